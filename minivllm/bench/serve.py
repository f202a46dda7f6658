"""`serve`: what clients of any OpenAI server see. Owns the order of a run, and the file that it leaves.

    ready? which model? -> its tokenizer makes the prompts -> warm-ups -> prefix-cache counters
        -> send every request at its time -> counters again -> page, JSON

    python -m minivllm.bench serve --port 8000 --num-prompts 100 --input-len 128 --output-len 64 --request-rate 4
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import importlib.metadata
import importlib.util
import json
import math
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from minivllm.bench import client as wire
from minivllm.bench import serve_flags
from minivllm.bench.arrivals import arrival_times, send_all
from minivllm.bench.flags import BenchError, own_command
from minivllm.bench.prompts import allowed_ids, as_prompts, named_tokenizer, tokenizer_of
from minivllm.bench.serve_metrics import ServeOptions, calculate, detailed, result_lines
from minivllm.bench.stream import RequestRecord
from minivllm.bench.workload import BenchRequest, Source, requests_from_flags
from minivllm.version import __version__


def main(argv: Sequence[str], prog: str, clock: Callable[[], float] = time.perf_counter) -> int:
    args, options = serve_flags.parse(argv, prog)
    now = datetime.now(UTC)
    args.run_id = args.run_id or now.strftime("%Y%m%d-%H%M%S-%f")
    if args.save_result or args.save_detailed:
        serve_flags.result_path(args, f"{args.label or args.backend}-.json")  # as far as its name is known before the run
    tokenizer = None if args.tokenizer is None else named_tokenizer(args.tokenizer)
    model_root = asyncio.run(find_server(args, clock))
    if tokenizer is None:
        tokenizer = choose_tokenizer(args, model_root)
    prompts, warm_ups = make_prompts(args, tokenizer), make_warm_ups(args, tokenizer)
    records, duration, hit_rate = asyncio.run(run(args, prompts, warm_ups, clock))
    count_missing_tokens(records, tokenizer)
    result = calculate(records, duration, options)
    print("\n".join(result_lines(result, options)))
    tell_more(args, records, hit_rate)
    if args.save_result or args.save_detailed:
        print(f"Result:    {save(args, options, result | {'prefix_cache_hit_rate': hit_rate}, records, now)}", file=sys.stderr)
    return 0 if result["completed"] else 1


async def find_server(args: argparse.Namespace, clock: Callable[[], float]) -> str:
    """Wait for the server if asked to, and fill in the model; returns where that was loaded from.

    A client of its own, closed before the prompts are made: the server would hang up on one that is idle for so long.
    """
    async with wire.make_client(serve_flags.api_key()) as client:
        if args.ready_check:
            await wire.wait_until_ready(client, args.base_url, args.ready_check, clock)
        if args.model:
            return args.model
        card = await wire.find_model(client, args.base_url)
        args.model = card.model_id
        return card.root


def choose_tokenizer(args: argparse.Namespace, model_root: str) -> Any:
    """The model's tokenizer, else the embedded one, which is told: lengths are then not those that were asked for."""
    tokenizer, args.tokenizer = tokenizer_of(model_root)
    if args.tokenizer != model_root:
        lengths = "" if args.token_ids else ", and their lengths in the model's tokens are others than asked for"
        print(f"No tokenizer of {model_root!r} is on this machine: prompts are made with that of {args.tokenizer}{lengths}; "
              "for its own pass --tokenizer FOLDER", file=sys.stderr)
    return tokenizer


def make_prompts(args: argparse.Namespace, tokenizer: Any) -> list[wire.Prompt]:
    """Lengths and answers from --seed, tokens from --seed and --run-id: two runs offer the same load of different text."""
    source = Source.of(args.seed, allowed_ids(tokenizer), args.run_id)
    return as_prompts(requests_from_flags(args, source), tokenizer, source, args.token_ids, args.request_id_prefix)


def make_warm_ups(args: argparse.Namespace, tokenizer: Any) -> list[wire.Prompt]:
    """As many requests as --num-warmups, of the measured ones' lengths and of tokens of their own, which no prefix shares."""
    source = Source.of(args.seed, allowed_ids(tokenizer), f"{args.run_id}/warm-up")
    requests: list[BenchRequest] = []
    while len(requests) < args.num_warmups:  # whole rounds, so that every data set can have its own number of prompts
        requests += requests_from_flags(args, source)
    return as_prompts(requests[:args.num_warmups], tokenizer, source, args.token_ids, f"{args.request_id_prefix}warm-up-")


async def run(args: argparse.Namespace, prompts: Sequence[wire.Prompt], warm_ups: Sequence[wire.Prompt],
              clock: Callable[[], float]) -> tuple[list[RequestRecord], float, float | None]:
    """Send everything; returns the records, the seconds from first send to last answer, and the server's prefix hit rate."""
    async with wire.make_client(serve_flags.api_key()) as client:
        target = wire.Target(args.base_url, args.endpoint, args.served_model_name or args.model, args.backend == "openai-chat",
                             args.ignore_eos, serve_flags.extra_body(args))
        send = functools.partial(wire.stream_one, client, target, clock=clock)
        await warm_up(send, warm_ups)
        before = await wire.read_cache_counters(client, args.base_url)
        times = arrival_times(random.Random(args.seed), len(prompts), args.request_rate, args.burstiness)
        start = clock()
        records = await send_all(prompts, times, send, clock=clock, max_concurrency=args.max_concurrency)
        duration = clock() - start
        return records, duration, wire.hit_rate(before, await wire.read_cache_counters(client, args.base_url))


async def warm_up(send: Callable[[wire.Prompt], Any], warm_ups: Sequence[wire.Prompt]) -> None:
    """Send them one after the other. Raises `BenchError` for one that fails."""
    for prompt in warm_ups:
        record = await send(prompt)
        if not record.success:
            raise BenchError(f"--num-warmups: request {prompt.request_id} failed, so none is measured: {record.error}")


def count_missing_tokens(records: Sequence[RequestRecord], tokenizer: Any) -> None:
    """A server that sends no usage: its answers are counted by the bench's tokenizer, as vLLM does."""
    for record in records:
        if record.success and not record.output_tokens:
            record.output_tokens = len(tokenizer.encode(record.generated_text, add_special_tokens=False))


def tell_more(args: argparse.Namespace, records: Sequence[RequestRecord], hit_rate: float | None) -> None:
    """What vLLM's page does not say, on stderr: the run's id, the hit rate, and why requests failed."""
    rate = "not told by the server (/metrics)" if hit_rate is None else f"{100 * hit_rate:.1f}%"
    print(f"Prefix cache hit rate of the run: {rate}. Repeat these prompts with --seed {args.seed} --run-id {args.run_id}",
          file=sys.stderr)
    num_tokens, num_chunks = (sum(counts) for counts in zip(*((one.output_tokens, one.num_chunks) for one in records)))
    if num_tokens != num_chunks:  # then ITL is the time between chunks, and TPOT the one to compare
        print(f"The server sent {num_tokens} tokens in {num_chunks} chunks", file=sys.stderr)
    failures = [record.error for record in records if not record.success]
    for error in dict.fromkeys(failures):
        print(f"Failed ({failures.count(error)} of {len(records)}): {' '.join(error.split())[:500]}", file=sys.stderr)


def save(args: argparse.Namespace, options: ServeOptions, result: dict[str, Any], records: Sequence[RequestRecord],
         now: datetime) -> Path:
    """Write vLLM's JSON under vLLM's file name, and return where."""
    date = now.strftime("%Y%m%d-%H%M%S")
    rate = args.request_rate if math.isfinite(args.request_rate) else "inf"
    whole = {"date": date, "endpoint_type": args.backend, "backend": args.backend, "label": args.label, "model_id": args.model,
             "tokenizer_id": args.tokenizer, "num_prompts": len(records), "request_rate": rate,
             "burstiness": args.burstiness, "max_concurrency": args.max_concurrency, "seed": args.seed, "run_id": args.run_id}
    whole |= result | (detailed(records) if args.save_detailed else {}) | {"environment": client_environment()}
    concurrency = "" if options.max_concurrency is None else f"-concurrency{options.max_concurrency}"
    name = f"{args.label or args.backend}-{rate}qps{concurrency}-{Path(args.model).name}-{date}.json"
    path = serve_flags.result_path(args, name)
    try:
        path.write_text(json.dumps(whole, indent=4), encoding="utf-8")
    except OSError as error:  # a disk that is full, a model whose name is too long for a file
        raise BenchError(f"--result-filename: {path} cannot be written: {error}") from error
    return path


def client_environment() -> dict[str, Any]:
    """The client's side only: the server may run anywhere, on anything."""
    found: dict[str, Any] = {"minivllm": __version__, "python": platform.python_version(), "platform": platform.platform()}
    found |= {name: importlib.metadata.version(name) for name in ("aiohttp", "transformers") if importlib.util.find_spec(name)}
    return found | {"command": own_command()}
