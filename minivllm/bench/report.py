"""How throughput is told: vLLM's three lines for each backend, one table, one JSON with vLLM's keys.

Owns formats. Every number is computed elsewhere; the ratio is of output tokens a second, above 1 is faster than the baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minivllm.bench.environment import environment_lines
from minivllm.bench.measure import Measured, agreement

UNKNOWN = "-"


@dataclass(frozen=True)
class Floor:
    """The least bytes of the workload, and the bytes a second that this machine moves."""

    num_bytes: int
    bandwidth: float
    is_measured: bool

    @property
    def seconds(self) -> float:
        return self.num_bytes / self.bandwidth


def vllm_lines(measured: Measured) -> list[str]:
    """What `vllm bench throughput` prints."""
    work, elapsed = measured.workload, measured.elapsed_time
    total = work.num_prompt_tokens + work.num_output_tokens
    return [f"Throughput: {len(work.requests) / elapsed:.2f} requests/s, {total / elapsed:.2f} total tokens/s, "
            f"{work.num_output_tokens / elapsed:.2f} output tokens/s",
            f"Total num prompt tokens:  {work.num_prompt_tokens}",
            f"Total num output tokens:  {work.num_output_tokens}"]


def result_json(measured: Measured, baseline: Measured, floor: Floor, model_id: str) -> dict[str, Any]:
    """One backend: vLLM's keys first, then what this bench adds."""
    work, elapsed = measured.workload, measured.elapsed_time
    total = work.num_prompt_tokens + work.num_output_tokens
    is_comparable = work.temperature == 0 and measured is not baseline
    return {
        "model_id": model_id, "elapsed_time": elapsed, "num_requests": len(work.requests), "total_num_tokens": total,
        "requests_per_second": len(work.requests) / elapsed, "tokens_per_second": total / elapsed,
        "backend": measured.backend, "output_tokens_per_second": measured.output_tokens_per_second,
        "ratio": measured.output_tokens_per_second / baseline.output_tokens_per_second, "seconds": measured.seconds,
        "batch_size": measured.size, "batch_size_sweep": {str(size): seconds for size, seconds in measured.swept.items()},
        "prefix_cache_hit_rate": measured.cache_hit_rate, "num_preemptions": measured.num_preemptions,
        "gigabytes_per_second": floor.num_bytes / elapsed / 1e9, "share_of_bandwidth_floor": floor.seconds / elapsed,
        "equal_outputs": agreement(measured, baseline) if is_comparable else None,
    }


def whole_json(results: Sequence[dict[str, Any]], floor: Floor, workload_name: str, baseline: str, temperature: float,
               environment: dict[str, Any]) -> dict[str, Any]:
    """The first backend's keys at the top, where vLLM's readers look for them; all backends under `backends`."""
    return dict(results[0]) | {
        "workload": {"name": workload_name, "temperature": temperature, "least_bytes": floor.num_bytes,
                     "bandwidth": floor.bandwidth, "bandwidth_is_measured": floor.is_measured},
        "baseline": baseline, "backends": list(results), "environment": environment}


COLUMNS = ("backend", "output tok/s", "total tok/s", "req/s", "median s", "min s", "max s", "ratio", "prefix hits", "preempted",
           "GB/s", "of floor", "equal outputs")


def table_lines(whole: dict[str, Any]) -> list[str]:
    """The table, and below it all that it takes to repeat it."""
    rows = [COLUMNS, *(_row(result) for result in whole["backends"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                       for column, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return [*lines, "", *_footnotes(whole), *environment_lines(whole["environment"])]


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    name = result["backend"] + (f" (batch {result['batch_size']})" if result["batch_size"] else "")
    seconds = result["seconds"]
    return (name, f"{result['output_tokens_per_second']:,.1f}", f"{result['tokens_per_second']:,.1f}",
            f"{result['requests_per_second']:.2f}", f"{result['elapsed_time']:.3f}", f"{min(seconds):.3f}", f"{max(seconds):.3f}",
            f"{result['ratio']:.2f}x", _percent(result["prefix_cache_hit_rate"]),
            UNKNOWN if result["num_preemptions"] is None else f"{result['num_preemptions']:,}",
            f"{result['gigabytes_per_second']:.2f}", _percent(result["share_of_bandwidth_floor"]),
            _percent(result["equal_outputs"]))


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{100 * share:.1f}%"


def _footnotes(whole: dict[str, Any]) -> list[str]:
    work, repeats = whole["workload"], len(whole["seconds"])
    how = "measured by a large copy" if work["bandwidth_is_measured"] else "as given"
    lines = [f"Workload:  {work['name']}; temperature {work['temperature']:g}, EOS ignored; {whole['num_requests']:,} requests, "
             f"median of {repeats} {'run' if repeats == 1 else 'runs'}, prefix caches emptied before each",
             f"Model:     {whole['model_id']}",
             f"Ratio:     output tokens a second over those of {whole['baseline']}",
             f"Floor:     {work['least_bytes']:,} bytes (weights once a step, KV) at {work['bandwidth'] / 1e9:,.1f} GB/s, {how}; "
             "GB/s are these bytes over the median"]
    for result in whole["backends"]:
        if sweep := result["batch_size_sweep"]:
            tried = ", ".join(f"{size}: {seconds:.2f} s" for size, seconds in sweep.items())
            lines.append(f"Sweep:     {result['backend']}, one run a batch size: {tried}")
    return lines
