"""Many outputs on one wire: merging the streams of a request's prompts, server-sent events, and clients that leave.

Owns the two races that every answer runs: against its client, who may hang up, and against the server's end. Whoever loses,
the engine's requests are closed, which aborts them and frees their blocks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minivllm.exceptions import EngineDeadError, ValidationError
from minivllm.request import RequestOutput
from minivllm.serve.errors import ApiError, error_response, to_api_error, to_json

logger = logging.getLogger("minivllm.serve")
T = TypeVar("T")
Chunk = bytes | dict[str, Any]  # one event: JSON as it is sent, or what is written as it
Queue = asyncio.Queue[tuple[int, RequestOutput | Exception | None]]  # None: this stream has ended


class ClientGoneError(Exception):
    """The client has hung up: whatever is sent reaches nobody."""


async def race(work: Coroutine[Any, Any, T], receive: Receive, stopping: asyncio.Event) -> T:
    """Run `work` while its client is there and the server goes on.

    Raises `ClientGoneError` when the client leaves first and `ApiError` (503) when the server stops; `work` is then cancelled
    and has ended when this returns.
    """
    task = asyncio.ensure_future(work)
    gone, stopped = asyncio.ensure_future(_disconnected(receive)), asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait((task, gone, stopped), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientGoneError
        raise ApiError("The server is shutting down.", status=503)
    finally:
        for each in (task, gone, stopped):
            each.cancel()
        await asyncio.gather(task, gone, stopped, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def merge(streams: Sequence[AsyncIterable[RequestOutput]]) -> AsyncGenerator[tuple[int, RequestOutput]]:
    """(index of the stream, its next output), as they come.

    The queue holds one item: behind a slow reader every stream waits, and hands over its newest output later.
    """
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    queue: Queue = asyncio.Queue(1)
    pumps = [asyncio.create_task(_pump(index, stream, queue)) for index, stream in enumerate(streams)]
    try:
        num_left = len(streams)
        while num_left:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_left -= 1
            else:
                yield index, item
    finally:
        for pump in pumps:
            pump.cancel()


async def _pump(index: int, stream: AsyncIterable[RequestOutput], queue: Queue) -> None:
    try:
        async for output in stream:
            await queue.put((index, output))
        await queue.put((index, None))
    except Exception as error:
        await queue.put((index, error))


class Writer(Protocol):
    """A short way to a client's socket for the pieces of one answer (connection.py); `AsgiWriter` is the long one."""

    written_at: float

    @property
    def is_ready(self) -> bool: ...

    def post(self, data: bytes) -> None: ...

    def flush(self) -> None: ...

    async def write(self, data: bytes) -> None: ...


class AsgiWriter:
    """What any ASGI server can do: one message for each piece. It is never ready to take one without waiting."""

    is_ready = False

    def __init__(self, send: Send) -> None:
        self._send = send
        self.written_at = time.monotonic()

    def post(self, data: bytes) -> None:
        raise NotImplementedError("this writer waits for its reader")

    def flush(self) -> None:
        """Nothing is ever held back."""

    async def write(self, data: bytes) -> None:
        self.written_at = time.monotonic()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})


class EventStream(Response):
    """Server-sent events: `data: {...}` for every chunk, then `data: [DONE]`.

    Nothing is sent before the first chunk is there, so an error that comes earlier is still a proper HTTP error; one that
    comes later is an event. `push_to` is then told where further chunks may be written directly. `close` is called once,
    however it ends. With `keep_alive` seconds of silence a comment is sent, before the first chunk too: then with a status of 200.
    """

    def __init__(self, chunks: AsyncGenerator[Chunk], close: Callable[[], None], stopping: asyncio.Event,
                 push_to: Callable[[Writer], None] = lambda writer: None, keep_alive: float = 0.0) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self.chunks = chunks
        self.close = close
        self.stopping = stopping
        self.push_to = push_to
        self.keep_alive = keep_alive
        self.has_started = False
        self._starting = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer: Writer = scope.get("minivllm.writer") or AsgiWriter(send)
        try:
            await race(self._send_all(writer, send), receive, self.stopping)
        except ClientGoneError:
            pass
        except Exception as error:
            if not isinstance(error, (ApiError, ValidationError, EngineDeadError)):
                logger.exception("a stream ended with an error")
            await self._send_error(error, writer, scope, receive, send)
        finally:
            self.close()
            await self.chunks.aclose()

    async def _send_all(self, writer: Writer, send: Send) -> None:
        beat = asyncio.ensure_future(self._beat(writer, send)) if self.keep_alive else None
        try:
            async for chunk in self.chunks:
                await self._start(writer, send)
                await writer.write(b"data: %b\n\n" % (chunk if isinstance(chunk, bytes) else to_json(chunk)))
        finally:
            if beat is not None:
                beat.cancel()
        await self._finish(send)

    async def _start(self, writer: Writer, send: Send) -> None:
        if self.has_started:
            return
        async with self._starting:  # the first chunk and a comment may come at the same time
            if not self.has_started:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                self.has_started = True
                self.push_to(writer)

    async def _beat(self, writer: Writer, send: Send) -> None:
        """Write a comment, which every reader of events skips, whenever nothing was written for `keep_alive` seconds."""
        while True:
            silent = time.monotonic() - writer.written_at
            if silent >= self.keep_alive:
                await self._start(writer, send)
                await writer.write(b": keep-alive\n\n")
            else:
                await asyncio.sleep(self.keep_alive - silent)

    async def _send_error(self, error: Exception, writer: Writer, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.has_started:
            await error_response(error)(scope, receive, send)
            return
        await writer.write(b"data: %b\n\n" % to_json(to_api_error(error).body()))
        await self._finish(send)

    async def _finish(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
