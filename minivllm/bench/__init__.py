"""`python -m minivllm.bench throughput | latency | serve | speculation | scheduler`: vLLM's flags, definitions, formats, JSON keys.

workload, shapes            what is computed: token ids drawn from a seed, and models of published sizes without a download
backends, hf_backends       the engines under test, each in its best fair form: token ids in, token ids out, exact lengths
measure, cost_floor         clocks and medians; the bytes that no engine can avoid
environment, report         what ran where; one table, one JSON
throughput, latency         the two commands that own an engine
replay, speculation         guesses that are right as often as was asked for; the command that compares with and without
sse, stream, serve_metrics  what a client of an OpenAI server sees: one stream, its times, and the sums over all
arrivals, serve_flags, serve   when requests are sent; the command that needs only a URL
scheduler                   the host's own work for a step, however long the queue

The engine imports nothing from here. Every clock is an argument, so the arithmetic is tested without waiting for anything.
"""
