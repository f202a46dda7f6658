"""`speculation`: what guessing ahead brings at a known acceptance, and where it loses.

Owns the comparison of two engines of one model: one that does not guess, in its best form (one step ahead), and one that verifies
k guesses a request. The guesses come from a replay (replay.py) and cost nothing, so what is measured is verification; what a
draft model takes on top is in the break-even formula of the start-up report.

    python -m minivllm.bench speculation --shape qwen2.5-0.5b --num-speculative-tokens 4 --acceptance 0.5 0.7 0.9 --batch-size 1 16

In float32 both engines say the same. In bfloat16 kernels change with the number of rows, so their answers may part where two
tokens are nearly equal, and from there on a replay of the other engine's answer would be wrong by no fault of speculation. So the
replay of a run is what the run before it has said, the first runs are not timed, and the table shows what was *measured*: the
share of the guesses reached that were right (a guess behind a wrong one is not reached), and how many answers differ from those
of the engine that does not guess. Should runs part from each other, the measured share and the speed fall together.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minivllm.bench.backends import ModelSpec, release_memory
from minivllm.bench.environment import describe_environment, environment_lines
from minivllm.bench.flags import OneLineParser, add_engine_flags, parse_flags, require, require_at_least
from minivllm.bench.replay import ReplayProposer
from minivllm.bench.shapes import SHAPES
from minivllm.bench.throughput import choose_model
from minivllm.llm import LLM
from minivllm.sampling_params import SamplingParams
from minivllm.speculative_config import break_even, tokens_per_step

Run = dict[str, Any]


def build_parser(prog: str) -> OneLineParser:
    parser = OneLineParser(prog=prog, allow_abbrev=False, description="What guessing ahead brings at a known acceptance.")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights in a published shape, nothing to download")
    parser.add_argument("--num-speculative-tokens", type=int, default=4, metavar="K", help="guesses (default: %(default)s)")
    parser.add_argument("--acceptance", type=float, nargs="+", default=[0.5, 0.7, 0.9], metavar="A",
                        help="share of right guesses (default: 0.5 0.7 0.9)")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 4, 16, 64], metavar="N", help="(default: 1 4 16 64)")
    for name, default in (("input-len", 64), ("output-len", 256), ("num-warmups", 2), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="seeded where it is not 0 (default: %(default)s)")
    parser.add_argument("--output-json", metavar="FILE")
    parser.set_defaults(hf_batch_sizes=None, hf_static_cache=False)
    add_engine_flags(parser, without=("skip_tokenizer_init", "tokenizer", "chat_template", "generation_config", "async_scheduling",
                                      "speculative_config"))
    return parser


def main(argv: Sequence[str], prog: str, clock: Callable[[], float] = time.perf_counter) -> int:
    args = parse_flags(build_parser(prog), argv)
    require_at_least(args, 1, "num_speculative_tokens", "input_len", "output_len", "repeats")
    require_at_least(args, 0, "num_warmups")
    require(min(args.batch_size) >= 1, "batch_size", "1 or more", min(args.batch_size))
    require(all(0 <= share <= 1 for share in args.acceptance), "acceptance", "shares from 0 to 1", args.acceptance)
    args.max_num_seqs = args.max_num_seqs or max(args.batch_size)
    args.max_model_len = args.max_model_len or args.input_len + args.output_len
    with tempfile.TemporaryDirectory(prefix="minivllm-bench-") as folder:
        spec, model_config = choose_model(args, Path(folder))
        spec.engine_kwargs = {"enable_prefix_caching": False} | spec.engine_kwargs
        whole = compare(args, spec, model_config.vocab_size, clock)
    print("\n".join(report_lines(whole)))
    if args.output_json:
        Path(args.output_json).write_text(json.dumps(whole, indent=4), encoding="utf-8")
    return 0


def compare(args: argparse.Namespace, spec: ModelSpec, vocab_size: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Run both engines, one after the other, and return the whole JSON."""
    k, rng = args.num_speculative_tokens, random.Random(args.seed or 0)
    prompts = [[rng.randrange(vocab_size) for _ in range(args.input_len)] for _ in range(max(args.batch_size))]
    # Only its number of tokens counts: the proposer is replaced.
    asked = {"method": "ngram", "num_speculative_tokens": k}
    seconds, plain, answers = measure_plain(args, spec.engine_kwargs, prompts, clock)
    rows, guessing_seconds = measure_guessing(args, spec.engine_kwargs | {"speculative_config": asked}, prompts, answers,
                                              vocab_size, clock)
    return {"model_id": args.shape or spec.engine_kwargs.get("model") or "minivllm-tiny", "num_speculative_tokens": k,
            "input_len": args.input_len, "output_len": args.output_len, "temperature": args.temperature,
            "ready_seconds": {"plain": seconds, "speculating": guessing_seconds}, "plain": plain,
            "rows": [combine(row, next(one for one in plain if one["batch_size"] == row["batch_size"]), k) for row in rows],
            "environment": describe_environment(spec.device, spec.dtype)}


def open_engine(kwargs: dict[str, Any], clock: Callable[[], float]) -> tuple[LLM, float]:
    tell("loading " + ("an engine that verifies" if "speculative_config" in kwargs else "the plain engine"))
    start = clock()
    llm = LLM(**(kwargs | {"skip_tokenizer_init": True}))
    return llm, clock() - start


def measure_plain(args: argparse.Namespace, kwargs: dict[str, Any], prompts: list[list[int]],
                  clock: Callable[[], float]) -> tuple[float, list[Run], dict[int, list[list[int]]]]:
    """Seconds to be ready, a row for each batch size, and the answers to it."""
    llm, ready = open_engine(kwargs, clock)
    rows, answers = [], {}
    for size in args.batch_size:
        runs = [run_once(llm, prompts[:size], args, clock) for _ in range(args.num_warmups + args.repeats)]
        rows.append({"batch_size": size} | summary([run for run, _ in runs[args.num_warmups:]], size * args.output_len))
        answers[size] = runs[-1][1]
        tell(f"plain, batch {size}: {rows[-1]['output_tokens_per_second']:,.0f} tokens/s")
    llm.close()
    release_memory()
    return ready, rows, answers


def measure_guessing(args: argparse.Namespace, kwargs: dict[str, Any], prompts: list[list[int]],
                     answers: dict[int, list[list[int]]], vocab_size: int, clock: Callable[[], float]) -> tuple[list[Run], float]:
    """A row for each batch size and acceptance, and the seconds to be ready. Every run replays what the one before has said."""
    llm, ready = open_engine(kwargs, clock)
    proposer = ReplayProposer(args.num_speculative_tokens, vocab_size, args.seed or 0)
    llm.engine.proposer = llm.engine.scheduler.proposer = proposer  # type: ignore[attr-defined]
    rows = []
    for size in args.batch_size:
        said = answers[size]
        for acceptance in args.acceptance:
            runs = []
            for _ in range(args.num_warmups + args.repeats):
                proposer.learn(prompts[:size], said, acceptance)
                run, said = run_once(llm, prompts[:size], args, clock)
                run["num_complete"] += proposer.num_short_ends
                runs.append(run)
            differing = sum(one != other for one, other in zip(said, answers[size]))
            rows.append({"batch_size": size, "acceptance": acceptance, "num_differing_answers": differing}
                        | summary(runs[args.num_warmups:], size * args.output_len))
            tell(f"acceptance {acceptance:g}, batch {size}: {rows[-1]['output_tokens_per_second']:,.0f} tokens/s")
    llm.close()
    release_memory()
    return rows, ready


def run_once(llm: LLM, prompts: list[list[int]], args: argparse.Namespace,
             clock: Callable[[], float]) -> tuple[Run, list[list[int]]]:
    """Answer all prompts at once: seconds and counters, and the answers."""
    llm.reset_prefix_cache()
    params = [SamplingParams(temperature=args.temperature, seed=number, max_tokens=args.output_len, ignore_eos=True,
                             detokenize=False) for number in range(len(prompts))]
    before = counters(llm)
    start = clock()
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    seconds = clock() - start
    return {"seconds": seconds} | {name: now - before[name] for name, now in counters(llm).items()}, [
        output.outputs[0].token_ids for output in outputs]


def counters(llm: LLM) -> dict[str, int]:
    """Counts since the start; `num_complete` are verifications in which all of k guesses were right."""
    stats, k = llm.stats, llm.engine.runner.num_drafts
    complete = stats.num_accepted_tokens_per_pos[k - 1] if 0 < k == len(stats.num_accepted_tokens_per_pos) else 0
    return {"num_steps": stats.num_steps, "num_drafts": stats.num_drafts, "num_draft_tokens": stats.num_draft_tokens,
            "num_accepted_tokens": stats.num_accepted_tokens, "num_complete": complete, "num_preemptions": stats.num_preemptions}


def summary(runs: Sequence[Run], num_tokens: int) -> Run:
    """The median of the runs' seconds, what follows from it, and the counters of the last run."""
    seconds, last = statistics.median(run["seconds"] for run in runs), runs[-1]
    return last | {"seconds": [run["seconds"] for run in runs], "output_tokens_per_second": num_tokens / seconds,
                   "milliseconds_per_step": seconds / last["num_steps"] * 1e3}


def combine(row: Run, plain: Run, k: int) -> Run:
    """A row beside the one without guesses.

    A verification costs `cost` plain steps. It pays where it brings more tokens than that: 1 + a + ... + a^k > cost.
    """
    cost = row["milliseconds_per_step"] / plain["milliseconds_per_step"]
    drafts, accepted = row["num_drafts"], row["num_accepted_tokens"]
    num_reached = accepted + drafts - row["num_complete"]  # every other verification ends at a wrong guess
    return row | {
        "plain_output_tokens_per_second": plain["output_tokens_per_second"],
        "plain_milliseconds_per_step": plain["milliseconds_per_step"],
        "speedup": row["output_tokens_per_second"] / plain["output_tokens_per_second"], "cost": cost,
        "measured_acceptance": accepted / max(1, num_reached), "tokens_per_verification": 1 + accepted / max(1, drafts),
        "expected_tokens_per_verification": tokens_per_step(row["acceptance"], k),
        "break_even_acceptance": break_even(k, max(0.0, cost - 1) / k)}


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


COLUMNS = ("batch", "acceptance", "measured", "tokens/step", "plain tok/s", "guessing tok/s", "speedup", "plain ms", "verify ms",
           "pays above", "differ")


def report_lines(whole: dict[str, Any]) -> list[str]:
    """The table, what its columns mean, and where it was measured."""
    rows = [COLUMNS, *(_cells(row) for row in whole["rows"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    k = whole["num_speculative_tokens"]
    return [*lines, "",
            f"Workload:  prompts of {whole['input_len']} tokens, answers of {whole['output_len']}, temperature "
            f"{whole['temperature']:g}, EOS ignored; {k} guesses a step, the given share of them right",
            f"Model:     {whole['model_id']}",
            f"Pays:      where 1 + a + ... + a^{k} > cost; cost = verify ms / plain ms, and a is the acceptance in `pays above`",
            "Measured:  share of the guesses reached that were right; differ: answers that are not those of the plain engine",
            *environment_lines(whole["environment"])]


def _cells(row: Run) -> tuple[str, ...]:
    pays = f"{row['break_even_acceptance']:.0%}" if row["break_even_acceptance"] <= 1 else "never"
    return (str(row["batch_size"]), f"{row['acceptance']:g}", f"{row['measured_acceptance']:.3f}",
            f"{row['tokens_per_verification']:.2f}", f"{row['plain_output_tokens_per_second']:,.0f}",
            f"{row['output_tokens_per_second']:,.0f}", f"{row['speedup']:.2f}x", f"{row['plain_milliseconds_per_step']:.3f}",
            f"{row['milliseconds_per_step']:.3f}", pays, f"{row['num_differing_answers']} of {row['batch_size']}")
