"""Lessons 9 and 10: who computes how many tokens in a step. Small worlds, one promise each (T numbers: the list of traps)."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from telling import is_learners

from minivllm.config import EngineConfig
from minivllm.exceptions import ValidationError
from minivllm.kv_cache import KVCacheManager
from minivllm.request import Request, RequestStatus
from minivllm.sampling_params import SamplingParams
from minivllm.scheduler import Scheduler
from minivllm.scheduler_output import ModelOutput

ABORTED = RequestStatus.FINISHED_ABORTED
EOS = 99


def make_scheduler(*, num_blocks=9, block_size=2, budget=8, seats=4, max_model_len=16, caching=False, **knobs):
    config = EngineConfig(num_blocks=num_blocks, block_size=block_size, max_num_batched_tokens=budget, max_num_seqs=seats,
                          max_model_len=max_model_len, enable_prefix_caching=caching, **knobs)
    return Scheduler(config, KVCacheManager(num_blocks, block_size, caching, max_model_len),
                     clock=itertools.count(1.0).__next__)


def add(scheduler, request_id, prompt, max_tokens=4, **params):
    """Queue a request; a number as prompt stands for so many tokens that no other request has."""
    token_ids = [1000 * (1 + ord(request_id[0])) + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    request = Request(request_id, token_ids, SamplingParams(max_tokens=max_tokens, **params), eos_token_ids=[EOS])
    scheduler.add_request(request)
    return request


def finish_step(scheduler, output, token_id=7):
    """Give every request that has caught up one token, as the model runner would."""
    caught_up = [r.request_id for r in scheduler.running
                 if r.request_id in output.num_scheduled_tokens and r.num_computed_tokens == r.num_tokens]
    moved = scheduler.update_from_output(output, ModelOutput({request_id: [token_id] for request_id in caught_up}))
    scheduler.kv_cache_manager.check()
    return moved


def step(scheduler, token_id=7):
    output = scheduler.schedule()
    finish_step(scheduler, output, token_id)
    return output.num_scheduled_tokens


def run_all(scheduler):
    return [step(scheduler) for _ in iter(scheduler.has_unfinished_requests, False)]


def ids(requests):
    return [request.request_id for request in requests]


def test_a_step_is_tokens_for_requests_under_one_budget():
    """In a step prompts and single tokens share one budget, and the oldest request comes first."""
    scheduler = make_scheduler(budget=8, num_blocks=20)
    for request_id, length in (("a", 5), ("b", 6), ("c", 2)):
        add(scheduler, request_id, length)
    first, second = step(scheduler), step(scheduler)
    assert first == {"a": 5, "b": 3}, f"prompts of 5, 6 and 2, a budget of 8: b gets 3, c nothing, and the step is {first}"
    assert second == {"a": 1, "b": 3, "c": 2}, f"then a's new token, the rest of b and all of c fit, and the step is {second}"


def test_t02_a_block_is_shared_only_when_it_is_full_of_computed_positions():
    """A neighbor in the same step finds what the step computes, and not what a later chunk will."""
    scheduler = make_scheduler(budget=9, caching=True, long_prefill_token_threshold=3)
    add(scheduler, "a", [1, 2, 3, 4, 5, 6, 7])
    add(scheduler, "b", [1, 2, 3, 4, 5, 6, 8])
    _, b = scheduler.schedule().new_requests
    assert b.num_computed_tokens == 2, "a computes 3 positions: one full block, and half of another that b must not hit"
    scheduler = make_scheduler(budget=9, caching=True)
    add(scheduler, "a", [1, 2, 3, 4, 5, 6, 7])
    add(scheduler, "b", [1, 2, 3, 4, 5, 6, 8])
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"a": 7, "b": 1}, "b shares all three blocks that a fills in this very step"
    assert output.new_requests[1].block_ids[:3] == output.new_requests[0].block_ids[:3]


def test_a_prompts_blocks_are_named_when_it_arrives():
    """So a step with many prompts to admit has nothing to hash before it can begin. Without the prefix cache nothing is named."""
    for caching, count in ((True, 3), (False, 0)):
        request = add(make_scheduler(caching=caching), "a", 7)
        assert len(request.block_hashes) == count, f"7 tokens in blocks of 2, caching {caching}: {request.block_hashes}"


def test_t03_a_known_prompt_is_never_an_empty_query():
    """The same prompt again, a multiple of the block size long: its last block is computed, not its first ones."""
    scheduler = make_scheduler(caching=True)
    first = add(scheduler, "a", [1, 2, 3, 4], max_tokens=1)
    run_all(scheduler)
    again = add(scheduler, "b", [1, 2, 3, 4], max_tokens=1)
    assert step(scheduler) == {"b": 2}, "2 of 4 tokens are hit, and 2 computed"
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 2)


def test_t05_preempted_then_aborted_frees_once():
    """A request gives its blocks back when it is preempted; aborting it afterwards has none to give."""
    scheduler = make_scheduler(num_blocks=4, block_size=1)
    add(scheduler, "a", 1, max_tokens=3)
    add(scheduler, "b", 1, max_tokens=3)
    step(scheduler)
    step(scheduler)
    assert ids(scheduler.waiting) == ["b"], f"3 blocks do not hold two sequences of 2 tokens, and {ids(scheduler.waiting)} wait"
    scheduler.finish_requests(["b"], ABORTED)
    run_all(scheduler)
    free = scheduler.kv_cache_manager.num_free_blocks
    assert free == 3, f"both requests have ended, and {free} of 3 blocks are free"


def test_t11_requests_are_conserved():
    """Each is waiting, running or finished after every step, with memory for less than half of what they want."""
    scheduler = make_scheduler(num_blocks=6, budget=5)
    requests = [add(scheduler, request_id, 3, max_tokens=6) for request_id in "abcdef"]
    while scheduler.has_unfinished_requests():
        step(scheduler)
        assert len(scheduler.waiting) + len(scheduler.running) + sum(r.is_finished for r in requests) == 6
    assert [r.num_output_tokens for r in requests] == [6] * 6
    assert scheduler.stats.num_preemptions > 0, "memory should have run out"


def test_t12_a_preempted_request_longer_than_the_budget_comes_back():
    """A preempted request that is longer than the budget comes back: all its tokens are a prompt now, computed in chunks."""
    scheduler = make_scheduler(num_blocks=9, block_size=1, budget=2, max_model_len=9)
    add(scheduler, "a", 2, max_tokens=6)
    b = add(scheduler, "b", 2, max_tokens=6)
    steps = run_all(scheduler)
    assert b.num_preemptions > 0, "b should have lost its blocks"
    assert b.num_output_tokens == 6, f"b should say 6 tokens and says {b.num_output_tokens}"
    most = max(sum(counts.values()) for counts in steps)
    assert most <= 2, f"the budget is 2, and a step computes {most} tokens"


def test_t13_the_hits_are_known_before_the_tokens_are_counted():
    """Nothing is scheduled past the end: hits and new tokens add up to what is known."""
    scheduler = make_scheduler(caching=True, budget=16)
    add(scheduler, "a", [1, 2, 3, 4, 5], max_tokens=1)
    run_all(scheduler)
    b = add(scheduler, "b", [1, 2, 3, 4, 5, 6, 7])
    assert step(scheduler) == {"b": 3}
    assert b.num_computed_tokens == 7, "4 hit and 3 computed"


def test_t14_the_only_request_can_always_grow():
    """Whoever was let in fits alone, to its very last token: here exactly, with no block to spare."""
    scheduler = make_scheduler(num_blocks=4, block_size=2)
    request = add(scheduler, "a", 3, max_tokens=4)  # 3 + 4 - 1 = 6 positions, 3 blocks of 2
    run_all(scheduler)
    assert request.num_output_tokens == 4
    assert request.num_preemptions == 0


def test_t14_what_can_never_fit_is_refused_with_a_way_out():
    """The refusal comes on arrival, names the parameter, and the value it proposes is accepted."""
    scheduler = make_scheduler(num_blocks=4, block_size=2)
    with pytest.raises(ValidationError, match="at most max_tokens=4") as refused:
        add(scheduler, "a", 3, max_tokens=5)
    assert refused.value.parameter == "max_tokens"
    assert not scheduler.has_unfinished_requests()
    add(scheduler, "a", 3, max_tokens=4)


def test_t15_seats_are_for_resident_requests():
    """Two seats: a third request waits until one of the two has ended, however small the steps are."""
    for budget in (1, 8):
        scheduler = make_scheduler(seats=2, budget=budget, num_blocks=20)
        for request_id in "abc":
            add(scheduler, request_id, 2, max_tokens=2)
        while scheduler.has_unfinished_requests():
            both_run = len(scheduler.running) == 2
            counts = step(scheduler)
            resident = [request_id for request_id in "abc" if scheduler.kv_cache_manager.get_block_ids(request_id)]
            assert len(resident) <= 2, f"{resident} hold blocks, with 2 seats and a budget of {budget}"
            assert not (both_run and "c" in counts), f"two requests run and c computes, with a budget of {budget}: {counts}"


def test_t16_a_resumed_request_neither_repeats_nor_skips_a_token():
    """A request that was preempted answers as if alone: no token comes twice or is left out."""
    scheduler = make_scheduler(num_blocks=7, block_size=1, budget=4)
    a, b = add(scheduler, "a", 1, max_tokens=6), add(scheduler, "b", 1, max_tokens=6)
    while scheduler.has_unfinished_requests():
        output = scheduler.schedule()
        caught_up = {r.request_id: [r.num_output_tokens] for r in scheduler.running if r.num_computed_tokens == r.num_tokens}
        scheduler.update_from_output(output, ModelOutput(caught_up))
    assert b.num_preemptions > 0, "6 blocks do not hold two sequences of 6 positions, and b was never preempted"
    for request in (a, b):
        said = request.output_token_ids
        assert said == [0, 1, 2, 3, 4, 5], f"{request.request_id} should say 0 to 5 and says {said}"


def test_t17_a_chunk_that_is_not_the_last_gets_no_token():
    """Only a request that has caught up samples; a token for a half-computed prompt is our mistake and says so."""
    scheduler = make_scheduler(budget=3)
    request = add(scheduler, "a", 5)
    output = scheduler.schedule()
    with pytest.raises(AssertionError, match="3 of its 5 computed"):
        scheduler.update_from_output(output, ModelOutput({"a": [7]}))
    scheduler = make_scheduler(budget=3)
    request = add(scheduler, "a", 5)
    assert finish_step(scheduler, scheduler.schedule()) == []
    assert finish_step(scheduler, scheduler.schedule()) == [request]


def test_t17_a_request_that_caught_up_gets_a_token():
    """A runner that forgets one would make its request wait for ever; the step says so instead."""
    scheduler = make_scheduler()
    add(scheduler, "a", 3)
    with pytest.raises(AssertionError, match="got no new one"):
        scheduler.update_from_output(scheduler.schedule(), ModelOutput())


@pytest.mark.parametrize("length", [3, 4, 5, 8])
def test_t18_block_edges_cost_no_token(length):
    """Prompts of B-1, B, B+1 and 2B tokens with exactly the memory that they need run to their end."""
    max_tokens = 6
    num_blocks = 1 + -(-(length + max_tokens - 1) // 4)
    scheduler = make_scheduler(num_blocks=num_blocks, block_size=4, max_model_len=32)
    request = add(scheduler, "a", length, max_tokens=max_tokens)
    run_all(scheduler)
    assert request.num_output_tokens == max_tokens
    assert scheduler.stats.num_blocks_allocated == num_blocks - 1


def test_t19_lengths_at_the_limit():
    """A prompt needs one position more than itself: max_model_len - 1 runs, max_model_len is refused, so is nothing at all."""
    scheduler = make_scheduler(max_model_len=6)
    request = add(scheduler, "a", 5, max_tokens=9)
    run_all(scheduler)
    assert request.status is RequestStatus.FINISHED_LENGTH_CAPPED
    assert request.num_output_tokens == 1
    for length, sentence in ((6, "shorten the prompt to 5 tokens"), (7, "max_model_len is 6"), (0, "prompt is empty")):
        with pytest.raises(ValidationError, match=sentence) as refused:
            add(scheduler, "b", length)
        assert refused.value.parameter == "prompt"


def test_t19_a_prompt_larger_than_the_pool_is_refused():
    """Beyond the cache there is no max_tokens to propose: the prompt itself is too long."""
    scheduler = make_scheduler(num_blocks=3, block_size=2)
    with pytest.raises(ValidationError, match="pool holds 4: shorten the prompt to 4 tokens") as refused:
        add(scheduler, "a", 5, max_tokens=1)
    assert refused.value.parameter == "prompt"
    request = add(scheduler, "a", 4, max_tokens=1)
    run_all(scheduler)
    assert request.num_output_tokens == 1


def test_max_tokens_none_means_the_rest_of_the_context():
    """Without a number of its own a request may fill max_model_len, and must be able to."""
    add(make_scheduler(num_blocks=9, max_model_len=16), "a", 3, max_tokens=None)
    with pytest.raises(ValidationError, match="needs KV cache for 16 positions"):
        add(make_scheduler(num_blocks=8, max_model_len=17), "a", 3, max_tokens=None)


def test_two_unfinished_requests_cannot_have_one_id():
    """An id names one request; it is free again when that one has ended."""
    scheduler = make_scheduler()
    add(scheduler, "a", 2)
    with pytest.raises(ValidationError, match="'a' is in use") as refused:
        add(scheduler, "a", 3)
    assert refused.value.parameter == "request_id"
    scheduler.finish_requests("a", ABORTED)
    add(scheduler, "a", 3)


def test_t20_abort_frees_everything_in_any_state():
    """A request that is aborted gives its blocks back at once, be it waiting, in the middle of its prompt, running or preempted."""
    scheduler = make_scheduler(budget=3, num_blocks=6, seats=2, block_size=1)
    add(scheduler, "r", 1, max_tokens=4)
    add(scheduler, "c", 4, max_tokens=1)
    add(scheduler, "w", 1)
    step(scheduler)
    computed = [r.num_computed_tokens for r in scheduler.running]
    assert computed == [1, 2], f"r should have computed its 1 token and c 2 of 4: {computed}"
    step(scheduler)
    assert ids(scheduler.waiting) == ["c", "w"], f"c gave way to r and waits before w: {ids(scheduler.waiting)}"
    for request_id in ("w", "c", "r"):
        held = len(scheduler.kv_cache_manager.get_block_ids(request_id))
        free = scheduler.kv_cache_manager.num_free_blocks
        scheduler.finish_requests([request_id], ABORTED)
        now_free = scheduler.kv_cache_manager.num_free_blocks
        assert now_free == free + held, f"{free} blocks were free, {request_id} held {held} and is aborted: {now_free} are free"
        assert request_id not in ids(scheduler.waiting) + ids(scheduler.running), f"{request_id} is aborted and still in a queue"
    assert scheduler.kv_cache_manager.num_free_blocks == 5, f"{scheduler.kv_cache_manager.num_free_blocks} of 5 blocks are free"
    told = scheduler.schedule().finished_request_ids
    assert told == ["w", "c", "r"], f"w, c and r were aborted, and the runner is told of {told} in place of these"


def test_t20_abort_in_the_middle_of_a_prompt():
    """A request that is aborted in the middle of its prompt gives its blocks and its seat back at once."""
    scheduler = make_scheduler(budget=2, seats=1)
    add(scheduler, "a", 6)
    add(scheduler, "b", 2)
    step(scheduler)
    scheduler.finish_requests(["a"], ABORTED)
    free = scheduler.kv_cache_manager.num_free_blocks
    assert free == 8, f"a, which held 1 of 8 blocks, is aborted, and {free} are free"
    counts = step(scheduler)
    assert counts == {"b": 2}, f"the one seat is b's now, and the step is {counts}"


def test_t20_abort_of_the_finished_or_unknown_does_nothing():
    """To end a request twice, or one that nobody knows, changes nothing; one call may name an id twice."""
    scheduler = make_scheduler()
    request = add(scheduler, "a", 2, max_tokens=1)
    run_all(scheduler)
    scheduler.finish_requests(["a", "nobody"], ABORTED)
    assert request.status is RequestStatus.FINISHED_LENGTH_CAPPED, (
        f"a had ended by its length and is {request.status.name} instead of FINISHED_LENGTH_CAPPED")
    add(scheduler, "b", 2)
    scheduler.finish_requests(["b", "b"], ABORTED)
    told = scheduler.schedule().finished_request_ids
    assert told == ["a", "b"], f"a ended, b was aborted twice, and the runner is told of {told} instead of ['a', 'b']"


def test_t21_a_flood_of_prompts_does_not_starve_a_running_request():
    """Running ones come first in every step: its tokens come one a step, whatever arrives."""
    scheduler = make_scheduler(budget=4, num_blocks=60)
    request = add(scheduler, "a", 2, max_tokens=10)
    step(scheduler)
    for number in range(9):
        add(scheduler, f"b{number}", 9, max_tokens=1)
        assert step(scheduler)["a"] == 1, f"a gets nothing in step {number + 2}"
    assert request.num_output_tokens == 10


def test_t21_first_tokens_come_in_order_of_arrival():
    """No request overtakes another, neither for memory nor for budget: a small one waits behind a large one."""
    scheduler = make_scheduler(num_blocks=7, budget=4)
    order = []
    for request_id, length in (("a", 4), ("b", 9), ("c", 1), ("d", 2)):
        add(scheduler, request_id, length, max_tokens=3)
    while scheduler.has_unfinished_requests():
        order += [r.request_id for r in finish_step(scheduler, scheduler.schedule()) if r.num_output_tokens == 1]
    assert order == ["a", "b", "c", "d"], f"a, b, c, d came in this order, and their first tokens as {order}"


def test_t22_the_order_of_arrival_changes_no_answer():
    """What a request is given to compute is its own sequence, whoever else is there."""
    answers = []
    for order in itertools.permutations("abc"):
        scheduler = make_scheduler(num_blocks=7, block_size=1, budget=3)
        requests = {request_id: add(scheduler, request_id, 2, max_tokens=4) for request_id in order}
        while scheduler.has_unfinished_requests():
            output = scheduler.schedule()
            sampled = {r.request_id: [sum(r.all_token_ids) % 97] for r in scheduler.running
                       if r.num_computed_tokens == r.num_tokens}
            scheduler.update_from_output(output, ModelOutput(sampled))
        answers.append({request_id: request.output_token_ids for request_id, request in sorted(requests.items())})
    assert all(answer == answers[0] for answer in answers)


def test_the_newest_running_request_gives_way():
    """Memory goes to the oldest request: the newest is preempted, goes to the front of the queue and comes back first."""
    scheduler = make_scheduler(num_blocks=4, block_size=1)
    a, b = add(scheduler, "a", 1, max_tokens=3), add(scheduler, "b", 1, max_tokens=3)
    add(scheduler, "c", 1, max_tokens=3)
    step(scheduler)
    assert ids(scheduler.running) == ["a", "b", "c"], f"{ids(scheduler.running)} run on 3 blocks, not all three"
    output = scheduler.schedule()
    counts, gave_way = output.num_scheduled_tokens, output.preempted_request_ids
    assert gave_way == ["c", "b"], f"a takes the block of the newest, c, and then b, itself the newest, gives way: {gave_way} did"
    assert counts == {"a": 1}, f"only the oldest, a, has room for a second token, and the step is {counts}"
    assert ids(scheduler.waiting) == ["b", "c"], f"b and c wait in their old order at the front: {ids(scheduler.waiting)}"
    assert b.num_computed_tokens == 0, f"b's blocks are gone and {b.num_computed_tokens} of its positions count as computed"
    assert b.status is RequestStatus.PREEMPTED, f"b gave way and is {b.status.name} instead of PREEMPTED"
    counted = (a.num_preemptions, b.num_preemptions, scheduler.stats.num_preemptions)
    assert counted == (0, 1, 2), f"preemptions of a, of b, and in all: {counted} instead of (0, 1, 2)"


def test_nobody_is_admitted_in_a_step_that_preempts():
    """The block that was taken away must not go to somebody newer."""
    scheduler = make_scheduler(num_blocks=5, block_size=1)
    add(scheduler, "a", 1)
    add(scheduler, "b", 2, max_tokens=3)
    step(scheduler)
    add(scheduler, "c", 1, max_tokens=1)
    output = scheduler.schedule()
    assert output.preempted_request_ids == ["b"]
    assert output.num_scheduled_tokens == {"a": 1}
    assert scheduler.kv_cache_manager.num_free_blocks == 2, "there would have been room for c"


def test_a_preempted_request_finds_its_own_blocks_again():
    """With the prefix cache a preemption often costs little: only lost positions are computed again, and counted."""
    scheduler = make_scheduler(num_blocks=6, block_size=1, caching=True)
    add(scheduler, "a", 2, max_tokens=2)
    b = add(scheduler, "b", 3, max_tokens=3)
    run_all(scheduler)
    assert b.num_preemptions == 1
    assert scheduler.stats.num_recomputed_tokens < 3, "b had computed 3 positions and found some of them"


def test_a_request_is_admitted_only_if_all_its_known_tokens_fit():
    """A long prompt does not creep in chunk by chunk, only to be thrown out before its first token."""
    scheduler = make_scheduler(num_blocks=6, block_size=1, budget=2)
    add(scheduler, "a", 2, max_tokens=3)
    add(scheduler, "b", 4, max_tokens=1)
    step(scheduler)
    assert step(scheduler) == {"a": 1}, "b needs 4 blocks and 3 are free, although its chunk would need only one"
    run_all(scheduler)
    assert scheduler.stats.num_preemptions == 0


def test_without_chunked_prefill_a_prompt_runs_whole_or_waits():
    """Without chunked prefill a prompt is computed whole or waits, and still nobody overtakes it."""
    scheduler = make_scheduler(budget=6, max_model_len=6, num_blocks=30, enable_chunked_prefill=False)
    for request_id, length in (("a", 4), ("b", 3), ("c", 1)):
        add(scheduler, request_id, length, max_tokens=2)
    first, second = step(scheduler), step(scheduler)
    assert first == {"a": 4}, f"b's 3 tokens do not fit into the 2 that are left, c waits behind b, and the step is {first}"
    assert second == {"a": 1, "b": 3, "c": 1}, f"then all of them fit into 6, and the step is {second}"


def test_the_threshold_caps_a_long_prompt_only_in_company():
    """A long prompt alone has the whole budget; with others there it gets the threshold, and they get the rest."""
    scheduler = make_scheduler(budget=8, num_blocks=30, long_prefill_token_threshold=3)
    add(scheduler, "a", 12, max_tokens=2)
    counts = step(scheduler)
    assert counts == {"a": 8}, f"alone, 8 of 12 tokens fit into a budget of 8, and the step is {counts}"
    add(scheduler, "b", 6)
    counts = step(scheduler)
    assert counts == {"a": 3, "b": 3}, f"with b there, a threshold of 3 leaves 3 tokens to each, and the step is {counts}"


def test_one_step_may_bring_several_tokens():
    """They are appended one by one, and what comes after the one that ends the request was never said."""
    scheduler = make_scheduler()
    a, b = add(scheduler, "a", 2, max_tokens=9), add(scheduler, "b", 2, max_tokens=2)
    output = scheduler.schedule()
    assert scheduler.update_from_output(output, ModelOutput({"a": [5, EOS, 6], "b": [5, 6, 7]})) == [a, b]
    assert (a.output_token_ids, a.status) == ([5, EOS], RequestStatus.FINISHED_STOPPED)
    assert (b.output_token_ids, b.status) == ([5, 6], RequestStatus.FINISHED_LENGTH_CAPPED)
    assert scheduler.stats.num_generated_tokens == 4


def test_late_results_are_dropped_and_counted():
    """The request was aborted after its step had been planned: its token is thrown away, its positions are counted."""
    scheduler = make_scheduler()
    request = add(scheduler, "a", 3)
    output = scheduler.schedule()
    scheduler.finish_requests(["a"], ABORTED)
    assert scheduler.update_from_output(output, ModelOutput({"a": [7]})) == []
    assert request.output_token_ids == []
    assert scheduler.stats.discarded_positions == 3


def test_late_results_for_a_preempted_request_are_dropped():
    """It lost its blocks while its step was running: it samples that token again when it is back."""
    scheduler = make_scheduler(num_blocks=4, block_size=2, budget=3)
    a, b = add(scheduler, "a", 4, max_tokens=1), add(scheduler, "b", 1, max_tokens=2)
    step(scheduler)
    first = scheduler.schedule()
    assert first.num_scheduled_tokens == {"a": 1, "b": 1}
    scheduler._preempt(scheduler.running.pop(), "gives way to a test")
    assert scheduler.update_from_output(first, ModelOutput({"a": [7], "b": [8]})) == [a]
    assert b.output_token_ids == []
    run_all(scheduler)
    assert b.output_token_ids == [7, 7]


def test_a_step_can_be_planned_before_the_last_one_has_reported():
    """The rest of a prompt is known, a token on its way counts as one more, and behind the last one nothing is computed."""
    scheduler = make_scheduler(budget=4)
    a = add(scheduler, "a", 6, max_tokens=2)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert (first.num_scheduled_tokens, second.num_scheduled_tokens) == ({"a": 4}, {"a": 2})
    assert a.num_output_placeholders == 1, "the second step reaches the end of the prompt, so it samples"
    assert scheduler.update_from_output(first, ModelOutput()) == []
    third = scheduler.schedule()
    assert (third.num_scheduled_tokens, a.num_output_placeholders) == ({"a": 1}, 2), "it computes a token that is not known yet"
    assert scheduler.update_from_output(second, ModelOutput({"a": [7]})) == [a]
    assert scheduler.schedule().num_scheduled_tokens == {}, "a's last token is on its way"
    assert (len(scheduler.in_flight), scheduler.stats.num_steps) == (1, 3), "a plan without tokens is not a step"
    assert scheduler.update_from_output(third, ModelOutput({"a": [8]})) == [a]
    assert (a.output_token_ids, a.num_output_placeholders, len(scheduler.in_flight)) == ([7, 8], 0, 0)
    assert scheduler.stats.discarded_positions == 0


def test_shares_are_taken_over_from_a_step_only_where_they_are_the_same():
    """Decodes of the same requests have the shares of the step before, and nobody makes them anew. A last chunk is as long as the
    one before and samples; who comes back from a preemption has another residency; and an id may have another owner.
    """
    scheduler = make_scheduler(budget=2, num_blocks=20)
    add(scheduler, "a", 4, max_tokens=4)
    first, second, third, fourth = (scheduler.schedule() for _ in range(4))
    assert [step.num_scheduled_tokens["a"] for step in (first, second, third, fourth)] == [2, 2, 1, 1]
    shares = [shares for _, shares in scheduler.in_flight.steps]
    assert [share.samples for [share] in shares] == [False, True, True, True], "a last chunk brings a token"
    assert shares[3] is shares[2], "a decode like the one before"
    scheduler.finish_requests(["a"], ABORTED)
    for output in (first, second, third, fourth):
        assert scheduler.update_from_output(output, ModelOutput({"a": [7]})) == []

    b = add(scheduler, "b", 1)
    scheduler.schedule()
    scheduler._preempt(scheduler.running.pop(), "gives way to a test")
    scheduler.schedule()
    assert [share.num_preemptions for _, [share] in scheduler.in_flight.steps] == [0, 1], "it has come back, and lost what it had"
    scheduler.finish_requests(["b"], ABORTED)
    new_owner = add(scheduler, "b", 1)
    scheduler.schedule()
    assert [share.request is new_owner for _, [share] in scheduler.in_flight.steps] == [False, False, True]
    assert b.is_finished


def test_a_failed_step_leaves_nothing_behind():
    """Its names are taken back, its requests wait again in their order, and the runner is told everything once more."""
    scheduler = make_scheduler(caching=True, num_blocks=20)
    add(scheduler, "z", 2, max_tokens=1)
    step(scheduler)
    add(scheduler, "a", [1, 2, 3, 4, 5])
    add(scheduler, "b", [1, 2, 3, 4, 6])
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"a": 5, "b": 1}, "b hits what a is about to compute"
    scheduler.rollback(output)
    scheduler.kv_cache_manager.check()
    assert ids(scheduler.waiting) == ["a", "b"]
    again = scheduler.schedule()
    assert again.num_scheduled_tokens == {"a": 5, "b": 1}, "a computes everything again: nobody believes the failed step"
    assert again.finished_request_ids == ["z"]
    assert sorted(again.preempted_request_ids) == ["a", "b"]


def test_a_failed_step_does_not_touch_those_who_were_not_in_it():
    """The budget had run out before them, so they keep their blocks and their progress."""
    scheduler = make_scheduler(budget=2, num_blocks=20)
    add(scheduler, "a", 1, max_tokens=9)
    add(scheduler, "b", 1, max_tokens=9)
    step(scheduler)
    add(scheduler, "c", 1, max_tokens=9)
    scheduler.max_num_batched_tokens = 1
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {"a": 1}
    scheduler.rollback(output)
    assert ids(scheduler.running) == ["b"]
    assert ids(scheduler.waiting) == ["a", "c"]


def test_the_output_carries_differences_only():
    """A request is told whole when it starts; afterwards only its new blocks, and nothing when it takes none."""
    scheduler = make_scheduler(block_size=2, budget=8)
    request = add(scheduler, "a", 3, max_tokens=4)
    new = scheduler.schedule().new_requests
    assert [(n.request_id, list(n.token_ids), n.block_ids, n.num_computed_tokens) for n in new] == [
        ("a", request.prompt_token_ids, [1, 2], 0)]
    scheduler = make_scheduler(block_size=2, budget=8)
    add(scheduler, "a", 3, max_tokens=4)
    step(scheduler)
    second = scheduler.schedule()
    finish_step(scheduler, second)
    assert (second.new_requests, second.new_block_ids) == ([], {}), "position 3 is in the second block"
    assert scheduler.schedule().new_block_ids == {"a": [3]}


def test_a_resumed_request_is_told_whole():
    """After a preemption its row starts anew: the prompt, what it had sampled, and a new table."""
    scheduler = make_scheduler(num_blocks=4, block_size=1)
    add(scheduler, "a", 1, max_tokens=2)
    b = add(scheduler, "b", 1, max_tokens=3)
    step(scheduler)
    assert scheduler.schedule().preempted_request_ids == ["b"]
    scheduler.finish_requests(["a"], ABORTED)
    (new,) = scheduler.schedule().new_requests
    assert (new.request_id, new.token_ids, new.num_prompt_tokens) == ("b", b.all_token_ids, 1)
    assert len(new.token_ids) == len(new.block_ids) == 2


@pytest.mark.skipif(is_learners(Scheduler), reason="a learner's scheduler may decide without a word")
def test_every_decision_is_a_sentence():
    """A learner reads why: who got what, who waits and for what, who gave way to whom."""
    scheduler = make_scheduler(num_blocks=4, block_size=1, seats=2)
    scheduler.record_decisions = True
    for request_id in "abc":
        add(scheduler, request_id, 1, max_tokens=3)
    sentences = []
    while scheduler.has_unfinished_requests():
        output = scheduler.schedule()
        sentences += [decision.reason for decision in output.decisions]
        finish_step(scheduler, output)
    sentences += [decision.reason for decision in scheduler.schedule().decisions]
    for sentence in ("request a starts behind 0 cached positions: computes 1 token, takes 1 block, 2 left",
                     "request c waits: all max_num_seqs=2 seats are taken", "request a computes 1 token, takes 1 block, 0 left",
                     "request b gives 1 block back: 0 free and request b needs more",
                     "request b waits: nobody is admitted in a step that had to preempt", "request a ends (length): 3 blocks back",
                     "request b waits: needs 2 blocks, 0 free"):
        assert sentence in sentences, f"{sentence!r} is not among {sentences}"


def test_decisions_cost_nothing_while_nobody_reads_them():
    """Without a reader no decision is kept, and a template is filled in only when its sentence is asked for."""
    scheduler = make_scheduler()
    add(scheduler, "{free}", 3)
    assert scheduler.schedule().decisions == []
    scheduler = make_scheduler()
    scheduler.record_decisions = True
    add(scheduler, "{free}", 3)
    assert scheduler.schedule().decisions[0].reason.startswith("request {free} starts"), "an id is text and not a template"


def test_times_come_from_the_clock_that_was_given():
    """Queued, first scheduled, first and last token, in this order, and a preemption does not set them back."""
    scheduler = make_scheduler()
    request = add(scheduler, "a", 3, max_tokens=3)
    run_all(scheduler)
    times = request.times
    assert (times.queued, times.first_scheduled, times.first_token, times.last_token) == (1.0, 2.0, 3.0, 5.0)


@pytest.mark.parametrize("caching", [False, True])
def test_positions_add_up(caching):
    """Computed are the prompts without their hits, all sampled tokens but each request's last, and what was lost and redone."""
    scheduler = make_scheduler(num_blocks=9 if not caching else 40, budget=6, caching=caching)
    for request_id in "abcdef":
        add(scheduler, request_id, [1, 2, 3, 4, 5], max_tokens=6)
    run_all(scheduler)
    stats = scheduler.stats
    assert stats.num_scheduled_tokens == (stats.num_prompt_tokens - stats.prefix_cache_hits + stats.num_generated_tokens
                                          - stats.num_finished + stats.num_recomputed_tokens)
    assert (stats.num_recomputed_tokens > 0, stats.prefix_cache_hits > 0) == (not caching, caching)
    assert (stats.num_prompt_tokens, stats.num_generated_tokens, stats.num_finished) == (30, 36, 6)
    assert stats.prefix_cache_queries == (30 if caching else 0)


def count_calls(function):
    """How many functions, Python's own included, a call runs: a clock that ticks the same on every machine."""
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(event) if event.endswith("call") else None)
    try:
        function()
    finally:
        sys.setprofile(None)
    return len(calls)


def test_a_step_costs_the_same_with_ten_thousand_waiting():
    """Planning looks at the running requests and the head of the queue; so does an abort from its middle."""
    costs = []
    for num_waiting in (10, 10_000):
        scheduler = make_scheduler(seats=4, budget=64, num_blocks=100)
        for number in range(4 + num_waiting):
            add(scheduler, f"{number}", [1, 2, 3])
        step(scheduler)
        costs.append((count_calls(scheduler.schedule), count_calls(lambda: scheduler.finish_requests(["8"], ABORTED))))  # noqa: B023
    assert costs[0] == costs[1], f"(schedule, abort) take {costs[0]} calls with 10 waiting and {costs[1]} with 10,000"


def test_the_scheduler_needs_no_torch():
    """A scheduler test runs in a millisecond because nothing below it imports torch."""
    code = ("import sys, minivllm.block_pool, minivllm.kv_cache, minivllm.scheduler_output, minivllm.scheduler;"
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0, "scheduler.py pulls in torch"
