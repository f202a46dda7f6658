"""The shadow KV under random workloads, and the proof that it can fail: planted bugs, every one of them caught."""

from __future__ import annotations

import inspect
import sys
import textwrap

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from shadow_kv import play, speculating_workloads, workloads
from telling import is_learners

from minivllm import kv_cache, speculative
from minivllm.block_pool import BlockPool
from minivllm.kv_cache import KVCacheManager
from minivllm.scheduler import Scheduler
from minivllm.speculative import DraftRoom, SpeculatingScheduler
from minivllm.steps_in_flight import StepsInFlight

# 2,000 workloads by default, 200,000 with --hypothesis-profile=deep
NUM_WORKLOADS = settings().max_examples * (100 if settings.get_current_profile_name() == "deep" else 20)


@pytest.mark.timeout(0)
@settings(max_examples=NUM_WORKLOADS)
@given(workloads())
def test_everybody_reads_its_own_sequence_and_nothing_else(workload):
    """Whatever is added, aborted, preempted, shared or lost in a failed step, every request reads and answers as if alone."""
    play(*workload)


@pytest.mark.timeout(0)
@settings(max_examples=NUM_WORKLOADS // 2)
@given(speculating_workloads())
def test_drafts_change_no_answer_and_leave_nothing_behind(workload):
    """Right, wrong and half right drafts: everybody reads its own sequence, answers as if alone, and pays with no block."""
    play(*workload)


# Who does it wrong, where, and what the source says instead. Most of them are bugs that published engines had.
PLANTED = [
    ("a block keeps its hash when it is handed out", BlockPool.get_new_blocks, "self.evict(block_id)", "pass"),
    ("a shared block is free as soon as one owner leaves", BlockPool.free_blocks,
     "if self.ref_counts[block_id] == 0:", "if True:"),
    ("one owner leaves for all", BlockPool.free_blocks, "self.ref_counts[block_id] -= 1", "self.ref_counts[block_id] = 0"),
    ("a hit on a free block leaves it in the queue", BlockPool.touch, "del self.free_queue[block_id]", "pass"),
    ("a second owner is not counted", BlockPool.touch, "self.ref_counts[block_id] += 1", "self.ref_counts[block_id] = 1"),
    ("a twin is forgotten with its twin", BlockPool.evict, "if not self.cached_blocks[block_hash]:", "if True:"),
    ("a hash has no parent", kv_cache.hash_block_tokens, "parent.digest if parent else NO_PARENT", "NO_PARENT"),
    ("a hash has no salt", kv_cache.extra_keys_of, "block_index == 0", "False"),
    ("a whole prompt may be hit", kv_cache.find_longest_cache_hit, "(num_tokens - 1)", "num_tokens"),
    ("requests for prompt_logprobs read the cache", KVCacheManager.reads_cache,
     " and request.sampling_params.prompt_logprobs is None", ""),
    ("hits on free blocks cost nothing", KVCacheManager.num_blocks_to_take,
     "sum(self.pool.ref_counts[block_id] == 0 for block_id in new_computed_blocks)", "0"),
    ("hits are touched before it is known that all fits", KVCacheManager.allocate_slots,
     "    table = self.block_tables.get", "    self.pool.touch(new_computed_blocks); table = self.block_tables.get"),
    ("a block is counted when it is full", KVCacheManager.num_blocks_to_take,
     "-(-num_tokens // self.block_size)", "(num_tokens // self.block_size)"),
    ("a long prompt creeps in piece by piece", Scheduler._admit, "full_sequence_must_fit=True", "full_sequence_must_fit=False"),
    ("tokens are counted without the hits", Scheduler._admit, "request.num_tokens - num_hit_tokens", "request.num_tokens"),
    ("a block is published with its first position", Scheduler._commit,
     "end if end < num_known else num_known", "min(end + self.kv_cache_manager.block_size - 1, num_known)"),
    ("the budget is not looked at", Scheduler._split, "return min(num_missing_tokens, budget)", "return num_missing_tokens"),
    ("the threshold is not looked at", Scheduler._split, "len(self.requests) > 1", "False"),
    ("chunked prefill cannot be switched off", Scheduler._split, "not self.config.enable_chunked_prefill", "False"),
    ("progress survives a preemption", Scheduler._preempt,
     "request.num_computed_tokens = request.num_output_placeholders = 0", "request.num_output_placeholders = 0"),
    ("a preempted request keeps its blocks", Scheduler._preempt, "self.kv_cache_manager.free(request)", "pass"),
    ("a preempted request goes to the back of the queue", Scheduler._preempt, "appendleft", "append"),
    ("a preempted request is lost", Scheduler._preempt, "self.waiting.appendleft(request)", "pass"),
    ("the runner is not told of a preemption", Scheduler._preempt,
     "self.next_output.preempted_request_ids.append(request.request_id)", "pass"),
    ("the oldest is preempted", Scheduler._allocate_or_preempt, "self.running.pop()", "self.running.pop(0)"),
    ("a request that gave way goes on", Scheduler._allocate_or_preempt, "if victim is request:", "if False:"),
    ("a step that preempts admits", Scheduler.schedule, "self.stats.num_preemptions == num_preemptions", "True"),
    ("seats are not counted", Scheduler._schedule_waiting, ">= self.max_num_running", ">= 999"),
    ("a request that does not fit is overtaken", Scheduler._schedule_waiting, "self.waiting.peek()\n",
     "min(self.waiting, key=lambda request: request.num_tokens)\n"),
    ("an ended request keeps its blocks", Scheduler._release, "self.kv_cache_manager.free(request)", "pass"),
    ("the runner is not told of an end", Scheduler._release,
     "self.next_output.finished_request_ids.append(request.request_id)", "pass"),
    ("an aborted request stays in the queue", Scheduler.finish_requests, "self.waiting.remove(request)", "pass"),
    ("a failed step's hashes stay", Scheduler.rollback,
     "self.kv_cache_manager.uncache(output.cached_block_ids)", "pass"),
    ("a failed step counts as progress", Scheduler.rollback, "in output.num_scheduled_tokens", "in ()"),
    ("a failed step's requests turn around", Scheduler.rollback, "reversed(self.running)", "list(self.running)"),
    ("what a failed step had to say is lost", Scheduler.rollback,
     "self.next_output.finished_request_ids += output.finished_request_ids", "pass"),
    ("a late result counts for a request that has been preempted and is back", Scheduler.update_from_output,
     " or request.num_preemptions != share.num_preemptions", ""),
    ("a late result belongs to whoever has the id now", Scheduler.update_from_output,
     "share.request\n        if request.status is not RequestStatus.RUNNING or request.num_preemptions != share.num_preemptions:",
     "self.requests.get(share.request.request_id, share.request)\n        if request.status is not RequestStatus.RUNNING:"),
    ("positions of the ended are not counted", Scheduler.update_from_output, "if request.is_finished else 0", "* 0"),
    ("positions of the preempted are counted twice", Scheduler.update_from_output, "if request.is_finished else 0", ""),
    ("tokens on their way survive a preemption", Scheduler._preempt,
     "request.num_computed_tokens = request.num_output_placeholders = 0", "request.num_computed_tokens = 0"),
    ("a position is computed behind the last token", Scheduler._schedule_running,
     "if num_coming and num_tokens >= request.max_num_tokens:", "if False:"),
    ("a request waits for every token", Scheduler._schedule_running,
     "num_tokens >= request.max_num_tokens", "True"),
    ("only one token can be on its way", Scheduler._commit, "num_output_placeholders += 1", "num_output_placeholders = 1"),
    ("a block is published before its last token is known", Scheduler._commit, "end if end < num_known else num_known", "end"),
    ("an empty plan counts as a step", Scheduler.schedule, "if output.num_scheduled_tokens:", "if True:"),
    ("what an empty plan has to say is lost", Scheduler.schedule,
     "if output.num_scheduled_tokens:\n        self.next_output = SchedulerOutput()",
     "self.next_output = SchedulerOutput()\n    if output.num_scheduled_tokens:\n        pass"),
    ("a step that samples is taken for one more chunk", StepsInFlight.add, "not all(share.samples for share in shares)", "False"),
    ("a step belongs to the one before with the same ids", StepsInFlight.add, "or output.new_requests", ""),
    ("a failed step's successor goes on", StepsInFlight.undo,
     "while not undone or undone[-1] is not output:", "while not undone:"),
    ("a failed step takes the one before with it", StepsInFlight.undo,
     "while not undone or undone[-1] is not output:", "while self.steps:"),
]


PLANTED_IN_SPECULATION = [
    ("one draft too many is accepted", speculative.accepted_run, "[: num_right + 1]", "[: num_right + 2]"),
    ("the token behind the drafts is lost", speculative.accepted_run, "[: num_right + 1]", "[: max(1, num_right)]"),
    ("wrong drafts count as computed", SpeculatingScheduler._take_back, "request.num_computed_tokens -= num_rejected", "pass"),
    ("one position too few is taken back", SpeculatingScheduler._take_back, "-= num_rejected", "-= num_rejected - 1"),
    ("the blocks of wrong drafts stay", SpeculatingScheduler._take_back,
     "self.kv_cache_manager.truncate(request, request.num_computed_tokens)", "pass"),
    ("one block too many goes", SpeculatingScheduler._take_back,
     "truncate(request, request.num_computed_tokens)", "truncate(request, request.num_computed_tokens - 1)"),
    ("the runner is not told", SpeculatingScheduler._take_back, "self.next_output.rewound_requests[request.request_id] =", "_ ="),
    ("drafts stay on their way", SpeculatingScheduler._take_back, "request.num_output_placeholders -= num_drafts", "pass"),
    ("wrong drafts are computed again in the count", SpeculatingScheduler._take_back,
     "request.max_num_computed_tokens = request.num_computed_tokens", "pass"),
    ("positions of wrong drafts are not counted", SpeculatingScheduler.update_from_output,
     "self.stats.num_rejected_positions +=", "_ ="),
    ("drafts are published with the step", Scheduler._commit, "end if end < num_known else num_known",
     "publish(self, request, end)"),
    ("drafts are proposed once and scheduled for ever", SpeculatingScheduler.schedule, "request.spec_token_ids, []",
     "request.spec_token_ids, request.spec_token_ids"),
    ("drafts take the blocks that others need", DraftRoom.__init__, " - sum(map(self.num_blocks_for_known, running))", ""),
    ("drafts take the budget that others need", DraftRoom.__init__,
     "sum(one.num_tokens - one.num_computed_tokens for one in running)", "1"),
    ("drafts go beyond the last token", DraftRoom.reserve, "min(most) - 1", "min(most)"),
    ("drafts forget the threshold", DraftRoom.reserve, "share - 1", "share"),
    ("budget is granted twice", DraftRoom.reserve, "self.num_tokens -= granted", "pass"),
    ("blocks are granted twice", DraftRoom.reserve, "self.num_blocks -= len(new_blocks) - num_known", "pass"),
    ("the runner does not hear of the blocks for drafts", DraftRoom.reserve,
     "self.scheduler.next_output.new_block_ids[request.request_id] = new_blocks", "pass"),
    ("requests behind in their prompt speculate", SpeculatingScheduler._draft, "== request.num_tokens - 1", "< request.num_tokens"),
]


def publish(scheduler, request, end):
    """The bug that rejected drafts are published: names are made of the drafts as well."""
    request.all_token_ids.extend(request.spec_token_ids)
    scheduler.next_output.cached_block_ids += scheduler.kv_cache_manager.cache_blocks(request, min(end, request.num_tokens))
    del request.all_token_ids[request.num_tokens - len(request.spec_token_ids):]
    return min(end, request.num_tokens)


CASES = [(*bug, workloads) for bug in PLANTED] + [(*bug, speculating_workloads) for bug in PLANTED_IN_SPECULATION]


@pytest.mark.parametrize(("bug", "function", "right", "wrong", "draw"), CASES, ids=[bug for bug, *_ in CASES])
def test_the_harness_catches(bug, function, right, wrong, draw, monkeypatch):
    """A planted bug does not survive the workloads: a harness that cannot fail proves nothing."""
    if is_learners(function):
        pytest.skip(f"{function.__qualname__} stands in a learner's file, which need not say {right!r}")
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(right) == 1, f"{function.__qualname__} has no longer one place that says {right!r}"
    module = sys.modules[function.__module__]
    source = source.replace(right, wrong).replace("super()", "super(SpeculatingScheduler, self)")  # it stands in no class here
    code = compile("from __future__ import annotations\n" + source, f"<{bug}>", "exec")
    scope: dict = {}
    monkeypatch.setattr(module, "publish", publish, raising=False)
    exec(code, vars(module), scope)
    owner = getattr(module, function.__qualname__.split(".")[0]) if "." in function.__qualname__ else module
    monkeypatch.setattr(owner, function.__name__, scope[function.__name__])

    @settings(max_examples=2000, phases=[Phase.generate], derandomize=True, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))
    @given(draw())
    def find(workload):
        play(*workload)

    with pytest.raises((AssertionError, LookupError)):
        find()
