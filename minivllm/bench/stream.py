"""One streamed answer, as its client sees it: when each token came. vLLM's definitions (lib/endpoint_request_func.py).

Owns what a *token chunk* is and the times of one request. Reads no clock and no socket: `on_event(payload, now)`. What a server
sends is looked at before it is used: a stream that is not OpenAI's ends in a `MalformedChunk`, whatever it holds.

    send          first token chunk     next          last
    |----- ttft -----|------ itl[0] ------|--- itl[1] ---|
    |------------------- latency (E2EL) -----------------|      tpot = (latency - ttft) / (output tokens - 1)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, TypeVar

Part = TypeVar("Part")
JSON_NAMES = {dict: "an object", list: "a list", str: "a string", int: "an integer"}
NO_TOKEN = "Never received a valid chunk to calculate TTFT. This response will be marked as failed!"
FIELDS_OF_A_TOKEN = ("content", "reasoning", "reasoning_content", "tool_calls")


class MalformedChunk(ValueError):
    """A `data:` line that is no chunk of OpenAI's API. The message says which part of it is what."""


@dataclass
class RequestRecord:
    """What became of one request. Times are seconds; `start_time` is on the bench's clock."""

    prompt_len: int  # as the bench counts, until the server's usage has told its own number
    start_time: float
    success: bool = False
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    latency: float = 0.0
    output_tokens: int = 0  # by the server's usage; 0 until that has come
    generated_text: str = ""
    error: str = ""

    @property
    def num_chunks(self) -> int:
        return len(self.itl) + 1 if self.success else 0


class StreamTimer:
    """Fills the record of one request from its events."""

    def __init__(self, record: RequestRecord, is_chat: bool = False) -> None:
        self.record = record
        self.is_chat = is_chat
        self.last_token_time = record.start_time
        self.is_done = False

    def on_event(self, payload: str, now: float) -> None:
        """Count one `data:` payload that arrived at `now`. Raises `MalformedChunk` for one that is no chunk."""
        if payload == "[DONE]":
            self.is_done = True
            return
        chunk = read_chunk(payload)
        usage = part(chunk, "usage", dict, {})
        if (error := chunk.get("error")) is not None:  # vLLM's tool overlooks this: a broken answer would count as a success
            self.record.error = self.record.error or f"the server ended the stream: {error}"
        elif (text := token_text(chunk, self.is_chat)) is not None:
            self._on_token(text, now)
        elif usage:
            self.record.output_tokens = count(usage, "completion_tokens")
            self.record.prompt_len = count(usage, "prompt_tokens") or self.record.prompt_len

    def _on_token(self, text: str, now: float) -> None:
        record = self.record
        if not record.success:
            record.success, record.ttft = True, now - record.start_time
        else:
            record.itl.append(now - self.last_token_time)
        self.last_token_time = now
        record.latency = now - record.start_time
        record.generated_text += text

    def finish(self) -> RequestRecord:
        """The record, when the stream has ended: failed if no token ever came, or if the server said so in mid-stream."""
        if not self.record.success and not self.record.error:
            self.record.error = NO_TOKEN
        self.record.success = not self.record.error
        return self.record


def token_text(chunk: dict[str, Any], is_chat: bool) -> str | None:
    """The text of a token chunk, which may be empty, or None for any other chunk: the role, the usage."""
    choices = part(chunk, "choices", list, [])
    if not choices:
        return None
    if not isinstance(choices[0], dict):
        raise MalformedChunk(f"a choice of the stream is {_shown(choices[0])}, not an object")
    if not is_chat:
        return part(choices[0], "text", str, "")
    delta = part(choices[0], "delta", dict, {})
    content = part(delta, "content", str, "")
    is_token = any(delta.get(name) for name in FIELDS_OF_A_TOKEN) or (delta.get("content") == "" and "role" not in delta)
    return content if is_token else None


# ---- Parts of a chunk ----


def read_chunk(payload: str) -> dict[str, Any]:
    """The JSON object of a payload. Raises `MalformedChunk` for anything else."""
    try:
        chunk = json.loads(payload)
    except ValueError as error:
        raise MalformedChunk(f"a chunk of the stream is no JSON ({error}): {payload[:80]!r}") from error
    if not isinstance(chunk, dict):
        raise MalformedChunk(f"a chunk of the stream is {_shown(chunk)}, not an object")
    return chunk


def part(holder: dict[str, Any], name: str, kind: type[Part], absent: Part) -> Part:
    """A field of that type, or `absent` where it is missing or null. Raises `MalformedChunk` for one of another type."""
    value = holder.get(name)
    if value is None:
        return absent
    if not isinstance(value, kind):
        raise MalformedChunk(f"{name} in the stream is {_shown(value)}, not {JSON_NAMES[kind]}")
    return value


def count(usage: dict[str, Any], name: str) -> int:
    """A number of tokens from usage, 0 where it does not tell. Raises `MalformedChunk` for what is no count."""
    value = part(usage, name, int, 0)
    if isinstance(value, bool) or value < 0:  # to Python, True is the integer 1
        raise MalformedChunk(f"{name} in the stream is {_shown(value)}, not a count")
    return value


def _shown(value: object) -> str:
    """As JSON, and no longer than a line has room for."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
