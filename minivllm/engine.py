"""The engine: requests go in, steps are made, outputs come out. One loop, and it reads like the sentence
*schedule, run, sample, update*.

Owns the place where scheduler, model runner and text meet, and nothing that they own: only the scheduler changes queues,
only the KV manager changes block tables, only the runner holds tensors. Not thread-safe: one thread calls it.

    engine.add_request("r1", "Hello", SamplingParams(max_tokens=8))
    while engine.has_unfinished_requests():
        for output in engine.step(): ...
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from minivllm import startup
from minivllm.config import EngineConfig
from minivllm.exceptions import EngineDeadError, ValidationError
from minivllm.input_processor import InputProcessor, ProcessedInput, derive_seed
from minivllm.kv_cache import KVCacheManager
from minivllm.model_runner import ModelRunner
from minivllm.output_processor import OutputProcessor
from minivllm.request import Request, RequestOutput, RequestStatus
from minivllm.sampling_params import SamplingParams
from minivllm.scheduler import Scheduler
from minivllm.scheduler_output import SchedulerStats
from minivllm.trace import TraceRecorder


class LLMEngine:
    """A loaded model and everything that serves it. `stats` counts all work; `trace` records steps when asked for."""

    def __init__(self, config: EngineConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        started = startup.start(config)
        self.config = started.config
        self.model_config = started.model_config
        self.tokenizer = started.tokenizer
        self.eos_token_ids = started.defaults.eos_token_ids
        self.default_sampling_params = started.defaults.sampling
        self.chat_template = started.chat_template
        self.report = started.report
        self.clock = clock
        self.runner: ModelRunner = started.runner
        num_blocks, block_size, max_model_len = startup.resolved_sizes(self.config)
        self.kv_cache_manager = KVCacheManager(num_blocks, block_size, self.config.enable_prefix_caching, max_model_len)
        self.scheduler = Scheduler(self.config, self.kv_cache_manager, clock=clock)
        self.input_processor = InputProcessor(self.config, self.model_config.vocab_size, self.tokenizer, self.eos_token_ids)
        self.output_processor = OutputProcessor(self.tokenizer)
        self.trace = TraceRecorder(self.scheduler, self.config.trace)
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
        params = processed.params
        child_id = processed.request_id if params.n == 1 else f"{index}_{processed.request_id}"
        return Request(child_id, processed.prompt_token_ids, params, max_tokens=processed.max_tokens,
                       eos_token_ids=self.eos_token_ids, seed=derive_seed(self.config.seed, self.num_arrivals, params, index),
                       arrival_time=processed.arrival_time, cache_salt=processed.cache_salt)

    def abort_request(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        """End requests in any state and give their blocks back at once; unknown and finished ids are left alone.

        Returns their last outputs, with what had been generated and finish_reason "abort".
        """
        ended: list[Request] = []
        for request_id in request_ids:
            state = self.output_processor.states.get(request_id)
            if state is not None:
                ended += [child.request for child in state.children if not child.request.is_finished]
        self.scheduler.finish_requests([request.request_id for request in ended], RequestStatus.FINISHED_ABORTED)
        return self.output_processor.collect(ended)

    def step(self) -> list[RequestOutput]:
        """Give every scheduled request its tokens of one forward pass; returns the requests that moved, cumulative.

        If the forward pass raises, nothing is lost: what the step had scheduled waits again, and the error goes on up.
        """
        self._require_alive()
        scheduler_output = self.scheduler.schedule()
        try:
            model_output = self.runner.execute_model(scheduler_output)
        except BaseException:
            self.scheduler.rollback(scheduler_output)
            raise
        requests = self.scheduler.update_from_output(scheduler_output, model_output)
        stopped = self.output_processor.update(requests, model_output)
        self.scheduler.finish_requests(stopped, RequestStatus.FINISHED_STOPPED)
        self.trace.record(scheduler_output, requests)
        return self.output_processor.collect(requests)

    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished_requests()

    def reset_prefix_cache(self) -> bool:
        """Forget every cached block; False, and nothing done, while a request holds one."""
        return self.kv_cache_manager.reset_prefix_cache()

    def close(self) -> None:
        """Give the weights, the KV cache and the trace file back. Further calls raise `EngineDeadError`."""
        if not self.is_closed:
            self.is_closed = True
            self.trace.close()
            self.runner.close()

    def _require_alive(self) -> None:
        if self.is_closed:
            raise EngineDeadError("this engine has been closed: make a new LLM")
