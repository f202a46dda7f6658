"""From what a user passed to the requests that the scheduler will see. Nothing is allocated before every check has passed.

Owns tokenising, the limits of lengths and ids, and the expansion of one request with n answers into n children. Knows no
block and no tensor. Every refusal is a `ValidationError` that names the parameter and the way out.

    "Hi", n=2, seed=7  ->  Request("0_r", [42, 17], seed=7), Request("1_r", [42, 17], seed=8)

What comes out of here holds:

    1 <= num_prompt_tokens < max_model_len      a prompt that fills the context leaves no room for an answer
    num_prompt_tokens + max_tokens <= max_model_len
    0 <= every token id < vocab_size            an id beyond the embedding would be an error of the device, which ends the engine

Whether the pool can ever hold the request is the scheduler's question (`Scheduler.check_fits`). vLLM: v1/engine/input_processor.py,
with images, audio and LoRA adapters.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minivllm.config import EngineConfig
from minivllm.exceptions import ValidationError
from minivllm.sampling_params import SamplingParams, is_unicode

MAX_CHARS_PER_TOKEN = 128  # no token of a Qwen vocabulary is longer: more characters than this a token can't fit


@dataclass
class ProcessedInput:
    """One checked request: what to run (`prompt_token_ids`, `params`) and what to show (`prompt`)."""

    request_id: str
    prompt: str | None  # as it was sent; None where token ids were sent, which are shown as they came
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int  # the end of the context counted in
    cache_salt: str | None = None
    arrival_time: float = 0.0
    final_only: bool = False  # vLLM's RequestOutputKind.FINAL_ONLY: no output before the last


class InputProcessor:
    """Turns a prompt in any of its forms (str, token ids, {"prompt": ...}, {"prompt_token_ids": ...}) into a `ProcessedInput`."""

    def __init__(self, config: EngineConfig, vocab_size: int, tokenizer: Any | None, eos_token_ids: Sequence[int] = ()) -> None:
        assert config.max_model_len is not None, "the engine resolves max_model_len before it takes requests"
        self.max_model_len = config.max_model_len
        # -1 is vLLM's word for "no limit", in the engine's setting as in a request's
        self.max_logprobs = vocab_size if config.max_logprobs == -1 else config.max_logprobs
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids

    def process(self, request_id: str, prompt: Any, params: SamplingParams, *, cache_salt: str | None = None,
                arrival_time: float = 0.0, final_only: bool = False) -> ProcessedInput:
        """Check and tokenise one request. Raises `ValidationError`.

        In this order: kinds, text, ids, parameters, lengths (of texts, absurd ones before they are tokenised). So a complaint
        about a length comes for a request that is right otherwise. `max_tokens=None` means to the end of the context, and a
        number beyond it means the same.
        """
        if not isinstance(params, SamplingParams):
            raise ValidationError(f"sampling_params must be SamplingParams, got {type(params).__name__}",
                                  parameter="sampling_params")
        text, token_ids = self._split(prompt)
        # A lone surrogate has no UTF-8: neither the tokenizer nor the hash of a salt nor a JSON answer could write it.
        for parameter, value in (("prompt", text), ("cache_salt", cache_salt)):
            if value is not None and not is_unicode(value):
                raise ValidationError(f"{parameter} must be valid Unicode, without lone surrogates", parameter=parameter)
        if token_ids is None:
            assert text is not None, "a prompt is text or token ids"
            token_ids = self.tokenize(text)
        self._check_token_ids("prompt", token_ids)
        self._check_params(params)
        if len(token_ids) == 0:
            raise ValidationError("The decoder prompt cannot be empty: pass at least one token", parameter="prompt", value=prompt)
        self.check_length(len(token_ids))
        room = self.max_model_len - len(token_ids)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        # Copies: the caller's list and parameters may change while the request waits.
        return ProcessedInput(request_id, text, list(token_ids), copy.copy(params), max_tokens, cache_salt, arrival_time,
                              final_only)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, special tokens in it recognised. Absurd lengths are refused before any work is done."""
        if self.tokenizer is None:
            raise ValidationError("this engine has no tokenizer (skip_tokenizer_init=True): pass token ids", parameter="prompt")
        # One thread tokenises for everybody, and a text of many megabytes would hold it up for seconds.
        if len(text) > self.max_model_len * MAX_CHARS_PER_TOKEN:
            self._refuse_length(f"at least {len(text) // MAX_CHARS_PER_TOKEN}")
        return self.tokenizer.encode(text)

    def check_length(self, num_tokens: int) -> None:
        """A prompt must leave room for at least one output token."""
        if num_tokens >= self.max_model_len:
            self._refuse_length(str(num_tokens))

    def _refuse_length(self, contains: str) -> None:
        """OpenAI's sentence: clients look for "maximum context length" to find out that they must shorten a conversation."""
        raise ValidationError(
            f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains {contains} input "
            "tokens, which leaves no room for an output token. Please reduce the length of the input prompt.", parameter="prompt")

    def _split(self, prompt: Any) -> tuple[str | None, Sequence[int] | None]:
        """(text, token ids) of a prompt in any of its forms; one of them may be None.

        The forms are vLLM's. A key that belongs to another form, `multi_modal_data` say, is refused and not ignored.
        """
        if isinstance(prompt, dict):
            text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            unknown = set(prompt) - {"prompt", "prompt_token_ids"}
            if unknown or (text is None) == (token_ids is None):  # both or neither
                raise ValidationError('a prompt given as a dict must have exactly one key, "prompt" or "prompt_token_ids", '
                                      f"got {sorted(map(str, prompt))}", parameter="prompt")
            return self._split(text if token_ids is None else token_ids)
        if isinstance(prompt, str):
            return prompt, None
        # bytes are a sequence of small integers, and would pass for token ids
        if isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
            return None, prompt
        raise ValidationError(f"a prompt must be a string or a list of token ids, got {type(prompt).__name__}", parameter="prompt")

    def _check_token_ids(self, parameter: str, token_ids: Sequence[int]) -> None:
        """Every id is an integer inside the vocabulary. True is an integer to Python, and is refused: it was meant otherwise."""
        if set(map(type, token_ids)) <= {int} and (not token_ids or 0 <= min(token_ids) <= max(token_ids) < self.vocab_size):
            return  # a few times faster than one by one: a thousand users may come with the same long prompt
        for token_id in token_ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool):
                raise ValidationError(f"{parameter} must hold token ids (integers), got {token_id!r}", parameter=parameter)
            if not 0 <= token_id < self.vocab_size:
                raise ValidationError(f"Token id {token_id} is out of vocabulary (0..{self.vocab_size - 1})", parameter=parameter)

    def _check_params(self, params: SamplingParams) -> None:
        """The checks that need the model: ids inside the vocabulary, logprobs below the engine's limit."""
        for parameter in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            self._check_token_ids(parameter, list(getattr(params, parameter) or ()))
        # Below min_tokens these are masked. Were no other id allowed, nothing could be sampled: a row of -inf has no softmax.
        ends = {*self.eos_token_ids, *(params.stop_token_ids or ())}
        if params.allowed_token_ids is not None and params.min_tokens > 0 and ends.issuperset(params.allowed_token_ids):
            raise ValidationError("allowed_token_ids holds only tokens that end the answer, and min_tokens forbids them: allow "
                                  "another token or set min_tokens=0", parameter="allowed_token_ids")
        for parameter in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, parameter)
            wanted = self.vocab_size if asked == -1 else asked  # -1: all of them
            if wanted is not None and wanted > self.max_logprobs:
                raise ValidationError(
                    f"{parameter}={asked} asks for more than the {self.max_logprobs} logprobs a token that this engine gives: "
                    "lower it, or start with a higher max_logprobs", parameter=parameter, value=asked)
        for parameter in ("stop", "bad_words"):
            if getattr(params, parameter) and self.tokenizer is None:
                raise ValidationError(f"{parameter} needs a tokenizer, and this engine has none (skip_tokenizer_init=True)",
                                      parameter=parameter)


def derive_seed(engine_seed: int, arrival_number: int, params: SamplingParams, child_index: int) -> int:
    """The seed of one child: the user's seed + its index, or a hash of where it stands in the engine's life.

    Children of one seed must differ, or n=3 would be one answer three times; neighbors are fine, since noise is a hash (lesson 4).
    So an unseeded run repeats exactly when the same engine seed sees the same requests in the same order.
    """
    if params.seed is not None:
        return _wrap_int64(params.seed + child_index)
    text = f"{engine_seed}/{arrival_number}/{child_index}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little", signed=True)


def _wrap_int64(value: int) -> int:
    """Seeds live in an int64 tensor: a large one wraps around, as adding there would, instead of being refused."""
    return (value + 2**63) % 2**64 - 2**63
