"""`latency`: seconds from the first prompt token to the last answer token of one batch, again and again.

Owns vLLM's print and JSON (vllm/benchmarks/latency.py). The prefix cache is off, as there: every iteration is the same batch.

    python -m minivllm.bench latency --input-len 32 --output-len 128 --batch-size 8
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minivllm.bench.backends import MinivllmBackend
from minivllm.bench.environment import describe_environment
from minivllm.bench.flags import OneLineParser, add_engine_flags, parse_flags, require_at_least
from minivllm.bench.measure import run_once
from minivllm.bench.shapes import SHAPES
from minivllm.bench.throughput import add_fixed_flags, choose_model, require_lengths_fit
from minivllm.bench.workload import BenchRequest, Workload

PERCENTAGES = (10, 25, 50, 75, 90, 99)
MOST_IDS = 10_000  # vLLM draws its prompts from the first 10,000 ids


def build_parser(prog: str) -> OneLineParser:
    parser = OneLineParser(prog=prog, allow_abbrev=False, description="Seconds for one batch from start to end.")
    for name, default in (("input-len", 32), ("output-len", 128), ("batch-size", 8), ("num-iters-warmup", 10), ("num-iters", 30)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights in a published shape, nothing to download")
    parser.add_argument("--output-json", metavar="FILE")
    add_fixed_flags(parser)
    parser.set_defaults(hf_batch_sizes=None, hf_static_cache=False)
    add_engine_flags(parser, without=("skip_tokenizer_init", "tokenizer", "chat_template", "generation_config"))
    return parser


def main(argv: Sequence[str], prog: str, clock: Callable[[], float] = time.perf_counter) -> int:
    args = parse_flags(build_parser(prog), argv)
    require_at_least(args, 1, "input_len", "output_len", "batch_size", "num_iters")
    require_at_least(args, 0, "num_iters_warmup")
    with tempfile.TemporaryDirectory(prefix="minivllm-bench-") as folder:
        spec, model_config = choose_model(args, Path(folder))
        if args.enable_prefix_caching is None:
            spec.engine_kwargs["enable_prefix_caching"] = False
        rng, top = random.Random(args.seed or 0), min(MOST_IDS, model_config.vocab_size)
        requests = [BenchRequest(rng.choices(range(top), k=args.input_len), args.output_len) for _ in range(args.batch_size)]
        require_lengths_fit(requests, spec, model_config)
        backend = MinivllmBackend(spec)
        try:
            latencies = measure(backend, Workload("latency", requests), args.num_iters_warmup, args.num_iters, clock)
        finally:
            backend.close()
    results = summarize(latencies)
    print("\n".join(latency_lines(results)))
    if args.output_json:
        whole = results | {"environment": describe_environment(spec.device, spec.dtype)}
        Path(args.output_json).write_text(json.dumps(whole, indent=4), encoding="utf-8")
    return 0


def measure(backend: Any, workload: Workload, num_warmups: int, num_iters: int, clock: Callable[[], float]) -> list[float]:
    """Seconds of each timed iteration."""
    print("Warming up...", file=sys.stderr)
    for _ in range(num_warmups):
        run_once(backend, workload, None, clock)
    return [run_once(backend, workload, None, clock)[0] for _ in range(num_iters)]


def summarize(latencies: Sequence[float]) -> dict[str, Any]:
    """vLLM's three keys."""
    percentiles = dict(zip(map(str, PERCENTAGES), np.percentile(latencies, PERCENTAGES).tolist()))
    return {"avg_latency": float(np.mean(latencies)), "latencies": list(latencies), "percentiles": percentiles}


def latency_lines(results: dict[str, Any]) -> list[str]:
    return [f"Avg latency: {results['avg_latency']} seconds",
            *(f"{percentage}% percentile latency: {seconds} seconds" for percentage, seconds in results["percentiles"].items())]
