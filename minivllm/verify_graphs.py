"""Lesson 14. Verification as a CUDA graph: guesses are decodes at the next positions, and the device itself counts the right ones.

Owns the step in which every request decodes, some of them behind guesses (lesson 12), as a function of device memory, one graph
per bucket of requests. With k guesses each request has k + 1 queries, and each of these is a decode of its own: the same kernel,
the same table, one position further. Their K and V are written before anybody looks, so a query sees the guesses before it:

    k = 2      known       guesses     tokens in    at positions    written to          won
    row 3      ... 6 9     [4]         9  4  4      7  8  8         7  8  null block    4 8      if 4 and 8 are what it samples
    row 0      ... 2       []          2  2  2      5  5  5         5  null  null       1        its one query stands in for all

The host sends rows and guesses, and gets back how many tokens each request has won, and which. Rows move on by as many on the
device too. A context is read k + 1 times, once from memory if it fits into the GPU's cache; in return the kernel for decodes
serves as it is, only for more of them.
vLLM: its graphs of uniform decode length, vllm/v1/worker/gpu/cudagraph_utils.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm.async_output import AsyncOutput
from minivllm.attention import NULL_BLOCK, slot_mapping
from minivllm.cuda_graphs import DecodeGraphs, bucket_of, bucket_sizes, record
from minivllm.flex_attention import FlexMetadata, decode_metadata, ends
from minivllm.input_batch import RowTensors, StepInputs
from minivllm.sampler import sample_plain
from minivllm.scheduler_output import ModelOutput
from minivllm.transfers import upload, upload_into


def places(step: Tensor) -> Tensor:
    """How far behind its request's newest token each query stands, (B, k + 1) int32: 0, 1, 2, 2, 2 with two guesses and k = 4.

    `step` (B, 2 + k) int32 is what the host sends: for each request its row, its number of guesses, and these.
    """
    return torch.arange(step.shape[1] - 1, dtype=torch.int32, device=step.device).minimum(step[:, 1:2])


def read_guesses(rows: RowTensors, step: Tensor, block_size: int) -> tuple[Tensor, ...]:
    """Token, position and slot of every query (B * (k + 1),), the block table of each (B * (k + 1), blocks), `ends` of these.

    A query that stands in for another writes to the null block, as those of the padding row do.
    """
    index, place = step[:, 0].long(), places(step)
    first = rows.positions[index]  # (B,)
    newest = rows.token_ids[index, first.long()]
    input_ids = torch.cat((newest[:, None], step[:, 2:]), dim=1).gather(1, place.long())  # (B, k + 1)
    positions = first[:, None] + place
    slots = slot_mapping(rows.block_table, index[:, None], positions.long(), block_size)
    is_own = torch.arange(place.shape[1], device=step.device) == place
    slots = torch.where(is_own, slots, NULL_BLOCK * block_size)
    owner = index[:, None].expand(place.shape)
    positions, table = positions.flatten(), rows.block_table[owner.flatten()]
    return input_ids.flatten(), positions, slots.flatten(), table, *ends(positions, table, block_size)


def accept_into_rows(logits: Tensor, rows: RowTensors, step: Tensor) -> Tensor:
    """A plainly sampled token behind every query, from logits (B * (k + 1), V); rows get theirs, and move on behind the run of
    tokens that these accept. Returns (B, 2 + k): how many tokens that are, and all that were sampled.
    """
    index, place = step[:, 0].long(), places(step)
    owner = index[:, None].expand(place.shape)
    following = rows.positions[index].long()[:, None] + 1 + place  # (B, k + 1) where the sampled tokens will stand
    sampled = sample_plain(logits, rows.temperature[owner.flatten()], rows.seed_keys[owner.flatten()], following.flatten())
    sampled = sampled.view(place.shape).gather(1, place.long()).int()
    rows.token_ids[owner, following] = sampled
    guess = torch.arange(step.shape[1] - 2, dtype=torch.int32, device=step.device)
    is_right = (sampled[:, :-1] == step[:, 2:]) & (guess < step[:, 1:2])  # (B, k)
    num_tokens = torch.where(is_right, len(guess), guess).amin(1) + 1  # (B,) the first wrong one brings the last token
    rows.positions[index] = torch.where(index == rows.padding_row, 0, rows.positions[index] + num_tokens).int()
    return torch.cat((num_tokens[:, None].int(), sampled), dim=1)


class AcceptedRuns(AsyncOutput):
    """A step on its way whose accepted runs the device has found: `token_ids` (B, 2 + k) are what `accept_into_rows` returns."""

    def result(self) -> ModelOutput:
        """Wait for the device and read."""
        return ModelOutput({name: line[1 : 1 + line[0]] for name, line in zip(self.request_ids, self.wait_and_read())})


class VerifyGraphs(DecodeGraphs):
    """Captured verifications of up to `num_drafts` guesses a request. What `verify` returns stays valid until the next one.

    Results are hidden states and no logits: those of 256 requests with five queries each would take 1.8 GB in all buckets.
    """

    def __init__(self, decodes: DecodeGraphs, num_drafts: int) -> None:
        super().__init__(decodes.model, decodes.forward, decodes.kv_caches, decodes.rows, decodes.max_num_seqs,
                         use_graphs=decodes.use_graphs, use_compile=decodes.use_compile)
        self.num_drafts, self.compute_logits = num_drafts, decodes.compute_logits  # compiled once for both
        self.padding = np.zeros((self.max_num_seqs, 2 + num_drafts), dtype=np.int32)
        self.padding[:, 0] = self.rows.padding_row
        self.steps = torch.from_numpy(self.padding).to(self.rows.device, copy=True)
        self.read_guesses: Any = torch.compile(read_guesses, dynamic=True) if self.use_compile else read_guesses
        self.accept_into_rows: Any = torch.compile(accept_into_rows, dynamic=True) if self.use_compile else accept_into_rows

    def capture(self) -> float:
        """Compile and record every bucket. Returns the seconds that recording took. It has no head of its own."""
        self.graphs, self.results, seconds = record(self.compute, bucket_sizes(self.max_num_seqs))
        return seconds

    def fits(self, inputs: StepInputs) -> bool:
        """Whether every request of the step decodes, and nobody behind more guesses than there is room for."""
        return (bool(inputs.samples.all()) and np.array_equal(inputs.query_lens, 1 + inputs.num_drafts)
                and int(inputs.num_drafts.max()) <= self.num_drafts)

    def compute(self, size: int) -> tuple[Tensor, Tensor]:
        """One step of the first `size` lines of `steps`: hidden states (B * (k + 1), E), and the accepted runs (B, 2 + k)."""
        cache, config, step = self.kv_caches[0], self.model.config, self.steps[:size]
        torch._dynamo.mark_static(step, 1)
        input_ids, positions, slots, table, *last = self.read_guesses(self.rows, step, cache.block_size)
        group = config.num_attention_heads // config.num_key_value_heads
        decode = decode_metadata(last, table, cache.block_size, cache.key_cache.shape[1], group)
        num_queries = len(input_ids)
        hidden = self.forward(input_ids, positions, self.kv_caches, FlexMetadata(slots, decode, None, num_queries))
        logits = self.compute_logits(num_queries, self.model, hidden)  # (B * (k + 1), V)
        torch._dynamo.mark_static(logits, 1)
        return hidden, self.accept_into_rows(logits, self.rows, step)

    def verify(self, inputs: StepInputs, drafts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Hidden states of all queries of the bucket, and the accepted runs (B, 2 + k), of a step that `fits`.

        `drafts` are each request's guesses. Where a request asks for more than a temperature, the runs say nothing.
        """
        count = len(inputs.rows)
        size = bucket_of(count, self.max_num_seqs)
        step = self.padding[:size].copy()
        step[:count, 0], step[:count, 1] = inputs.rows, inputs.num_drafts
        is_guess = np.arange(self.num_drafts) < inputs.num_drafts[:, None]
        step[:count, 2:][is_guess] = np.fromiter(chain.from_iterable(drafts), dtype=np.int32, count=int(is_guess.sum()))
        upload_into(self.steps[:size], step)
        self.launch(size)
        hidden, runs = self.results[size]
        return hidden, runs[:count]

    def in_order(self, hidden: Tensor, inputs: StepInputs) -> Tensor:
        """Of the hidden states of a bucket those of the step's tokens (T, E), in their order."""
        first = np.arange(len(inputs.rows)) * (1 + self.num_drafts) - (inputs.seq_lens - inputs.query_lens)
        return hidden[upload(np.repeat(first, inputs.query_lens) + inputs.positions, self.rows.device)]
