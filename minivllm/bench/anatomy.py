"""`anatomy`: where the milliseconds of a step go on a GPU. Kernels of decode steps, rate of prompts, worth of a shared prefix.

Owns how kernels are grouped and three small experiments on one loaded engine. A decode step is taken as it runs, a CUDA graph
replayed on rows of a given length, and torch's profiler names its kernels; what is left between them is the gaps.

    python -m minivllm.bench anatomy --shape qwen2.5-0.5b --batch-sizes 1 32 256 --context-len 600
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minivllm import cost
from minivllm.bench.backends import MinivllmBackend
from minivllm.bench.cost_floor import measure_bandwidth, on_an_engines_stream, wait_for
from minivllm.bench.environment import describe_environment, environment_lines
from minivllm.bench.flags import OneLineParser, add_engine_flags, parse_flags, require, require_at_least
from minivllm.bench.shapes import SHAPES
from minivllm.bench.throughput import choose_model
from minivllm.exceptions import ValidationError
from minivllm.llm import LLM
from minivllm.sampling_params import SamplingParams

# The first that matches counts. Generated kernels carry the names of the operations that were fused into them.
GROUPS = (
    ("attention", ("flex_attention",)),
    ("sampling", ("argmax", "rshift", "bitwise", "amax")),
    # A sum is a product with one row, whatever else is in it (`one_token.py`).
    ("matrix products", ("nvjet", "gemm", "gemv", "cublas", "cutlass", "_mm_", "splitk", "_sum", "_expand_", "bmm")),
    ("norms, residual additions", ("rsqrt",)),
    ("SiLU times up", ("silu",)),
    ("rotation, KV write", ("cat", "index_put")),
)
OTHER = "rows, masks, the rest"
NUM_REPLAYS, NUM_PROFILED, NUM_REPEATS = 100, 5, 5
PREFIX_LEN, SUFFIX_LEN, NUM_SHARING = 2048, 64, 64  # a system prompt, a question, and so many users
MATMUL_SIZE, MATMUL_REPEATS = 8192, 10


@dataclass
class Step:
    """One decode step: microseconds and launches per group, and the least that the machine would need."""

    batch_size: int
    context_len: int  # the mean
    milliseconds: float  # a replay, the median of several rounds
    groups: dict[str, tuple[float, int]]
    floor_milliseconds: float  # weights and KV at the measured bandwidth
    range_ratio: float = 0.0  # contexts differ from the mean by up to this share of it


def build_parser(prog: str) -> OneLineParser:
    parser = OneLineParser(prog=prog, allow_abbrev=False, description="Where the milliseconds of a step go. Needs CUDA.")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights in a published shape, nothing to download")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32, 256], metavar="N", help="(default: 1 32 256)")
    parser.add_argument("--context-len", type=int, default=600, help="of each decoding request, or the mean (default: %(default)s)")
    parser.add_argument("--random-range-ratio", type=float, default=0.0, metavar="R",
                        help="contexts from 1 - R to 1 + R times that, evenly spread (default: all alike)")
    parser.add_argument("--prompt-len", type=int, default=2048, help="of the prompts whose rate is measured (default: %(default)s)")
    parser.add_argument("--output-json", metavar="FILE")
    parser.set_defaults(hf_batch_sizes=None, hf_static_cache=False)
    add_engine_flags(parser, without=("skip_tokenizer_init", "tokenizer", "chat_template", "generation_config"))
    return parser


def main(argv: Sequence[str], prog: str, clock: Callable[[], float] = time.perf_counter) -> int:
    args = parse_flags(build_parser(prog), argv)
    require_at_least(args, 1, "context_len", "prompt_len")
    require(0 <= args.random_range_ratio < 1, "random_range_ratio", "at least 0 and below 1", args.random_range_ratio)
    with tempfile.TemporaryDirectory(prefix="minivllm-bench-") as folder:
        spec, _ = choose_model(args, Path(folder))
        if spec.device.type != "cuda":
            raise ValidationError("needs CUDA: CUDA graphs and their kernels are what it looks at", parameter="device")
        with on_an_engines_stream(spec.device):
            bandwidth, rate = measure_bandwidth(spec.device, clock), measure_matmul(spec.device, spec.dtype, clock)
        start = clock()
        backend = MinivllmBackend(spec)
        gc.collect()
        gc.freeze()  # as the server does: the collector need not look at the compiler's objects again and again
        whole: dict[str, Any] = {"ready_seconds": clock() - start, "bandwidth": bandwidth, "matmul_flops_per_second": rate}
    try:
        with torch.cuda.stream(backend.llm.engine.runner.stream):
            whole["steps"] = [vars(decode_step(backend.llm, size, args.context_len, bandwidth, args.random_range_ratio))
                              for size in args.batch_sizes]
        whole["prompts"] = prompt_rate(backend.llm, args.prompt_len, clock) | {"matmul": rate}
        whole["shared_prefix"] = shared_prefix(backend.llm)
    finally:
        backend.close()
    whole["environment"] = describe_environment(spec.device, spec.dtype)
    print("\n".join(report_lines(whole)))
    if args.output_json:
        Path(args.output_json).write_text(json.dumps(whole, indent=4), encoding="utf-8")
    return 0


def measure_matmul(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Floating-point operations a second of one large square product, the best of several."""
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(MATMUL_REPEATS):
        wait_for(device)
        start = clock()
        torch.mm(a, b)
        wait_for(device)
        best = min(best, clock() - start)
    return 2 * MATMUL_SIZE**3 / best


def group_of(kernel: str) -> str:
    """To which group a kernel belongs, by its name."""
    lower = kernel.lower()
    return next((group for group, words in GROUPS if any(word in lower for word in words)), OTHER)


def group_kernels(kernels: Iterable[tuple[str, float, int]]) -> dict[str, tuple[float, int]]:
    """(name, microseconds in all, launches) summed by group, the costliest group first."""
    found: dict[str, tuple[float, int]] = {}
    for name, microseconds, launches in kernels:
        total, count = found.get(group_of(name), (0.0, 0))
        found[group_of(name)] = total + microseconds, count + launches
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def spread_lens(count: int, mean: int, range_ratio: float) -> list[int]:
    """`count` lengths around `mean`, the longest first, as decodes stand in a step, and the same at every call."""
    return [round(mean * (1 + range_ratio * (1 - (2 * index + 1) / count))) for index in range(count)]


@torch.inference_mode()
def decode_step(llm: LLM, batch_size: int, context_len: int, bandwidth: float, range_ratio: float = 0.0) -> Step:
    """Replay the graph of this batch size on rows that pretend to have `context_len` tokens on average, in scattered blocks.

    A step ends with the longest of them, and real requests differ in length.
    """
    runner, lens = llm.engine.runner, spread_lens(batch_size, context_len, range_ratio)
    graphs, rows, config = runner.graphs, runner.rows, llm.engine.config
    if graphs is None or batch_size > config.max_num_seqs or lens[0] + NUM_REPLAYS >= rows.token_ids.shape[1]:
        raise ValidationError(f"no graph for {batch_size} requests of {spoken_range(lens)} tokens: raise --max-num-seqs or "
                              "--max-model-len, and leave --enforce-eager out", parameter="batch_sizes")
    num_blocks, width = config.num_blocks or 2, rows.block_table.shape[1]
    rows.block_table[:batch_size] = torch.randint(1, num_blocks, (batch_size, width), device=rows.device, dtype=torch.int32)
    graphs.index[:batch_size] = torch.arange(batch_size, device=rows.device)
    graphs.index[batch_size:] = rows.padding_row
    size = min(bucket for bucket in graphs.graphs if bucket >= batch_size)
    milliseconds = [timed_replays(graphs.graphs[size], rows, lens) for _ in range(NUM_REPEATS)]
    kernels = profiled_replays(graphs.graphs[size])
    graphs.host_index[:] = -1  # what it says of `index` is not true any more
    num_bytes = cost.bytes_moved(llm.engine.model_config, [1] * batch_size, lens, runner.kv_cache.itemsize)
    return Step(batch_size, context_len, statistics.median(milliseconds), group_kernels(kernels), num_bytes / bandwidth * 1e3,
                range_ratio)


def timed_replays(graph: torch.cuda.CUDAGraph, rows: Any, lens: Sequence[int]) -> float:
    """Milliseconds of one replay among many. Each moves the rows one position on, so they start a little before."""
    starts = [max(0, length - 1 - NUM_REPLAYS // 2) for length in lens]
    rows.positions[: len(lens)] = torch.tensor(starts, dtype=torch.int32, device=rows.device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(NUM_REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / NUM_REPLAYS


def profiled_replays(graph: torch.cuda.CUDAGraph) -> list[tuple[str, float, int]]:
    """(kernel, microseconds a step, launches a step)."""
    return profiled(graph.replay)


def profiled(step: Callable[[], object]) -> list[tuple[str, float, int]]:
    """The same for whatever launches kernels, copies among them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(NUM_PROFILED):
            step()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.device_time_total > 0]
    return [(event.key, event.device_time_total / NUM_PROFILED, round(event.count / NUM_PROFILED)) for event in events]


def prompt_rate(llm: LLM, prompt_len: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Flops a second over prompts of this length that fill the budget of one step, the median of several rounds; its kernels."""
    count = max(1, (llm.engine.config.max_num_batched_tokens or prompt_len) // prompt_len)
    params, seconds = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False), []
    for _ in range(NUM_REPEATS + 1):
        prompts = random_prompts(llm, count, prompt_len)
        start = clock()
        llm.generate(prompts, params, use_tqdm=False)
        seconds.append(clock() - start)
    kernels = profiled(lambda: llm.generate(random_prompts(llm, count, prompt_len), params, use_tqdm=False))
    config, query_lens = llm.engine.model_config, [prompt_len] * count
    num_flops = cost.flops(config, query_lens, [(prompt_len + 1) // 2] * count)  # half of each context is in the future
    num_flops -= cost.flops_left_out(config, query_lens)
    median = statistics.median(seconds[1:])
    return {"num_prompts": count, "prompt_len": prompt_len, "seconds": median, "tokens_per_second": count * prompt_len / median,
            "flops_per_second": num_flops / median, "groups": group_kernels(kernels)}


def shared_prefix(llm: LLM) -> dict[str, float]:
    """Mean seconds to the first token of users who share a long prefix, and of the same users with a cache salt each: those
    find nothing of each other's, as without a prefix cache. All arrive at once, and the cache is empty.
    """
    prefix = random_prompts(llm, 1, PREFIX_LEN)[0]
    prompts = [prefix + suffix for suffix in random_prompts(llm, NUM_SHARING, SUFFIX_LEN)]
    means: dict[str, list[float]] = {"shared": [], "alone": []}
    for number in range(NUM_REPEATS):
        for kind in means:
            llm.reset_prefix_cache()
            salts = [f"{number}-{user}" if kind == "alone" else None for user in range(NUM_SHARING)]
            means[kind].append(mean_time_to_first_token(llm, prompts, salts))
    found = {kind: statistics.median(times) for kind, times in means.items()}
    return {"shared_seconds": found["shared"], "alone_seconds": found["alone"], "ratio": found["alone"] / found["shared"]}


def mean_time_to_first_token(llm: LLM, prompts: Sequence[list[int]], salts: Sequence[str | None]) -> float:
    engine, params = llm.engine, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
    for index, (prompt, salt) in enumerate(zip(prompts, salts)):
        engine.add_request(f"anatomy-{index}", prompt, params, cache_salt=salt)
    times = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                first, arrival = output.metrics[0].first_token, output.metrics[0].arrival
                times.append((first or arrival) - arrival)
    return statistics.mean(times)


def random_prompts(llm: LLM, count: int, length: int) -> list[list[int]]:
    top = llm.engine.model_config.vocab_size - 1
    return [[random.randint(0, top) for _ in range(length)] for _ in range(count)]


def spoken_range(lens: Sequence[int]) -> str:
    return f"{lens[0]:,}" if lens[0] == lens[-1] else f"{lens[-1]:,} - {lens[0]:,}"


def group_lines(groups: dict[str, tuple[float, int]], milliseconds: float, rest: str) -> list[str]:
    """A line for each group of kernels, and one for what they leave of `milliseconds`."""
    rows = [(group, microseconds / 1e3, count) for group, (microseconds, count) in groups.items()]
    rows.append((rest, max(0.0, milliseconds - sum(row[1] for row in rows)), 0))
    return [f"  {group:<36}{took:8.3f} ms  {took / milliseconds:5.1%}" + (f"  {count:4} launches" if count else "")
            for group, took, count in rows]


def report_lines(whole: dict[str, Any]) -> list[str]:
    """One table a batch size, then the two experiments."""
    lines = [f"Ready after {whole['ready_seconds']:.1f} s"]
    for step in whole["steps"]:
        lens = spread_lens(step["batch_size"], step["context_len"], step["range_ratio"])
        lines += ["", f"Decode, {step['batch_size']} x {spoken_range(lens)} tokens: {step['milliseconds']:.3f} ms a step, "
                  f"{step['batch_size'] / step['milliseconds'] * 1e3:,.0f} tokens/s; weights and KV alone would take "
                  f"{step['floor_milliseconds']:.3f} ms ({step['floor_milliseconds'] / step['milliseconds']:.0%})"]
        lines += group_lines(step["groups"], step["milliseconds"], "gaps between kernels")
    prompts, prefix = whole["prompts"], whole["shared_prefix"]
    rate, peak = prompts["flops_per_second"], prompts["matmul"]
    return [
        *lines, "",
        f"Prompts, {prompts['num_prompts']} x {prompts['prompt_len']} tokens: {prompts['tokens_per_second']:,.0f} tokens/s, "
        f"{rate / 1e12:.0f} TFLOP/s, {rate / peak:.0%} of a large matrix product ({peak / 1e12:.0f})",
        *group_lines(prompts["groups"], prompts["seconds"] * 1e3, "gaps, and the host before and after"), "",
        f"Shared prefix of {PREFIX_LEN} tokens, {NUM_SHARING} users at once: {prefix['shared_seconds'] * 1e3:.1f} ms to the first "
        f"token (mean), without sharing {prefix['alone_seconds'] * 1e3:.1f} ms: {prefix['ratio']:.1f}x",
        "", *environment_lines(whole["environment"])]
