"""Forms of the code side by side on one GPU, measured in turns: `python tests/gpu_turns.py old=../old new=.`. Not a test: the clock
is in it.

A machine's speed changes within minutes, and two machines differ by 5 %. So each form is a process of its own, all of them are
ready before the first is measured, and they take turns. A form is a checkout, and perhaps a file that changes something first:

    python tests/gpu_turns.py now=. wide=.:wide.py --measure 25x140 256x600 A
        25x140     microseconds of the decode graph alone: 25 requests of 140 tokens
        256x600~0.6    contexts from 0.4 to 1.6 times that
        A          output tokens a second of the bench's preset

With `~` contexts are spread as requests of different lengths are. KV caches share the memory: `--kv-gib` is each form's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

REPLAYS, ROUNDS, RUNS = 100, 5, {"A": 7, "B": 1, "C": 5}


class Form:
    """In a process of its own: one engine, which measures what it is told to."""

    def __init__(self, shape: str, kv_gib: float) -> None:
        from minivllm.bench import throughput

        self.bench, self.folder = throughput, Path(tempfile.mkdtemp())
        self.flags = ["--shape", shape, "--max-model-len", "4096", "--max-num-seqs", "256", "--no-enable-prefix-caching",
                      "--kv-cache-memory-bytes", str(int(kv_gib * 2**30))]
        spec, self.config = throughput.choose_model(self.args("A"), self.folder)
        self.backend: Any = throughput.open_backend("minivllm", spec)
        self.runner = self.backend.llm.engine.runner

    def args(self, preset: str) -> argparse.Namespace:
        return self.bench.parse_flags(self.bench.build_parser("gpu_turns"), [*self.flags, "--preset", preset])

    def measure(self, what: str) -> float:
        step = re.fullmatch(r"(\d+)x(\d+)(?:~([\d.]+))?", what)
        return self.replay(int(step[1]), int(step[2]), float(step[3] or 0)) if step else self.run_preset(what)

    @torch.inference_mode()
    def replay(self, count: int, mean: int, ratio: float) -> float:
        """Microseconds of a decode graph: contexts in scattered blocks, the longest first, each round from the same lengths on."""
        graphs, rows = self.runner.graphs, self.runner.rows
        shape, lens = rows.block_table[:count].shape, [mean * (1 + ratio * (1 - (2 * i + 1) / count)) for i in range(count)]
        starts = torch.tensor([max(0, int(length) - REPLAYS // 2) for length in lens], dtype=torch.int32, device=rows.device)
        torch.cuda.set_stream(getattr(self.runner, "stream", None) or torch.cuda.current_stream())  # older checkouts have none
        torch.manual_seed(0)
        rows.block_table[:count] = torch.randint(1, self.runner.config.num_blocks, shape, dtype=torch.int32, device=rows.device)
        graphs.index[:count] = torch.arange(count, device=rows.device)
        graphs.index[count:] = rows.padding_row
        graphs.host_index[:] = -1  # what it says of `index` is not true any more
        graph, times = graphs.graphs[min(size for size in graphs.graphs if size >= count)], []
        for _ in range(ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            rows.positions[:count] = starts
            begin.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / REPLAYS * 1e3)
        return round(statistics.median(times), 1)

    def run_preset(self, preset: str) -> float:
        from minivllm.bench.measure import run_once

        workload = self.bench.workload_from_flags(self.args(preset), self.config.vocab_size)
        seconds = [run_once(self.backend, workload, None, time.perf_counter)[0] for _ in range(RUNS[preset])]
        return round(workload.num_output_tokens / statistics.median(seconds))


def serve(shape: str, kv_gib: float, patch: str | None) -> None:
    """A line of names in, a line of numbers out."""
    if patch:
        runpy.run_path(patch)
    form = Form(shape, kv_gib)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps({what: form.measure(what) for what in line.split()}), flush=True)


def launch(form: str, args: argparse.Namespace) -> subprocess.Popen[str]:
    root, _, patch = form.partition("=")[2].partition(":")
    command = [sys.executable, __file__, "--shape", args.shape, "--kv-gib", str(args.kv_gib), "--serve", patch]
    env = os.environ | {"PYTHONPATH": str(Path(root).resolve())}
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def heard(process: subprocess.Popen[str]) -> str:
    """Its next line that is ours: a start-up report may go the same way."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(("ready", "{")):
            return line
    raise SystemExit(f"{process.args} has ended")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("forms", nargs="*", metavar="NAME=CHECKOUT[:FILE]")
    parser.add_argument("--measure", nargs="+", default=["1x192", "25x140", "256x600", "C", "A"])
    parser.add_argument("--shape", default="qwen2.5-0.5b")
    parser.add_argument("--kv-gib", type=float, default=9.0)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.shape, args.kv_gib, args.serve or None)
        return
    processes = {form.partition("=")[0]: launch(form, args) for form in args.forms}
    for process in processes.values():
        heard(process)
    for turn in range(1, args.turns + 1):
        for name, process in processes.items():
            assert process.stdin is not None
            print(*args.measure, file=process.stdin, flush=True)
            print(f"turn {turn} {name:16s} {heard(process).strip()}", flush=True)
    for process in processes.values():
        process.kill()


if __name__ == "__main__":
    main()
