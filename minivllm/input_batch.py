"""Lesson 9. The runner's memory: one persistent row per resident request, updated by differences.

Owns the rows (tokens, block table, lengths, sampling parameters) and turns "request r computes k tokens" into the flat
arrays of a step. Host arrays only: what reaches the device is decided in model_runner.py. Never reads a `Request`: all it
knows came through `SchedulerOutput`, as it would if the scheduler lived in another process.

    row   token_ids            num_computed   this step    flat batch
    0     [5, 8, 2, 9]         3              1            [9 | 4, 4, 7]      decodes first
    2     [4, 4, 7]            0              3

vLLM keeps such rows on the GPU (vllm/v1/worker/gpu/, model runner V2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minivllm.sampling_params import SamplingParams
from minivllm.scheduler_output import NewRequestData, SchedulerOutput

NULL_BLOCK = 0


@dataclass
class RowRequest:
    """What a row holds beside its arrays: fixed for as long as the request is resident."""

    request_id: str
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    eos_token_ids: tuple[int, ...]
    bad_words_token_ids: list[list[int]]
    admission: int  # how many rows had been given out before: no two residencies have the same number


@dataclass
class StepInputs:
    """One step as flat host arrays: T tokens of B requests, decodes first."""

    request_ids: list[str]
    rows: np.ndarray  # (B,) the row of each request
    query_lens: np.ndarray  # (B,)
    seq_lens: np.ndarray  # (B,) context length once this step has written
    token_ids: np.ndarray  # (T,)
    positions: np.ndarray  # (T,)
    token_rows: np.ndarray  # (T,) which of the B requests a token belongs to
    num_decodes: int
    samples: np.ndarray  # (B,) bool: this step reaches the request's newest token, so it gets a next one

    @property
    def is_decode(self) -> bool:
        """Every request computes one token."""
        return self.num_decodes == len(self.rows)


class InputBatch:
    """Rows 0..max_num_seqs-1. `num_computed` positions of a row have KV; `num_tokens` are known."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        max_blocks = -(-max_model_len // block_size)
        # zeros are handed out lazily by the operating system: an unused row costs no memory
        self.token_ids = np.zeros((max_num_seqs, max_model_len), dtype=np.int64)
        self.block_table = np.full((max_num_seqs, max_blocks), NULL_BLOCK, dtype=np.int32)
        self.num_blocks = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_computed = np.zeros(max_num_seqs, dtype=np.int64)
        self.requests: list[RowRequest | None] = [None] * max_num_seqs
        self.row_of: dict[str, int] = {}
        self.free_rows = list(reversed(range(max_num_seqs)))
        self.block_size = block_size
        self.num_admissions = 0
        self.wants_prompt_logprobs: set[str] = set()

    def add(self, new: NewRequestData, bad_words_token_ids: list[list[int]]) -> None:
        """Give a request a row: first-time, or resumed with what it had sampled before it was preempted."""
        assert self.free_rows, "the scheduler keeps at most max_num_seqs requests resident"
        row = self.free_rows.pop()
        self.row_of[new.request_id] = row
        self.requests[row] = RowRequest(new.request_id, new.num_prompt_tokens, new.sampling_params, new.seed, new.eos_token_ids,
                                        bad_words_token_ids, self.num_admissions)
        self.num_admissions += 1
        if new.sampling_params.prompt_logprobs is not None:
            self.wants_prompt_logprobs.add(new.request_id)
        self.token_ids[row, : len(new.token_ids)] = new.token_ids
        self.num_tokens[row] = len(new.token_ids)
        self.num_computed[row] = new.num_computed_tokens
        self.num_blocks[row] = 0
        self.append_blocks(new.request_id, new.block_ids)

    def remove(self, request_id: str) -> None:
        """Forget a finished or preempted request; one that never got a row is no error."""
        row = self.row_of.pop(request_id, None)
        self.wants_prompt_logprobs.discard(request_id)
        if row is not None:
            self.requests[row] = None
            self.block_table[row, : self.num_blocks[row]] = NULL_BLOCK
            self.free_rows.append(row)

    def request(self, row: int) -> RowRequest:
        request = self.requests[row]
        assert request is not None, f"row {row} belongs to nobody"
        return request

    def append_blocks(self, request_id: str, block_ids: list[int]) -> None:
        row = self.row_of[request_id]
        start = self.num_blocks[row]
        self.block_table[row, start : start + len(block_ids)] = block_ids
        self.num_blocks[row] += len(block_ids)

    def append_tokens(self, rows: np.ndarray, token_ids: np.ndarray) -> None:
        """One sampled token for each of these rows."""
        self.token_ids[rows, self.num_tokens[rows]] = token_ids
        self.num_tokens[rows] += 1

    def prepare(self, output: SchedulerOutput) -> StepInputs:
        """The flat arrays of this step. `num_computed` advances here, as it has in the scheduler."""
        scheduled = output.num_scheduled_tokens
        # Decodes first: attention reads their contexts in one gather. The order does not change any result.
        request_ids = sorted(scheduled, key=lambda request_id: scheduled[request_id] > 1)
        rows = np.fromiter((self.row_of[request_id] for request_id in request_ids), dtype=np.int64, count=len(request_ids))
        query_lens = np.fromiter((scheduled[request_id] for request_id in request_ids), dtype=np.int64, count=len(request_ids))
        computed = self.num_computed[rows]
        starts = np.cumsum(query_lens) - query_lens  # (B,) where each request's tokens begin in the flat batch
        token_rows = np.repeat(np.arange(len(rows)), query_lens)  # (T,)
        positions = np.arange(len(token_rows)) - np.repeat(starts - computed, query_lens)  # (T,)
        seq_lens = computed + query_lens
        self.num_computed[rows] = seq_lens
        return StepInputs(
            request_ids, rows, query_lens, seq_lens,
            token_ids=self.token_ids[rows[token_rows], positions],  # (T,) a copy
            positions=positions, token_rows=token_rows, num_decodes=int((query_lens == 1).sum()),
            samples=seq_lens == self.num_tokens[rows],
        )
