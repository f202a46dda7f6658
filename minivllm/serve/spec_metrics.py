"""How often guesses were right, for Prometheus and for the log: vLLM's names and its line (vllm/v1/spec_decode/metrics.py).

Owns the words; the scheduler counts. Nothing is said by an engine that does not speculate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, Metric

from minivllm.scheduler_output import SchedulerStats

PER_POSITION = "spec_decode_num_accepted_tokens_per_pos"


def spec_decode_metrics(stats: SchedulerStats, prefix: str, names: Sequence[str], labels: Sequence[str]) -> Iterator[Metric]:
    """Four counters; the last one has a label more."""
    for name, value, what in (("spec_decode_num_drafts", stats.num_drafts, "Runs of drafts that were verified."),
                              ("spec_decode_num_draft_tokens", stats.num_draft_tokens, "Draft tokens that were verified."),
                              ("spec_decode_num_accepted_tokens", stats.num_accepted_tokens, "Draft tokens that were accepted.")):
        counter = CounterMetricFamily(f"{prefix}:{name}", what, labels=names)
        counter.add_metric(labels, value)
        yield counter
    counter = CounterMetricFamily(f"{prefix}:{PER_POSITION}", "Accepted draft tokens by their position in a run.",
                                  labels=(*names, "position"))
    for position, value in enumerate(stats.num_accepted_tokens_per_pos):
        counter.add_metric((*labels, str(position)), value)
    yield counter


class SpecDecodeLog:
    """The line in the log: what has happened since the line before."""

    def __init__(self) -> None:
        self.logged = SchedulerStats()

    def line(self, stats: SchedulerStats, seconds: float) -> str | None:
        """None if nothing was verified. The mean acceptance length counts the model's own token as well."""
        before, num_drafts = self.logged, stats.num_drafts - self.logged.num_drafts
        if num_drafts == 0:
            return None
        num_tokens = stats.num_draft_tokens - before.num_draft_tokens
        num_accepted = stats.num_accepted_tokens - before.num_accepted_tokens
        past = [*before.num_accepted_tokens_per_pos, *[0] * len(stats.num_accepted_tokens_per_pos)]
        rates = [(new - old) / num_drafts for new, old in zip(stats.num_accepted_tokens_per_pos, past)]
        self.logged = SchedulerStats(num_drafts=stats.num_drafts, num_draft_tokens=stats.num_draft_tokens,
                                     num_accepted_tokens=stats.num_accepted_tokens,
                                     num_accepted_tokens_per_pos=list(stats.num_accepted_tokens_per_pos))
        return (f"SpecDecoding metrics: Mean acceptance length: {1 + num_accepted / num_drafts:.2f}, "
                f"Accepted throughput: {num_accepted / seconds:.2f} tokens/s, "
                f"Drafted throughput: {num_tokens / seconds:.2f} tokens/s, Accepted: {num_accepted} tokens, "
                f"Drafted: {num_tokens} tokens, Per-position acceptance rate: {', '.join(f'{rate:.3f}' for rate in rates)}, "
                f"Avg Draft acceptance rate: {100 * num_accepted / num_tokens:.1f}%")
