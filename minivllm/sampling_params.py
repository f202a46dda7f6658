"""What a user asks of one request: how its tokens are chosen, and when it ends.

Owns `SamplingParams` and its checks, and nothing else: no tensor, no request. Every field is checked on construction, so a
wrong value never reaches the engine. What needs the model, ids inside the vocabulary say, is checked by input_processor.py.

    logits -> allowed ids -> min_tokens -> logit_bias -> penalties -> / temperature -> top_k -> top_p -> min_p -> draw

That is the order in which the fields act (sampler.py). Each of these has a value at which it does nothing, and that is its
default. A checkpoint may bring other defaults (generation_config.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minivllm.exceptions import ValidationError

MAX_STOP_STRINGS = 4  # OpenAI's limit, and vLLM's default
MAX_BAD_WORDS = 128
MAX_N = 16384
GREEDY = 0.0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass
class SamplingParams:
    """How the tokens of one request are chosen and when it ends. Checked on construction; raises `ValidationError`.

    Names, defaults and domains are vLLM's (vllm/sampling_params.py). Two differences: a temperature is used as given
    (vLLM raises 0 < t < 0.01 to 0.01), and a `logit_bias` beyond +-100 is refused (vLLM clamps it).
    """

    n: int = 1  # answers to one prompt
    temperature: float = 1.0  # logits are divided by it; 0 is argmax, exactly
    top_p: float = 1.0  # the likeliest tokens that together have this much; the one that crosses it stays
    top_k: int = 0  # the k likeliest, and who ties with the last of them; 0 and -1: off
    min_p: float = 0.0  # tokens with at least this share of the likeliest one's probability
    presence_penalty: float = 0.0  # taken from the logit of what the answer has said,
    frequency_penalty: float = 0.0  # and this as often as it has
    repetition_penalty: float = 1.0  # divides it (multiplies, below 0), for prompt and answer alike
    max_tokens: int | None = 16  # None: to the end of the context
    min_tokens: int = 0  # so many come before anything but the length can end the answer
    seed: int | None = None  # -1 means None, as in vLLM
    stop: str | Sequence[str] | None = None  # texts that end the answer, wherever tokens begin and end
    stop_token_ids: Sequence[int] | None = None  # ids that end it, beside the checkpoint's own
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False  # for benchmarks: answers of a known length
    logprobs: int | None = None  # so many of the likeliest at each token, and its own; -1: the whole vocabulary
    prompt_logprobs: int | None = None  # the same for the prompt; such a request does not read the prefix cache
    logit_bias: dict[int, float] | None = None  # added; +-100 as good as decides
    allowed_token_ids: Sequence[int] | None = None  # nothing else is ever said
    bad_words: Sequence[str] | None = None  # the last token of each is forbidden where the others stand before it
    detokenize: bool = True  # False: ids alone, no text and no work for it
    skip_special_tokens: bool = True  # they have no text in the answer

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_stops()
        self._check_token_lists()
        if self.seed == -1:  # a JSON client may have no way to say null
            self.seed = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == GREEDY

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list, whichever way it was written."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    def _require(self, holds: bool, parameter: str, wanted: str) -> None:
        """The end of the sentence says parameter and value once more, in the form in which vLLM says it."""
        if not holds:
            value = getattr(self, parameter)
            message = f"{parameter} must be {wanted}, got {value!r}. (parameter={parameter}, value={value!r})"
            raise ValidationError(message, parameter=parameter, value=value)

    def _require_number(self, parameter: str, low: float, high: float, wanted: str, *, above_low: bool = False) -> None:
        value = getattr(self, parameter)
        # NaN fails every comparison, so `low <= NaN` refuses it without a case of its own
        holds = _is_number(value) and (low < value if above_low else low <= value) and value <= high
        self._require(holds, parameter, wanted)

    def _require_int(self, parameter: str, low: int, high: float, wanted: str, *, optional: bool = False) -> None:
        value = getattr(self, parameter)
        self._require((value is None and optional) or (_is_int(value) and low <= value <= high), parameter, wanted)

    def _check_numbers(self) -> None:
        """Every number lies in its domain. True is refused for an integer: it was meant for another field."""
        self._require_number("temperature", 0, 2, "a finite number in [0, 2]")
        self._require_number("top_p", 0, 1, "in (0, 1]", above_low=True)
        self._require_number("min_p", 0, 1, "in [0, 1]")
        self._require_number("presence_penalty", -2, 2, "in [-2, 2]")
        self._require_number("frequency_penalty", -2, 2, "in [-2, 2]")
        finite = 1e30  # beyond this a float32 logit overflows
        self._require_number("repetition_penalty", 0, finite, "a finite number greater than 0", above_low=True)
        self._require_int("n", 1, MAX_N, f"an integer in [1, {MAX_N}]")
        self._require_int("top_k", -1, math.inf, "an integer >= 1, or 0 or -1 to turn it off")
        self._require_int("max_tokens", 1, math.inf, "an integer >= 1, or None for the rest of the context", optional=True)
        self._require_int("min_tokens", 0, math.inf, "an integer >= 0")
        # Looked at twice, so that a negative one is told about 0 and a large one about max_tokens.
        most = math.inf if self.max_tokens is None else self.max_tokens
        self._require_int("min_tokens", 0, most, f"at most max_tokens={self.max_tokens}")
        self._require_int("seed", -(2**63), 2**63 - 1, "a 64-bit integer or None", optional=True)
        for parameter in ("logprobs", "prompt_logprobs"):
            self._require_int(parameter, -1, math.inf, "an integer >= 0, -1 for the whole vocabulary, or None", optional=True)
        if self.n > 1 and self.is_greedy:
            raise ValidationError("n must be 1 when using greedy sampling: all n answers would be equal. "
                                  f"Set n=1 or temperature > 0, got n={self.n}.", parameter="n", value=self.n)

    def _check_stops(self) -> None:
        """An empty stop string would end every answer before it begins, and one with half a character would never come up."""
        self._require(self.stop is None or isinstance(self.stop, str) or _is_list_of(self.stop, str), "stop",
                      "a string or a list of strings")
        strings = self.stop_strings
        self._require(all(strings), "stop", "without empty strings")
        self._require(all(map(is_unicode, strings)), "stop", "valid Unicode, without lone surrogates")
        self._require(len(strings) <= MAX_STOP_STRINGS, "stop", f"a list of at most {MAX_STOP_STRINGS} strings")
        self._require(not strings or self.detokenize, "detokenize", "True when stop strings are given")
        for parameter in ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens"):
            self._require(isinstance(getattr(self, parameter), bool), parameter, "True or False")

    def _check_token_lists(self) -> None:
        """Kinds and sizes. A list is limited where every entry costs something in every step."""
        for parameter in ("stop_token_ids", "allowed_token_ids"):
            value = getattr(self, parameter)
            self._require(value is None or _is_list_of(value, int), parameter, "a list of token ids")
        self._require(self.allowed_token_ids is None or len(self.allowed_token_ids) > 0, "allowed_token_ids", "None or not empty")
        self._require(self.bad_words is None or (_is_list_of(self.bad_words, str) and all(self.bad_words)), "bad_words",
                      "a list of strings that are not empty")
        self._require(len(self.bad_words or ()) <= MAX_BAD_WORDS, "bad_words", f"a list of at most {MAX_BAD_WORDS} strings")
        self._require(all(map(is_unicode, self.bad_words or ())), "bad_words", "valid Unicode, without lone surrogates")
        bias = self.logit_bias
        self._require(bias is None or (isinstance(bias, dict) and all(_is_int(key) for key in bias)), "logit_bias",
                      "a dict from token id to bias")
        self._require(all(_is_number(b) and -100 <= b <= 100 for b in (bias or {}).values()), "logit_bias",
                      "a dict whose values lie in [-100, 100]")


def is_unicode(text: str) -> bool:
    """A str can hold half of a surrogate pair ("\\ud83d" in JSON does that), which no tokenizer and no hash can encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_list_of(value: object, kind: type) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        return False
    return all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
