"""Sums over all requests of a serving run: throughput, goodput, means and percentiles, by vLLM's definitions.

Owns the arithmetic of vllm/benchmarks/serve.py `calculate_metrics`, its print format and its JSON keys. No clock.

    ITL is one list over all tokens of all requests; TPOT has one entry for each request of more than one token. If a server
    packs two tokens into a chunk, the two part ways: compare both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minivllm.bench.stream import RequestRecord

METRICS = {"ttft": ("TTFT", "Time to First Token"), "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
           "itl": ("ITL", "Inter-token Latency"), "e2el": ("E2EL", "End-to-end Latency")}
GOODPUT_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class ServeOptions:
    """What was asked for, as far as it shows in the result."""

    request_rate: float = math.inf
    max_concurrency: int | None = None
    goodput: dict[str, float] | None = None  # metric -> most milliseconds
    percentile_metrics: tuple[str, ...] = ("ttft", "tpot", "itl")
    percentiles: tuple[float, ...] = (99,)


def calculate(records: Sequence[RequestRecord], duration: float, options: ServeOptions) -> dict[str, Any]:
    """The whole result under vLLM's keys. `output_tokens` of every successful record must be known."""
    done = [record for record in records if record.success]
    total_input, total_output = sum(one.prompt_len for one in done), sum(one.output_tokens for one in done)
    peak_tokens, peak_requests = peaks(done)
    result: dict[str, Any] = {
        "duration": duration, "completed": len(done), "failed": len(records) - len(done), "total_input_tokens": total_input,
        "total_output_tokens": total_output, "request_throughput": len(done) / duration,
        "request_goodput": count_good(done, options.goodput) / duration if options.goodput else None,
        "output_throughput": total_output / duration, "total_token_throughput": (total_input + total_output) / duration,
        "max_output_tokens_per_s": peak_tokens, "max_concurrent_requests": peak_requests}
    for name, values in times(done).items():
        if name in options.percentile_metrics:
            result |= _statistics(name, values, options.percentiles)
    return result


def times(done: Sequence[RequestRecord]) -> dict[str, list[float]]:
    """Seconds of each metric. A request of one token has no TPOT."""
    return {"ttft": [one.ttft for one in done], "tpot": [tpot(one) for one in done if one.output_tokens > 1],
            "itl": [gap for one in done for gap in one.itl], "e2el": [one.latency for one in done]}


def tpot(record: RequestRecord) -> float:
    """Seconds for each token after the first; 0 where there is none, which any goodput limit allows."""
    return (record.latency - record.ttft) / (record.output_tokens - 1) if record.output_tokens > 1 else 0.0


def count_good(done: Sequence[RequestRecord], goodput: dict[str, float]) -> int:
    """Requests that keep every limit."""
    measures = {"ttft": lambda one: one.ttft, "tpot": tpot, "e2el": lambda one: one.latency}
    return sum(all(measures[name](one) <= limit / 1000 for name, limit in goodput.items()) for one in done)


def peaks(done: Sequence[RequestRecord]) -> tuple[float, int]:
    """The most token chunks in one second, and the most requests that touched one second, counted from the first start."""
    if not done:
        return 0.0, 0
    first = min(one.start_time for one in done)
    num_seconds = math.ceil(max(one.start_time + one.latency for one in done) - first) + 1
    tokens, requests = np.zeros(num_seconds), np.zeros(num_seconds, dtype=int)
    for one in done:
        arrivals = one.start_time - first + np.cumsum([one.ttft, *one.itl])
        np.add.at(tokens, np.minimum(arrivals.astype(int), num_seconds - 1), 1)
        requests[int(one.start_time - first):int(one.start_time + one.latency - first) + 1] += 1
    return float(tokens.max()), int(requests.max())


def _statistics(name: str, seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    values = np.array(seconds or [0.0]) * 1000  # vLLM reports 0 where nothing was measured
    found = {f"mean_{name}_ms": np.mean(values), f"median_{name}_ms": np.median(values), f"std_{name}_ms": np.std(values)}
    found |= {f"p{_word(one)}_{name}_ms": np.percentile(values, one) for one in percentiles}
    return {key: float(value) for key, value in found.items()}


def _word(percentile: float) -> str:
    """99, 99.9: as vLLM writes it in keys and lines."""
    return str(int(percentile)) if int(percentile) == percentile else str(percentile)


def detailed(records: Sequence[RequestRecord]) -> dict[str, list[Any]]:
    """What `--save-detailed` keeps: one entry for each request."""
    return {"input_lens": [one.prompt_len for one in records],
            "output_lens": [one.output_tokens if one.success else 0 for one in records],
            "ttfts": [one.ttft for one in records], "itls": [one.itl for one in records],
            "latencies": [one.latency for one in records], "start_times": [one.start_time for one in records],
            "generated_texts": [one.generated_text for one in records], "errors": [one.error for one in records]}


# ---- Print ----


def result_lines(result: dict[str, Any], options: ServeOptions) -> list[str]:
    """vLLM's page, line for line."""
    lines = [f"{' Serving Benchmark Result ':=^50}", _count("Successful requests:", result["completed"]),
             _count("Failed requests:", result["failed"])]
    if options.max_concurrency is not None:
        lines.append(_count("Maximum request concurrency:", options.max_concurrency))
    if math.isfinite(options.request_rate):
        lines.append(_rate("Request rate configured (RPS):", options.request_rate))
    lines += [_rate("Benchmark duration (s):", result["duration"]), _count("Total input tokens:", result["total_input_tokens"]),
              _count("Total generated tokens:", result["total_output_tokens"]),
              _rate("Request throughput (req/s):", result["request_throughput"])]
    if options.goodput:
        lines.append(_rate("Request goodput (req/s):", result["request_goodput"]))
    lines += [_rate("Output token throughput (tok/s):", result["output_throughput"]),
              _rate("Peak output token throughput (tok/s):", result["max_output_tokens_per_s"]),
              _rate("Peak concurrent requests:", result["max_concurrent_requests"]),
              _rate("Total token throughput (tok/s):", result["total_token_throughput"])]
    for name, (short, header) in METRICS.items():
        if name in options.percentile_metrics:
            lines += [f"{header:-^50}", _rate(f"Mean {short} (ms):", result[f"mean_{name}_ms"]),
                      _rate(f"Median {short} (ms):", result[f"median_{name}_ms"])]
            lines += [_rate(f"P{_word(one)} {short} (ms):", result[f"p{_word(one)}_{name}_ms"]) for one in options.percentiles]
    return [*lines, "=" * 50]


def _count(label: str, value: int) -> str:
    return f"{label:<40} {value:<10}"


def _rate(label: str, value: float) -> str:
    return f"{label:<40} {value:<10.2f}"
