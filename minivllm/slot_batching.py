"""Lesson 6. Continuous batching: a request leaves its row when it ends, and another one joins at the very next step.

Owns the queue, the rows and their loop, on lesson 2's dense cache: a row is reserved for one request at its longest. Never
shares memory between rows and never preempts: those need blocks (lesson 7) and a budget (lesson 9).

    step       1  2  3  4  5  6         static batches of two:     1  2  3  4  5  6  7  8
    row 0      A  A  C  C  C  C                                    A  A  .  .  C  C  C  C
    row 1      B  B  B  B  D  D                                    B  B  B  B  D  D  .  .
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from minivllm.dense_cache import DenseCache
from minivllm.generate import GenerationStats, as_limits, dense_caches, dense_step, is_done
from minivllm.model import Qwen2ForCausalLM


@dataclass
class SlotRequest:
    """One prompt on its way; its tokens are the prompt's, then the output's. Lesson 9's `Request` is the same idea, grown up."""

    prompt: list[int]
    limit: int
    eos_token_ids: Collection[int] = ()
    output: list[int] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return is_done(self.output, self.limit, self.eos_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)


class SlotScheduler:
    """Who sits in which row. A request is waiting, in exactly one row, or finished.

    A decode pass costs the same for one row as for all, so a free row while somebody waits is work thrown away.
    """

    def __init__(self, requests: Sequence[SlotRequest], num_rows: int) -> None:
        self.waiting = deque(request for request in requests if not request.is_finished)
        self.rows: list[SlotRequest | None] = [None] * num_rows

    def schedule(self) -> list[int]:
        """Empty the rows of finished requests, seat waiting ones in the free rows, and return the rows that were seated.

        First come, first seated, in the lowest free row. Called once at the start of every step.
        """
        seated = []
        for row, request in enumerate(self.rows):
            if request is not None and request.is_finished:
                self.rows[row] = None
            if self.rows[row] is None and self.waiting:
                self.rows[row] = self.waiting.popleft()
                seated.append(row)
        return seated

    @property
    def running(self) -> dict[int, SlotRequest]:
        """The rows that are taken, and by whom."""
        return {row: request for row, request in enumerate(self.rows) if request is not None}


@torch.inference_mode()
def greedy_continuous(
    model: Qwen2ForCausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int],
    eos_token_ids: Collection[int] = (), stats: GenerationStats | None = None, num_rows: int = 8,
) -> list[list[int]]:
    """All prompts over `num_rows` rows, a new token for every running request in every step; outputs in the prompts' order."""
    stats = stats or GenerationStats()
    limits = as_limits(max_new_tokens, len(prompts))
    requests = [SlotRequest(list(prompt), limit, eos_token_ids) for prompt, limit in zip(prompts, limits, strict=True)]
    caches = dense_caches(model, num_rows, max(len(r.prompt) + r.limit for r in requests))
    scheduler = SlotScheduler(requests, num_rows)
    num_before = 0
    while True:
        seated = scheduler.schedule()
        running = scheduler.running
        if not running:
            return [request.output for request in requests]
        stats.steps += 1
        # A batch kept tight, without rows of its own, would be copied whole whenever somebody joins or leaves.
        if seated or len(running) != num_before:
            stats.kv_slots_repacked += len(running) * max(request.num_tokens for request in running.values())
        num_before = len(running)
        # Decodes before prefills: the pass over all rows leaves garbage in column 0 of rows that are free or newly seated.
        decode(model, caches, {row: request for row, request in running.items() if row not in seated}, stats)
        for row in seated:
            prefill(model, caches, row, running[row], stats)


def decode(model: Qwen2ForCausalLM, caches: list[DenseCache], running: dict[int, SlotRequest], stats: GenerationStats) -> None:
    """The newest token of each request, in one pass over all rows: an idle one computes token 0 in column 0, for nobody.

    Leaving idle rows out would copy the others' keys and values next to each other, at every step.
    """
    if not running:
        return
    num_rows, device = len(caches[0].keys), model.lm_head.weight.device
    ids, positions = torch.zeros(2, num_rows, 1, dtype=torch.int64, device=device)  # (B, 1) each
    for row, request in running.items():
        ids[row], positions[row] = request.output[-1], request.num_tokens - 1
    first = torch.zeros_like(ids[:, 0])  # (B,)
    next_ids = dense_step(model, caches, ids, positions, first, stats, num_useful=len(running))  # (B,)
    for row, request in running.items():
        request.output.append(int(next_ids[row]))


def prefill(model: Qwen2ForCausalLM, caches: list[DenseCache], row: int, request: SlotRequest, stats: GenerationStats) -> None:
    """The whole prompt of a request that was just seated, alone in its row, over whatever the row's last owner left.

    What lies beyond the prompt needs no clearing: a column is shown by the mask only after its new owner has written it. The
    other rows wait meanwhile; lesson 10 ends that.
    """
    ids = torch.tensor([request.prompt], device=model.lm_head.weight.device)  # (1, Tq)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, Tq)
    next_ids = dense_step(model, caches, ids, positions, positions[:, 0], stats, num_useful=ids.numel(), first_row=row)  # (1,)
    request.output.append(int(next_ids))
