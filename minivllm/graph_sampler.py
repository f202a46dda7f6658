"""Lesson 14. The sampler that chat models ask for, as a CUDA graph: penalties, top_k, top_p and min_p in few passes.

Owns the form of `sampler.py` that a GPU likes. Qwen2.5's generation_config has a repetition penalty, a top_k of 20 and a top_p of
0.8, so this is how real checkpoints sample. `sampler.py` takes some fifty operations to it, of which most read all logits. Here

    the history      counts once: 1 for a token of the output, a trifle for one of the prompt
    the largest      are found in the 64 parts of the vocabulary whose largest logits are the largest
    top_k, top_p     look at these 64 alone, and with min_p become one threshold a row, so the last pass is `draw`

Tokens are those of `sample`, bit for bit: ties at the threshold stay, and sums are sums of integers. What is asked for lies in the
rows (`RowTensors.cuts`), so nothing is built when the batch changes. Masks of tokens, a top_k above 64 and a top_p without any
top_k (which has to put the whole vocabulary in order) are left to `sample`.

vLLM: vllm/v1/sample/ops/topk_topp_sampler.py sorts all logits, or leaves it to FlashInfer or to a Triton kernel of its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from minivllm.compiled_model import OneAndMany
from minivllm.cuda_graphs import DecodeGraphs, bucket_of, bucket_sizes, record
from minivllm.input_batch import RowTensors
from minivllm.sampler import NEVER, PART, draw, output_penalties, repetition_penalty
from minivllm.sampling_metadata import MOST_TOP_K

FAINT = 2.0**-20  # what a prompt's token counts: a million of them are not yet one of the output


class SamplerGraphs:
    """What is drawn behind a decode graph in place of its own plain token, one graph for each bucket of these."""

    def __init__(self, decodes: DecodeGraphs) -> None:
        self.decodes = decodes
        self.sample_by_cuts: Any = OneAndMany(sample_by_cuts) if decodes.use_compile else lambda _, *args: sample_by_cuts(*args)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.results: dict[int, Tensor] = {}

    def capture(self) -> float:
        """Compile and record every bucket, once the decodes are. Returns the seconds that recording took."""
        self.graphs, self.results, seconds = record(self.compute, bucket_sizes(self.decodes.max_num_seqs))
        return seconds

    def compute(self, size: int) -> Tensor:
        """Token ids (B,) of the step that the bucket of this size has just computed."""
        index = self.decodes.index[:size]
        return self.sample(self.decodes.results[size][0], index, torch.zeros_like(index))

    def sample(self, logits: Tensor, index: Tensor, back: Tensor) -> Tensor:
        """A token (R,) for each of the logits (R, V) of the rows in `index` (R,), for a step of any kind. Behind guesses a row
        comes several times: then each token stands `back` (R,) int64 before the step's last.
        """
        count = len(index)
        if count == 1:  # torch.compile would make something of its own of one row: so it comes twice
            logits, index, back = logits.repeat(2, 1), index.repeat(2), back.repeat(2)
        return self.sample_by_cuts(len(index), logits, self.decodes.rows, index, back)[:count]

    def run(self, num_requests: int) -> Tensor:
        """Token ids (B,) of the decode step that was launched last. Valid until the next run."""
        size = bucket_of(num_requests, self.decodes.max_num_seqs)
        if self.decodes.use_graphs:
            self.graphs[size].replay()
        else:
            self.results[size] = self.compute(size)
        return self.results[size][:num_requests]


def sample_by_cuts(logits: Tensor, rows: RowTensors, index: Tensor, back: Tensor) -> Tensor:
    """A token (R,) for each of the logits (R, V), as the rows in `index` (R,) ask for; it is written where it stands in its row.

    That is `back` (R,) before the row's position. A row's guesses stand in it already, and count as far as they lie before.
    """
    positions, temperature = rows.positions[index].long() - back, rows.temperature[index][:, None]
    cuts = rows.cuts[:, index, None]  # (number of cuts, R, 1)
    logits = penalize(logits.float(), rows.token_ids[index], positions, cuts)
    ordered = largest_by_parts(logits, MOST_TOP_K)  # (R, 64), descending
    is_greedy = temperature == 0
    temperature, largest = temperature.masked_fill(is_greedy, 1), ordered[:, :1]
    logits, ordered = (logits - largest) / temperature, (ordered - largest) / temperature
    logits = logits.masked_fill(logits < threshold(logits, ordered, cuts), NEVER)
    token_ids = draw(logits, rows.seeds[index], positions, 1.0 - is_greedy.float())
    rows.token_ids[index, positions] = token_ids.int()
    return token_ids


def penalize(logits: Tensor, token_ids: Tensor, positions: Tensor, cuts: Tensor) -> Tensor:
    """`apply_penalties` for logits (R, V) behind token_ids (R, L), of which those before `positions` (R,) are known."""
    *_, repetition, presence, frequency, prompt_lens = cuts[..., 0]  # (R,) each
    columns = torch.arange(token_ids.shape[1], device=token_ids.device)
    is_known = columns < positions[:, None]  # (R, L)
    weights = torch.where(columns < prompt_lens[:, None], FAINT, 1.0) * is_known
    # Unknown tokens add nothing, each to a number of its own: all to the same one, they would wait for each other.
    where = torch.where(is_known, token_ids, columns % logits.shape[1]).long()
    counts = torch.zeros_like(logits).scatter_add_(1, where, weights)
    logits = repetition_penalty(logits, counts > 0, repetition)
    return output_penalties(logits, counts.floor(), presence, frequency)


def largest_by_parts(logits: Tensor, num: int) -> Tensor:
    """The `num` largest of each row of logits (R, V), in descending order.

    At most `num` parts hold any of them, and these have the largest maxima. Of parts that tie any will do: values count, not ids.
    """
    parts = logits.unflatten(-1, (-1, math.gcd(logits.shape[-1], PART)))  # (R, P, size)
    _, chosen = parts.amax(dim=-1).topk(min(num, parts.shape[1]))  # (R, at most num)
    candidates = parts.gather(1, chosen[..., None].expand(-1, -1, parts.shape[2])).flatten(1)
    return candidates.topk(min(num, candidates.shape[1])).values


def weigh(logits: Tensor) -> Tensor:
    """`token_weights` where each row's largest logit is 0."""
    return (logits.exp() * 2.0**40).long()


def threshold(logits: Tensor, ordered: Tensor, cuts: Tensor) -> Tensor:
    """(R, 1): what no logit (R, V) may be below by top_k, top_p and min_p, one after the other. The largest logit is 0.

    `ordered` (R, at most 64) are the largest. A row with a top_p has a top_k, so it keeps none of the others but for ties.
    """
    top_k, top_p, min_p = cuts[:3]  # (R, 1) each
    last = (top_k.long() - 1).clamp(0, ordered.shape[1] - 1)
    kth = ordered.gather(1, last).masked_fill(top_k == 0, NEVER)
    ordered = ordered.masked_fill(ordered < kth, NEVER)
    weights, total = weigh(ordered), weigh(logits.masked_fill(logits < kth, NEVER)).sum(dim=1, keepdim=True)
    # A token stays if those that are likelier sum to less than top_p; the likeliest stays in any case.
    is_kept = ((weights.cumsum(dim=1) - weights).double() < top_p.double() * total) | (ordered == 0)
    smallest = ordered.masked_fill(~is_kept, float("inf")).amin(dim=1, keepdim=True).masked_fill(top_p >= 1, NEVER)
    return torch.maximum(torch.maximum(kth, smallest), min_p.log())
