"""One streamed answer, as its client sees it: when each token came. vLLM's definitions (lib/endpoint_request_func.py).

Owns what a *token chunk* is and the times of one request. Reads no clock and no socket: `on_event(payload, now)`.

    send          first token chunk     next          last
    |----- ttft -----|------ itl[0] ------|--- itl[1] ---|
    |------------------- latency (E2EL) -----------------|      tpot = (latency - ttft) / (output tokens - 1)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

NO_TOKEN = "Never received a valid chunk to calculate TTFT. This response will be marked as failed!"
FIELDS_OF_A_TOKEN = ("content", "reasoning", "reasoning_content", "tool_calls")


@dataclass
class RequestRecord:
    """What became of one request. Times are seconds; `start_time` is on the bench's clock."""

    prompt_len: int
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
        """Count one `data:` payload that arrived at `now`. Raises `ValueError` for one that is not JSON."""
        if payload == "[DONE]":
            self.is_done = True
            return
        chunk = json.loads(payload)
        if "error" in chunk:  # vLLM's tool overlooks this, and would count a broken answer as a success
            self.record.error = self.record.error or f"the server ended the stream: {chunk['error']}"
        elif (text := token_text(chunk, self.is_chat)) is not None:
            self._on_token(text, now)
        elif usage := chunk.get("usage"):
            self.record.output_tokens = usage.get("completion_tokens") or 0

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
    choices = chunk.get("choices")
    if not choices:
        return None
    if not is_chat:
        return choices[0].get("text") or ""
    delta = choices[0].get("delta") or {}
    is_token = any(delta.get(name) for name in FIELDS_OF_A_TOKEN) or (delta.get("content") == "" and "role" not in delta)
    return (delta.get("content") or "") if is_token else None
