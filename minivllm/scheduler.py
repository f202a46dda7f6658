"""Lesson 9. The scheduler: a step is nothing but "how many tokens for each request", under one budget.

There is no prefill phase and no decode phase. Every request has `num_tokens` that are known and `num_computed_tokens` that
are in the KV cache, and each step lets the second catch up with the first:

    step 1   A ████████ 8 of its 8 prompt tokens          budget 12
             B ████     4 of its 10: the budget is spent
    step 2   A █        the token it sampled              a decode is a request that misses one token
             B ██████   the rest of its prompt            chunked prefill has no code of its own
             C █████    5 of its prompt

Owns the two queues and every request's status and progress. Never touches a tensor or a block table. Running requests come
first, in order of admission, then waiting ones, in order of arrival, and nobody overtakes one that has to wait: so all get
their turn. vLLM: vllm/v1/core/sched/scheduler.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from minivllm.config import EngineConfig
from minivllm.exceptions import ValidationError
from minivllm.kv_cache import KVCacheManager
from minivllm.request import Request, RequestStatus, append_sampled_tokens
from minivllm.request_queue import RequestQueue, check_can_finish
from minivllm.scheduler_output import Decision, ModelOutput, NewRequestData, SchedulerOutput, SchedulerStats
from minivllm.steps_in_flight import StepsInFlight


class Scheduler:
    """Decides every step. Between two calls these hold:

        requests == waiting + running, each request in exactly one of the two, and len(running) <= max_num_seqs
        waiting:  num_computed_tokens == num_output_placeholders == 0, and it owns no block
        running:  num_computed_tokens < num_tokens + num_output_placeholders, and it owns a slot for each computed position

    `num_computed_tokens` advances when a step is planned, not when it has run, and a token that a step in flight will sample
    counts as one more. So step N+1 can be planned while step N still runs (vLLM's async scheduling).
    """

    def __init__(self, config: EngineConfig, kv_cache_manager: KVCacheManager, *,
                 clock: Callable[[], float] = time.monotonic) -> None:
        assert config.max_num_batched_tokens and config.max_model_len, "the engine decides both before it makes a scheduler"
        self.config, self.kv_cache_manager = config, kv_cache_manager
        self.max_num_batched_tokens: int = config.max_num_batched_tokens
        self.max_model_len: int = config.max_model_len
        self.max_num_running = config.max_num_seqs  # fewer while the engine recovers from a failed step (recovery.py)
        self.clock = clock
        self.requests: dict[str, Request] = {}
        self.waiting = RequestQueue()
        self.running: list[Request] = []  # in order of admission, so the newest is the last
        self.stats = SchedulerStats()
        self.in_flight = StepsInFlight()
        self.record_decisions = False  # True while somebody reads them: a trace, a lesson, the live page
        self.next_output = SchedulerOutput()  # what happens between two steps is noted here too, for the runner and for readers

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises `ValidationError`, having changed nothing, for one that could never finish."""
        self.check_fits(request)
        if request.request_id in self.requests:
            raise ValidationError(f"request id {request.request_id!r} is in use: ids of unfinished requests must differ",
                                  parameter="request_id", value=request.request_id)
        request.max_num_tokens = min(request.max_num_tokens, self.max_model_len)
        self.kv_cache_manager.name_full_blocks(request, request.num_tokens)
        request.times.queued = self.clock()
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def check_fits(self, request: Request) -> None:
        """Raise `ValidationError` for a request that could never finish, even alone."""
        check_can_finish(request, self.max_model_len, (self.kv_cache_manager.num_blocks - 1) * self.kv_cache_manager.block_size)

    def schedule(self) -> SchedulerOutput:
        """Plan one step: tokens for the running requests, then, if no memory had to be taken from one, for waiting ones.

        With no step in flight somebody gets a token: the oldest running request can always make itself room. One without any
        token is not a step: what it has to say stays for the next one.
        """
        num_preemptions = self.stats.num_preemptions
        budget = self._schedule_running(self.max_num_batched_tokens)
        if self.stats.num_preemptions == num_preemptions:
            self._schedule_waiting(budget)
        elif self.waiting:
            self._decide(self.waiting.peek(), "wait", "waits: nobody is admitted in a step that had to preempt")
        output = self.next_output
        assert output.num_scheduled_tokens or not self.requests or self.in_flight, (
            f"a step computes nothing while {len(self.running)} requests run and {len(self.waiting)} wait")
        if output.num_scheduled_tokens:
            self.next_output = SchedulerOutput()
            self.stats.num_steps += 1
            self.in_flight.add(output, self.requests)
        return output

    def _schedule_running(self, budget: int) -> int:
        """Give running requests their next tokens, oldest first, and return what is left of the budget."""
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            index += 1
            num_tokens = len(request.all_token_ids) + (num_coming := request.num_output_placeholders)
            if num_coming and num_tokens >= request.max_num_tokens:
                continue  # its last token is on the way: another position would be computed for nothing
            num_missing = num_tokens + len(request.spec_token_ids) - request.num_computed_tokens
            num_new_tokens = 1 if num_missing == 1 else self._split(num_missing, budget)  # a decode's one token always fits
            if num_new_tokens == 0:
                continue  # not `break`: the next one may fit into what is left
            new_blocks = self._allocate_or_preempt(request, num_new_tokens)
            if new_blocks is None:
                break  # it gave way itself, so it was the newest
            if new_blocks:
                self.next_output.new_block_ids[request.request_id] = new_blocks
            if self.record_decisions:  # asked here as well: every token of every request comes by
                self._decide(request, "schedule", "computes {tokens}, takes {blocks}, {free} left", len(new_blocks), num_new_tokens)
            self._commit(request, num_new_tokens, len(new_blocks))
            budget -= num_new_tokens
        for request in self.running[index:] if self.record_decisions else ():
            self._decide(request, "wait", "waits: the token budget of the step is spent")
        return budget

    def _split(self, num_missing_tokens: int, budget: int) -> int:
        """Return how many of a request's missing tokens this step computes; 0 means that it has to wait.

        All that the budget left allows, and while there are other requests no more than `long_prefill_token_threshold` (0: no
        limit). Without chunked prefill it is all or nothing; nothing waits for ever then, as the budget is at least max_model_len.
        """
        if not self.config.enable_chunked_prefill:
            return num_missing_tokens if num_missing_tokens <= budget else 0
        if self.config.long_prefill_token_threshold and len(self.requests) > 1:
            num_missing_tokens = min(num_missing_tokens, self.config.long_prefill_token_threshold)
        return min(num_missing_tokens, budget)

    def _allocate_or_preempt(self, request: Request, num_new_tokens: int) -> list[int] | None:
        """Return new blocks for a running request's next tokens. While the pool has too few, preempt the newest running one. If
        that is the request itself, it has given way: None. Requests already scheduled in this step are older, so they are safe.
        """
        while (new_blocks := self.kv_cache_manager.allocate_slots(request, num_new_tokens)) is None:
            victim = self.running.pop()
            self._preempt(victim, "gives {blocks} back: {free} free and request {cause} needs more", cause=request.request_id)
            if victim is request:
                return None
        return new_blocks

    def _preempt(self, request: Request, why: str, cause: object = None) -> None:
        """Take away a request's blocks and put it, already out of `running`, at the front of the queue. It and `stats` count that,
        and the step's output names it. It starts over with all its tokens as its prompt, often from a hit on its own old blocks.
        """
        self._decide(request, "preempt", why, len(self.kv_cache_manager.get_block_ids(request.request_id)), cause=cause)
        self.kv_cache_manager.free(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = request.num_output_placeholders = 0  # it samples again what was on the way
        request.num_preemptions += 1
        self.waiting.appendleft(request)
        self.next_output.preempted_request_ids.append(request.request_id)
        self.stats.num_preemptions += 1

    def _schedule_waiting(self, budget: int) -> None:
        """Admit waiting requests in order until the budget, the seats or the blocks run out. Nobody overtakes."""
        while self.waiting and budget > 0:
            request = self.waiting.peek()
            if len(self.running) >= self.max_num_running:
                self._decide(request, "wait", "waits: all max_num_seqs={cause} seats are taken", cause=self.max_num_running)
                return
            num_new_tokens = self._admit(request, budget)
            if num_new_tokens == 0:
                return
            budget -= num_new_tokens
        if self.waiting:
            self._decide(self.waiting.peek(), "wait", "waits: the token budget of the step is spent")

    def _admit(self, request: Request, budget: int) -> int:
        """Schedule the first tokens of the first waiting request. Returns how many; 0 if it has to wait, unchanged.

        There must be room for all its known tokens (vLLM's scheduler_reserve_full_isl), or a long prompt would fill the
        pool piece by piece only to be thrown out before its first token.
        """
        manager = self.kv_cache_manager
        hits, num_hit_tokens = manager.get_computed_blocks(request)
        num_missing = request.num_tokens - num_hit_tokens
        num_new_tokens = self._split(num_missing, budget)
        if num_new_tokens == 0:
            self._decide(request, "wait", "waits: {tokens} at once, {cause} left in the budget", 0, num_missing, budget)
            return 0
        new_blocks = manager.allocate_slots(request, num_new_tokens, new_computed_blocks=hits, full_sequence_must_fit=True)
        if new_blocks is None:
            need = manager.num_blocks_to_take(request, request.num_tokens, hits)
            self._decide(request, "wait", "waits: needs {blocks}, {free} free", need)
            return 0
        self._seat(request, num_hit_tokens)
        action = "resume" if request.num_preemptions else "admit"
        self._decide(request, action, "starts behind {cause} cached positions: computes {tokens}, takes {blocks}, {free} left",
                     len(new_blocks), num_new_tokens, num_hit_tokens)
        self._commit(request, num_new_tokens, len(new_blocks))
        return num_new_tokens

    def _seat(self, request: Request, num_hit_tokens: int) -> None:
        """Make a waiting request a running one, with its prefix hits as computed tokens, and tell the runner all about it."""
        self.waiting.remove(request)
        self.running.append(request)
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = num_hit_tokens
        if request.num_cached_tokens < 0:  # its first admission, not a return after preemption
            request.num_cached_tokens = num_hit_tokens
            request.times.first_scheduled = self.clock()
            self.stats.count_admission(request, num_hit_tokens, self.kv_cache_manager.reads_cache(request))
        block_ids = self.kv_cache_manager.get_block_ids(request.request_id)
        self.next_output.new_requests.append(NewRequestData.from_request(request, block_ids))

    def _commit(self, request: Request, num_new_tokens: int, num_new_blocks: int) -> None:
        """Count the tokens as computed, and publish the blocks that they fill: who is admitted later in this step may hit them.
        That is sound as long as the model writes the whole batch's K and V, layer by layer, before it reads, and as long as
        `rollback` follows a step that failed. Every token of every request comes by, so nothing is done that most need not.
        """
        self.stats.count_tokens(request, num_new_tokens, num_new_blocks)
        self.next_output.num_scheduled_tokens[request.request_id] = num_new_tokens
        end = request.num_computed_tokens = request.num_computed_tokens + num_new_tokens
        if end > request.max_num_computed_tokens:
            request.max_num_computed_tokens = end
        num_known, num_drafts = len(request.all_token_ids), len(request.spec_token_ids)
        if end == num_known + num_drafts + request.num_output_placeholders:
            request.num_output_placeholders += 1 + num_drafts
        # A position may be computed before its token is known here, or accepted; without it the block has no name until later.
        if self.kv_cache_manager.enable_caching:
            self.next_output.cached_block_ids += self.kv_cache_manager.cache_blocks(request, end if end < num_known else num_known)

    def update_from_output(self, scheduler_output: SchedulerOutput, model_output: ModelOutput) -> list[Request]:
        """Append what a step sampled, end the requests that are done, and return those that got tokens, in the step's order.

        Results for a request that has ended or been preempted since then, and so lost its blocks, are dropped from `model_output`.
        Positions of the ended are counted as discarded; the preempted compute theirs again, and that is counted then.
        """
        moved, num_generated_tokens, now = list[Request](), 0, self.clock()
        for share in self.in_flight.take_in(scheduler_output):
            request = share.request
            if request.status is not RequestStatus.RUNNING or request.num_preemptions != share.num_preemptions:
                self.stats.discarded_positions += share.num_tokens if request.is_finished else 0
                model_output.discard(request.request_id)
            elif token_ids := model_output.sampled_token_ids.get(request.request_id):
                assert share.samples, (f"request {request.request_id} got a token with {request.num_computed_tokens} of its "
                                       f"{request.num_tokens} computed")
                num_generated_tokens += append_sampled_tokens(request, token_ids, now)
                moved.append(request)
            else:
                assert not share.samples, f"request {request.request_id} has all its tokens computed and got no new one"
        self.stats.num_generated_tokens += num_generated_tokens
        self._release([request for request in moved if request.is_finished])
        return moved

    def finish_requests(self, request_ids: str | Iterable[str], status: RequestStatus) -> None:
        """End requests, if known, from outside (abort, stop string): who waits leaves the queue, `_release` does the rest."""
        assert status.is_finished, f"{status} is not an end"
        request_ids = [request_ids] if isinstance(request_ids, str) else request_ids
        ended = [self.requests.pop(request_id) for request_id in request_ids if request_id in self.requests]
        for request in ended:
            if request.status is not RequestStatus.RUNNING:
                self.waiting.remove(request)
            request.status = status
        self._release(ended)

    def _release(self, ended: list[Request]) -> None:
        """Forget requests that have just got a finished status, and give their blocks back at once.

        A step in flight may still write to those blocks. Whoever gets them next comes in a later step, and the device works
        in the order of launching: it wipes and writes them after that.
        """
        for request in ended:
            self._decide(request, "finish", "ends ({cause}): {blocks} back",
                         len(self.kv_cache_manager.get_block_ids(request.request_id)), cause=request.status.finish_reason)
            self.requests.pop(request.request_id, None)
            self.kv_cache_manager.free(request)
            self.next_output.finished_request_ids.append(request.request_id)
            self.stats.num_finished += 1
        if ended:
            self.running = [request for request in self.running if request.status is RequestStatus.RUNNING]

    def rollback(self, scheduler_output: SchedulerOutput) -> None:
        """Undo a step that failed and all planned after it: nobody may believe KV that was perhaps never written.

        Their names are taken back, and all that they scheduled (so everyone who hit those names) is preempted in order. What
        earlier steps bring them is dropped, and sampled again. The runner may not know which rows to drop: it is told again.
        """
        failed = self.in_flight.undo(scheduler_output)
        for output in failed:
            self.kv_cache_manager.uncache(output.cached_block_ids)
            self.next_output.finished_request_ids += output.finished_request_ids
            self.next_output.preempted_request_ids += output.preempted_request_ids
        for request in reversed(self.running):
            if any(request.request_id in output.num_scheduled_tokens for output in failed):
                self._preempt(request, "gives {blocks} back: the step failed")
        self.running = [request for request in self.running if request.status is RequestStatus.RUNNING]
        self.stats.num_rollbacks += len(failed)

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def _decide(self, request: Request, action: str, why: str, need: int = 0, tokens: int = 0, cause: object = None) -> None:
        """Note a decision for whoever reads them; the next step's output carries it."""
        if self.record_decisions:
            free = self.kv_cache_manager.num_free_blocks
            self.next_output.decisions.append(Decision(request.request_id, action, why, need, free, tokens, cause))
