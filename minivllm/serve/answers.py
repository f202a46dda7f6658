"""From cumulative outputs to an answer: the part that completions and chat share, whole or as a stream.

Owns the differences: what each choice has gained since it was last looked at. A whole answer is one look at the end and a
stream is one look per step, by the same code, so the two cannot disagree.

    outputs  "Par" -> "Paris" -> "Paris." (stop)        deltas  "Par", "is", "." (stop)
"""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any, Self

from minivllm.request import CompletionOutput, Logprob, RequestOutput
from minivllm.sampling_params import SamplingParams
from minivllm.serve.errors import ENCODER, ApiError, to_json
from minivllm.serve.prompts import Prompt
from minivllm.serve.protocol import GenerationBody
from minivllm.serve.service import Service, Stream
from minivllm.serve.streams import Writer, merge


@dataclass(slots=True)
class Delta:
    """What one choice has gained since the last look."""

    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None
    is_first: bool

    @property
    def is_plain(self) -> bool:
        """Text, and nothing that is said once only."""
        return not self.is_first and self.finish_reason is None and self.logprobs is None


@dataclass(slots=True)
class Progress:
    """How much of one choice has been handed out."""

    num_chars: int = 0
    num_tokens: int = 0
    is_first: bool = True
    is_finished: bool = False

    def advance(self, output: CompletionOutput) -> Delta | None:
        """What is new in `output`; None if nothing is. A new token counts even when its text is held back."""
        token_ids = output.token_ids[self.num_tokens:]
        text = output.text[self.num_chars:]
        if self.is_finished or not (token_ids or text or output.finish_reason):
            return None
        logprobs = None if output.logprobs is None else output.logprobs[self.num_tokens:]
        delta = Delta(text, token_ids, logprobs, output.finish_reason, output.stop_reason, self.is_first)
        self.num_chars += len(text)
        self.num_tokens += len(token_ids)
        self.is_first = False
        self.is_finished = output.finish_reason is not None
        return delta


@dataclass
class Usage:
    """Tokens so far. Every prompt counts once, however many answers it gets."""

    prompt_tokens: dict[int, int] = field(default_factory=dict)  # by prompt
    cached_tokens: dict[int, int] = field(default_factory=dict)
    completion_tokens: int = 0

    def see(self, prompt_index: int, output: RequestOutput) -> None:
        self.prompt_tokens[prompt_index] = len(output.prompt_token_ids)
        self.cached_tokens[prompt_index] = output.num_cached_tokens

    def body(self) -> dict[str, Any]:
        prompt_tokens = sum(self.prompt_tokens.values())
        return {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached_tokens.values())},
        }


class Answer:
    """The answer to one body. Subclasses write the choices: `choice` for a whole answer, `chunk_choices` for a stream."""

    id_prefix: str
    object_name: str
    chunk_name: str

    @classmethod
    async def admit(cls, service: Service, body: Any, header_id: str | None, prompts: Sequence[Prompt],
                    params: SamplingParams) -> Self:
        """Queue the body's requests under the client's own id (by header or body) or a random one.

        Raises `ValidationError`; nothing is queued then.
        """
        response_id = f"{cls.id_prefix}-{(header_id or body.request_id or uuid.uuid4().hex)[:256]}"
        streams = await service.admit(prompts, params, response_id, body.cache_salt, final_only=not body.stream)
        return cls(service, body, response_id, prompts, streams)

    def __init__(self, service: Service, body: Any, response_id: str, prompts: Sequence[Prompt],
                 streams: Sequence[Stream]) -> None:
        self.service = service
        self.body: GenerationBody = body
        self.prompts = prompts
        self.streams = streams
        self.n = body.n or 1
        self.usage = Usage()
        self.progress = [Progress() for _ in range(len(prompts) * self.n)]
        # id, created and model stay the same through one stream
        self.identity = {"id": response_id, "created": int(time.time()), "model": service.model_name}
        self.head = to_json({**self.identity, "object": self.chunk_name})[:-1] + b',"choices":['
        self.has_plain_chunks = not self.body.return_token_ids
        self.is_waiting = False  # `chunks` has nothing left to give, and sleeps

    def close(self) -> None:
        """Abort what has not ended."""
        for stream in self.streams:
            stream.close()

    def choice(self, index: int, output: RequestOutput, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError

    def chunk_choices(self, index: int, output: RequestOutput, delta: Delta) -> list[dict[str, Any]]:
        raise NotImplementedError

    def plain_choice(self, index: int, text: str) -> str:
        """The JSON of `chunk_choices` for a token in the middle of an answer of text alone: nearly all that is ever sent.

        Half the time of the general way, and the same bytes.
        """
        raise NotImplementedError

    def extras(self, output: RequestOutput) -> dict[str, Any]:
        """Further keys of a whole answer."""
        return {}

    def count_tokens(self, delta: Delta) -> int:
        return len(delta.token_ids)

    async def whole(self) -> dict[str, Any]:
        """The answer as one object, when all its requests have ended."""
        last: dict[int, RequestOutput] = {}
        async with aclosing(merge(self.streams)) as outputs:
            async for prompt_index, output in outputs:
                last[prompt_index] = output
        choices = []
        for prompt_index in range(len(self.prompts)):
            for index, delta in self._deltas(prompt_index, last[prompt_index]):
                choices.append(self.choice(index, last[prompt_index], delta))
        return {**self.identity, "object": self.object_name, "choices": choices, "service_tier": None,
                "system_fingerprint": self.service.fingerprint, "usage": self.usage.body(), **self.extras(last[0])}

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The answer as JSON chunks: one per choice and token, then the usage if it was asked for."""
        async with aclosing(merge(self.streams)) as outputs:
            self.is_waiting = True
            async for prompt_index, output in outputs:
                self.is_waiting = False
                for chunk in self._chunks_of(prompt_index, output):
                    yield chunk
                self.is_waiting = True
        if self.body.includes_usage:
            yield self.head + b'],"usage":%b}' % to_json(self.usage.body())

    def push_to(self, writer: Writer) -> None:
        """From now on a token in the middle of the answer is written as it arrives, and no task is woken for it.

        Only while `chunks` waits for an output and the reader keeps up: otherwise it goes the long way, where a newer one may
        overtake it. So does everything of answers that are more than text, and of several prompts.
        """
        if len(self.streams) == 1 and self.has_plain_chunks and not self.body.includes_continuous_usage:
            self.streams[0].takes = functools.partial(self._take, writer, [self._frame(index) for index in range(self.n)])

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and behind the text in a plain event of this choice."""
        before, after = self.plain_choice(index, "\0").split("\0")
        return b"data: " + self.head + before.encode(), after.encode() + b"]}\n\n"

    def _take(self, writer: Writer, frames: list[tuple[bytes, bytes]], output: RequestOutput) -> bool:
        """The same bytes as by `_chunks_of`, for a fifth of its time: this is what the loop does 64 times in a step."""
        if not (self.is_waiting and writer.is_ready):
            return False
        for completion, progress in zip(output.outputs, self.progress):
            if progress.is_first or completion.finish_reason is not None or completion.logprobs is not None:
                return False
        for (before, after), completion, progress in zip(frames, output.outputs, self.progress):
            num_tokens, text = len(completion.token_ids) - progress.num_tokens, completion.text[progress.num_chars:]
            if num_tokens or text:
                progress.num_tokens += num_tokens
                progress.num_chars += len(text)
                self.usage.completion_tokens += num_tokens
                writer.post(before + encode_basestring(text).encode("utf-8", "replace") + after)
        return True

    def _chunks_of(self, prompt_index: int, output: RequestOutput) -> list[bytes]:
        """The chunks for what is new in an output."""
        chunks = []
        for index, delta in self._deltas(prompt_index, output):
            if self.has_plain_chunks and delta.is_plain:
                choices = [self.plain_choice(index, ENCODER.encode(delta.text)).encode("utf-8", "replace")]
            else:
                choices = [to_json(choice) for choice in self.chunk_choices(index, output, delta)]
            end = b'],"usage":%b}' % to_json(self.usage.body()) if self.body.includes_continuous_usage else b"]}"
            chunks += [self.head + choice + end for choice in choices]
        return chunks

    def _deltas(self, prompt_index: int, output: RequestOutput) -> list[tuple[int, Delta]]:
        """(index in the answer, what is new) for every choice of one prompt that has moved."""
        self.usage.see(prompt_index, output)
        deltas = []
        for completion in output.outputs:
            if completion.finish_reason == "error":
                raise ApiError("Internal server error", status=500)
            index = prompt_index * self.n + completion.index
            delta = self.progress[index].advance(completion)
            if delta is not None:
                self.usage.completion_tokens += self.count_tokens(delta)
                deltas.append((index, delta))
        return deltas


def finish_fields(delta: Delta) -> dict[str, Any]:
    return {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
