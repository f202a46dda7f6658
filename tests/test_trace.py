"""The flight recorder tells the truth: what it says of blocks and queues is what the engine had."""

from __future__ import annotations

import json

import pytest
from telling import is_learners
from test_engine import greedy, make_llm, prompts_of

from minivllm.scheduler import Scheduler
from minivllm.trace import KEYFRAME_EVERY, read_trace, replay, to_ranges


def test_replaying_a_trace_rebuilds_every_block_table(tmp_path):
    """At every step the state rebuilt from the file equals the engine's own tables, queues and free blocks."""
    path = str(tmp_path / "run.trace.jsonl")
    llm = make_llm(num_blocks=14, max_num_batched_tokens=9, trace=path)
    prompts = prompts_of(9, 14, 9, 5, 12, 7)
    ids = llm.enqueue([prompts[0], *prompts], greedy(14))
    engine, truth = llm.engine, []
    while engine.has_unfinished_requests():
        engine.step()
        if len(truth) == 4:
            engine.abort_request([ids[1]])  # shows in the next step's record
        running = {request.request_id: request for request in engine.scheduler.running}
        truth.append({
            "tables": {name: engine.kv_cache_manager.get_block_ids(name) for name in running},
            "computed": {name: request.num_computed_tokens for name, request in running.items()},
            "tokens": {name: request.num_tokens for name, request in running.items()},
            "waiting": len(engine.scheduler.waiting), "free": engine.kv_cache_manager.num_free_blocks,
            "cached": set(engine.kv_cache_manager.pool.block_hashes),
        })
    stats = engine.stats
    llm.close()
    states = replay(read_trace(path))
    next(states)  # the keyframe before the first step
    for number, (state, expected) in enumerate(zip(states, truth, strict=True), start=1):
        if number == 5:
            continue  # the abort came after this step had been recorded
        for key, name in (("blocks", "tables"), ("num_computed_tokens", "computed"), ("num_tokens", "tokens")):
            rebuilt = {request_id: request[key] for request_id, request in state.requests.items()}
            assert rebuilt == expected[name], f"{name} after step {number}"
        assert (state.waiting["count"], state.free_blocks) == (expected["waiting"], expected["free"]), f"queues after step {number}"
        assert state.cached == expected["cached"], f"blocks that the prefix cache knows after step {number}"
    assert stats.num_preemptions > 0, "the workload should preempt, so that the trace has to tell of it"


def test_a_keyframe_says_what_the_differences_say(tmp_path):
    """A viewer that starts at a later keyframe sees the same state as one that has replayed everything."""
    path = str(tmp_path / "long.trace.jsonl")
    llm = make_llm(max_model_len=256, num_blocks=200, trace=path)
    llm.generate(prompts_of(5, 6), greedy(KEYFRAME_EVERY + 20), use_tqdm=False)
    llm.close()
    records = read_trace(path)
    keyframe = next(record for record in records if record["type"] == "keyframe" and record["step"] == KEYFRAME_EVERY)
    before = [record for record in records[: records.index(keyframe)] if record["type"] != "keyframe" or record["step"] == 0]
    *_, state = replay(before)
    assert state.requests == keyframe["requests"], "differences and keyframe agree"
    assert to_ranges(state.cached) == keyframe["cached"] != [], "and so they do about the prefix cache"


@pytest.mark.skipif(is_learners(Scheduler), reason="a learner's scheduler may decide without a word")
def test_decisions_say_who_waits_for_what(tmp_path):
    """A request that does not fit is named with the blocks that it needs and those that are free."""
    path = str(tmp_path / "wait.trace.jsonl")
    llm = make_llm(num_blocks=8, trace=path)
    llm.generate(prompts_of(16, 16), greedy(4), use_tqdm=False)
    llm.close()
    decisions = [decision for record in read_trace(path) if record["type"] == "step" for decision in record["decisions"]]
    waits = [decision for decision in decisions if decision["action"] == "wait"]
    assert waits, "the second request has to wait for blocks"
    assert waits[0]["need"] > waits[0]["free"], f"a wait says what is missing: {waits[0]}"
    assert "needs" in waits[0]["reason"], f"the reason is a sentence: {waits[0]['reason']!r}"


def test_nothing_is_recorded_while_nobody_listens():
    """Without a file or a listener no record is made; a listener that joins later starts with a keyframe of now."""
    llm = make_llm()
    llm.enqueue(prompts_of(5, 5), greedy(6))
    llm.engine.step()
    assert llm.engine.trace.step == 0
    records = []
    llm.engine.trace.subscribe(records.append)
    llm.engine.step()
    kinds = [record["type"] for record in records]
    assert kinds == ["header", "keyframe", "step"]
    assert list(records[1]["requests"]) == ["0", "1"], "the keyframe knows who runs already"
    json.dumps(records)
    llm.engine.trace.unsubscribe(records.append)
    llm.wait_for_completion(use_tqdm=False)
    assert len(records) == 3, "after leaving, nothing more is handed over"


def test_a_keyframe_tells_what_happened_without_a_step():
    """Requests that come or are aborted between two steps show in a keyframe as soon as somebody asks, and once."""
    llm = make_llm()
    trace, records = llm.engine.trace, []
    trace.subscribe(records.append)
    ids = llm.enqueue(prompts_of(5, 5), greedy(6))
    trace.refresh()
    trace.refresh()
    assert [record["waiting"]["first"] for record in records[2:]] == [ids], "told, and not told twice"
    llm.engine.step()
    free = llm.engine.kv_cache_manager.num_free_blocks
    llm.engine.abort_request(ids)
    trace.refresh()
    assert records[-1]["type"] == "keyframe" and not records[-1]["requests"], "the aborted are gone"
    assert records[-1]["free_blocks"] > free, "and their blocks are back"


def test_the_first_token_s_time_is_told_once_per_request():
    """Seconds from arrival, by the engine's clock, in the record of the step that brought the first token."""
    llm = make_llm(num_blocks=14, max_num_batched_tokens=9)
    records = []
    llm.engine.trace.subscribe(records.append)
    ids = llm.enqueue(prompts_of(9, 14, 9, 5), greedy(14))
    times = {request_id: request.times for request_id, request in llm.engine.scheduler.requests.items()}
    llm.wait_for_completion(use_tqdm=False)
    told = [first for record in records if record["type"] == "step" for first in record["first_tokens"].items()]
    assert sorted(told) == [(name, round(times[name].first_token - times[name].arrival, 6)) for name in ids]
    clock = [record["time"] for record in records if "time" in record]
    assert clock == sorted(clock)


def test_another_version_is_refused():
    """A trace of another version is refused by number and not misread."""
    with pytest.raises(ValueError, match="version 99"):
        list(replay([{"type": "header", "version": 99}]))
