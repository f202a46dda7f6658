"""From a body to token ids: the four forms of `prompt`, conversations, truncation and the limit of length.

Owns what happens before the engine sees a request. Long texts are tokenised on a thread of their own, so that one of them
does not hold up everybody's stream.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from minivllm.chat import chat_text
from minivllm.exceptions import ValidationError
from minivllm.input_processor import MAX_CHARS_PER_TOKEN
from minivllm.serve.errors import ApiError
from minivllm.serve.protocol import ChatBody, CompletionBody, GenerationBody, Message, TemplateFields, TokenizeBody

MAX_PROMPTS = 1024
SHORT_TEXT = 4096  # characters: about a millisecond of tokenising, less than a thread's round trip is worth
LONGEST_TEXT = 4 * 2**20  # characters: seconds of tokenising. A text may be longer only if the model's context is
T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """What the engine runs, and the text that `echo` repeats (None: nobody sent one)."""

    token_ids: list[int]
    text: str | None = None


class PromptReader:
    """Turns bodies into prompts for one tokenizer and one context length."""

    def __init__(self, tokenizer: Any, chat_template: str | None, max_model_len: int, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        # One worker: encodings of one tokenizer in parallel would gain little and share its cache.
        self._worker = ThreadPoolExecutor(1, "minivllm-serve-tokenizer")

    def close(self) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def read_completion(self, body: CompletionBody) -> list[Prompt]:
        """Every prompt of the body. Raises `ApiError`."""
        prompts = []
        for item in split_prompts(body.prompt):
            if isinstance(item, str):
                self._refuse_absurd(len(item), body)
                encode = functools.partial(self.encode, item, body.add_special_tokens is not False)
                prompts.append(Prompt(self._fit(await self._run(len(item), encode), body), item))
            else:
                self.check_token_ids(item)
                prompts.append(Prompt(self._fit(item, body)))
        return prompts

    async def read_chat(self, body: ChatBody) -> Prompt:
        """The conversation, rendered by the chat template. Raises `ApiError` or `ValidationError`."""
        add_special_tokens = body.add_special_tokens is True
        token_ids = await self._run(_count_chars(body), lambda: self.render(body, body.messages, add_special_tokens))
        return Prompt(self._fit(token_ids, body, param="messages"))

    def render(self, body: ChatBody | TokenizeBody, messages: list[Message], add_special_tokens: bool) -> list[int]:
        """Token ids of a conversation. The template writes its special tokens itself; others are added when asked for.

        Raises `ApiError` or `ValidationError`.
        """
        self._refuse_absurd(sum(len(str(message.content)) for message in messages), body, "messages")
        continues = bool(body.continue_final_message)
        entries = [_to_template(message) for message in messages]
        try:
            text = chat_text(self.tokenizer, entries, chat_template=self.chat_template, tools=body.tools,
                             continue_final_message=continues, template_kwargs=body.chat_template_kwargs,
                             add_generation_prompt=body.add_generation_prompt is not False and not continues)
        except UnicodeError as error:  # a lone surrogate: legal in JSON, no text
            raise ApiError(f"the messages cannot be tokenised: {error}", param="messages") from error
        self._refuse_absurd(len(text), body, "messages")  # tools and other variables are part of it
        return self.encode(text, add_special_tokens, "messages")

    def encode(self, text: str, add_special_tokens: bool, param: str = "prompt") -> list[int]:
        try:
            # verbose=False: transformers would warn about long texts, and the check of length is ours
            return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))
        except (TypeError, UnicodeError) as error:  # a lone surrogate: legal in JSON, no text
            raise ApiError(f"the {param} cannot be tokenised: {error}", param=param) from error

    async def read_tokenize(self, body: TokenizeBody) -> list[int]:
        """Token ids only: what is too long for the model may still be counted."""
        if body.messages is not None:
            messages = body.messages
            return await self._run(_count_chars(body), lambda: self.render(body, messages, body.add_special_tokens is True))
        text = body.prompt or ""
        self._refuse_absurd(len(text), body)
        return await self._run(len(text), lambda: self.encode(text, body.add_special_tokens is not False))

    def check_token_ids(self, token_ids: list[int], param: str = "prompt") -> None:
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self.vocab_size):
            wrong = next(token for token in token_ids if not 0 <= token < self.vocab_size)
            raise ApiError(f"Token id {wrong} is out of vocabulary (0 to {self.vocab_size - 1}).", param=param)

    async def _run(self, num_chars: int, work: Callable[[], T]) -> T:
        if num_chars <= SHORT_TEXT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    def _refuse_absurd(self, num_chars: int, body: GenerationBody | TokenizeBody, param: str = "prompt") -> None:
        """No token has more characters than MAX_CHARS_PER_TOKEN: some texts are too long before they are tokenised.

        A text that is cut or only counted may be longer than the context, and still not of any length.
        """
        most = self.max_model_len * MAX_CHARS_PER_TOKEN
        if isinstance(body, GenerationBody) and body.truncate_prompt_tokens is None and num_chars > most:
            self._refuse_length(f"at least {math.ceil(num_chars / MAX_CHARS_PER_TOKEN)}", param)
        if num_chars > max(most, LONGEST_TEXT):
            raise ApiError(f"a text of {num_chars} characters is not tokenised: {max(most, LONGEST_TEXT)} are the most that this "
                           "server takes", param=param)

    def _fit(self, token_ids: list[int], body: GenerationBody, param: str = "prompt") -> list[int]:
        """Cut as `truncate_prompt_tokens` asks, and refuse what is still too long."""
        keep = body.truncate_prompt_tokens
        if keep is not None:
            keep = self._check_truncation(keep, body)
            token_ids = token_ids[:keep] if body.truncation_side == "right" else token_ids[-keep:]
        if len(token_ids) > self.max_model_len:
            self._refuse_length(str(len(token_ids)), param)
        return token_ids

    def _check_truncation(self, keep: int, body: GenerationBody) -> int:
        """-1 keeps as much as leaves room for max_tokens, and for one token at least."""
        if keep == -1:
            return max(self.max_model_len - max(body.max_tokens or 1, 1), 1)
        if not 1 <= keep <= self.max_model_len:
            raise ApiError(f"truncate_prompt_tokens must be -1 or in [1, {self.max_model_len}], got {keep}",
                           param="truncate_prompt_tokens")
        return keep

    def _refuse_length(self, contains: str, param: str) -> None:
        raise ApiError(
            f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains {contains} "
            "input tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input "
            "prompt.", param=param)


def split_prompts(raw: object) -> list[str | list[int]]:
    """The prompts of a body: a string, token ids, or a list of either. Raises `ApiError` for any other form."""
    if raw is None or raw in ("", []):
        raise ApiError("Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")
    if isinstance(raw, str):
        return [raw]
    if not isinstance(raw, list):
        raise ApiError(f"{PROMPT_FORMS}, got {type(raw).__name__}", param="prompt")
    if _is_ids(raw):
        return [raw]
    if len(raw) > MAX_PROMPTS:
        raise ApiError(f"at most {MAX_PROMPTS} prompts fit into one request, got {len(raw)}", param="prompt")
    for item in raw:
        if not (isinstance(item, str) or (isinstance(item, list) and _is_ids(item))):
            raise ApiError(f"{PROMPT_FORMS}, got a list that holds {str(item)[:100]!r}", param="prompt")
        if not item:
            raise ApiError("Either prompt or prompt_embeds must be provided and non-empty: one prompt of the list is empty.",
                           param="prompt")
    return list(raw)


PROMPT_FORMS = "prompt must be a string, a list of strings, a list of token ids or a list of lists of token ids"


def _count_chars(body: TemplateFields) -> int:
    """About how much a template has to render: its time decides where that is done."""
    return len(str(body))


def _is_ids(items: list[object]) -> bool:
    return all(type(item) is int for item in items)  # bool is an int in Python, but not a token


def _to_template(message: Message) -> dict[str, Any]:
    """A message as templates expect it: arguments of tool calls arrive as JSON text and are read as objects."""
    entry = message.model_dump(exclude_unset=True)
    calls = entry.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"] or "{}")
            except ValueError as error:
                raise ValidationError(f"the arguments of a tool call are no JSON: {error}", parameter="messages") from error
    return entry
