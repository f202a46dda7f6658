"""The bodies of requests: every field that this server reads, with its type.

Types only. Domains (temperature in [0, 2]) are checked where the values are used, by `SamplingParams`; what other fields
mean is `fields.py`'s business. Types are strict, as in OpenAI's API: "5" is no number and 1 is no truth value. Null means
"left out" everywhere.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from minivllm.sampling_params import is_unicode
from minivllm.serve.errors import ApiError
from minivllm.serve.fields import check_fields


def _whole(value: object) -> object:
    """JSON has one kind of number, so 5.0 is the integer 5 (as JSON Schema says)."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_whole)]
TokenIds = list[int]
_STRINGS = {"type": "array", "items": {"type": "string"}}
_IDS = {"type": "array", "items": {"type": "integer"}}
# Unions are checked by hand: pydantic would report one error per branch, and none of them says what was meant.
Prompt = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, _STRINGS, _IDS, {"type": "array", "items": _IDS}]})]
Stop = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, _STRINGS, {"type": "null"}]})]


class Body(BaseModel):
    """A request body. Fields that it does not declare are kept in `model_extra` for `check`."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str | None = None

    def check(self, *, ignore_unknown: bool) -> None:
        """Raise `ApiError` for fields that are refused or unknown, and for combinations that contradict each other."""
        check_fields(self.model_extra or {}, type(self).model_fields, ignore_unknown=ignore_unknown)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(Body):
    """What completions and chat have in common: sampling, stopping, streaming, and vLLM's extras."""

    max_tokens: Int | None = None
    n: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Int | None = None
    stop: Stop = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Int | None = None
    skip_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: Int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Int | None = None
    truncation_side: Literal["left", "right"] | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    def check(self, *, ignore_unknown: bool) -> None:
        check_fields(self.model_extra or {}, type(self).model_fields, n=self.n or 1, ignore_unknown=ignore_unknown)
        self._check_stream()
        for name in ("stop", "bad_words", "cache_salt", "request_id"):
            check_is_text(name, getattr(self, name))
        if self.cache_salt is not None and not 1 <= len(self.cache_salt) <= 128:
            raise ApiError("cache_salt must have 1 to 128 characters", param="cache_salt")
        if self.request_id is not None and not 1 <= len(self.request_id) <= 256:
            raise ApiError("request_id must have 1 to 256 characters", param="request_id")

    def _check_stream(self) -> None:
        options = self.stream_options
        if self.stream and self.prompt_logprobs is not None:
            raise ApiError("`prompt_logprobs` are not available when `stream=True`.", param="prompt_logprobs")
        if options is None:
            return
        if not self.stream:
            raise ApiError("Stream options can only be defined when `stream=True`.", param="stream_options")
        for name in options.model_extra or {}:
            if name != "include_obfuscation":  # OpenAI's padding against eavesdroppers: it changes no text
                raise ApiError(f"unknown field `stream_options.{name[:100]}`", param="stream_options")
        if options.continuous_usage_stats and not options.include_usage:
            raise ApiError("`continuous_usage_stats` needs `include_usage`.", param="stream_options")

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def includes_continuous_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


def check_is_text(name: str, value: object) -> None:
    """JSON can spell half of a surrogate pair. It is no character, and no tokenizer or hash downstream takes it."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and not is_unicode(text):
            raise ApiError(f"{name} holds a lone surrogate, which is no text", param=name)


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Prompt = None
    logprobs: Int | None = None


class Message(BaseModel):
    """One turn of a conversation. Further keys go to the chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: str
    content: Annotated[Any, WithJsonSchema({"anyOf": [
        {"type": "string"}, {"type": "null"},
        {"type": "array", "items": {"type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}}}},
    ]})] = None


# What `apply_chat_template` and the templates' renderer take for themselves: as a variable each would change the call.
RESERVED_VARIABLES = frozenset(
    "self conversation conversations messages tools documents chat_template add_generation_prompt continue_final_message tokenize "
    "sanitize_control_tokens padding truncation max_length return_tensors return_dict return_assistant_tokens_mask "
    "tokenizer_kwargs".split())


class TemplateFields(Body):
    """What a chat template is given besides the messages: for chat, and for /tokenize."""

    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check_template_fields(self) -> None:
        if reserved := sorted(RESERVED_VARIABLES & (self.chat_template_kwargs or {}).keys()):
            raise ApiError(f"chat_template_kwargs must not hold {', '.join(reserved)}: these are set by other fields or by the "
                           "server", param="chat_template_kwargs")
        if self.tools is not None and not self.tools:
            raise ApiError("tools must not be an empty list: leave the field out", param="tools")
        if self.continue_final_message and self.add_generation_prompt:
            raise ApiError("Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
                           param="continue_final_message")


class ChatBody(GenerationBody, TemplateFields):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    tool_choice: Any = None

    def check(self, *, ignore_unknown: bool) -> None:
        super().check(ignore_unknown=ignore_unknown)
        self.check_template_fields()
        if self.top_logprobs and not self.logprobs:
            raise ApiError("when using `top_logprobs`, `logprobs` must be set to true.", param="top_logprobs")
        self._check_tools()

    def _check_tools(self) -> None:
        """Tools are rendered into the prompt and nothing is parsed out of the answer, so only "none" keeps its promise."""
        choice = self.tool_choice or ("auto" if self.tools else "none")
        if choice == "none":
            return
        if not self.tools and choice != "auto":
            raise ApiError("When using `tool_choice`, `tools` must be set.", param="tool_choice")
        if self.tools:
            shown = choice if isinstance(choice, str) else "named"
            raise ApiError(f'"{shown[:100]}" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set, '
                           'which minivllm does not have yet: send tool_choice "none" to have the tools rendered into the '
                           "prompt and the answer returned as text", param="tool_choice")


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: TokenIds


class TokenizeBody(TemplateFields):
    """POST /tokenize: either `prompt`, or `messages` and what goes with them."""

    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def check(self, *, ignore_unknown: bool) -> None:
        super().check(ignore_unknown=ignore_unknown)
        self.check_template_fields()
        if (self.prompt is None) == (self.messages is None):
            raise ApiError("give either `prompt` or `messages`", param="prompt")
