"""The bytes that no engine can avoid for a workload, and the time that a machine needs to move them.

Owns an imaginary engine: every step gives each of its at most `max_num_seqs` requests all it can compute, reads each weight
once, and wastes nothing (`cost.bytes_moved`). Real engines chunk, pad and schedule, so all lie above the floor of their own number
of seats. It counts memory only: a workload that is mostly prefill is bound by arithmetic instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from minivllm import cost
from minivllm.bench.workload import BenchRequest
from minivllm.config import ModelConfig
from minivllm.cuda_graphs import next_stream

COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}  # far more than any cache holds
NUM_COPIES = 8


def least_bytes(config: ModelConfig, requests: Sequence[BenchRequest], dtype_bytes: int, max_num_seqs: int) -> int:
    """Bytes of the workload's fewest and leanest steps. No prefix is shared: a hit would save arithmetic, hardly bytes."""
    waiting = list(reversed(requests))
    running: list[list[int]] = []  # [tokens of this step, context, answers still to come]
    moved = 0
    while waiting or running:
        while waiting and len(running) < max_num_seqs:
            request = waiting.pop()
            length = len(request.prompt_token_ids)
            running.append([length, length, request.max_tokens])
        moved += cost.bytes_moved(config, [row[0] for row in running], [row[1] for row in running], dtype_bytes)
        running = [[1, context + 1, left - 1] for _, context, left in running if left > 1]
    return moved


def measure_bandwidth(device: torch.device, clock: Callable[[], float]) -> float:
    """Bytes a second of a large copy, read and written, the best of several: what `--bandwidth` replaces."""
    source = torch.ones(COPY_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(NUM_COPIES):
        wait_for(device)
        start = clock()
        target.copy_(source)
        wait_for(device)
        best = max(best, 2 * source.nbytes / max(clock() - start, 1e-9))
    return best


def wait_for(device: torch.device) -> None:
    """Until everything that was launched has run; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def on_an_engines_stream(device: torch.device) -> Iterator[None]:
    """Whatever is launched within goes to the stream that the next engine takes. On any other it would make that engine's steps
    slower, for as long as the process lives (`next_stream`). On a CPU it does nothing.
    """
    with torch.cuda.stream(next_stream(device.type)):
        yield
