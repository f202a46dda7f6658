"""What is computed: prompts as token ids, and how many tokens each is to be answered with. A pure function of the seed.

Owns the data sets `random` and `prefix_repetition` (vLLM's, vllm/benchmarks/datasets.py) and the presets of this project's
ledger. No torch, no tokenizer, no clock.

    random              every token drawn by itself. vLLM counts up from a drawn id, so that two prompts may be equal where the
                        vocabulary is small, and a prefix cache would be paid for it
    prefix_repetition   num_prefixes prefixes, each shared by num_prompts // num_prefixes prompts, shuffled
    preset B            256 prompts and answers of 100 to 1,024 tokens, drawn exactly as nano-vllm's bench.py draws them
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from minivllm.bench.flags import flag, require, require_at_least
from minivllm.exceptions import ValidationError

T = TypeVar("T")
DATASETS = ("random", "prefix_repetition")
LENGTHS = ("num_prompts", "input_len", "output_len", "random_input_len", "random_output_len", "random_range_ratio",
           "random_prefix_len")
DEFAULT_LENGTHS = {"random_input_len": 1024, "random_output_len": 128, "random_range_ratio": 0.0,
                   "random_prefix_len": 0}
PREFIX_LENGTHS = {"prefix_len": 256, "suffix_len": 256, "num_prefixes": 10, "output_len": 128}


@dataclass(frozen=True)
class BenchRequest:
    """One prompt and the exact number of tokens that it is to be answered with."""

    prompt_token_ids: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival, how they are sampled, and a name for the report."""

    name: str
    requests: list[BenchRequest]
    temperature: float = 1.0
    cuts: Mapping[str, float] = field(default_factory=dict)  # top_k, top_p, repetition_penalty where given: all engines' names

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.prompt_token_ids) for request in self.requests)

    @property
    def num_output_tokens(self) -> int:
        return sum(request.max_tokens for request in self.requests)


@dataclass(frozen=True)
class Source:
    """Where a workload is drawn from. Two sources of random numbers, so that a second run may ask for the same lengths in the
    same order with other tokens."""

    lengths: random.Random
    tokens: random.Random
    allowed_ids: Sequence[int]

    @classmethod
    def of(cls, seed: int, allowed_ids: Sequence[int], run_id: str = "") -> Source:
        return cls(random.Random(seed), random.Random(f"{seed}/{run_id}"), allowed_ids)

    def draw(self, num_tokens: int) -> list[int]:
        return self.tokens.choices(self.allowed_ids, k=num_tokens)


def random_requests(source: Source, num_prompts: int, input_len: int, output_len: int, range_ratio: float = 0.0,
                    prefix_len: int = 0) -> list[BenchRequest]:
    """vLLM's RandomDataset: lengths uniform in length * (1 +- range_ratio), behind one shared prefix of `prefix_len`."""
    rng, prefix = source.lengths, source.draw(prefix_len)
    lengths = [(draw_length(rng, input_len, range_ratio, 0 if prefix_len else 1), draw_length(rng, output_len, range_ratio))
               for _ in range(num_prompts)]
    return [BenchRequest(prefix + source.draw(num_inner), max_tokens) for num_inner, max_tokens in lengths]


def draw_length(rng: random.Random, mean: int, range_ratio: float, low: int = 1) -> int:
    """Uniform from floor(mean * (1 - ratio)) to ceil(mean * (1 + ratio)), both included, and never below `low`."""
    shortest = max(low, math.floor(mean * (1 - range_ratio)))
    return rng.randint(shortest, max(shortest, math.ceil(mean * (1 + range_ratio))))


def prefix_repetition_requests(source: Source, num_prompts: int, prefix_len: int, suffix_len: int, num_prefixes: int,
                               output_len: int) -> list[BenchRequest]:
    """vLLM's PrefixRepetitionRandomDataset. The remainder of num_prompts / num_prefixes is dropped, as there."""
    requests = []
    for _ in range(num_prefixes):
        prefix = source.draw(prefix_len)
        for _ in range(num_prompts // num_prefixes):
            requests.append(BenchRequest(prefix + source.draw(suffix_len), output_len))
    source.lengths.shuffle(requests)
    return requests


def preset(name: str, rng: random.Random, vocab_size: int) -> Workload:
    """A, B or C: many equal requests, many unequal ones, and one alone."""
    top = min(10_000, vocab_size - 1)
    if name == "B":  # the order of these draws is nano-vllm's: first all prompts, then all answers
        prompts = [[rng.randint(0, top) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
        requests = [BenchRequest(ids, rng.randint(100, 1024)) for ids in prompts]
        return Workload("B: 256 prompts of 100 to 1,024 tokens, answers of 100 to 1,024", requests, 0.6)
    num_prompts, output_len, temperature = {"A": (25, 128, 1.0), "C": (1, 256, 0.0)}[name]
    requests = [BenchRequest([rng.randint(0, top) for _ in range(64)], output_len) for _ in range(num_prompts)]
    return Workload(f"{name}: {num_prompts} x 64 tokens, {output_len} out", requests, temperature)


# ---- Flags ----


def add_workload_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workload")
    group.add_argument("--dataset-name", choices=DATASETS, help="(default: random)")
    group.add_argument("--num-prompts", type=int, help="(default: 1000)")
    group.add_argument("--input-len", type=int, help="the same as --random-input-len")
    group.add_argument("--output-len", type=int, help="the same as --random-output-len, and as --prefix-repetition-output-len")
    for name in LENGTHS[3:]:
        kind, also = float if name == "random_range_ratio" else int, ["--prefix-len"] if name == "random_prefix_len" else []
        group.add_argument(flag(name), *also, type=kind, help=f"(default: {DEFAULT_LENGTHS[name]})")
    for name, default in PREFIX_LENGTHS.items():
        group.add_argument(flag(f"prefix_repetition_{name}"), type=int, help=f"(default: {default})")


def requests_from_flags(args: argparse.Namespace, source: Source) -> list[BenchRequest]:
    """The requests that the flags describe. Raises `ValidationError` that names the flag at fault."""
    num_prompts = _pick(args.num_prompts, 1000)
    require(num_prompts >= 1, "num_prompts", "1 or more", num_prompts)
    if args.dataset_name == "prefix_repetition":
        _refuse_given(args, ["input_len", *LENGTHS[3:]], "dataset_name", "prefix_repetition has --prefix-repetition-* in its place")
        lengths = {name: _pick(getattr(args, f"prefix_repetition_{name}"), default) for name, default in PREFIX_LENGTHS.items()}
        if args.prefix_repetition_output_len is None:
            lengths["output_len"] = _pick(args.output_len, lengths["output_len"])
        for name, value in lengths.items():
            require(value >= 1, f"prefix_repetition_{name}", "1 or more", value)
        num_prefixes = lengths["num_prefixes"]
        require(num_prompts >= num_prefixes, "num_prompts", f"at least the {num_prefixes} prefixes", num_prompts)
        return prefix_repetition_requests(source, num_prompts, **lengths)
    _refuse_given(args, [f"prefix_repetition_{name}" for name in PREFIX_LENGTHS], "dataset_name",
                  "random has no prefixes to repeat: pass --dataset-name prefix_repetition")
    return random_requests(source, num_prompts, *_random_lengths(args))


def _random_lengths(args: argparse.Namespace) -> tuple[int, int, float, int]:
    for short in ("input_len", "output_len"):
        if getattr(args, short) is not None and getattr(args, f"random_{short}") is not None:
            raise ValidationError(f"was given beside --{short.replace('_', '-')}: keep one", parameter=f"random_{short}")
    chosen = argparse.Namespace(**{name: _pick(getattr(args, name), default) for name, default in DEFAULT_LENGTHS.items()})
    chosen.random_input_len = _pick(args.input_len, chosen.random_input_len)
    chosen.random_output_len = _pick(args.output_len, chosen.random_output_len)
    require_at_least(chosen, 1, "random_input_len", "random_output_len")
    require_at_least(chosen, 0, "random_prefix_len")
    require(0 <= chosen.random_range_ratio < 1, "random_range_ratio", "in [0, 1)", chosen.random_range_ratio)
    return chosen.random_input_len, chosen.random_output_len, chosen.random_range_ratio, chosen.random_prefix_len


def workload_from_flags(args: argparse.Namespace, vocab_size: int) -> Workload:
    """The whole workload of `throughput`: a preset, or a data set and its lengths."""
    seed = args.seed or 0
    if args.preset is not None:
        _refuse_given(args, ["dataset_name", *LENGTHS, *(f"prefix_repetition_{name}" for name in PREFIX_LENGTHS)], "preset",
                      f"{args.preset} decides the lengths: leave one of the two out")
        made = preset(args.preset, random.Random(seed), vocab_size)
        return Workload(made.name, made.requests, _pick(args.temperature, made.temperature))
    requests = requests_from_flags(args, Source.of(seed, range(vocab_size)))
    name = f"{args.dataset_name or 'random'}: {describe(requests)}"
    return Workload(name, requests, _pick(args.temperature, 1.0))


def describe(requests: Sequence[BenchRequest]) -> str:
    """"25 prompts of 64 tokens, 128 out", or the ranges where they differ."""
    prompts, answers = ([len(request.prompt_token_ids) for request in requests], [request.max_tokens for request in requests])
    return f"{len(requests):,} prompts of {_span(prompts)} tokens, {_span(answers)} out"


def _span(lengths: Sequence[int]) -> str:
    low, high = min(lengths), max(lengths)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _pick(given: T | None, default: T) -> T:
    return default if given is None else given


def _refuse_given(args: argparse.Namespace, names: Iterable[str], parameter: str, why: str) -> None:
    given = [name for name in names if getattr(args, name) is not None]
    if given:
        raise ValidationError(f"{flag(given[0])} was given, and {why}", parameter=parameter)
