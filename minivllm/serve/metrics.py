"""What the engine has done, as numbers for Prometheus (`/metrics`) and as a line in the log every ten seconds.

Gauges and counters cost nothing until somebody asks: they are read from the scheduler and its `stats` at that moment.
Histograms need every single event, so the engine shows each step to `observe`, on its own thread:

    arrival --- queued --- first_scheduled --- first_token --- last_token
                   | queue |     prefill     |     decode    |
       | time to first token                 |
       | e2e                                                 |

Owns the names, and they are vLLM's (vllm/v1/metrics/loggers.py) but for the prefix. A request that is preempted after its
first token waits again, and that counts as decode.
"""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from minivllm.request import FINISH_REASONS, Request
from minivllm.scheduler_output import SchedulerStats
from minivllm.serve.spec_metrics import SpecDecodeLog, spec_decode_metrics

logger = logging.getLogger("minivllm")
LOG_SECONDS = 10.0
LABELS = ("model_name", "engine")

# vLLM's edges. Small models on big devices need less than its first edge of 10 ms for a token: three finer ones come before.
FIRST_TOKEN = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
PER_TOKEN = (.001, .002, .005, .01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
PER_REQUEST = (.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
PER_STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LENGTHS = ()  # 1, 2, 5, 10, ... up to max_model_len

HISTOGRAMS: dict[str, tuple[tuple[float, ...], str]] = {
    "time_to_first_token_seconds": (FIRST_TOKEN, "From arrival to the first token."),
    "inter_token_latency_seconds": (PER_TOKEN, "Between two tokens of a request."),
    "request_time_per_output_token_seconds": (PER_TOKEN, "Mean of a request's gaps between tokens; 0 for one token."),
    "e2e_request_latency_seconds": (PER_REQUEST, "From arrival to the last token."),
    "request_queue_time_seconds": (PER_REQUEST, "From joining the queue to the first step."),
    "request_prefill_time_seconds": (PER_REQUEST, "From the first step to the first token."),
    "request_decode_time_seconds": (PER_REQUEST, "From the first token to the last."),
    "request_inference_time_seconds": (PER_REQUEST, "From the first step to the last token."),
    "iteration_tokens_total": (PER_STEP, "Prompt tokens computed and tokens generated in a step."),
    "request_prompt_tokens": (LENGTHS, "Length of a request's prompt."),
    "request_generation_tokens": (LENGTHS, "Length of a request's answer."),
    "request_max_num_generation_tokens": (LENGTHS, "Length of the longest of a request's n answers."),
    "request_params_max_tokens": (LENGTHS, "max_tokens of a request."),
    "request_params_n": ((1, 2, 5, 10, 20), "n of a request."),
    "request_num_preemptions": ((1, 2, 3, 4, 5, 10, 20), "How often a request was preempted."),
}
# name: (what counts it, what it is)
COUNTERS: dict[str, tuple[Callable[[SchedulerStats], int], str]] = {
    "prefix_cache_queries": (lambda stats: stats.prefix_cache_queries, "Tokens that were looked up in the prefix cache."),
    "prefix_cache_hits": (lambda stats: stats.prefix_cache_hits, "Tokens that were found there."),
    "num_preemptions": (lambda stats: stats.num_preemptions, "Preemptions."),
    "prompt_tokens": (lambda stats: stats.num_prompt_tokens, "Prompt tokens, cached ones included."),
    "prompt_tokens_cached": (lambda stats: stats.prefix_cache_hits, "Prompt tokens that need not be computed."),
    "generation_tokens": (lambda stats: stats.num_generated_tokens, "Tokens generated."),
}


def length_edges(max_model_len: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... as far as a length can go."""
    series = (digit * 10**power for power in range(len(str(max_model_len))) for digit in (1, 2, 5))
    return tuple(edge for edge in series if edge <= max_model_len)


class Histogram:
    """Events per bucket. One thread writes, so an event costs a bisection and no lock (the library's has one)."""

    def __init__(self, edges: tuple[float, ...]) -> None:
        self.edges = edges
        self.counts = [0] * (len(edges) + 1)  # the last one is of what lies beyond
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.edges, value)] += 1
        self.sum += value

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """(upper edge, events up to it): cumulative, as Prometheus wants them."""
        edges = [*(str(float(edge)) for edge in self.edges), "+Inf"]
        return list(zip(edges, accumulate(self.counts.copy()), strict=True))


class EngineMetrics(Collector):
    """The metrics of one server over one engine. `observe` runs on the engine's thread, everything else on any other.

    Other threads read single numbers while the engine goes on, so two of them may be a step apart.
    """

    def __init__(self, engine: Any, model_name: str, prefix: str = "minivllm", *,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.engine = engine
        self.prefix = prefix
        self.labels = (model_name, "0")
        lengths = length_edges(engine.config.max_model_len)
        self.histograms = {name: Histogram(edges or lengths) for name, (edges, _) in HISTOGRAMS.items()}
        self.num_ended = dict.fromkeys(FINISH_REASONS.values(), 0)
        self.num_rejected = {"max_num_queued_reqs": 0, "max_num_queued_tokens": 0}  # the event loop counts these
        self.families: dict[str, list[int]] = {}  # lengths of the answers that have ended, of requests for several
        self.last_tokens: dict[str, float] = {}  # when each unfinished request got its newest token
        self.clock = clock
        self.logged_at, self.logged = clock(), (0, 0, 0)
        self.spec_decode_log = SpecDecodeLog()
        self.registry = CollectorRegistry()  # not the library's global one: two servers may share a process
        self.registry.register(self)
        engine.observer = self.observe

    # On the engine's thread ---------------------------------------------------------------------------------------------------

    def observe(self, requests: list[Request], num_tokens: int) -> None:
        """Take in a step of `num_tokens` positions and who got a token in it; with 0 positions, who was aborted.

        A decode computes one position for one token. A prompt's last step brings a token on top: the first one.
        """
        num_first = 0
        for request in requests:
            if num_tokens:
                num_first += self._observe_token(request)
            if request.is_finished:
                self._observe_end(request)
        if num_tokens:
            self.histograms["iteration_tokens_total"].observe(num_tokens + num_first)

    def _observe_token(self, request: Request) -> bool:
        """Note the time of a request's newest token, and say whether it is its first."""
        now, before = request.times.last_token, self.last_tokens.get(request.request_id)
        assert now is not None, "a request that got a token knows when"
        self.last_tokens[request.request_id] = now
        if before is None:
            self.histograms["time_to_first_token_seconds"].observe(now - request.times.arrival)
        else:
            self.histograms["inter_token_latency_seconds"].observe(now - before)
        return before is None

    def _observe_end(self, request: Request) -> None:
        """Count a request, and each of n answers, in whatever way it ended."""
        self.last_tokens.pop(request.request_id, None)
        self.num_ended[FINISH_REASONS[request.status]] += 1
        values = {"request_prompt_tokens": request.num_prompt_tokens, "request_generation_tokens": request.num_output_tokens,
                  "request_num_preemptions": request.num_preemptions, **seconds_of(request)}
        if request.max_tokens is not None:
            values["request_params_max_tokens"] = request.max_tokens
        values |= self._end_of_family(request)
        for name, value in values.items():
            self.histograms[name].observe(value)

    def _end_of_family(self, request: Request) -> dict[str, int]:
        """What is told once of a request for n answers, when the last of them has ended."""
        n = request.sampling_params.n
        parent = request.request_id if n == 1 else request.request_id.partition("_")[2]  # a child is "0_parent" (engine.py)
        lengths = [*self.families.pop(parent, ()), request.num_output_tokens]
        if len(lengths) < n:
            self.families[parent] = lengths
            return {}
        return {"request_params_n": n, "request_max_num_generation_tokens": max(lengths)}

    # On any thread ------------------------------------------------------------------------------------------------------------

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """What the registry asks for at every scrape."""
        yield from self._gauges()
        for name, (count, what) in COUNTERS.items():
            counter = CounterMetricFamily(f"{self.prefix}:{name}", what, labels=LABELS)
            counter.add_metric(self.labels, count(self.engine.stats))
            yield counter
        if self.engine.config.speculative_config is not None:
            yield from spec_decode_metrics(self.engine.stats, self.prefix, LABELS, self.labels)
        yield self._by("finished_reason", CounterMetricFamily, "request_success", "Requests that ended, in whatever way.",
                       self.num_ended)
        yield self._by("reason", CounterMetricFamily, "admission_rejections", "Requests refused because a limit was reached.",
                       self.num_rejected)
        for name, histogram in self.histograms.items():
            family = HistogramMetricFamily(f"{self.prefix}:{name}", HISTOGRAMS[name][1], labels=LABELS)
            family.add_metric(self.labels, histogram.buckets, histogram.sum)
            yield family

    def _by(self, label: str, kind: type[CounterMetricFamily | GaugeMetricFamily], name: str, what: str,
            values: dict[str, int]) -> Metric:
        """A metric with one sample for each value of a label."""
        family = kind(f"{self.prefix}:{name}", what, labels=(*LABELS, label))
        for value, number in values.items():
            family.add_metric((*self.labels, value), number)
        return family

    def _gauges(self) -> Iterator[Metric]:
        scheduler, manager = self.engine.scheduler, self.engine.kv_cache_manager
        for name, value, what in (("num_requests_running", len(scheduler.running), "Requests in the running batch."),
                                  ("num_requests_waiting", len(scheduler.waiting), "Requests that wait, preempted ones included."),
                                  ("kv_cache_usage_perc", manager.usage, "Share of the KV cache in use; 1 is all of it.")):
            gauge = GaugeMetricFamily(f"{self.prefix}:{name}", what, labels=LABELS)
            gauge.add_metric(self.labels, value)
            yield gauge
        # vLLM defers requests whose LoRA or remote KV is on its way; here all that wait want room
        yield self._by("reason", GaugeMetricFamily, "num_requests_waiting_by_reason", "Requests that wait, by what they wait for.",
                       {"capacity": len(scheduler.waiting), "deferred": 0})
        num_slots = (manager.num_blocks - 1) * manager.block_size
        facts = {"block_size": manager.block_size, "num_gpu_blocks": manager.num_blocks, "kv_cache_size_tokens": num_slots,
                 "kv_cache_max_concurrency": round(num_slots / manager.max_model_len, 2),
                 "enable_prefix_caching": manager.enable_caching}
        info = GaugeMetricFamily(f"{self.prefix}:cache_config_info", "The KV cache, as labels.", labels=(*LABELS, *facts))
        info.add_metric((*self.labels, *map(str, facts.values())), 1)
        yield info

    @asynccontextmanager
    async def log_line(self) -> AsyncIterator[None]:
        """Write the line every ten seconds until the block ends."""
        task = asyncio.create_task(self._log_forever())
        try:
            yield
        finally:
            task.cancel()

    async def _log_forever(self) -> None:
        while True:
            await asyncio.sleep(LOG_SECONDS)
            self.log()

    def log(self) -> None:
        """One line, which vLLM's users know by heart: rates since the line before, the hit rate since the start.

        Without requests it is a line for debuggers. Cached prompt tokens are not throughput: nobody computed them.
        """
        stats, scheduler, now = self.engine.stats, self.engine.scheduler, self.clock()
        totals = (stats.num_prompt_tokens - stats.prefix_cache_hits, stats.num_generated_tokens, stats.num_preemptions)
        num_prompt, num_generated, num_preemptions = (new - old for new, old in zip(totals, self.logged))
        seconds = max(now - self.logged_at, 1e-9)
        self.logged_at, self.logged = now, totals
        num_running, num_waiting = len(scheduler.running), len(scheduler.waiting)
        happened = num_prompt or num_generated or num_preemptions or num_running or num_waiting
        preempted = f"Preemptions: {num_preemptions}, " if num_preemptions else ""
        hit_rate = stats.prefix_cache_hits / max(stats.prefix_cache_queries, 1)
        logger.log(
            logging.INFO if happened else logging.DEBUG,
            "Engine 000: Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, Running: %d reqs, "
            "Waiting: %d reqs, %sGPU KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%", num_prompt / seconds,
            num_generated / seconds, num_running, num_waiting, preempted, 100 * self.engine.kv_cache_manager.usage, 100 * hit_rate)
        if (line := self.spec_decode_log.line(stats, seconds)) is not None:
            logger.info("%s", line)


def seconds_of(request: Request) -> dict[str, float]:
    """How long each part of a request's life took; nothing of what it did not live to see."""
    times, seconds = request.times, {}
    if times.first_scheduled is not None and times.queued is not None:
        seconds["request_queue_time_seconds"] = times.first_scheduled - times.queued
        if times.first_token is not None and times.last_token is not None:
            decode = times.last_token - times.first_token
            seconds["request_prefill_time_seconds"] = times.first_token - times.first_scheduled
            seconds["request_decode_time_seconds"] = decode
            seconds["request_inference_time_seconds"] = times.last_token - times.first_scheduled
            seconds["e2e_request_latency_seconds"] = times.last_token - times.arrival
            # a request of one token has no gap: its decode is 0
            seconds["request_time_per_output_token_seconds"] = decode / max(request.num_output_tokens - 1, 1)
    return seconds
