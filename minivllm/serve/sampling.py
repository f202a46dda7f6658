"""From a body to `SamplingParams`: what the request says, else the checkpoint's defaults, else OpenAI's.

Owns the defaults and the limits that need the model's length. The domains of the values are `SamplingParams`' own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from minivllm.exceptions import ValidationError
from minivllm.sampling_params import SamplingParams
from minivllm.serve.errors import ApiError
from minivllm.serve.protocol import ChatBody, CompletionBody, GenerationBody

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for completions; chat has the rest of the context

# fields with the same name and meaning in a body and in SamplingParams
SHARED_FIELDS = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
    "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens",
    "allowed_token_ids", "bad_words", "prompt_logprobs",
)


def completion_params(body: CompletionBody, defaults: dict[str, Any], max_model_len: int) -> SamplingParams:
    """Raises `ApiError` or `ValidationError` that names the field.

    With `echo`, `logprobs` covers the prompt too. `max_tokens=0` with `echo` scores the prompt: one token is sampled, since
    the engine knows no request without one, and left out of the answer.
    """
    check_max_tokens("max_tokens", body.max_tokens, max_model_len)
    asked = defaults.get("max_tokens", COMPLETION_MAX_TOKENS) if body.max_tokens is None else body.max_tokens
    own: dict[str, Any] = {"max_tokens": 1 if asked == 0 and body.echo else asked, "logprobs": body.logprobs}
    if body.logprobs is not None and body.logprobs < 0:
        raise ApiError(f"`logprobs` must be 0 or more, got {body.logprobs}.", param="logprobs")
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        own["prompt_logprobs"] = body.logprobs
    return SamplingParams(**_shared(body, defaults) | own)


def chat_params(body: ChatBody, defaults: dict[str, Any], max_model_len: int) -> SamplingParams:
    """Raises `ApiError` or `ValidationError` that names the field, by chat's own name for it."""
    name = _length_field(body)
    given: int | None = getattr(body, name)
    check_max_tokens(name, given, max_model_len)
    own = {"max_tokens": defaults.get("max_tokens") if given is None else given,
           "logprobs": (body.top_logprobs or 0) if body.logprobs else None}
    with chat_names(body):
        return SamplingParams(**_shared(body, defaults) | own)


def _length_field(body: ChatBody) -> str:
    return "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"


@contextlib.contextmanager
def chat_names(body: ChatBody) -> Iterator[None]:
    """A `ValidationError` about the engine's parameters becomes an `ApiError` that speaks of chat's fields."""
    try:
        yield
    except ValidationError as error:
        names = {"max_tokens": _length_field(body), "logprobs": "top_logprobs"}
        own = error.parameter or ""
        if own not in names:
            raise
        message = str(error).replace(own, names[own], 1).replace(f"parameter={own}", f"parameter={names[own]}")
        raise ApiError(message, param=names[own]) from error


def _shared(body: GenerationBody, defaults: dict[str, Any]) -> dict[str, Any]:
    """Fields by `SamplingParams`' names: a default of the checkpoint holds where the body says nothing."""
    given = {name: getattr(body, name) for name in SHARED_FIELDS if getattr(body, name) is not None}
    if body.logit_bias is not None:
        given["logit_bias"] = {_token_id(key): bias for key, bias in body.logit_bias.items()}
    return defaults | given


def _token_id(key: str) -> int:
    """JSON's keys are strings. Only plain digits count: int() would also take " 5", "+5" and "5_0"."""
    if not (key.isascii() and key.isdigit() and len(key) < 20):
        raise ApiError(f"logit_bias keys must be token ids, got {key[:100]!r}", param="logit_bias")
    return int(key)


def check_max_tokens(name: str, given: int | None, max_model_len: int) -> None:
    """More than the whole context is a mistake; more than the room left is clamped by the engine, as in vLLM."""
    if given is not None and given > max_model_len:
        raise ApiError(f"{name}={given} cannot be greater than max_model_len={max_model_len}. "
                       "Please request fewer output tokens.", param=name)
