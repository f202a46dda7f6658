"""One step ahead: the host plans and launches a step while the one before it runs, and no answer may show it."""

from __future__ import annotations

import asyncio
import functools
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import greedy, make_llm, prompts_of, run_alone, tokens_of

import minivllm
from minivllm import LLM, SamplingParams
from minivllm.async_engine import AsyncEngine
from minivllm.bench.flags import OneLineParser, add_engine_flags, engine_kwargs, parse_flags
from minivllm.engine import LLMEngine
from minivllm.engine_args import engine_config_from_kwargs
from minivllm.request import RequestOutput
from minivllm.scheduler_output import LaunchedStep, ModelOutput, SchedulerOutput
from minivllm.trace import replay

DRAFT = str(Path(minivllm.__file__).parent / "tiny" / "draft")
FAULTS = ("before the launch", "after the launch", "at the result")


class DeviceError(Exception):
    """What an injected failure raises."""


@dataclass
class Launched:
    """A step whose result is known only when somebody asks for it, as on a device."""

    runner: LateRunner
    number: int
    output: LaunchedStep
    fails: bool

    def result(self) -> ModelOutput:
        self.runner.log.append(f"wait {self.number}")
        if self.fails:
            raise DeviceError(f"the result of step {self.number}")
        return self.output.result()


@dataclass
class LateRunner:
    """The engine's own runner, which hands its results over late, says what was called when, and fails when told to."""

    runner: object
    faults: dict[int, str] = field(default_factory=dict)  # by the number of the launch
    log: list[str] = field(default_factory=list)
    num_launches: int = 0

    def execute_model(self, output: SchedulerOutput) -> Launched:
        assert output.num_scheduled_tokens, "a step that computes nothing is never launched"
        self.num_launches += 1
        number, fault = self.num_launches, self.faults.get(self.num_launches)
        self.log.append(f"launch {number}")
        if fault == "before the launch":
            raise DeviceError(f"launch {number}")
        model_output = self.runner.execute_model(output)
        if fault == "after the launch":
            raise DeviceError(f"launch {number}")
        return Launched(self, number, model_output, fault == "at the result")

    def close(self) -> None:
        self.runner.close()


def make_late(**knobs) -> tuple[LLM, LateRunner]:
    llm = make_llm(async_scheduling=True, **knobs)
    llm.engine.runner = LateRunner(llm.engine.runner)
    return llm, llm.engine.runner


def assert_clean(engine: LLMEngine) -> None:
    """Nothing is left of any request: no block, no step, no row that is not on its way out."""
    engine.kv_cache_manager.check()
    assert engine.kv_cache_manager.usage == 0, "blocks are left in use"
    assert (len(engine.launched), len(engine.scheduler.in_flight)) == (0, 0), "an idle engine has a step in flight"
    assert not engine.output_processor.states
    assert not engine.output_processor.parents


# Drawn workloads --------------------------------------------------------------------------------------------------------------

KNOBS = (
    {"num_blocks": 30, "block_size": 4, "max_num_batched_tokens": 16, "max_num_seqs": 5},
    {"num_blocks": 30, "block_size": 4, "max_num_batched_tokens": 16, "max_num_seqs": 5, "enable_prefix_caching": False},
    {"num_blocks": 100, "block_size": 1, "max_num_batched_tokens": 5, "max_num_seqs": 3},
    {"num_blocks": 20, "block_size": 8, "max_num_batched_tokens": 64, "long_prefill_token_threshold": 7},
    {"num_blocks": 26, "block_size": 4, "max_num_batched_tokens": 64, "enable_chunked_prefill": False},
)
PROMPTS = ("Once upon a time", "Once upon a hill", "The scheduler", "hello 你好 🙂", "What is a block?", "\n\n",
           "The KV cache " * 5)


@functools.cache
def engine_of(knobs: int, is_async: bool) -> LLMEngine:
    """One engine for all examples: each has to leave it clean for the next."""
    return LLM(DRAFT, max_model_len=64, dtype="float64", device="cpu", async_scheduling=is_async, **KNOBS[knobs]).engine


@dataclass
class Ask:
    """One user request, and what happens to it and when (in calls of `step`)."""

    prompt: str
    params: SamplingParams
    arrives: int
    leaves: int | None = None  # aborted this many calls after its arrival
    takes_over: bool = False  # under the id of an earlier request that has ended, if there is one


@st.composite
def sampling_params(draw) -> SamplingParams:
    """Any combination that the engine allows; every answer is determined by its seed."""
    def maybe(value: object) -> object:
        return value if draw(st.integers(0, 3)) == 0 else None

    max_tokens = draw(st.integers(1, 24))
    temperature = draw(st.sampled_from([0, 0.7, 1.3]))
    given = {
        "stop": maybe(draw(st.sampled_from(["e", [" the", "."], ["\n"]]))), "ignore_eos": maybe(True),
        "min_tokens": maybe(max_tokens // 2), "stop_token_ids": maybe(list(range(draw(st.integers(250, 1000)), 4096, 3))),
        "top_k": maybe(20), "top_p": maybe(0.9), "min_p": maybe(0.05), "repetition_penalty": maybe(1.3),
        "presence_penalty": maybe(0.8), "frequency_penalty": maybe(-0.4), "logprobs": maybe(draw(st.sampled_from([0, 2]))),
        "prompt_logprobs": maybe(1), "bad_words": maybe(["the"]), "logit_bias": maybe({5: 40.0, 300: -100.0, 4093: 9.0}),
        "n": maybe(draw(st.integers(2, 3))) if temperature else None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=draw(st.integers(0, 99)), **given)


@st.composite
def asks(draw, mishaps: bool) -> list[Ask]:
    """Requests that arrive over a dozen steps; with mishaps some are aborted, and some ids are used again."""
    found = []
    for _ in range(draw(st.integers(1, 7))):
        ask = Ask(draw(st.sampled_from(PROMPTS)), draw(sampling_params()), draw(st.integers(0, 12)))
        if mishaps:
            ask.leaves, ask.takes_over = draw(st.sampled_from([None, None, *range(9)])), draw(st.booleans())
        found.append(ask)
    return sorted(found, key=lambda ask: ask.arrives)


def play(engine: LLMEngine, workload: list[Ask], faults: dict[int, str] | None = None) -> list[RequestOutput]:
    """The last output of every request. Errors of a step are met as a patient caller would: by calling `step` again."""
    own, engine.runner = engine.runner, LateRunner(engine.runner, faults or {})
    latest: dict[int, RequestOutput] = {}
    owners: dict[str, int] = {}  # of an id: the newest request under it

    def take(outputs: list[RequestOutput]) -> None:
        for output in outputs:
            number = owners[output.request_id]
            assert number not in latest or not latest[number].finished, f"request {number} has ended and moves"
            latest[number] = output

    def add(number: int, ask: Ask) -> None:
        ended = [request_id for request_id in owners if request_id not in engine.output_processor.states]
        request_id = ended[-1] if ask.takes_over and ended else f"r{number}"
        engine.add_request(request_id, ask.prompt, ask.params)
        owners[request_id] = number

    now = 0
    while len(latest) < len(workload) or engine.has_unfinished_requests():
        assert now < 3000, "somebody waits for ever"
        for number, ask in enumerate(workload):
            if ask.leaves is not None and ask.arrives + ask.leaves == now:
                take(engine.abort_request([request_id for request_id, owner in owners.items() if owner == number]))
            if ask.arrives == now:
                add(number, ask)
        try:
            take(engine.step())
        except DeviceError:
            engine.kv_cache_manager.check()
        now += 1
    engine.runner = own
    return [latest[number] for number in range(len(workload))]


def what_was_said(output: RequestOutput) -> list:
    return [(answer.text, answer.token_ids, answer.finish_reason, answer.stop_reason) for answer in output.outputs]


def all_logprobs(output: RequestOutput) -> list[tuple]:
    """(token, rank, decoded, logprob) of every entry, the answers' and the prompt's."""
    entries = [entry for answer in output.outputs for entry in answer.logprobs or ()] + (output.prompt_logprobs or [])[1:]
    return [(token_id, entry.rank, entry.decoded_token, entry.logprob) for each in entries for token_id, entry in each.items()]


def assert_same(ours: RequestOutput, theirs: RequestOutput, story: str) -> None:
    assert ours.finished
    assert what_was_said(ours) == what_was_said(theirs), story
    mine, expected = all_logprobs(ours), all_logprobs(theirs)
    assert [entry[:3] for entry in mine] == [entry[:3] for entry in expected], f"other logprobs: {story}"
    assert all(math.isclose(one[3], two[3], abs_tol=1e-5) for one, two in zip(mine, expected)), f"other logprobs: {story}"


@settings(max_examples=examples(60))
@given(st.integers(0, len(KNOBS) - 1), asks(mishaps=False))
def test_no_answer_shows_that_steps_overlap(knobs, workload):
    """Text, tokens, reasons and logprobs are those of steps made in turn, whatever is asked for and whenever it comes."""
    in_turn, ahead = engine_of(knobs, False), engine_of(knobs, True)
    for ours, theirs, ask in zip(play(ahead, workload), play(in_turn, workload), workload, strict=True):
        assert_same(ours, theirs, f"{ask}, engine {KNOBS[knobs]}")
    assert_clean(ahead)


@settings(max_examples=examples(80))
@given(st.integers(0, len(KNOBS) - 1), asks(mishaps=True), st.dictionaries(st.integers(1, 25), st.sampled_from(FAULTS), max_size=4))
def test_aborts_reused_ids_and_failed_steps_change_no_other_answer(knobs, workload, faults):
    """What is aborted has said a prefix of its answer; everybody else gets all of it, although steps before and after fail."""
    calm = [Ask(ask.prompt, ask.params, 0) for ask in workload]
    in_turn, ahead = engine_of(knobs, False), engine_of(knobs, True)
    for ours, theirs, ask in zip(play(ahead, workload, faults), play(in_turn, calm), workload, strict=True):
        story = f"{ask}, failures {faults}, engine {KNOBS[knobs]}"
        if "abort" not in [answer.finish_reason for answer in ours.outputs]:
            assert_same(ours, theirs, story)
        for mine, whole in zip(ours.outputs, theirs.outputs, strict=True):
            assert mine.token_ids == whole.token_ids[: len(mine.token_ids)], story
    assert_clean(ahead)


# The loop ---------------------------------------------------------------------------------------------------------------------


def test_a_step_is_launched_before_the_last_one_is_waited_for():
    """Two steps are in flight while the host waits, and none is made behind a last token that is sure to come."""
    llm, runner = make_late()
    (output,) = llm.generate(prompts_of(5), greedy(4), use_tqdm=False)
    assert tokens_of([output]) == run_alone(prompts_of(5), [greedy(4)])
    assert runner.log == ["launch 1", "launch 2", "wait 1", "launch 3", "wait 2", "launch 4", "wait 3", "wait 4"]
    assert (llm.stats.num_steps, llm.stats.num_scheduled_tokens, llm.stats.discarded_positions) == (4, 8, 0)


def test_in_turn_no_step_is_launched_before_the_last_one_is_known():
    """With async_scheduling=False every step is waited for at once."""
    llm = make_llm(async_scheduling=False)
    llm.engine.runner = runner = LateRunner(llm.engine.runner)
    llm.generate(prompts_of(5), greedy(2), use_tqdm=False)
    assert runner.log == ["launch 1", "wait 1", "launch 2", "wait 2"]


def test_every_call_of_step_returns_the_tokens_of_one_step():
    """One step ahead, a caller still sees one more token of each request a call, from the first call on."""
    llm, _ = make_late()
    llm.enqueue(prompts_of(5, 6), greedy(5))
    for state in llm.engine.output_processor.states.values():
        state.processed.final_only, state.children[0].is_followed = False, True
    for number in range(1, 6):
        assert [len(output.outputs[0].token_ids) for output in llm.engine.step()] == [number, number]
    assert_clean(llm.engine)


def test_requests_that_end_at_different_lengths_waste_nothing():
    """Neither max_tokens nor the end of the context lets a position be computed that nobody needs."""
    llm, _ = make_late(max_model_len=16, num_blocks=12)
    params = [greedy(count) for count in (1, 2, 5, 9)] + [greedy(None)]
    llm.generate(prompts_of(4, 7, 5, 6, 9), params, use_tqdm=False)
    stats = llm.stats
    assert stats.discarded_positions == 0
    assert stats.num_scheduled_tokens == (stats.num_prompt_tokens - stats.prefix_cache_hits + stats.num_generated_tokens
                                          - stats.num_finished + stats.num_recomputed_tokens)


def test_an_end_that_only_the_token_tells_costs_one_position():
    """A stop token is found one step late: one position was computed behind it, and it is counted as discarded."""
    prompt = prompts_of(7)[0]
    free_run = run_alone([prompt], [greedy(12)])[0]
    llm, runner = make_late()
    answer = llm.generate([prompt], greedy(12, stop_token_ids=[free_run[5]]), use_tqdm=False)[0].outputs[0]
    length = free_run.index(free_run[5]) + 1
    assert (answer.token_ids, answer.finish_reason) == (free_run[:length], "stop")
    assert (llm.stats.discarded_positions, llm.stats.num_steps) == (1, length + 1)
    assert f"wait {length + 1}" not in runner.log, "nobody waits for a step that nobody reads"
    assert_clean(llm.engine)


def test_aborting_the_last_request_leaves_nothing_in_flight():
    """The step in flight is forgotten with the request that it was for, and the next request is served."""
    llm, _ = make_late()
    llm.engine.add_request("r", prompts_of(5)[0], greedy(9))
    llm.engine.step()
    assert len(llm.engine.launched) == 1
    llm.engine.abort_request(["r"])
    assert_clean(llm.engine)
    assert llm.stats.discarded_positions == 1
    assert tokens_of(llm.generate(prompts_of(6), greedy(3), use_tqdm=False)) == run_alone(prompts_of(6), [greedy(3)])


def test_an_id_that_is_used_again_gets_nothing_of_its_former_owner():
    """Results belong to a request and not to an id: with a step of the first owner in flight, the second one starts clean."""
    first, second, other = prompts_of(5, 8, 6)
    llm, _ = make_late()
    engine, params = llm.engine, greedy(4, prompt_logprobs=0)
    engine.add_request("other", other, greedy(9))
    engine.add_request("same", first, params)
    engine.step()
    engine.abort_request(["same"])
    engine.add_request("same", second, params)
    last = {}
    while engine.has_unfinished_requests():
        last |= {output.request_id: output for output in engine.step()}
    assert tokens_of([last["same"], last["other"]]) == run_alone([second, other], [params, greedy(9)])
    assert [next(iter(entry)) for entry in last["same"].prompt_logprobs[1:]] == second[1:], "prompt logprobs of the first owner"


def test_a_preempted_request_samples_again_what_was_on_its_way():
    """Blocks run out while a step is in flight: its results for who gave way are dropped, and come again."""
    prompts, params = prompts_of(*[9] * 8), [greedy(12)] * 8
    llm, _ = make_late(num_blocks=11)
    assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == run_alone(prompts, params)
    assert llm.stats.num_preemptions > 0, "the pool should be too small"
    assert_clean(llm.engine)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_fails_with_another_one_in_flight_loses_nothing(fault):
    """The error comes up once, what had built on the failed step is undone, and all tokens come."""
    prompts, params = prompts_of(9, 6, 9), [greedy(8), greedy(3), greedy(8)]
    llm, runner = make_late(max_num_batched_tokens=16)
    runner.faults = {3: fault}
    ids, done, num_errors = llm.enqueue(prompts, params), {}, 0
    while llm.engine.has_unfinished_requests():
        try:
            done |= {output.request_id: output for output in llm.engine.step()}
        except DeviceError:
            num_errors += 1
            assert len(llm.engine.launched) == len(llm.engine.scheduler.in_flight) == (0 if fault == "at the result" else 1)
    assert num_errors == 1
    assert llm.stats.num_rollbacks == (2 if fault == "at the result" else 1)
    assert tokens_of([done[request_id] for request_id in ids]) == run_alone(prompts, params)
    assert_clean(llm.engine)


# Who watches ------------------------------------------------------------------------------------------------------------------


def test_a_trace_that_begins_between_two_steps_in_flight_tells_the_truth():
    """While somebody listens steps are made in turn, and the state rebuilt from the records is the engine's own."""
    llm, runner = make_late(num_blocks=14, max_num_batched_tokens=9)
    engine, records = llm.engine, []
    llm.enqueue(prompts_of(9, 14, 9, 5, 12, 7), greedy(14))
    for _ in range(6):
        engine.step()
    assert len(engine.launched) == 1
    engine.trace.subscribe(records.append)
    engine.step()
    assert [record["type"] for record in records] == ["header", "keyframe"], "that step's plan is in the keyframe already"
    num_steps = 0
    while engine.has_unfinished_requests():
        engine.step()
        assert not engine.launched
        num_steps += 1
        *_, state = replay(records)
        running = {request.request_id: request for request in engine.scheduler.running}
        assert state.requests == {request_id: {
            "num_prompt_tokens": request.num_prompt_tokens, "num_tokens": request.num_tokens,
            "num_computed_tokens": request.num_computed_tokens, "blocks": engine.kv_cache_manager.get_block_ids(request_id),
        } for request_id, request in running.items()}
    assert (records[-1]["step"], engine.stats.num_preemptions > 0) == (num_steps, True)
    engine.trace.unsubscribe(records.append)
    runner.log.clear()
    engine.add_request("later", prompts_of(5)[0], greedy(3))
    engine.step()
    assert [event.split()[0] for event in runner.log[:3]] == ["launch", "launch", "wait"], "nobody listens: one step ahead again"


def test_a_trace_file_is_written_step_by_step(tmp_path):
    """With a trace file steps are made in turn, even where async scheduling was asked for."""
    llm, runner = make_late(trace=str(tmp_path / "t.jsonl"))
    llm.generate(prompts_of(5), greedy(2), use_tqdm=False)
    assert runner.log == ["launch 1", "wait 1", "launch 2", "wait 2"]
    llm.close()


def test_a_paused_engine_has_nothing_in_flight():
    """`pause` takes in what is being computed; then every single step is planned, made and reported alone."""
    prompts, params = prompts_of(5, 9), greedy(30)

    async def story(engine: AsyncEngine):
        await engine.pause()
        streams = [await engine.add_request(prompt, params, str(i)) for i, prompt in enumerate(prompts)]
        await engine.resume()
        await streams[0].__anext__()
        await engine.pause()
        counts = []
        for _ in range(3):
            counts.append(await engine.call(lambda inner: (inner.stats.num_steps, len(inner.launched))))
            await engine.step_once()
        await engine.resume()
        return counts, [[output async for output in stream][-1].outputs[0].token_ids for stream in streams]

    async def main():
        engine = AsyncEngine(make_late()[0].engine)
        try:
            return await asyncio.wait_for(story(engine), 60)
        finally:
            engine.shutdown()

    counts, tokens = asyncio.run(main())
    first = counts[0][0]
    assert counts == [(first, 0), (first + 1, 0), (first + 2, 0)]
    assert tokens == run_alone(prompts, [params] * 2)


# The knob ---------------------------------------------------------------------------------------------------------------------


def test_the_knob_is_vllms_and_a_cpu_steps_in_turn_by_default():
    """async_scheduling goes through LLM, `serve` and `bench`; left out it is decided by the device."""
    assert make_llm().engine.config.async_scheduling is False
    assert make_llm(async_scheduling=True).engine.config.async_scheduling is True
    assert engine_config_from_kwargs(async_scheduling=None).async_scheduling is None
    parser = OneLineParser()
    add_engine_flags(parser)
    for flag, value in (("--async-scheduling", True), ("--no-async-scheduling", False)):
        assert engine_kwargs(parse_flags(parser, [flag])) == {"async_scheduling": value}


def test_serve_takes_the_knob():
    """`--async-scheduling` and `--no-async-scheduling` reach the engine."""
    args = pytest.importorskip("minivllm.serve.args", reason="the server's tests need fastapi")
    assert args.parse_args(["--no_async_scheduling"]).engine.async_scheduling is False
    assert args.parse_args(["--async-scheduling"]).engine.async_scheduling is True
    assert args.parse_args([]).engine.async_scheduling is None
