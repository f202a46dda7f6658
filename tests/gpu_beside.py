"""Engines beside each other on one GPU: `python tests/gpu_beside.py --backend vllm minivllm`. Not a test: the clock is in it.

Each engine with each model is a process of its own, one after the other. It runs presets C, A and B of the bench, each once
before it counts, and prints output tokens a second: medians, and of every run in the JSON, of which
docs/ledger/h200-vllm-side-by-side.json was made. `bench throughput` measures one preset a start; here a start is shared.

    --vllm-path FOLDER    where vLLM lies, if it is not installed: it goes in front of vLLM's PYTHONPATH alone
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RUNS = {"C": 5, "A": 7, "B": 3}
FLAGS = ("--max-model-len", "4096", "--max-num-seqs", "256", "--gpu-memory-utilization", "0.85", "--no-enable-prefix-caching")
VLLM_ENV = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
            "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def measure(backend_name: str, shape: str) -> None:
    """In a process of its own: prints one line of JSON for every preset."""
    from minivllm.bench import throughput
    from minivllm.bench.environment import describe_environment
    from minivllm.bench.measure import run_once

    def args_of(preset: str) -> argparse.Namespace:
        flags = ["--shape", shape, *FLAGS, "--preset", preset]
        return throughput.parse_flags(throughput.build_parser("gpu_beside"), flags)

    spec, config = throughput.choose_model(args_of("A"), Path(tempfile.mkdtemp()))
    began = time.perf_counter()
    backend = throughput.open_backend(backend_name, spec)
    ready = round(time.perf_counter() - began, 1)
    gc.collect()
    gc.freeze()  # as the bench does
    for preset, runs in RUNS.items():
        workload = throughput.workload_from_flags(args_of(preset), config.vocab_size)
        seconds = [run_once(backend, workload, None, time.perf_counter)[0] for _ in range(1 + runs)][1:]
        rates = [round(workload.num_output_tokens / second) for second in seconds]
        print(json.dumps({"model_id": shape, "preset": preset, "backend": backend_name, "ready_seconds": ready,
                          "median_output_tokens_per_second": round(statistics.median(rates)), "output_tokens_per_second": rates,
                          "environment": describe_environment(spec.device, spec.dtype)}), flush=True)
    backend.close()


def run_process(backend: str, shape: str, vllm_path: str | None) -> list[dict[str, Any]]:
    """What such a process has printed; what it says otherwise goes on to our own standard error."""
    root, paths = str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, (root, paths))))  # minivllm need not be installed
    if backend == "vllm":
        env |= VLLM_ENV
        if vllm_path:
            env["PYTHONPATH"] = os.pathsep.join((vllm_path, env["PYTHONPATH"]))
    command = [sys.executable, __file__, "--measure", backend, shape]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"model_id"')]
    if len(results) != len(RUNS):
        print(f"{backend} with {shape} ended after {len(results)} presets (exit status {done.returncode})", file=sys.stderr)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--backend", nargs="+", default=["vllm", "minivllm"])
    parser.add_argument("--shape", nargs="+", default=["qwen2.5-0.5b", "qwen2.5-7b"])
    parser.add_argument("--vllm-path")
    parser.add_argument("--output-json")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    results = []
    for shape in args.shape:
        for backend in args.backend:
            results += run_process(backend, shape, args.vllm_path)
            for one in results[-len(RUNS):]:
                print(f"{shape} {one['preset']} {backend:9s} {one['median_output_tokens_per_second']:7,} tokens/s of "
                      f"{one['output_tokens_per_second']}, ready in {one['ready_seconds']} s", flush=True)
            if args.output_json:  # after each process: a time limit may end the next one
                Path(args.output_json).write_text(json.dumps(results, indent=4), encoding="utf-8")


if __name__ == "__main__":
    main()
