"""After failed steps: who is to blame ends, everybody else gets all tokens, and a broken device is nobody's fault."""

from __future__ import annotations

import asyncio

import pytest
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_async_scheduling import assert_clean
from test_engine import greedy, make_llm, prompts_of, run_alone, tokens_of

from minivllm.async_engine import AsyncEngine
from minivllm.exceptions import EngineDeadError

LENGTHS, MAX_TOKENS = (9, 5, 14, 3, 20, 7), 16


class FaultyRunner:
    """A runner whose steps fail: some by their number, and all that reach a poisonous position of a request."""

    def __init__(self, engine, *, poison=(), transient=(), message="out of luck"):
        self.engine, self.runner, self.poison = engine, engine.runner, dict(poison)
        self.transient, self.message = transient, message
        self.num_launches = self.num_failures = 0
        self.sizes: list[int] = []  # of the steps that did not fail
        engine.runner = self

    def execute_model(self, output):
        self.num_launches += 1
        requests = [self.engine.scheduler.requests[name] for name in output.num_scheduled_tokens]
        poisoned = [each for each in requests if each.num_computed_tokens > self.poison.get(each.request_id, 10**6)]
        if poisoned or self.num_launches in self.transient:
            self.num_failures += 1
            raise RuntimeError(self.message)
        self.sizes.append(len(requests))
        return self.runner.execute_model(output)

    def close(self):
        self.runner.close()


def finish(engine) -> dict:
    """Step and recover until nothing is left; the last output of every request."""
    last = {}
    for _ in range(1000):
        if not engine.has_unfinished_requests():
            return last
        try:
            outputs = engine.step()
        except RuntimeError as error:
            outputs = engine.recover(error)
        last |= {output.request_id: output for output in outputs}
        engine.kv_cache_manager.check()
    raise AssertionError("the engine goes round in circles")


ALONE = {}


def alone(index: int) -> list[int]:
    """The answer of request `index` when nothing fails."""
    if not ALONE:
        ALONE.update(enumerate(run_alone(prompts_of(*LENGTHS), [greedy(MAX_TOKENS)] * len(LENGTHS))))
    return ALONE[index]


def queue_all(engine) -> None:
    for index, prompt in enumerate(prompts_of(*LENGTHS)):
        engine.add_request(str(index), prompt, greedy(MAX_TOKENS))


KNOBS = ({}, {"max_num_batched_tokens": 8}, {"num_blocks": 18, "max_num_batched_tokens": 16}, {"max_num_seqs": 2})
POISON = st.dictionaries(st.integers(0, len(LENGTHS) - 1), st.integers(0, 36), max_size=3)


@settings(max_examples=examples(40))
@given(st.sampled_from(KNOBS), st.booleans(), POISON)
def test_who_makes_steps_fail_ends_and_nobody_else_does(knobs, is_async, poison):
    """Poison in a prompt or in an answer: its request ends with "error" and a prefix of its answer; all others are complete.

    (Of several that fail independently one may fail while another is tried: then an innocent may end too, and nothing loops.)
    """
    engine = make_llm(async_scheduling=is_async, **knobs).engine
    runner = FaultyRunner(engine, poison={str(index): position for index, position in poison.items()})
    queue_all(engine)
    last = finish(engine)
    for index, length in enumerate(LENGTHS):
        (answer,) = last[str(index)].outputs
        is_reached = index in poison and poison[index] < length + MAX_TOKENS - 1  # the last token is not computed
        wanted = {"error"} if is_reached else {"length"} if len(poison) < 2 else {"length", "error"}
        assert answer.finish_reason in wanted, f"request {index}, poison {poison}"
        assert answer.token_ids == alone(index)[: len(answer.token_ids)]
        assert answer.finish_reason == "error" or len(answer.token_ids) == MAX_TOKENS, "all tokens came"
    assert runner.num_failures <= 2 * len(LENGTHS), "every second failure ends a request"
    assert runner.num_failures <= 2 or len(poison) > 1, "one poison fails twice"
    assert_clean(engine)
    engine.close()


@pytest.mark.parametrize("is_async", [False, True])
def test_a_failure_that_passes_ends_nobody(is_async):
    """Two failed steps of many: all requests get all their tokens, and afterwards they run together as before."""
    engine = make_llm(async_scheduling=is_async).engine
    runner = FaultyRunner(engine, transient=(3, 18))
    queue_all(engine)
    last = finish(engine)
    assert [tokens_of([last[str(index)]])[0] for index in range(len(LENGTHS))] == [alone(index) for index in range(len(LENGTHS))]
    assert runner.num_failures == 2
    assert runner.sizes[2] == 1, "after a failure one request runs alone"
    assert max(runner.sizes[3:]) == len(LENGTHS), "and then all together again"
    assert not engine.recovery.suspects


def test_a_step_that_always_fails_ends_every_request():
    """Nothing loops for ever: six requests cost seven failed steps, and the engine serves the next one that can be served."""
    engine = make_llm().engine
    runner = FaultyRunner(engine, transient=range(1, 8))
    queue_all(engine)
    assert {output.outputs[0].finish_reason for output in finish(engine).values()} == {"error"}
    assert runner.num_launches == 1 + len(LENGTHS)
    assert_clean(engine)
    queue_all(engine)
    assert {output.outputs[0].finish_reason for output in finish(engine).values()} == {"length"}


def test_new_requests_wait_behind_the_suspects():
    """Who comes while a suspect is tried is not in its step, so it cannot be blamed for it."""
    engine = make_llm().engine
    FaultyRunner(engine, poison={"0": 4})
    engine.add_request("0", [1] * 6, greedy(4))
    with pytest.raises(RuntimeError) as first:
        engine.step()
    assert engine.recover(first.value) == []
    engine.add_request("late", prompts_of(9)[0], greedy(MAX_TOKENS))
    last = finish(engine)
    assert (last["0"].outputs[0].finish_reason, tokens_of([last["late"]])) == ("error", [alone(0)])


def test_an_aborted_suspect_holds_nobody_up():
    """The seats come back when the suspects have gone, however they went."""
    engine = make_llm().engine
    FaultyRunner(engine, transient=(1,))
    queue_all(engine)
    with pytest.raises(RuntimeError) as failure:
        engine.step()
    engine.recover(failure.value)
    engine.abort_request([str(index) for index in range(1, len(LENGTHS))])
    engine.step()
    engine.step()
    assert (engine.recovery.suspects, engine.scheduler.max_num_running) == ({}, engine.config.max_num_seqs)


@pytest.mark.parametrize("reason", ["CUDA error: an illegal memory access was encountered", "our own mistake"])
def test_what_no_request_can_be_blamed_for_goes_up(reason):
    """A broken device, and an exception outside the forward pass, which leaves books that nobody may trust."""
    engine = make_llm().engine
    if reason.startswith("CUDA"):
        FaultyRunner(engine, transient=(1,), message=reason)
    else:
        engine.output_processor.update = lambda *given: (_ for _ in ()).throw(RuntimeError(reason))
    queue_all(engine)
    with pytest.raises(RuntimeError) as failure:
        engine.step()
    with pytest.raises(RuntimeError, match=reason):
        engine.recover(failure.value)


def test_the_async_engine_recovers_by_itself_and_its_observer_hears_of_it():
    """Streams of the innocent go on; the one to blame ends with "error"; a broken device then ends all of them."""
    async def story():
        engine = AsyncEngine(make_llm().engine)
        seen = []
        engine.engine.observer = lambda requests, num_tokens: seen.extend(each for each in requests if each.is_finished)
        runner = FaultyRunner(engine.engine, poison={"1": 8})
        try:
            streams = [await engine.add_request(prompt, greedy(MAX_TOKENS), str(index))
                       for index, prompt in enumerate(prompts_of(*LENGTHS))]
            last = [[output async for output in stream][-1] for stream in streams]
            assert not engine.errored
            runner.poison, runner.message = {"again": 0}, "CUDA error: device-side assert triggered"
            with pytest.raises(EngineDeadError):
                async for _ in await engine.add_request([1, 2], greedy(2), "again"):
                    pass
            return last, engine.errored, seen
        finally:
            engine.shutdown()

    last, is_dead, seen = asyncio.run(asyncio.wait_for(story(), 60))
    assert [output.outputs[0].finish_reason for output in last] == ["length", "error", *["length"] * 4]
    assert [tokens_of([output])[0] for output in last if output.outputs[0].finish_reason == "length"] == [
        alone(index) for index in (0, 2, 3, 4, 5)]
    assert is_dead
    assert sorted(request.status.finish_reason for request in seen) == ["error", *["length"] * 5]
