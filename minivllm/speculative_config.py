"""Lesson 12. How to guess ahead: vLLM's `speculative_config`, checked once, and what acceptance makes it pay.

Owns the keys and the break-even formula. Knows no tensor and no request.

    {"num_speculative_tokens": 4}                                  the embedded draft, beside the embedded model
    {"model": "Qwen/Qwen2.5-0.5B-Instruct", "num_speculative_tokens": 4}
    {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}

Guessing pays where a step waits for the weights and a draft is cheap, and loses where it waits for arithmetic (lesson 12). So the
start-up report says what acceptance is needed, and the counters say what it is:

    tokens a step = 1 + a + a^2 + ... + a^k        a: how often a draft is right; k: drafts a step
    worth it if that > 1 + k x cost                cost: of one draft, in steps of the model; at batch size 1

vLLM: vllm/config/speculative.py, which knows many more methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minivllm.exceptions import UnsupportedError, ValidationError

METHODS = ("draft_model", "ngram")
LOOKUP = ("prompt_lookup_max", "prompt_lookup_min")
KEYS = ("method", "model", "revision", "num_speculative_tokens", *LOOKUP)
# vLLM's keys -> the values at which they ask for nothing that minivllm lacks
NEUTRAL_KEYS: dict[str, tuple[object, ...]] = {
    "draft_tensor_parallel_size": (None, 1), "quantization": (None,), "max_model_len": (None,), "rejection_sample_method": (None,)}
LOOKUP_LENGTH = 5  # vLLM's, where neither length is given


@dataclass(frozen=True)
class SpeculativeConfig:
    """Who guesses, and how many tokens. Made by `parse`."""

    method: str
    num_speculative_tokens: int
    model: str | None = None  # of a draft_model; None: the draft inside the package
    revision: str | None = None
    prompt_lookup_max: int = LOOKUP_LENGTH  # of ngram: the longest end of the text that is looked for in it,
    prompt_lookup_min: int = LOOKUP_LENGTH  # and the shortest

    @classmethod
    def parse(cls, given: Any, *, target_is_embedded: bool) -> SpeculativeConfig | None:
        """What a user wrote; None for None. Raises `ValidationError` that names the key and what it may be."""
        if given is None:
            return None
        if not isinstance(given, Mapping):
            _refuse("", given, "an object such as {\"method\": \"ngram\", \"num_speculative_tokens\": 4}")
        values = {key: value for key, value in given.items() if value is not None}
        _check_keys(values)
        method = values.get("method", "draft_model" if "model" in values or target_is_embedded else None)
        if method not in METHODS:
            _refuse("method", method, f"one of {', '.join(METHODS)}; draft_model if `model` is given")
        _check_int(values, "num_speculative_tokens", 1)
        if method == "ngram":
            longest, shortest = _lookup_lengths(values)
            return cls("ngram", values["num_speculative_tokens"], prompt_lookup_max=longest, prompt_lookup_min=shortest)
        for key in ("model", "revision"):
            if not isinstance(values.get(key, ""), str):
                _refuse(key, values[key], "a string")
        if "model" not in values and not target_is_embedded:
            _refuse("model", None, "a model folder or id: only the embedded model has a draft of its own")
        _refuse_keys(values, LOOKUP, "draft_model looks nothing up")
        return cls("draft_model", values["num_speculative_tokens"], values.get("model"), values.get("revision"))


def check_speculation(given: Any, target_is_embedded: bool, async_scheduling: bool | None) -> None:
    """Raise `ValidationError` for a wrong `speculative_config`, and `UnsupportedError` where steps are to be planned ahead."""
    if SpeculativeConfig.parse(given, target_is_embedded=target_is_embedded) is not None and async_scheduling:
        raise UnsupportedError("async_scheduling=True cannot go with speculative_config in minivllm: drafts follow the tokens of "
                               "the step before, so steps are made in turn. Leave one of the two out",
                               parameter="async_scheduling", value=True)


def _refuse(key: str, value: object, wanted: str) -> None:
    where = f"speculative_config: `{key}`" if key else "speculative_config"
    raise ValidationError(f"{where} must be {wanted}, got {value!r}", parameter="speculative_config", value=value)


def _check_keys(values: Mapping[str, Any]) -> None:
    """Every key is known, or at a value that changes nothing."""
    for key, value in values.items():
        if key in NEUTRAL_KEYS and value not in NEUTRAL_KEYS[key]:
            raise UnsupportedError(f"speculative_config: `{key}` = {value!r} is not implemented in minivllm: leave it out",
                                   parameter="speculative_config", value=value)
        if key not in KEYS and key not in NEUTRAL_KEYS:
            _refuse("", key, f"made of the keys {', '.join(KEYS)}")


def _refuse_keys(values: Mapping[str, Any], keys: tuple[str, ...], why: str) -> None:
    for key in keys:
        if key in values:
            _refuse(key, values[key], f"left out: {why}")


def _check_int(values: Mapping[str, Any], key: str, low: int) -> None:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        _refuse(key, value, f"an integer >= {low}")


def _lookup_lengths(values: Mapping[str, Any]) -> tuple[int, int]:
    """Longest and shortest: one that is not given equals the other."""
    _refuse_keys(values, ("model", "revision"), "ngram needs no model")
    for key in LOOKUP:
        if key in values:
            _check_int(values, key, 1)
    longest = values.get(LOOKUP[0], values.get(LOOKUP[1], LOOKUP_LENGTH))
    shortest = values.get(LOOKUP[1], longest)
    if shortest > longest:
        _refuse(LOOKUP[1], shortest, f"at most prompt_lookup_max={longest}")
    return longest, shortest


# What it pays


def tokens_per_step(acceptance: float, num_drafts: int) -> float:
    """Tokens that a verification brings if each draft is right with this probability: 1 + a + a^2 + ... + a^k.

    The first draft counts if it is right, the second if both are, and the target's own token comes on top.
    """
    return sum(acceptance**position for position in range(num_drafts + 1))


def break_even(num_drafts: int, cost: float) -> float:
    """The acceptance at which k drafts of `cost` target steps each pay for themselves; above 1 if they never can.

    1 + a + ... + a^k = 1 + k cost, where reading the weights is what takes time: then k + 1 positions cost what one does.
    """
    if cost > 1:
        return 2.0
    low, high = 0.0, 1.0  # more acceptance never brings fewer tokens, so halving finds the one place
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if tokens_per_step(middle, num_drafts) < 1 + num_drafts * cost else (low, middle)
    return high


def describe(config: SpeculativeConfig, num_draft_parameters: int, num_parameters: int) -> str:
    """The line of the start-up report."""
    k, cost = config.num_speculative_tokens, num_draft_parameters / num_parameters
    if config.method == "ngram":
        lengths = f"{config.prompt_lookup_min} to {config.prompt_lookup_max}"
        return f"ngram, {k} tokens after the last {lengths}; a draft costs no forward pass, so any acceptance pays at batch 1"
    return (f"draft_model ({config.model or 'embedded draft'}), {k} tokens; a draft costs {cost:.3f} of a step "
            f"({num_draft_parameters:,} of {num_parameters:,} parameters), so at batch 1 an acceptance above "
            f"{break_even(k, cost):.0%} pays (1 + a + ... + a^{k} > 1 + {k} x {cost:.3f})")
