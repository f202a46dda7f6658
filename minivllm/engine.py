"""The engine: requests go in, steps are made, outputs come out. One loop, and it reads like the sentence
*schedule, run, sample, update*.

The device never waits for the host if that is one step ahead (`async_scheduling`): it plans and launches step N+1, and then
takes in what N has sampled. Who ended with N is found out one step late, and what N+1 computed for them is dropped.

    in turns     schedule 1, run 1 | update 1 | schedule 2, run 2 | update 2 | ...
    one ahead    schedule 1, launch 1 | schedule 2, launch 2 | wait for 1, update 1 | schedule 3, launch 3 | wait for 2, ...

Owns the place where scheduler, model runner and text meet, and nothing that they own: only the scheduler changes queues,
only the KV manager changes block tables, only the runner holds tensors. Not thread-safe: one thread calls it.

    engine.add_request("r1", "Hello", SamplingParams(max_tokens=8))
    while engine.has_unfinished_requests():
        for output in engine.step(): ...

Between two calls, whatever has failed:

    steps in `launched` == steps in `scheduler.in_flight`, in the same order; at most one of them
    children in `output_processor.parents` == requests in `scheduler.requests`

vLLM has the same loop in v1/engine/core.py, in a process of its own: text and stop strings (v1/engine/output_processor.py) are
then work for another core. Here they cost the one thread some microseconds a token, and one process is easier to follow.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from minivllm import startup
from minivllm.config import EngineConfig
from minivllm.exceptions import EngineDeadError, ValidationError
from minivllm.input_processor import InputProcessor, ProcessedInput, derive_seed
from minivllm.kv_cache import KVCacheManager
from minivllm.model_runner import ModelRunner
from minivllm.output_processor import OutputProcessor
from minivllm.recovery import Recovery
from minivllm.request import Request, RequestOutput, RequestStatus
from minivllm.sampling_params import SamplingParams
from minivllm.scheduler import Scheduler
from minivllm.scheduler_output import LaunchedStep, ModelOutput, SchedulerOutput, SchedulerStats
from minivllm.speculative import SpeculatingScheduler
from minivllm.trace import TraceRecorder


class LLMEngine:
    """A loaded model and everything that serves it. `stats` counts all work; `trace` records steps when asked for.

    `clock` gives seconds from any beginning, for the times of requests alone: no decision depends on it, so a run repeats.
    """

    def __init__(self, config: EngineConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        started = startup.start(config)  # may raise, with everything given back: then there is no engine
        self.config = started.config  # every size decided; from here on nothing changes it
        self.model_config = started.model_config
        self.tokenizer = started.tokenizer
        self.eos_token_ids = started.defaults.eos_token_ids
        self.default_sampling_params = started.defaults.sampling
        self.chat_template = started.chat_template
        self.report = started.report
        self.clock = clock
        self.runner: ModelRunner = started.runner
        # Scheduler and KV manager come last: they hold no memory of the device, and start from sizes that exist by now.
        num_blocks, block_size, max_model_len = startup.resolved_sizes(self.config)
        self.kv_cache_manager = KVCacheManager(num_blocks, block_size, self.config.enable_prefix_caching, max_model_len)
        self.proposer = started.proposer
        self.scheduler = Scheduler(self.config, self.kv_cache_manager, clock=clock) if self.proposer is None else (
            SpeculatingScheduler(self.config, self.kv_cache_manager, clock=clock, proposer=self.proposer))
        self.recovery = Recovery(self.scheduler)
        self.input_processor = InputProcessor(self.config, self.model_config.vocab_size, self.tokenizer, self.eos_token_ids)
        self.output_processor = OutputProcessor(self.tokenizer)
        self.trace = TraceRecorder(self.scheduler, self.config.trace)
        self.launched: deque[tuple[SchedulerOutput, LaunchedStep]] = deque()  # steps in flight, oldest first
        self.observer: Callable[[list[Request], int], None] | None = None  # the server's metrics, see `_observe`
        self.num_arrivals = 0
        self.is_closed = False

    @property
    def stats(self) -> SchedulerStats:
        """Deterministic counters of all work done."""
        return self.scheduler.stats

    def add_request(self, request_id: str, prompt: Any, params: SamplingParams, *, cache_salt: str | None = None) -> None:
        """Check a request and queue it. Raises `ValidationError` having changed nothing."""
        now = self.clock()
        self.add_processed(self.input_processor.process(request_id, prompt, params, cache_salt=cache_salt, arrival_time=now))

    def add_processed(self, processed: ProcessedInput) -> None:
        """Queue a checked request as n children. Raises `ValidationError` having changed nothing."""
        self._require_alive()
        request_id = processed.request_id
        if request_id in self.output_processor.states:
            raise ValidationError(f"request id {request_id!r} is in use: ids of unfinished requests must differ",
                                  parameter="request_id", value=request_id)
        # Whatever can be refused is refused before the first child is queued, so n children come in together or not at all.
        children = [self._make_child(processed, index) for index in range(processed.params.n)]
        for child in children:
            if child.request_id in self.output_processor.parents:
                raise ValidationError(f"request id {request_id!r} would name a child {child.request_id!r}, and that id is in use",
                                      parameter="request_id", value=request_id)
        self.scheduler.check_fits(children[0])  # the children are equal, so one check stands for all
        for child in children:
            self.scheduler.add_request(child)
        self.output_processor.add(processed, children)
        self.num_arrivals += 1

    def _make_child(self, processed: ProcessedInput, index: int) -> Request:
        """One of the n answers to a user's request, as the scheduler sees it: a request of its own, with a seed of its own.

        The children share their prompt's blocks by way of the prefix cache, not by any tie between them. As in vLLM the id of
        child i is `i_` and the user's id.
        """
        params = processed.params
        child_id = processed.request_id if params.n == 1 else f"{index}_{processed.request_id}"
        return Request(child_id, processed.prompt_token_ids, params, max_tokens=processed.max_tokens,
                       eos_token_ids=self.eos_token_ids, seed=derive_seed(self.config.seed, self.num_arrivals, params, index),
                       arrival_time=processed.arrival_time, cache_salt=processed.cache_salt)

    def abort_request(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        """End requests in any state and give their blocks back at once; unknown and finished ids are left alone.

        Returns their last outputs, with what had been generated and finish_reason "abort".
        """
        states = [self.output_processor.states[name] for name in request_ids if name in self.output_processor.states]
        children = [child.request for state in states for child in state.children]
        return self._end([child for child in children if not child.is_finished], RequestStatus.FINISHED_ABORTED)

    def recover(self, error: Exception) -> list[RequestOutput]:
        """After `step` has raised `error`: end who is to blame for it, with finish_reason "error", and return their last outputs.

        Raises `error` again if that would not help: the engine must not go on. (recovery.py)
        """
        return self._end([self.scheduler.requests[name] for name in self.recovery.blame(error)], RequestStatus.FINISHED_ERROR)

    def _end(self, requests: list[Request], status: RequestStatus) -> list[RequestOutput]:
        """End these requests now, with blocks and outputs; a step in flight may still compute a position for them, for nobody."""
        self.scheduler.finish_requests([request.request_id for request in requests], status)
        self._drop_unawaited_steps()
        self._observe(requests, 0)
        return self.output_processor.collect(requests)

    def step(self, *, ahead: bool = True) -> list[RequestOutput]:
        """Give every request its tokens of one forward pass; returns the requests that moved, cumulative.

        With `async_scheduling` the next step is launched before this one is waited for. `ahead=False` makes it the last one
        in flight; while somebody reads the trace every step is, so that a record shows one step and not a part of the next.
        If the forward pass raises, nothing is lost: what the step had scheduled waits again, and the error goes on up. Who
        calls `recover` then lets no request fail for ever.
        """
        self._require_alive()
        self.recovery.before_step()
        num_ahead = 1 if self.config.async_scheduling and ahead and not self.trace.is_on and not self.recovery.suspects else 0
        while len(self.launched) <= num_ahead and (planned := self.scheduler.schedule()).num_scheduled_tokens:
            self._launch(planned)
        if not self.launched:
            return []
        scheduler_output, model_output = self._wait()
        requests = self.scheduler.update_from_output(scheduler_output, model_output)  # ends by token or length
        # A stop string is a matter of text, which the scheduler never sees: so these requests end one call later, in the same step.
        stopped = self.output_processor.update(requests, model_output)
        self.scheduler.finish_requests(stopped, RequestStatus.FINISHED_STOPPED)
        if isinstance(self.scheduler, SpeculatingScheduler):
            self.scheduler.drop_tokens(requests, stopped)
        self._drop_unawaited_steps()
        self.trace.record(scheduler_output, requests)
        self._observe(requests, scheduler_output.total_num_scheduled_tokens)
        return self.output_processor.collect(requests)

    def _launch(self, planned: SchedulerOutput) -> None:
        """Hand a step to the device. If that raises, it alone is undone: the step in flight before it goes on."""
        try:
            self.launched.append((planned, self.runner.execute_model(planned)))  # on a GPU it returns before anything is computed
        except BaseException:
            self.recovery.roll_back(planned)
            raise

    def _wait(self) -> tuple[SchedulerOutput, ModelOutput]:
        """The oldest step in flight and its result. If that raises, every step in flight is undone: they have built on it."""
        scheduler_output, launched = self.launched[0]
        try:
            model_output = launched.result()
        except BaseException:
            self.launched.clear()
            self.recovery.roll_back(scheduler_output)
            raise
        self.launched.popleft()
        return scheduler_output, model_output

    def _drop_unawaited_steps(self) -> None:
        """With no request left, forget what is in flight: nobody reads it, so nobody waits for it, and an idle engine is clean."""
        while self.launched and not self.has_unfinished_requests():
            scheduler_output, _ = self.launched.popleft()
            self.scheduler.update_from_output(scheduler_output, ModelOutput())

    def _observe(self, requests: list[Request], num_tokens: int) -> None:
        """Show who got a token in a step of `num_tokens` positions (0: none was made) or has ended, before any reader knows."""
        if self.observer is not None:
            self.observer(requests, num_tokens)

    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished_requests()

    def reset_prefix_cache(self) -> bool:
        """Forget every cached block; False, and nothing done, while a request holds one."""
        return self.kv_cache_manager.reset_prefix_cache()

    def close(self) -> None:
        """Give the weights, the KV cache and the trace file back. Further calls raise `EngineDeadError`."""
        if not self.is_closed:
            self.is_closed = True
            self.launched.clear()
            self.trace.close()
            self.runner.close()
            if self.proposer is not None:
                self.proposer.close()

    def _require_alive(self) -> None:
        if self.is_closed:
            raise EngineDeadError("this engine has been closed: make a new LLM")
