"""`throughput`: tokens a second, of one engine or of several on the same token ids, side by side in one table.

Owns the command's flags and order. The model is a folder or hub id, the embedded toy, or a `--shape` with random weights.

    python -m minivllm.bench throughput --shape qwen2.5-0.5b --preset A --backend minivllm hf
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minivllm.bench import report
from minivllm.bench.backends import BACKENDS, ModelSpec, open_backend, require_installed
from minivllm.bench.cost_floor import least_bytes, measure_bandwidth, on_an_engines_stream
from minivllm.bench.environment import describe_environment
from minivllm.bench.flags import OneLineParser, add_engine_flags, engine_kwargs, flag, parse_flags, require, require_at_least
from minivllm.bench.measure import measure_all
from minivllm.bench.shapes import SHAPES, write_shape
from minivllm.bench.workload import BenchRequest, Workload, add_workload_flags, workload_from_flags
from minivllm.config import ModelConfig
from minivllm.engine_args import engine_config_from_kwargs
from minivllm.exceptions import ValidationError
from minivllm.sampling_params import SamplingParams
from minivllm.startup import decide_device
from minivllm.weights import resolve_dtype, resolve_model

CUTS = {"top_k": int, "top_p": float, "repetition_penalty": float}
NOT_HERE = {"dataset_path": "prompts are drawn, none is read from a file", "lora_path": "the engine has no adapters",
            "async_engine": "the offline engine is measured; `serve` measures the other through HTTP"}


def build_parser(prog: str) -> OneLineParser:
    parser = OneLineParser(prog=prog, allow_abbrev=False, description="Tokens a second, side by side.")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=["minivllm"], help="one or several (default: minivllm)")
    parser.add_argument("--baseline", choices=BACKENDS, help="whose speed is 1.00x (default: the first backend)")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights in a published shape, nothing to download")
    parser.add_argument("--preset", choices=("A", "B", "C"), help="a whole workload: 25 equal requests, 256 mixed ones, one alone")
    parser.add_argument("--temperature", type=float, help="(default: 1.0, or the preset's)")
    for name, kind in CUTS.items():
        parser.add_argument(flag(name), type=kind, help="what the sampler does beside it, in every engine (default: nothing)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the median counts (default: %(default)s)")
    parser.add_argument("--num-warmups", type=int, default=8, help="requests run before, untimed (default: %(default)s; vLLM's: 0)")
    parser.add_argument("--interleave", action="store_true", help="load all backends at once and let them take turns")
    parser.add_argument("--hf-batch-sizes", type=int, nargs="+", metavar="N", help="to sweep (default: all, 1/2, 1/4, 1/8)")
    parser.add_argument("--hf-max-batch-size", type=int, metavar="N", help="vLLM's way to give one")
    parser.add_argument("--hf-static-cache", action="store_true", help="static cache, and with it compiled decode (CUDA)")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="memory rate of the machine (default: measured)")
    parser.add_argument("--output-json", metavar="FILE")
    for name in NOT_HERE:
        parser.add_argument(flag(name), nargs="?", const=True, help=argparse.SUPPRESS)
    add_fixed_flags(parser)
    add_workload_flags(parser)
    add_engine_flags(parser, without=("skip_tokenizer_init", "tokenizer", "chat_template", "generation_config"))
    return parser


def add_fixed_flags(parser: argparse.ArgumentParser) -> None:
    """What scripts written for vLLM may say, and what is always so here."""
    parser.add_argument("--n", type=int, choices=(1,), help="answers to a prompt, for scripts written for vLLM")
    parser.add_argument("--disable-detokenize", action="store_true", help="always so: token ids in and out")


def main(argv: Sequence[str], prog: str, clock: Callable[[], float] = time.perf_counter) -> int:
    args = parse_flags(build_parser(prog), argv)
    check(args)
    with tempfile.TemporaryDirectory(prefix="minivllm-bench-") as folder:
        spec, model_config = choose_model(args, Path(folder))
        workload = with_cuts(workload_from_flags(args, model_config.vocab_size), args)
        require_lengths_fit(workload.requests, spec, model_config)
        whole = run(args, spec, model_config, workload, clock)
    print("\n".join(report.table_lines(whole)))
    if args.output_json:
        Path(args.output_json).write_text(json.dumps(whole, indent=4), encoding="utf-8")
    return 0


def with_cuts(workload: Workload, args: argparse.Namespace) -> Workload:
    """The workload, sampled as the flags say."""
    cuts = {name: getattr(args, name) for name in CUTS if getattr(args, name) is not None}
    named = "".join(f", {name} {value:g}" for name, value in cuts.items())
    return replace(workload, name=workload.name + named, cuts=cuts)


def check(args: argparse.Namespace) -> None:
    """Whatever can be wrong with these flags, before anything is loaded."""
    require_at_least(args, 1, "repeats")
    require_at_least(args, 0, "num_warmups")
    require_installed(args.backend)
    require(len(set(args.backend)) == len(args.backend), "backend", "each backend once", " ".join(args.backend))
    require(args.baseline in (None, *args.backend), "baseline", f"one of the backends that run ({', '.join(args.backend)})",
            args.baseline)
    require(args.bandwidth is None or 0 < args.bandwidth < float("inf"), "bandwidth", "gigabytes a second, more than 0 and finite",
            args.bandwidth)
    sampling = {name: value for name in ("temperature", *CUTS) if (value := getattr(args, name)) is not None}
    SamplingParams(**sampling)  # raises for a wrong one
    require("hf-continuous" not in args.backend or args.repetition_penalty in (None, 1), "repetition_penalty",
            "left out beside hf-continuous, where transformers drops it", args.repetition_penalty)
    for name, why in NOT_HERE.items():
        if getattr(args, name) is not None:
            raise ValidationError(f"is not implemented: {why}", parameter=name)
    check_hf_flags(args)


def check_hf_flags(args: argparse.Namespace) -> None:
    """Flags of Hugging Face's backends, which must be there then."""
    given = [name for name in ("hf_batch_sizes", "hf_max_batch_size", "hf_static_cache") if getattr(args, name)]
    if given and not {"hf", "hf-continuous"} & set(args.backend):
        raise ValidationError("is for the backends hf and hf-continuous, and none of them runs", parameter=given[0])
    require(args.hf_max_batch_size is None or args.hf_max_batch_size >= 1, "hf_max_batch_size", "1 or more", args.hf_max_batch_size)
    for size in args.hf_batch_sizes or []:
        require(size >= 1, "hf_batch_sizes", "1 or more", size)
    if args.hf_max_batch_size is not None:
        if args.hf_batch_sizes is not None:
            raise ValidationError("was given beside --hf-batch-sizes: keep one", parameter="hf_max_batch_size")
        args.hf_batch_sizes = [args.hf_max_batch_size]


def require_lengths_fit(requests: Sequence[BenchRequest], spec: ModelSpec, model_config: ModelConfig) -> None:
    """Raise before any backend has run if a request is longer than minivllm's contexts may be."""
    most = spec.engine_kwargs.get("max_model_len") or model_config.max_model_len
    longest = max(len(request.prompt_token_ids) + request.max_tokens for request in requests)
    if longest > most:
        raise ValidationError(f"is {most}, and the longest request has {longest} tokens with its answer: shorten it, or raise this",
                              parameter="max_model_len", value=most)


def choose_model(args: argparse.Namespace, folder: Path) -> tuple[ModelSpec, ModelConfig]:
    """The folder, dtype and device that all backends share. Raises before anything is loaded."""
    kwargs = engine_kwargs(args)
    if args.shape is not None:
        if "model" in kwargs or kwargs.get("load_format", "dummy") != "dummy":
            raise ValidationError(f"{args.shape} has random weights: leave --model and --load-format out", parameter="shape")
        kwargs |= {"model": str(write_shape(args.shape, folder)), "load_format": "dummy"}
    engine_config_from_kwargs(**kwargs)  # a wrong knob is told now, not after the first backend's minute
    home = resolve_model(kwargs.get("model"), kwargs.get("revision"))
    model_config = ModelConfig.from_folder(home)
    device = decide_device(kwargs.get("device", "auto"))
    if args.hf_static_cache and device.type != "cuda":
        raise ValidationError("needs CUDA: on a CPU generate compiles nothing, and a static cache only adds work",
                              parameter="hf_static_cache")
    dtype = resolve_dtype(kwargs.get("dtype", "auto"), model_config, device)
    kwargs |= {"dtype": str(dtype).removeprefix("torch."), "device": str(device)}
    return ModelSpec(str(home), dtype, device, kwargs, args.hf_batch_sizes or [], args.hf_static_cache), model_config


def run(args: argparse.Namespace, spec: ModelSpec, model_config: ModelConfig, workload: Workload,
        clock: Callable[[], float]) -> dict[str, Any]:
    """Measure, print vLLM's lines, and return the whole JSON."""
    openers = [functools.partial(open_backend, name, spec) for name in args.backend]
    with on_an_engines_stream(spec.device):
        bandwidth = args.bandwidth * 1e9 if args.bandwidth else measure_bandwidth(spec.device, clock)
        measured = measure_all(openers, workload, repeats=args.repeats, num_warmups=args.num_warmups, clock=clock,
                               interleave=args.interleave, tell=lambda line: print(line, file=sys.stderr, flush=True))
    for one in measured:
        if len(measured) > 1:
            print(f"Backend: {one.backend}")
        print("\n".join(report.vllm_lines(one)), flush=True)
    print()
    max_num_seqs = engine_config_from_kwargs(**spec.engine_kwargs).max_num_seqs
    floors = [report.Floor(least_bytes(model_config, workload.requests, spec.dtype.itemsize, one.size or max_num_seqs), bandwidth,
                           args.bandwidth is None) for one in measured]  # each with its own number of seats
    baseline = next(one for one in measured if one.backend == (args.baseline or args.backend[0]))
    model_id = args.shape or spec.engine_kwargs.get("model") or "minivllm-tiny"
    results = [report.result_json(one, baseline, floor, model_id) for one, floor in zip(measured, floors)]
    return report.whole_json(results, floors[0], workload.name, baseline.backend, workload.temperature,
                             describe_environment(spec.device, spec.dtype))
