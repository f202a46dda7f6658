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

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivllm.attention import NULL_BLOCK
from minivllm.mailbox import Mailbox
from minivllm.sampler import seed_keys
from minivllm.sampling_metadata import NO_PENALTIES
from minivllm.sampling_params import SamplingParams
from minivllm.scheduler_output import NewRequestData, SchedulerOutput
from minivllm.transfers import upload

NO_CUTS = (0.0, 1.0, 0.0)  # top_k, top_p, min_p: nothing is cut off
MOST_TOP_K = 64  # what is put in order where a graph samples (graph_sampler.py)
TINY_TEMPERATURE = 0.05  # below it a float32 of logit / temperature has no digits left for the noise
MOST_NEW_BLOCKS = 64  # that one step zeroes by a graph
FLOATS = ("temperature", "cuts")  # fields of numbers with a fraction; all others are integers
ALIGNMENT = 64  # numbers: torch.compile copies what does not begin at a multiple of 16 bytes
WISHES = ("more than a temperature", "a nucleus", "masks", "everything", "prompt_logprobs", "logprobs")


class RowTensors:
    """Rows 0..num_rows-1, and one more that belongs to nobody: padded requests of a CUDA graph stand there.

    All of it is one tensor of numbers of 4 bytes, and each field a stretch of it. What a step changes is noted first, in whatever
    fields, and written by one upload and one kernel: before the first of its kernels runs the GPU has nothing to do but wait.

        numbers    [ token_ids ... | block_table ... | positions . | temperature . | ... ]
    """

    token_ids: Tensor  # (rows, max_model_len) int32
    block_table: Tensor  # (rows, max_blocks) int32
    positions: Tensor  # (rows,) int32  the next one to compute
    temperature: Tensor  # (rows,) float32
    seed_keys: Tensor  # (rows, 2) int32
    # top_k (0 = off), top_p, min_p; repetition, presence and frequency penalty, and how many tokens are the prompt's
    cuts: Tensor  # (7, rows) float32
    block_index: Tensor  # (num_blocks,) int32  where in its request each block stands: the same number for all who share it
    block_ids_to_zero: Tensor  # (MOST_NEW_BLOCKS,) int32  what this step hands out, and null blocks (`NewBlocks`)

    def __init__(self, num_rows: int, max_model_len: int, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.padding_row, self.device = num_rows, device
        rows, neutral = num_rows + 1, [*NO_CUTS, *NO_PENALTIES, 0.0]
        fields = {"token_ids": (rows, max_model_len), "block_table": (rows, -(-max_model_len // block_size)), "positions": (rows,),
                  "temperature": (rows,), "seed_keys": (rows, 2), "cuts": (len(neutral), rows), "block_index": (num_blocks,),
                  "block_ids_to_zero": (MOST_NEW_BLOCKS,)}
        sizes = [-(-math.prod(shape) // ALIGNMENT) * ALIGNMENT for shape in fields.values()]
        self.numbers = torch.full((sum(sizes),), NULL_BLOCK, dtype=torch.int32, device=device)  # which is 0
        self.starts = dict(zip(fields, itertools.accumulate(sizes, initial=0)))
        for name, shape in fields.items():
            field = self.numbers[self.starts[name] :][: math.prod(shape)].view(shape)
            # As a tensor of its own: torch.compile would want to know of every kernel that writes one what the others see of it.
            setattr(self, name, torch.from_dlpack(field.view(torch.float32) if name in FLOATS else field))
        self.cuts.copy_(torch.tensor(neutral)[:, None])
        self.mailbox = Mailbox(rows, device)
        self.noted: list[tuple[np.ndarray, np.ndarray]] = []  # where in `numbers`, and what (its bits)
        self.moved: dict[int, int] = {}  # the newest position of rows whose positions change

    def note(self, field: str, where: np.ndarray, values: Any) -> None:
        """Let the numbers `where` (n,) of a field, counted flat, be `values` (n,) from the next `flush` on. Nothing twice."""
        bits = np.asarray(values, np.float32 if field in FLOATS else np.int32).view(np.int32)
        self.noted.append((self.starts[field] + where.ravel(), bits.ravel()))

    @contextmanager
    def flushed(self) -> Iterator[None]:
        """What is noted within is written at its end, also if that fails: the next step is told what has changed since."""
        try:
            yield
        finally:
            self.flush()

    def flush(self) -> None:
        """Write all that was noted: indices as 8 bytes each, behind them the values as 4."""
        if self.moved:
            self.note("positions", np.fromiter(self.moved, np.int64), list(self.moved.values()))
            self.moved = {}
        if not self.noted:
            return
        where, values = (np.concatenate(arrays) for arrays in zip(*self.noted))
        self.noted, count = [], len(where)
        packed = np.empty(count + -(-count // 2), np.int64)
        packed[:count], packed[count:].view(np.int32)[:count] = where, values
        sent = upload(packed, self.device)
        self.numbers[sent[:count]] = sent[count:].view(torch.int32)[:count]

    def write_tokens(self, rows: Sequence[int], starts: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Note `tokens[i]` for row `rows[i]`, from column `starts[i]` on."""
        where, _, values = _cells(rows, starts, tokens, self.token_ids.shape[1])
        self.note("token_ids", where, values)

    def write_blocks(self, rows: Sequence[int], starts: Sequence[int], block_ids: Sequence[Sequence[int]]) -> None:
        """Note longer block tables, likewise."""
        where, column, values = _cells(rows, starts, block_ids, self.block_table.shape[1])
        self.note("block_table", where, values)
        self.note("block_index", values, column)  # who shares a block has it at the same index

    def write_positions(self, rows: np.ndarray, positions: np.ndarray) -> None:
        """Note which position each row computes next. A row may come again before the next flush: the last one counts."""
        self.moved.update(zip(rows.tolist(), positions.tolist()))

    def start_rows(self, rows: Sequence[int], new: Sequence[NewRequestData]) -> None:
        """Note what a row starts with beside tokens and blocks."""
        row, keys = np.array(rows), seed_keys(torch.tensor([one.seed for one in new])).numpy()  # (n, 2)
        self.write_positions(row, np.array([one.num_computed_tokens for one in new]))
        self.note("seed_keys", row[:, None] * 2 + np.arange(2), keys)
        self.note("temperature", row, [one.sampling_params.temperature for one in new])
        cuts = np.array([row_cuts(one) for one in new], np.float32)  # (n, 7)
        self.note("cuts", np.arange(cuts.shape[1]) * (self.padding_row + 1) + row[:, None], cuts)


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
             params.prompt_logprobs is not None, params.logprobs is not None)
    return [wish for wish, is_wanted in zip(WISHES, asked) if is_wanted]


def _cells(rows: Sequence[int], starts: Sequence[int], values: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, ...]:
    """(n,) int64 each: where every entry stands in rows of this width, counted flat, its column and its value."""
    lengths = [len(one) for one in values]
    column = np.concatenate([np.arange(start, start + length) for start, length in zip(starts, lengths)])
    assert (column < width).all(), f"a row has {width} columns: what does not fit would be the next row's"
    return np.repeat(rows, lengths) * width + column, column, np.concatenate([np.asarray(one, np.int64) for one in values])


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
        self.names = [""] * max_num_seqs  # of these
        self.row_of: dict[str, int] = {}
        self.free_rows = list(reversed(range(max_num_seqs)))  # taken from the right: row 0 first
        self.num_admissions = 0
        self.wants = {wish: set[str]() for wish in WISHES}  # whose it is, of the resident requests
        self.last: tuple[dict[str, int], StepInputs] | None = None  # a step of decodes alone, until somebody comes or goes

    def add(self, new: NewRequestData, bad_words_token_ids: list[list[int]]) -> int:
        """Give a request a row: first-time, or resumed with what it had sampled before it was preempted."""
        assert self.free_rows, "the scheduler keeps at most max_num_seqs requests resident"
        row = self.free_rows.pop()
        self.row_of[new.request_id] = row
        self.requests[row] = RowRequest(new.request_id, new.num_prompt_tokens, new.sampling_params, new.seed, new.eos_token_ids,
                                        bad_words_token_ids, self.num_admissions)
        self.names[row], self.num_admissions = new.request_id, self.num_admissions + 1
        for wish in wishes_of(new.sampling_params):
            self.wants[wish].add(new.request_id)
        self.num_tokens[row] = len(new.token_ids)
        self.num_computed[row] = new.num_computed_tokens
        self.num_blocks[row] = 0
        self.last = None
        return row

    def remove(self, request_id: str) -> None:
        """Forget a finished or preempted request; one that never got a row is no error. What its row held is not read again."""
        row = self.row_of.pop(request_id, None)
        for whose in self.wants.values():
            whose.discard(request_id)
        if row is not None:
            self.requests[row] = self.last = None
            self.free_rows.append(row)

    def rewind(self, rows: Sequence[int], num_computed: Sequence[int], num_tokens: Sequence[int], block_size: int) -> None:
        """Forget the guesses that were wrong, their positions, and the blocks that only they needed."""
        self.num_computed[rows], self.num_tokens[rows] = num_computed, num_tokens
        self.num_blocks[rows] = -(-np.asarray(num_computed) // block_size)
        self.last = None

    def request(self, row: int) -> RowRequest:
        request = self.requests[row]
        assert request is not None, f"row {row} belongs to nobody"
        return request

    def names_of(self, rows: np.ndarray) -> list[str]:
        """The ids of the requests in these rows."""
        return list(map(self.names.__getitem__, rows.tolist()))

    def prepare(self, output: SchedulerOutput) -> StepInputs:
        """The flat arrays of this step. `num_computed` advances here, as it has in the scheduler."""
        scheduled, drafts = output.num_scheduled_tokens, output.scheduled_spec_decode_tokens
        if self.last is not None and not drafts and scheduled == self.last[0]:
            return self.one_further(*self.last)
        rows = np.fromiter(map(self.row_of.__getitem__, scheduled), dtype=np.int64, count=len(scheduled))
        query_lens = np.fromiter(scheduled.values(), dtype=np.int64, count=len(scheduled))
        num_drafts = np.zeros_like(rows) if not drafts else np.array([len(drafts.get(name, ())) for name in scheduled])
        # Decodes first: attention reads their contexts in one kernel. Of them the longest first: it begins with those, and the
        # short ones fill the gaps at its end. Prompts likewise, so the next step has the order of this one. No result changes.
        order = np.lexsort((-self.num_computed[rows] - query_lens, query_lens > 1))
        rows, query_lens, num_drafts = rows[order], query_lens[order], num_drafts[order]
        computed = self.num_computed[rows]
        starts = np.cumsum(query_lens) - query_lens  # (B,) where each request's tokens begin in the flat batch
        seq_lens = computed + query_lens
        self.num_computed[rows] = seq_lens
        positions = np.arange(query_lens.sum()) - np.repeat(starts - computed, query_lens)  # (T,)
        inputs = StepInputs(rows, query_lens, seq_lens, np.repeat(rows, query_lens), positions, int((query_lens == 1).sum()),
                            seq_lens == self.num_tokens[rows] + num_drafts, num_drafts)
        self.last = (scheduled, inputs) if inputs.num_decodes == len(rows) and not drafts else None
        return inputs

    def one_further(self, scheduled: dict[str, int], last: StepInputs) -> StepInputs:
        """The step after a step of decodes, if the same requests decode: most steps are like that, and need no more than this."""
        seq_lens = last.seq_lens + 1
        self.num_computed[last.rows] = seq_lens
        inputs = replace(last, seq_lens=seq_lens, positions=last.positions + 1, samples=seq_lens == self.num_tokens[last.rows])
        self.last = scheduled, inputs
        return inputs
