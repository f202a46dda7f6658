"""Many outputs on one wire: merging the streams of a request's prompts, server-sent events, and clients that leave.

Owns the two races that every answer runs: against its client, who may hang up, and against the server's end. Whoever loses,
the engine's requests are closed, which aborts them and frees their blocks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

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


class EventStream(Response):
    """Server-sent events: `data: {...}` for every chunk, then `data: [DONE]`.

    Nothing is sent before the first chunk is there, so an error that comes earlier is still a proper HTTP error; one that
    comes later is an event. `close` is called once, however it ends.
    """

    def __init__(self, chunks: AsyncGenerator[Chunk], close: Callable[[], None], stopping: asyncio.Event) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self.chunks = chunks
        self.close = close
        self.stopping = stopping
        self.has_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await race(self._send_all(scope, send), receive, self.stopping)
        except ClientGoneError:
            pass
        except Exception as error:
            if not isinstance(error, (ApiError, ValidationError, EngineDeadError)):
                logger.exception("a stream ended with an error")
            await self._send_error(error, scope, receive, send)
        finally:
            self.close()
            await self.chunks.aclose()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        writer = scope.get("minivllm.writer")  # ours, see connection.py; any other server has ASGI's way alone
        async for chunk in self.chunks:
            if not self.has_started:
                self.has_started = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            data = chunk if isinstance(chunk, bytes) else to_json(chunk)
            if writer is None:
                await self._send_event(data, send)
            else:
                await writer.write(b"data: %b\n\n" % data)
        await self._finish(send)

    async def _send_error(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.has_started:
            await error_response(error)(scope, receive, send)
            return
        await self._send_event(to_json(to_api_error(error).body()), send)
        await self._finish(send)

    async def _send_event(self, data: bytes, send: Send) -> None:
        await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

    async def _finish(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
