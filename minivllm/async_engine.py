"""The same engine for many callers at once: one thread owns it, commands go in by a queue, outputs come out once a step.

Owns the thread and the streams. No other thread ever touches the engine, so the engine needs no lock:

    event loop                          engine thread
    add_request --- command queue --->  drain commands; engine.step()
    stream      <-- one call_soon_threadsafe per step --  outputs

Between two steps is the one place where stepping can be paused and single-stepped, so that a learner can watch the
scheduler decide. vLLM has the same shape across processes (vllm/v1/engine/async_llm.py, core_client.py): JSON and text do
not share an interpreter with the engine there, and every token crosses a socket. Here a command is answered within one step.

A stream stands in `_streams` until it was handed its last output or an error, or its reader has left.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from minivllm.config import EngineConfig
from minivllm.engine import LLMEngine
from minivllm.exceptions import EngineDeadError, ValidationError
from minivllm.input_processor import ProcessedInput
from minivllm.request import RequestOutput
from minivllm.sampling_params import SamplingParams

logger = logging.getLogger("minivllm")


class RequestStream:
    """The outputs of one request, for `async for`. Cumulative, so a slow reader is handed the newest and misses nothing.

    Who stops reading early calls `close()`, and that aborts the request. Belongs to the event loop that made it.
    `takes(output)` may deal with an output as it arrives, and says whether it has: then no task is woken for it.
    """

    def __init__(self, request_id: str, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self.takes: Callable[[RequestOutput], bool] = lambda output: False
        self._abort = abort
        self._arrived = asyncio.Event()
        self._latest: RequestOutput | None = None  # one output at most: a slow reader costs no memory
        self._error: BaseException | None = None  # read after `_latest`: tokens that were made are not lost
        self._is_over = False  # the reader has had the last output, or has left: nothing is aborted any more

    def put(self, item: RequestOutput | BaseException) -> None:
        """Hand over an output or the error that ends the stream (on the event loop)."""
        if isinstance(item, BaseException):
            self._error = item
        elif self._latest is None and self.takes(item):
            return
        else:
            self._latest = item
        self._arrived.set()

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._is_over:
            raise StopAsyncIteration
        try:
            await self._arrived.wait()
        except asyncio.CancelledError:  # the task that reads was cancelled: its client has gone
            self.close()
            raise
        self._arrived.clear()
        output, self._latest = self._latest, None
        if output is None:  # the last output is read before the error that came after it
            self._is_over = True
            assert self._error is not None, "a stream wakes for an output or an error"
            raise self._error
        if self._error is not None:  # came while the output lay here: wake up again for it
            self._arrived.set()
        self._is_over = output.finished
        return output

    def close(self) -> None:
        """Abort the request unless its last output has been read."""
        if not self._is_over:
            self._is_over = True
            self._abort(self.request_id)


class AsyncEngine:
    """An `LLMEngine` on a thread of its own. Its coroutines belong to one event loop, that of the first caller."""

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.dead_error: BaseException | None = None
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._streams: dict[str, RequestStream] = {}  # event loop only
        self._loop: asyncio.AbstractEventLoop | None = None  # that of the first caller; outputs are handed over there
        self._has_ended = False  # written by the engine thread, read by all: once True it stays
        self._is_closing = False  # these three: engine thread only
        self._is_paused = False
        self._single_steps: deque[Future[None]] = deque()  # asked for while paused, each fulfilled by one step
        # One worker: a tokenizer must not be used by two threads at once.
        self._tokenizing = ThreadPoolExecutor(1, "minivllm-tokenizer")
        self._thread = threading.Thread(target=self._run, name="minivllm-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_config(cls, config: EngineConfig) -> AsyncEngine:
        return cls(LLMEngine(config))

    @property
    def errored(self) -> bool:
        """True once the engine's thread has ended by a failure: nothing more will come."""
        return self.dead_error is not None

    # On the event loop ------------------------------------------------------------------------------------------------------

    async def add_request(self, prompt: Any, params: SamplingParams, request_id: str, *, cache_salt: str | None = None,
                          final_only: bool = False, before: Callable[[LLMEngine], None] | None = None) -> RequestStream:
        """Tokenise, check and queue one request; returns the stream of its outputs, or of the last one alone.

        `before(engine)` runs on the engine's thread right before the request is queued, and refuses it by raising.

        Raises `ValidationError` before anything is streamed, and `EngineDeadError` when the engine has ended.
        """
        self._loop = asyncio.get_running_loop()
        processed = await self._process(prompt, params, request_id, cache_salt, final_only)
        if request_id in self._streams:
            raise ValidationError(f"request id {request_id!r} is in use", parameter="request_id", value=request_id)
        # The stream is there before the request is: the first step may end before `call` returns.
        stream = self._streams[request_id] = RequestStream(request_id, self._abandon)
        try:
            await self.call(functools.partial(self._enter, processed, before))
        except BaseException:  # refused, or the caller left while its request was on the way in
            stream.close()
            raise
        return stream

    async def _process(self, prompt: Any, params: SamplingParams, request_id: str, cache_salt: str | None,
                       final_only: bool) -> ProcessedInput:
        work = functools.partial(self.engine.input_processor.process, request_id, prompt, params, cache_salt=cache_salt,
                                 arrival_time=self.engine.clock(), final_only=final_only)
        if isinstance(prompt, str):  # off the event loop: a long text takes milliseconds; ids are checked at once
            return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)
        return work()

    async def generate(self, prompt: Any, params: SamplingParams, request_id: str) -> AsyncIterator[RequestOutput]:
        """`add_request` and its stream in one `async for`; closing it early aborts the request."""
        stream = await self.add_request(prompt, params, request_id)
        try:
            async for output in stream:
                yield output
        finally:
            stream.close()

    async def abort(self, request_id: str) -> None:
        """End a request in any state; unknown ids are left alone. Its blocks are free when this returns."""
        await self.call(lambda engine: self._hand_over(engine.abort_request([request_id])))

    async def pause(self) -> None:
        """Hold the engine between two steps, with none in flight. Requests still come in and can be aborted."""
        await self.call(self._pause)

    async def resume(self) -> None:
        await self.call(lambda engine: setattr(self, "_is_paused", False))

    async def step_once(self) -> None:
        """While paused, make one step; it has been made when this returns. With nothing to do it returns at once."""
        made: Future[None] = Future()
        await self.call(lambda engine: self._single_steps.append(made))
        await asyncio.wrap_future(made)

    async def call(self, function: Callable[[LLMEngine], Any]) -> Any:
        """Run `function(engine)` on the engine's thread between two steps, and return what it returns."""
        return await asyncio.wrap_future(self._submit(function))

    def _abandon(self, request_id: str) -> None:
        """The reader has left: forget its stream, and abort without waiting."""
        self._streams.pop(request_id, None)
        if not self._has_ended:  # else nothing is left to abort
            self._submit(lambda engine: engine.abort_request([request_id]))

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            if stream := self._streams.get(output.request_id):  # None: the reader left while the output was on its way
                stream.put(output)
                if output.finished:
                    del self._streams[output.request_id]

    def _fail_streams(self, error: BaseException) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.put(error)

    def shutdown(self, timeout: float = 30.0) -> None:
        """Abort everything, end the thread and close the engine. Safe to call twice, and from any thread."""
        if not self._has_ended:
            self._submit(self._begin_closing)
        self._thread.join(timeout)
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    # On the engine's thread ---------------------------------------------------------------------------------------------------

    def _submit(self, function: Callable[[LLMEngine], Any]) -> Future[Any]:
        """Queue a command (from any thread). It fails with `EngineDeadError` if the thread has ended or ends before it."""
        future: Future[Any] = Future()
        self._commands.put((functools.partial(function, self.engine), future))
        if self._has_ended:  # nobody is left to take it, so take it back
            self._refuse_commands()
        return future

    def _run(self) -> None:
        try:
            while not self._is_closing:
                self._run_commands(wait=not self._may_step())  # an idle engine sleeps here
                if self._may_step():
                    self._make_step()
                if self._single_steps:
                    self._single_steps.popleft().set_result(None)
        except BaseException as error:
            logger.exception("the engine has failed; all its requests end with an error")
            self.dead_error = error
        self._end()

    @staticmethod
    def _enter(processed: ProcessedInput, before: Callable[[LLMEngine], None] | None, engine: LLMEngine) -> None:
        if before is not None:
            before(engine)
        engine.add_processed(processed)

    def _may_step(self) -> bool:
        held = self._is_paused and not self._single_steps  # a single step that was asked for is made in spite of the pause
        return self.engine.has_unfinished_requests() and not held and not self._is_closing

    def _take_commands(self, *, wait: bool) -> Iterator[tuple[Callable[[], Any], Future[Any]]]:
        """All queued commands whose callers have not left; with `wait`, sleep until there is one."""
        with contextlib.suppress(queue.Empty):
            while True:
                function, future = self._commands.get(block=wait)
                wait = False  # sleep for the first one only
                if future.set_running_or_notify_cancel():  # False: the caller was cancelled and waits no more
                    yield function, future

    def _run_commands(self, *, wait: bool) -> None:
        """A command's exception belongs to its caller."""
        for function, future in self._take_commands(wait=wait and not self._single_steps):
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def _pause(self, engine: LLMEngine) -> None:
        """What is being computed belongs to the step before the pause; single steps are then made one after the other."""
        self._is_paused = True
        while engine.launched:
            self._make_step()

    def _make_step(self) -> None:
        try:
            outputs = self.engine.step(ahead=not self._is_paused)
        except Exception as error:
            outputs = self.engine.recover(error)  # raises where nobody can be blamed: then the thread ends
            logger.exception("a step has failed: %d requests end with an error, the others go on", len(outputs))
        self._hand_over(outputs)

    def _hand_over(self, outputs: list[RequestOutput]) -> None:
        """One wake-up of the event loop, however many requests moved."""
        if outputs:
            self._on_loop(self._deliver, outputs)  # never waits: the next step begins at once

    def _on_loop(self, function: Callable[..., None], *args: Any) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody is reading any more
                self._loop.call_soon_threadsafe(function, *args)

    def _begin_closing(self, engine: LLMEngine) -> None:
        self._is_closing = True
        self._hand_over(engine.abort_request(list(engine.output_processor.states)))

    def _end(self) -> None:
        """Let nobody wait for ever: every stream, command and single step that is still open gets an error."""
        self._has_ended = True  # first, so that a command that comes now is refused by whoever brings it
        reason = f"by a failure: {self.dead_error!r}" if self.errored else "by shutdown()"
        self._on_loop(self._fail_streams, EngineDeadError(f"the engine has ended {reason}"))
        self._refuse_commands()
        while self._single_steps:
            self._single_steps.popleft().set_exception(EngineDeadError(f"the engine has ended {reason}"))
        self.engine.close()

    def _refuse_commands(self) -> None:
        for _, future in self._take_commands(wait=False):
            future.set_exception(EngineDeadError("the engine has ended"))
