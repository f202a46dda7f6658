"""Lesson 9. The runner's memory: one row per resident request, updated by differences.

Owns which request has which row, on the host (`InputBatch`), and what a row holds, on the device (`RowTensors`): its tokens,
its block table, how far it is. A sampled token goes from the sampler into its row without passing the host, which only counts
it: so a step can be launched before the host has read what the step before has sampled. Never reads a `Request`: all it knows
came through `SchedulerOutput`, as it would if the scheduler lived in another process.

    row   token_ids            num_computed   this step    flat batch
    0     [5, 8, 2, 9]         3              1            [9 | 4, 4, 7]      decodes first
    2     [4, 4, 7]            0              3

vLLM: vllm/v1/worker/gpu/states.py and block_table.py (model runner V2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minivllm.attention import NULL_BLOCK
from minivllm.sampler import seed_keys
from minivllm.sampling_metadata import NO_PENALTIES
from minivllm.sampling_params import SamplingParams
from minivllm.scheduler_output import NewRequestData, SchedulerOutput

NO_CUTS = (0.0, 1.0, 0.0)  # top_k, top_p, min_p: nothing is cut off
MOST_TOP_K = 64  # what is put in order where a graph samples (graph_sampler.py)
TINY_TEMPERATURE = 0.05  # below it a float32 of logit / temperature has no digits left for the noise
WISHES = ("more than a temperature", "a nucleus", "masks", "everything", "prompt_logprobs")


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """One copy to the device. From pinned memory, which torch hands out anew only when the copy is done, so that no later
    step can overwrite what is still being read.
    """
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class RowTensors:
    """Rows 0..num_rows-1, and one more that belongs to nobody: padded requests of a CUDA graph stand there."""

    def __init__(self, num_rows: int, max_model_len: int, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.padding_row = num_rows
        self.device = device
        max_blocks = -(-max_model_len // block_size)
        integers = {"dtype": torch.int32, "device": device}
        self.token_ids = torch.zeros(num_rows + 1, max_model_len, **integers)  # type: ignore[call-overload]
        self.block_table = torch.full((num_rows + 1, max_blocks), NULL_BLOCK, **integers)  # type: ignore[call-overload]
        self.positions = torch.zeros(num_rows + 1, **integers)  # type: ignore[call-overload] # the next one to compute
        self.temperature = torch.zeros(num_rows + 1, device=device)
        self.seed_keys = torch.zeros(num_rows + 1, 2, **integers)  # type: ignore[call-overload]
        # top_k (0 = off), top_p, min_p; repetition, presence and frequency penalty, and how many tokens are the prompt's
        neutral = torch.tensor([*NO_CUTS, *NO_PENALTIES, 0.0], device=device)
        self.cuts = neutral[:, None].repeat(1, num_rows + 1)  # (7, num_rows + 1)
        # where in its request each block stands: the same number for all who share it
        self.block_index = torch.zeros(num_blocks, **integers)  # type: ignore[call-overload]

    def write_tokens(self, rows: Sequence[int], starts: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Put `tokens[i]` into row `rows[i]`, from column `starts[i]` on: one upload, one kernel."""
        where = upload(_cells(rows, starts, tokens), self.device)
        self.token_ids[where[0], where[1]] = where[2].int()

    def write_blocks(self, rows: Sequence[int], starts: Sequence[int], block_ids: Sequence[Sequence[int]]) -> None:
        """Lengthen block tables, likewise."""
        where = upload(_cells(rows, starts, block_ids), self.device)
        self.block_table[where[0], where[1]] = where[2].int()
        self.block_index[where[2]] = where[1].int()

    def start_rows(self, rows: Sequence[int], new: Sequence[NewRequestData]) -> None:
        """What a row starts with beside tokens and blocks: one upload, with numbers as the bits of 64."""
        keys = seed_keys(torch.tensor([one.seed for one in new])).T  # (2, n)
        integers = np.stack((np.array(rows), [one.num_computed_tokens for one in new], *keys.numpy()))
        numbers = np.array([[one.sampling_params.temperature, *row_cuts(one)] for one in new], np.float64).T  # (8, n)
        where = upload(np.concatenate((integers, numbers.view(np.int64))), self.device)
        row, cuts = where[0], where[4:].view(torch.float64).float()
        self.positions[row], self.seed_keys[row] = where[1].int(), where[2:4].int().T
        self.temperature[row], self.cuts[:, row] = cuts[0], cuts[1:]


def row_cuts(new: NewRequestData) -> list[float]:
    """What `RowTensors.cuts` holds of a request. A greedy one cuts nothing off; a top_k that no graph looks at is just large."""
    params = new.sampling_params
    cuts = NO_CUTS if params.is_greedy else (min(max(params.top_k, 0), MOST_TOP_K + 1), params.top_p, params.min_p)
    return [*cuts, params.repetition_penalty, params.presence_penalty, params.frequency_penalty, new.num_prompt_tokens]


def wishes_of(params: SamplingParams) -> list[str]:
    """What a request asks for that costs its batch something, of `WISHES`. A greedy one cuts nothing off.

    A nucleus is a top_p of all tokens, with no top_k before it; masks are lists of tokens that may not come. Everything is what
    `sample` alone knows: a table of biases, a top_k that is not small, a temperature that is tiny.
    """
    draws = not params.is_greedy
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != NO_PENALTIES
    cuts = draws and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
    masks = params.allowed_token_ids is not None or bool(params.bad_words) or params.min_tokens > 0
    everything = bool(params.logit_bias) or (draws and (params.top_k > MOST_TOP_K or params.temperature < TINY_TEMPERATURE))
    asked = (penalties or cuts or masks or everything, draws and params.top_p < 1 and params.top_k <= 0, masks, everything,
             params.prompt_logprobs is not None)
    return [wish for wish, is_wanted in zip(WISHES, asked) if is_wanted]


def _cells(rows: Sequence[int], starts: Sequence[int], values: Sequence[Sequence[int]]) -> np.ndarray:
    """(3, n) int64: row, column and value of every entry."""
    lengths = [len(one) for one in values]
    columns = [np.arange(start, start + length) for start, length in zip(starts, lengths)]
    return np.stack([np.repeat(rows, lengths), np.concatenate(columns), np.concatenate([np.asarray(one) for one in values])])


@dataclass
class RowRequest:
    """What a row holds beside its tensors: fixed for as long as the request is resident."""

    request_id: str
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    eos_token_ids: tuple[int, ...]
    bad_words_token_ids: list[list[int]]
    admission: int  # how many rows had been given out before: no two residencies have the same number


@dataclass
class StepInputs:
    """One step as host arrays: T tokens of B requests, decodes first."""

    rows: np.ndarray  # (B,) the row of each request
    query_lens: np.ndarray  # (B,)
    seq_lens: np.ndarray  # (B,) context length once this step has written
    token_rows: np.ndarray  # (T,) the row that a token belongs to
    positions: np.ndarray  # (T,)
    num_decodes: int
    samples: np.ndarray  # (B,) bool: this step reaches the request's newest token, so it gets a next one
    num_drafts: np.ndarray  # (B,) how many of its tokens are guesses: it samples behind each of them as well

    @property
    def is_decode(self) -> bool:
        """Every request computes one token and gets the next one."""
        return self.num_decodes == len(self.rows) and bool(self.samples.all())

    @property
    def sampling_tokens(self) -> np.ndarray:
        """Which of the T tokens get a next one (R,): of each request that samples its newest known token and its guesses."""
        counts = 1 + self.num_drafts[self.samples]
        firsts = np.cumsum(self.query_lens)[self.samples] - counts
        return np.arange(counts.sum()) + np.repeat(firsts - (np.cumsum(counts) - counts), counts)


class InputBatch:
    """Who has which row. `num_computed` positions of a row have KV; `num_tokens` exist, though the newest may be known to the
    device alone. len(row_of) + len(free_rows) == max_num_seqs.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self.num_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_computed = np.zeros(max_num_seqs, dtype=np.int64)
        self.requests: list[RowRequest | None] = [None] * max_num_seqs
        self.row_of: dict[str, int] = {}
        self.free_rows = list(reversed(range(max_num_seqs)))  # taken from the right: row 0 first
        self.num_admissions = 0
        self.wants = {wish: set[str]() for wish in WISHES}  # whose it is, of the resident requests

    def add(self, new: NewRequestData, bad_words_token_ids: list[list[int]]) -> int:
        """Give a request a row: first-time, or resumed with what it had sampled before it was preempted."""
        assert self.free_rows, "the scheduler keeps at most max_num_seqs requests resident"
        row = self.free_rows.pop()
        self.row_of[new.request_id] = row
        self.requests[row] = RowRequest(new.request_id, new.num_prompt_tokens, new.sampling_params, new.seed, new.eos_token_ids,
                                        bad_words_token_ids, self.num_admissions)
        self.num_admissions += 1
        for wish in wishes_of(new.sampling_params):
            self.wants[wish].add(new.request_id)
        self.num_tokens[row] = len(new.token_ids)
        self.num_computed[row] = new.num_computed_tokens
        self.num_blocks[row] = 0
        return row

    def remove(self, request_id: str) -> None:
        """Forget a finished or preempted request; one that never got a row is no error. What its row held is not read again."""
        row = self.row_of.pop(request_id, None)
        for whose in self.wants.values():
            whose.discard(request_id)
        if row is not None:
            self.requests[row] = None
            self.free_rows.append(row)

    def rewind(self, rows: Sequence[int], num_computed: Sequence[int], num_tokens: Sequence[int], block_size: int) -> None:
        """Forget the guesses that were wrong, their positions, and the blocks that only they needed."""
        self.num_computed[rows], self.num_tokens[rows] = num_computed, num_tokens
        self.num_blocks[rows] = -(-np.asarray(num_computed) // block_size)

    def request(self, row: int) -> RowRequest:
        request = self.requests[row]
        assert request is not None, f"row {row} belongs to nobody"
        return request

    def prepare(self, output: SchedulerOutput) -> StepInputs:
        """The flat arrays of this step. `num_computed` advances here, as it has in the scheduler."""
        scheduled, drafts = output.num_scheduled_tokens, output.scheduled_spec_decode_tokens
        rows = np.fromiter((self.row_of[request_id] for request_id in scheduled), dtype=np.int64, count=len(scheduled))
        query_lens = np.fromiter(scheduled.values(), dtype=np.int64, count=len(scheduled))
        num_drafts = np.array([len(drafts.get(name, ())) for name in scheduled] if drafts else [0] * len(scheduled), dtype=np.int64)
        # Decodes first: attention reads their contexts in one kernel. Of them the longest first: it begins with those, and the
        # short ones fill the gaps at its end. The order does not change any result.
        order = np.lexsort((-self.num_computed[rows], query_lens > 1))
        rows, query_lens, num_drafts = rows[order], query_lens[order], num_drafts[order]
        computed = self.num_computed[rows]
        starts = np.cumsum(query_lens) - query_lens  # (B,) where each request's tokens begin in the flat batch
        seq_lens = computed + query_lens
        self.num_computed[rows] = seq_lens
        return StepInputs(
            rows, query_lens, seq_lens, token_rows=np.repeat(rows, query_lens),
            positions=np.arange(query_lens.sum()) - np.repeat(starts - computed, query_lens),  # (T,)
            num_decodes=int((query_lens == 1).sum()), samples=seq_lens == self.num_tokens[rows] + num_drafts, num_drafts=num_drafts,
        )
