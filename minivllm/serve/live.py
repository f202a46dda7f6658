"""The engine, watched and held from a browser: `GET /trace` streams its flight records, `POST /control/...` steps it by hand.

    engine thread   record --> buffer of each watcher          an append, and never a wait
    event loop      buffer --> one event 30 times a second     {"paused": false, "records": [...]}

Each watcher begins with a header and a keyframe. One that is too slow is let go as soon as its buffer is full, and begins anew
once it has read what was sent, so it costs a bounded buffer and holds up nobody. Nothing is recorded while nobody watches.
Nothing here changes the engine unless the server was started with --step-control.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, Coroutine
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from minivllm.exceptions import EngineDeadError
from minivllm.serve.errors import ERROR_RESPONSES, ApiError, json_response
from minivllm.serve.streams import EventStream

if TYPE_CHECKING:
    from minivllm.serve.service import Engine, Service
    from minivllm.trace import Record, TraceRecorder

logger = logging.getLogger("minivllm.serve")
MAX_WATCHERS = 16
MAX_BUFFERED = 512  # records: half a second of a fast GPU's steps
TICK = 1 / 30  # seconds between two events
QUIET_SECONDS = 0.1  # without a step for so long, look for what changed without one
HEARTBEAT_SECONDS = 15.0  # so that proxies keep the connection
router = APIRouter(responses=ERROR_RESPONSES)
control_router = APIRouter(prefix="/control", responses=ERROR_RESPONSES)


def without_tokens(record: Record) -> Record:
    """The record with the number of sampled tokens in place of their ids: a watcher may see the engine, and not what others
    are told. Trace files keep the ids; they belong to whoever runs the server.
    """
    if "sampled" not in record:
        return record
    return {**record, "sampled": {request_id: len(token_ids) for request_id, token_ids in record["sampled"].items()}}


class Watcher:
    """One reader's buffer. The engine's thread fills it, the event loop empties it; a deque's ends are safe for that."""

    def __init__(self) -> None:
        self.records: deque[Record] = deque()
        self.recorder: TraceRecorder | None = None  # while subscribed

    def join(self, core: Any) -> None:
        """Begin with a header and a keyframe of now (on the engine's thread)."""
        self.leave(core)
        self.records.clear()
        self.recorder = core.trace
        core.trace.subscribe(self.receive)

    def leave(self, core: Any) -> None:
        if self.recorder is not None:
            self.recorder.unsubscribe(self.receive)
            self.recorder = None

    def receive(self, record: Record) -> None:
        """Take a record (on the engine's thread). With a full buffer leave: the reader will find it out and join again."""
        if len(self.records) >= MAX_BUFFERED and self.recorder is not None:
            self.leave(None)
        else:
            self.records.append(without_tokens(record))

    def take(self) -> list[Record]:
        return [self.records.popleft() for _ in range(len(self.records))]


class Live:
    """Who watches the engine, and whether somebody holds it. Belongs to the event loop."""

    def __init__(self, engine: Engine, allows_control: bool) -> None:
        self.engine = engine
        self.allows_control = allows_control
        self.is_paused = False
        self.num_watchers = 0
        self.ending = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()

    def watch(self) -> EventStream:
        """A stream of events until the reader leaves or the server ends. Raises `ApiError` (503) when too many watch."""
        if self.num_watchers >= MAX_WATCHERS:
            raise ApiError(f"{MAX_WATCHERS} pages watch this engine already: close one of them", status=503)
        self.num_watchers += 1
        if self.slows:
            logger.info("a live page watches: until it leaves the engine plans no step ahead")
        watcher = Watcher()

        def close() -> None:
            self.num_watchers -= 1
            self._soon(self.engine.call(watcher.leave))

        return EventStream(self._events(watcher), close, self.ending)

    async def _events(self, watcher: Watcher) -> AsyncGenerator[dict[str, Any]]:
        loop = asyncio.get_running_loop()
        last_sent, was_paused = loop.time(), self.is_paused
        while True:
            if not watcher.records and watcher.recorder is None:  # at the start, and after falling behind
                await self.engine.call(watcher.join)
            records, quiet = watcher.take(), loop.time() - last_sent
            if records or self.is_paused != was_paused or quiet > HEARTBEAT_SECONDS:
                last_sent, was_paused = loop.time(), self.is_paused
                yield {"paused": was_paused, "records": records}
            elif quiet > QUIET_SECONDS:
                await self.engine.call(lambda core: core.trace.refresh())
                await asyncio.sleep(QUIET_SECONDS)
            await asyncio.sleep(TICK)

    def _soon(self, work: Coroutine[Any, Any, Any]) -> None:
        """Do it without waiting: the engine may be in a long step, or at its end."""
        async def run() -> None:
            with contextlib.suppress(EngineDeadError):
                await work

        task = asyncio.ensure_future(run())
        self._background.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._background.discard)

    def require_control(self, *, paused: bool = False) -> None:
        if not self.allows_control:
            raise ApiError("This server can be watched and not held: start it with --step-control to pause and step the engine.",
                           status=HTTPStatus.FORBIDDEN, kind="PermissionDeniedError")
        if paused and not self.is_paused:
            raise ApiError("The engine is running: pause it before you step.", status=HTTPStatus.CONFLICT, kind="ConflictError")

    @property
    def slows(self) -> bool:
        """Whether watching costs more than records: an engine that plans a step ahead does not while it is watched."""
        return bool(self.engine.engine.config.async_scheduling)

    def state(self) -> dict[str, Any]:
        return {"allowed": self.allows_control, "paused": self.is_paused, "step": self.engine.engine.stats.num_steps,
                "slows": self.slows}

    def end(self) -> None:
        """The server is about to end: watchers go, and an engine that is held goes on, so that requests can finish."""
        self.ending.set()
        if self.is_paused:
            self.is_paused = False
            self._soon(self.engine.resume())


def get_service(request: Request) -> Service:
    return request.app.state.service


@router.get("/trace")
async def trace(request: Request) -> Response:
    """The engine's flight records from now on, as server-sent events."""
    service = get_service(request)
    service.check_admission()
    return service.live.watch()


@router.get("/control")
async def control(request: Request) -> Response:
    """Whether the engine may be held from here, whether it is, how many steps it has made, and if watching slows it."""
    return json_response(get_service(request).live.state())


@control_router.post("/pause")
async def pause(request: Request) -> Response:
    """Hold the engine between two steps. Requests still come in and can be aborted."""
    live = controlled(request)
    logger.warning("the engine is held from the live page: no request moves until it is resumed there")
    live.is_paused = True  # first, so that `end` knows of it while the engine is still in its step
    await live.engine.pause()
    return json_response(live.state())


@control_router.post("/step")
async def step(request: Request) -> Response:
    """Make one step of a held engine; none if nobody has anything to compute."""
    live = controlled(request, paused=True)
    await live.engine.step_once()
    return json_response(live.state())


@control_router.post("/resume")
async def resume(request: Request) -> Response:
    live = controlled(request)
    live.is_paused = False
    await live.engine.resume()
    return json_response(live.state())


def controlled(request: Request, *, paused: bool = False) -> Live:
    service = get_service(request)
    service.live.require_control(paused=paused)
    service.check_admission()
    return service.live
