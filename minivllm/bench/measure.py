"""Runs a workload on backends and keeps the times. Owns the order of load, warm-up, sweep and repeats, and the medians.

    load -> warm up -> one run for each batch size (the fastest stays) -> prepare, run, prepare, run, ... -> close

Only `generate` is timed, on a clock that is passed in. Every run is checked: each request got exactly what it asked for.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace

from minivllm.bench.backends import Backend, Counters
from minivllm.bench.flags import BenchError
from minivllm.bench.workload import Workload

Tell = Callable[[str], None]
WARMUP_TOKENS = 8  # asked of each warm-up request: enough for a prefill and some decode steps


@dataclass
class Measured:
    """What the repeats of one backend gave."""

    backend: str
    workload: Workload
    size: int | None = None  # the batch size that the sweep chose
    swept: dict[int, float] = field(default_factory=dict)  # batch size -> seconds of its one run
    seconds: list[float] = field(default_factory=list)
    counters: list[Counters] = field(default_factory=list)  # of each repeat
    outputs: list[list[int]] = field(default_factory=list)  # of the last repeat

    @property
    def elapsed_time(self) -> float:
        return statistics.median(self.seconds)

    @property
    def output_tokens_per_second(self) -> float:
        return self.workload.num_output_tokens / self.elapsed_time

    @property
    def num_preemptions(self) -> int | None:
        """Of all repeats together."""
        counts = [one.num_preemptions for one in self.counters]
        return None if None in counts else sum(count for count in counts if count is not None)

    @property
    def cache_hit_rate(self) -> float | None:
        """Share of prompt tokens that a prefix cache had, over all repeats; None where the backend does not tell."""
        queries = sum(one.prefix_cache_queries or 0 for one in self.counters)
        hits = sum(one.prefix_cache_hits or 0 for one in self.counters)
        tells = bool(self.counters) and all(one.prefix_cache_hits is not None for one in self.counters)
        return (hits / queries if queries else 0.0) if tells else None


def measure_all(openers: Sequence[Callable[[], Backend]], workload: Workload, *, repeats: int, num_warmups: int,
                clock: Callable[[], float], interleave: bool = False, tell: Tell = lambda line: None) -> list[Measured]:
    """Measure each backend. Interleaved, all are loaded at once and take turns: a machine whose speed drifts is fair to all.

    By default one is closed before the next is loaded, so that each finds the whole memory. `tell` gets a line for each run.
    """
    if not interleave:
        return [_measure([opener], workload, repeats, num_warmups, clock, tell)[0] for opener in openers]
    return _measure(openers, workload, repeats, num_warmups, clock, tell)


def _measure(openers: Sequence[Callable[[], Backend]], workload: Workload, repeats: int, num_warmups: int,
             clock: Callable[[], float], tell: Tell) -> list[Measured]:
    with ExitStack() as stack:
        backends = [stack.enter_context(closing(opener())) for opener in openers]
        results = [warm_up_and_sweep(backend, workload, num_warmups, clock, tell) for backend in backends]
        gc.collect()
        gc.freeze()  # as servers do: the collector need not look through all that a compiler keeps in the middle of some run
        stack.callback(gc.unfreeze)
        for repeat in range(1, repeats + 1):
            for backend, measured in zip(backends, results):
                before = backend.counters()
                seconds, measured.outputs = run_once(backend, workload, measured.size, clock)
                measured.seconds.append(seconds)
                tell(f"{backend.name}: run {repeat} of {repeats} took {seconds:.3f} s")
                measured.counters.append(backend.counters().since(before))
    return results


def warm_up_and_sweep(backend: Backend, workload: Workload, num_warmups: int, clock: Callable[[], float], tell: Tell) -> Measured:
    """One short run for lazy initialisation, then one full run for each batch size if there are several to choose from.

    A size that does not fit into memory is left out. Raises `BenchError` if none fits.
    """
    measured = Measured(backend.name, workload)
    sizes = backend.sizes(workload)
    if num_warmups > 0:
        first = [replace(request, max_tokens=min(request.max_tokens, WARMUP_TOKENS)) for request in workload.requests[:num_warmups]]
        run_once(backend, replace(workload, requests=first), sizes[-1], clock)
    if len(sizes) > 1:
        for size in (size for size in sizes if size is not None):
            try:
                measured.swept[size] = run_once(backend, workload, size, clock)[0]
                tell(f"{backend.name}: batch size {size} took {measured.swept[size]:.3f} s")
            except MemoryError:
                tell(f"{backend.name}: batch size {size} does not fit into memory")
        if not measured.swept:
            raise BenchError(f"{backend.name}: no batch size fits into memory: pass smaller --hf-batch-sizes")
        measured.size = min(measured.swept, key=lambda size: measured.swept[size])
    else:
        measured.size = sizes[0]
        if measured.size is not None:  # one size alone has no sweep before it, and compiles at its first full run
            run_once(backend, workload, measured.size, clock)
    return measured


def run_once(backend: Backend, workload: Workload, size: int | None, clock: Callable[[], float]) -> tuple[float, list[list[int]]]:
    """Seconds and token ids of one run from a cold prefix cache. Raises `BenchError` if a request got too few or too many."""
    backend.prepare(workload, size)
    start = clock()
    outputs = backend.generate(workload)
    seconds = clock() - start
    for index, (request, output) in enumerate(zip(workload.requests, outputs, strict=True)):
        if len(output) != request.max_tokens:
            raise BenchError(f"{backend.name} answered request {index} with {len(output)} tokens, asked for {request.max_tokens}: "
                             "no speed is reported for work that was not done")
    return seconds, outputs


def agreement(one: Measured, other: Measured) -> float:
    """Share of requests with equal token ids: in float32 and greedy it shows that both did the same work."""
    pairs = list(zip(one.outputs, other.outputs, strict=True))
    return sum(first == second for first, second in pairs) / len(pairs)
