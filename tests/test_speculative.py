"""Guessing ahead changes when tokens come, and never which: greedy, seeded, stopped, preempted, aborted, in any batch."""

from __future__ import annotations

import functools
import json
import logging
import math
import tempfile
from array import array
from collections import Counter
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from depth import examples
from flex_double import flex_on_cpu  # noqa: F401 - a fixture
from hypothesis import given, settings
from hypothesis import strategies as st
from telling import refused
from test_async_scheduling import DRAFT, FAULTS, Ask, all_logprobs, asks, assert_clean, assert_same, play
from test_async_scheduling import KNOBS as ENGINES
from test_engine import VOCAB, greedy, make_llm, model_and_folder, prompts_of, run_alone, tokens_of
from test_engine_parity import MAX_MODEL_LEN, hf_greedy, make_prompts, oracle
from test_engine_parity import workloads as parity_workloads
from tiny_models import random_qwen2
from transformers import AutoModelForCausalLM

from minivllm import LLM, SamplingParams
from minivllm.async_output import AsyncOutput
from minivllm.bench.flags import OneLineParser, add_engine_flags, engine_kwargs, parse_flags
from minivllm.engine import LLMEngine
from minivllm.engine_args import engine_config_from_kwargs
from minivllm.exceptions import CheckpointError, UnsupportedError, ValidationError
from minivllm.logprobs import compute_logprobs
from minivllm.rejection_sampling import rejection_sample
from minivllm.request import Request
from minivllm.sampler import draw, seed_keys
from minivllm.scheduler_output import SchedulerStats
from minivllm.speculative import DraftRoom, accepted_run, look_up
from minivllm.speculative_config import SpeculativeConfig, break_even, tokens_per_step
from minivllm.tiny import checkpoint_path, smalltalk, stories
from minivllm.trace import replay

MODEL = str(checkpoint_path())
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


class ReplayProposer:
    """Knows how requests go on, says so with the probability `right`, and lies otherwise; runs of 0 to `longest` drafts."""

    def __init__(self, truth, right: float, longest: int, vocab: int, seed: int = 0) -> None:
        self.truth = truth  # from a request to its whole answer
        self.right = right
        self.longest = longest
        self.vocab = vocab
        self.numbers = Random(seed)

    def propose(self, requests: list[Request], room: DraftRoom) -> dict[str, list[int]]:
        drafts = {}
        for request in requests:
            granted = room.reserve(request, self.numbers.randint(0, self.longest))
            coming = self.truth(request)[request.num_output_tokens:][:granted]
            drafts[request.request_id] = [
                token_id if self.numbers.random() < self.right else self.numbers.randrange(self.vocab) for token_id in coming]
        return drafts

    def close(self) -> None:
        pass


def replaying(llm_or_engine, truth, right: float = 1.0, longest: int = 5, vocab: int = VOCAB, seed: int = 0) -> None:
    """Let a speculating engine ask such a proposer instead of its own."""
    engine = getattr(llm_or_engine, "engine", llm_or_engine)
    engine.scheduler.proposer = engine.proposer = ReplayProposer(truth, right, longest, vocab, seed)


def run_checked(llm: LLM) -> dict[str, object]:
    """Make steps to the end, with the invariants of pool and prefix cache asserted after each."""
    done = {}
    while llm.engine.has_unfinished_requests():
        done |= {output.request_id: output for output in llm.engine.step() if output.finished}
        check_cache(llm.engine)
    assert_clean(llm.engine)
    return done


def check_cache(engine: LLMEngine) -> None:
    """Blocks add up, and what a running request has published are tokens that it has said or was given."""
    manager = engine.kv_cache_manager
    manager.check()
    for request in engine.scheduler.running:
        table, size = manager.get_block_ids(request.request_id), manager.block_size
        assert request.num_computed_tokens < request.num_tokens and not request.spec_token_ids
        for index in range(manager.num_cached_blocks[request.request_id] if manager.enable_caching else 0):
            name = manager.pool.block_hashes[table[index]]
            said = request.all_token_ids[index * size : (index + 1) * size]
            assert name.token_ids == said.tobytes(), "a guess is in the cache"


# Greedy: Hugging Face's tokens ------------------------------------------------------------------------------------------------


@st.composite
def greedy_workloads(draw):
    """A workload of the parity test, a proposer, and how right it is."""
    workload = draw(parity_workloads())
    who = draw(st.sampled_from(["replay", "replay", "replay", "ngram", "itself", "another"]))
    return workload, who, draw(st.integers(1, 6)), draw(st.sampled_from([0.0, 0.5, 0.8, 1.0])), draw(st.integers(0, 99))


SEEN: Counter[str] = Counter()


@settings(max_examples=examples(100))
@given(greedy_workloads())
def greedy_tokens_equal_hugging_face(drawn):
    workload, who, k, right, seed = drawn
    shape, dtype = workload["model"], workload["dtype"]
    model, folder = oracle(*shape, dtype)
    prompts = make_prompts(workload["lengths"], workload["shared"], workload["seed"])
    if who == "ngram":  # it guesses where something comes again, which in random prompts nothing does
        prompts = [[prompt[index % 3] for index in range(len(prompt))] for prompt in prompts]
    expected = [hf_greedy(model, prompt, workload["max_tokens"]) for prompt in prompts]
    others = {"itself": folder, "another": oracle(1 - shape[0], *shape[1:], dtype)[1]}
    asked = NGRAM | {"num_speculative_tokens": k} if who not in others else {"model": others[who], "num_speculative_tokens": k}
    llm = LLM(folder, skip_tokenizer_init=True, dtype=dtype, max_model_len=MAX_MODEL_LEN, device="cpu", speculative_config=asked,
              **workload["engine"])
    if who == "replay":
        replaying(llm, lambda request: expected[int(request.request_id)], right, k, 97, seed)
    for prompt in prompts:
        llm.enqueue([prompt], greedy(workload["max_tokens"]))
    done = run_checked(llm)
    assert [done[str(index)].outputs[0].token_ids for index in range(len(prompts))] == expected, f"{who}, {right}, {k}"
    stats = llm.stats
    assert stats.num_generated_tokens == sum(map(len, expected))
    if who == "itself":
        assert stats.num_accepted_tokens == stats.num_draft_tokens, "a draft that is the model is right"
    SEEN.update({f"{who} drafts": stats.num_draft_tokens, f"{who} accepted": stats.num_accepted_tokens,
                 "preemptions while speculating": stats.num_preemptions if stats.num_drafts else 0})
    llm.close()


def test_greedy_tokens_equal_hugging_face_whoever_guesses():
    """Any shape, pool, budget and chunking, and any drafts: the tokens are those of `generate`. Among them are drafts of every
    proposer, right and wrong ones, and preemptions.
    """
    SEEN.clear()
    greedy_tokens_equal_hugging_face()
    assert SEEN["replay drafts"] > SEEN["replay accepted"] > 0
    assert min(SEEN[f"{who} drafts"] for who in ("ngram", "itself", "another")) > 0
    assert SEEN["preemptions while speculating"] > 0


# Seeds and parameters: the tokens of the engine that does not guess -----------------------------------------------------------


@functools.cache
def engine_of(knobs: int, speculative: str | None) -> LLMEngine:
    """One engine for all examples: each has to leave it clean for the next."""
    return LLM(DRAFT, max_model_len=64, dtype="float64", device="cpu",
               speculative_config=speculative and json.loads(speculative), **ENGINES[knobs]).engine


def truth_of(engine: LLMEngine, workload: list[Ask]):
    """Play it without speculation; returns the outputs, and a function from a request to its answer."""
    known, requests, add = {}, [], engine.scheduler.add_request
    engine.scheduler.add_request = lambda request: (requests.append(request), add(request))
    outputs = play(engine, workload)
    del engine.scheduler.add_request

    def name(request):
        return tuple(request.prompt_token_ids), request.seed, repr(request.sampling_params)

    for request in requests:
        known[name(request)] = request.output_token_ids
    return outputs, lambda request: known[name(request)]


def failures():
    """Which launches fail, and how."""
    return st.dictionaries(st.integers(1, 15), st.sampled_from(FAULTS), max_size=3)


@settings(max_examples=examples(60))
@given(st.integers(0, len(ENGINES) - 1), asks(mishaps=False), st.sampled_from([0.0, 0.5, 0.9, 1.0, None]), st.integers(0, 99))
def test_no_answer_shows_that_somebody_guesses(knobs, workload, right, seed):
    """Text, tokens, reasons and logprobs are those of an engine that does not, with every sampling parameter in force."""
    plain, guessing = engine_of(knobs, None), engine_of(knobs, json.dumps(NGRAM))
    before = [plain.stats.num_generated_tokens, guessing.stats.num_generated_tokens]
    theirs, truth = truth_of(plain, workload)
    own = guessing.proposer
    if right is not None:
        replaying(guessing, truth, right, 6, 4096, seed)
    ours = play(guessing, workload)
    guessing.proposer = guessing.scheduler.proposer = own
    for mine, other, ask in zip(ours, theirs, workload, strict=True):
        assert_same(mine, other, f"{ask}, engine {ENGINES[knobs]}, right {right}")
    assert guessing.stats.num_generated_tokens - before[1] == plain.stats.num_generated_tokens - before[0], "tokens are miscounted"
    assert_clean(guessing)


@settings(max_examples=examples(40))
@given(st.integers(0, len(ENGINES) - 1), asks(mishaps=True), failures(),
       st.sampled_from([0.5, 1.0]))
def test_aborts_and_failed_steps_among_drafts_change_no_other_answer(knobs, workload, faults, right):
    """What is aborted has said a prefix of its answer, and everybody else gets all of it."""
    calm = [Ask(ask.prompt, ask.params, 0) for ask in workload]
    theirs, truth = truth_of(engine_of(knobs, None), calm)
    guessing = engine_of(knobs, json.dumps(NGRAM))
    replaying(guessing, truth, right, 6, 4096)
    for ours, whole, ask in zip(play(guessing, workload, faults), theirs, workload, strict=True):
        story = f"{ask}, failures {faults}, engine {ENGINES[knobs]}"
        if "abort" not in [answer.finish_reason for answer in ours.outputs]:
            assert_same(ours, whole, story)
        for mine, other in zip(ours.outputs, whole.outputs, strict=True):
            assert mine.token_ids == other.token_ids[: len(mine.token_ids)], story
    assert_clean(guessing)


@settings(max_examples=examples(25))
@given(st.integers(0, len(ENGINES) - 1), asks(mishaps=True), failures())
def test_a_draft_model_in_the_same_storm(knobs, workload, faults):
    """The model as its own draft: its rows follow aborts, failures, preemptions and prefix hits, and all that it says is right."""
    theirs, _ = truth_of(engine_of(knobs, None), [Ask(ask.prompt, ask.params, 0) for ask in workload])
    guessing = engine_of(knobs, json.dumps({"model": DRAFT, "num_speculative_tokens": 3}))
    before = (guessing.stats.num_draft_tokens, guessing.stats.num_accepted_tokens)
    for ours, whole, ask in zip(play(guessing, workload, faults), theirs, workload, strict=True):
        if "abort" not in [answer.finish_reason for answer in ours.outputs]:
            assert_same(ours, whole, f"{ask}, failures {faults}, engine {ENGINES[knobs]}")
    assert_clean(guessing)
    if not faults:
        new = (guessing.stats.num_draft_tokens - before[0], guessing.stats.num_accepted_tokens - before[1])
        assert new[0] == new[1], f"of {new[0]} drafts by the model itself {new[1]} are right"


# The draft model --------------------------------------------------------------------------------------------------------------


@functools.cache
def half_right_draft():
    """The model of `make_llm` with noise on its weights, and its folder."""
    model, folder = random_qwen2(tempfile.mkdtemp(), 3, dtype=torch.float64, layers=2, hidden=32, heads=4, kv_heads=2, vocab=VOCAB)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight += 0.02 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    model.save_pretrained(folder)
    return model.eval(), str(folder)


class CheckedProposer:
    """A draft model, asked as ever, whose drafts are compared with what that model says alone behind the same tokens.

    Not all of them are passed on, and some are replaced by a lie: so rows are rewound to any point, and what the draft has
    written for a token that was refused must never be read again.
    """

    def __init__(self, inner, model, truth) -> None:
        self.inner, self.model, self.truth, self.numbers = inner, model, truth, Random(3)
        self.num_compared = 0

    def propose(self, requests, room):
        drafts = self.inner.propose(requests, room)
        for request in requests:
            if found := drafts.get(request.request_id):
                assert found == hf_greedy(self.model, request.all_token_ids, len(found)), f"{request!r} is guessed from stale KV"
                self.num_compared += len(found)
                coming = self.truth[request.request_id][request.num_output_tokens:]
                drafts[request.request_id] = [self.numbers.choice((one, one, other, (other + 1) % VOCAB)) for one, other in zip(
                    found, coming)][: self.numbers.randint(0, len(found))]
        return drafts

    def close(self) -> None:
        self.inner.close()


@pytest.mark.parametrize("knobs", [{}, {"num_blocks": 16, "max_num_batched_tokens": 24}, {"enable_prefix_caching": False},
                                   {"attention_backend": "paged_gather", "block_size": 2}, {"max_num_batched_tokens": 9}])
def test_a_draft_says_what_that_model_says_alone(knobs):
    """Whatever was refused, shared, evicted or chunked before: each draft is the draft model's own greedy continuation."""
    model, folder = half_right_draft()
    shared = prompts_of(13, seed=5)[0]
    prompts = [shared[:length] + tail for length, tail in zip((13, 9, 13, 4, 12, 13), prompts_of(1, 8, 3, 2, 5, 1, seed=6))]
    params = [greedy(count) for count in (14, 9, 12, 16, 6, 11)]
    expected = run_alone(prompts, params)
    llm = make_llm(speculative_config={"model": folder, "num_speculative_tokens": 3}, **knobs)
    proposer = CheckedProposer(llm.engine.proposer, model, {str(i): tokens for i, tokens in enumerate(expected)})
    llm.engine.scheduler.proposer = llm.engine.proposer = proposer
    llm.enqueue(prompts, params)
    done = run_checked(llm)
    assert [done[str(i)].outputs[0].token_ids for i in range(len(prompts))] == expected
    assert proposer.num_compared > 20 and 0 < llm.stats.num_accepted_tokens < llm.stats.num_draft_tokens


def test_prefix_hits_count_for_the_draft_too():
    """A second request for the same prompt costs the draft one block of it, not all."""
    llm = make_llm(max_num_batched_tokens=20, speculative_config={"model": model_and_folder()[1], "num_speculative_tokens": 2})
    prompt, runner = prompts_of(33)[0], llm.engine.proposer.runner
    computed = []
    own = runner.execute_model
    runner.execute_model = lambda output: (computed.append(output.total_num_scheduled_tokens), own(output))[1]
    llm.generate([prompt], greedy(24), use_tqdm=False)
    assert max(computed) == 20, "the draft keeps to the budget of a step"
    first, computed[:] = sum(computed), []
    (output,) = llm.generate([prompt], greedy(24), use_tqdm=False)
    assert first - sum(computed) == 32, "eight blocks of four were there"
    computed.clear()
    llm.generate([prompt + output.outputs[0].token_ids + [5]], greedy(2), use_tqdm=False)
    assert sum(computed) == 0, "there is no draft for a last token"
    llm.generate([prompt + output.outputs[0].token_ids + [5]], greedy(4), use_tqdm=False)
    assert sum(computed) < 58 - 48 + 4, "of 58 tokens, what was said before is a prefix as well"
    assert llm.stats.num_accepted_tokens == llm.stats.num_draft_tokens > 0, "and they held what they should"


def test_a_block_that_was_somebody_elses_between_is_no_hit_for_the_draft():
    """The same prompt comes back to the same blocks after others have written there: the draft computes it anew, and is right."""
    llm = make_llm(num_blocks=11, speculative_config={"model": model_and_folder()[1], "num_speculative_tokens": 3})
    first, *others = prompts_of(30, 3, 3, 3, 6, 7, 11)
    for other in others:
        for prompt in (first, other):
            llm.generate([prompt], greedy(6), use_tqdm=False)
            llm.reset_prefix_cache()
    assert llm.stats.num_accepted_tokens == llm.stats.num_draft_tokens > 0


def test_a_draft_step_that_fails_loses_nothing():
    """The error comes up, and afterwards the draft's rows start anew: all tokens come, and its guesses are right."""
    prompts, params = prompts_of(9, 6), [greedy(8), greedy(11)]
    llm = make_llm(speculative_config={"model": model_and_folder()[1], "num_speculative_tokens": 3})
    runner, num_calls = llm.engine.proposer.runner, 0
    own = runner.execute_model

    def sometimes(output):
        nonlocal num_calls
        num_calls += 1
        if num_calls in (1, 5):
            raise RuntimeError("the draft has failed")
        return own(output)

    runner.execute_model = sometimes
    llm.enqueue(prompts, params)
    done, num_errors = {}, 0
    while llm.engine.has_unfinished_requests():
        try:
            done |= {output.request_id: output for output in llm.engine.step()}
        except RuntimeError:
            num_errors += 1
        llm.engine.kv_cache_manager.check()
    assert num_errors == 2
    assert [done[str(i)].outputs[0].token_ids for i in range(2)] == run_alone(prompts, params)
    assert llm.stats.num_accepted_tokens == llm.stats.num_draft_tokens > 0
    assert_clean(llm.engine)


# What ends a request in the middle of a run -----------------------------------------------------------------------------------


def guess_right(params: SamplingParams, prompt: str, **knobs):
    """The same request on an engine that does not guess, and on one whose six drafts are all right; and the second engine."""
    shape = {"max_model_len": 64, "dtype": "float64", "device": "cpu", "num_blocks": 40, "block_size": 4, **knobs}
    (plain,) = LLM(DRAFT, **shape).generate(prompt, params, use_tqdm=False)
    longer = SamplingParams(temperature=params.temperature, seed=params.seed, max_tokens=40, ignore_eos=True)
    (free,) = LLM(DRAFT, **shape).generate(prompt, longer, use_tqdm=False)
    llm = LLM(DRAFT, speculative_config=NGRAM, **shape)
    replaying(llm, lambda request: free.outputs[0].token_ids, 1.0, 6, 4096)
    llm.engine.proposer.numbers = SimpleNamespace(randint=lambda low, high: high, random=lambda: 0.0)
    llm.enqueue([prompt], params)
    (ours,) = run_checked(llm).values()
    return plain, ours, llm.engine


@pytest.mark.parametrize("ending", [{"stop": ["e"], "min_tokens": 3}, {"max_tokens": 4}, {"max_tokens": 9}, {"ignore_eos": False},
                                    {"stop": ["e"], "include_stop_str_in_output": True}, {"max_model_len": 12}, {"stop_token": 5}])
def test_a_run_ends_where_the_request_ends(ending):
    """Stop strings, stop tokens, EOS and lengths cut a run of right drafts: what lies behind is not said and not counted."""
    prompt, knobs, ending = "Once upon a time", {}, dict(ending)
    if "max_model_len" in ending:
        knobs = {"max_model_len": ending.pop("max_model_len")}
    if "stop_token" in ending:
        (free,) = LLM(DRAFT, dtype="float64", device="cpu", num_blocks=40).generate(prompt, SamplingParams(
            temperature=0.9, seed=4, max_tokens=12), use_tqdm=False)
        ending = {"stop_token_ids": [free.outputs[0].token_ids[ending["stop_token"]]]}
    params = SamplingParams(**{"temperature": 0.9, "seed": 4, "max_tokens": 40, "logprobs": 1} | ending)
    plain, ours, engine = guess_right(params, prompt, **knobs)
    assert_same(ours, plain, f"{ending}")
    assert len(all_logprobs(ours)) >= len(ours.outputs[0].token_ids) == engine.stats.num_generated_tokens
    stats = engine.stats
    assert stats.num_accepted_tokens > 0
    assert stats.num_scheduled_tokens == (stats.num_prompt_tokens + stats.num_generated_tokens - stats.num_finished
                                          + stats.num_rejected_positions)


def test_nothing_behind_a_stop_string_is_published():
    """The names in the cache after a run that a stop string has cut are those of tokens that were said."""
    params = SamplingParams(temperature=0, max_tokens=40, stop=["a"])
    plain, ours, engine = guess_right(params, "Once upon", block_size=1, num_blocks=90)
    said = ours.prompt_token_ids + ours.outputs[0].token_ids
    names = engine.kv_cache_manager.pool.block_hashes.values()
    assert {array("q", name.token_ids)[0] for name in names} <= set(said) and len(names) <= len(said)
    assert plain.outputs[0].token_ids == ours.outputs[0].token_ids


def test_penalties_count_the_drafts_before_a_position():
    """A penalty forbids what a draft in front has just said: with the history of the step before, a token would come twice."""
    params = SamplingParams(temperature=0, max_tokens=24, presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=2.0)
    plain, ours, _ = guess_right(params, "The scheduler")
    assert_same(ours, plain, "with penalties")
    truth = plain.outputs[0].token_ids
    llm = LLM(DRAFT, max_model_len=64, dtype="float64", device="cpu", num_blocks=40, speculative_config=NGRAM)
    replaying(llm, lambda request: truth, 1.0, 6, 4096)
    (again,) = llm.generate("The scheduler", params, use_tqdm=False)
    assert_same(again, plain, "with penalties, all drafts right")
    assert llm.stats.num_accepted_tokens == llm.stats.num_draft_tokens > 0


def test_a_preempted_request_speculates_on():
    """Eight requests on a pool for two: preempted, resumed, guessed again, and every token is that of running alone."""
    prompts, params = prompts_of(*[9] * 8), [greedy(12)] * 8
    expected = run_alone(prompts, params)
    llm = make_llm(num_blocks=11, speculative_config=NGRAM)
    replaying(llm, lambda request: expected[int(request.request_id)], 0.8)
    llm.enqueue(prompts, params)
    resumed = set()
    schedule = llm.engine.scheduler.schedule

    def watched():
        output = schedule()
        resumed.update(request_id for request_id in output.scheduled_spec_decode_tokens
                       if llm.engine.scheduler.requests[request_id].num_preemptions)
        return output

    llm.engine.scheduler.schedule = watched
    done = run_checked(llm)
    assert [done[str(i)].outputs[0].token_ids for i in range(8)] == expected
    assert llm.stats.num_preemptions > 0 and resumed, "somebody is preempted, comes back and is guessed for again"


def test_some_speculate_and_some_do_not():
    """In one step: a prompt, a decode without drafts, and a decode with some."""
    prompts = prompts_of(8, 8, 30)
    expected = run_alone(prompts, [greedy(9)] * 3)
    llm = make_llm(max_num_batched_tokens=48, speculative_config=NGRAM)
    replaying(llm, lambda request: expected[0] if request.request_id == "0" else [], 1.0)
    llm.engine.proposer.numbers = SimpleNamespace(randint=lambda low, high: 3, random=lambda: 0.0)
    steps = []
    schedule = llm.engine.scheduler.schedule
    llm.engine.scheduler.schedule = lambda: (steps.append(schedule()), steps[-1])[1]
    llm.enqueue(prompts[:2], greedy(9))
    llm.engine.step()
    llm.enqueue(prompts[2:], greedy(9))
    done = {output.request_id: output for output in llm.wait_for_completion(use_tqdm=False)}
    assert steps[1].num_scheduled_tokens == {"0": 4, "1": 1, "2": 30}
    assert [done[str(i)].outputs[0].token_ids for i in range(3)] == expected


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.parametrize("proposer", ["draft", "itself", "replay"])
def test_the_compiled_backend_verifies_among_its_graphs(proposer):
    """FlexAttention's metadata on a CPU: steps with drafts go the way of prompts, steps without that of decode graphs, where a
    row's own position on the device counts. The tokens are those of the readable rung.
    """
    prompts = prompts_of(5, 11, 3, 8)
    params = [greedy(12), SamplingParams(temperature=1.1, seed=3, max_tokens=14, ignore_eos=True), greedy(9),
              SamplingParams(temperature=0.8, seed=4, top_k=9, repetition_penalty=1.2, max_tokens=12, ignore_eos=True)]
    expected = tokens_of(make_llm(attention_backend="paged_gather").generate(prompts, params, use_tqdm=False))
    folder = {"draft": half_right_draft()[1], "itself": model_and_folder()[1]}.get(proposer)
    asked = {"model": folder, "num_speculative_tokens": 3} if folder else NGRAM
    llm = make_llm(attention_backend="flex_attention", block_size=16, num_blocks=20, speculative_config=asked)
    if folder is None:
        replaying(llm, lambda request: expected[int(request.request_id)], 0.7, 3)
        llm.engine.proposer.numbers = numbers = Random(1)
        numbers.randint = lambda low, high: high * (llm.stats.num_steps % 2)  # every other step is without drafts
    num_graph_steps, run = [0], llm.engine.runner.graphs.run
    llm.engine.runner.graphs.run = lambda rows: (num_graph_steps.append(1), run(rows))[1]
    llm.enqueue(prompts, params)
    done = run_checked(llm)
    assert [done[str(i)].outputs[0].token_ids for i in range(4)] == expected
    assert llm.stats.num_accepted_tokens > 0 and (len(num_graph_steps) > 1 or folder)
    assert proposer == "itself" or llm.stats.num_accepted_tokens < llm.stats.num_draft_tokens


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.parametrize("backend", ["paged_gather", "flex_attention"])
def test_when_a_step_begins_every_row_holds_what_is_true_of_its_request(backend):
    """Tokens, block table and their numbers, in the rows of the model and of its draft, whatever was guessed and taken back."""
    llm = make_llm(attention_backend=backend, block_size=16 if backend == "flex_attention" else 2, num_blocks=40,
                   speculative_config={"model": half_right_draft()[1], "num_speculative_tokens": 3})
    engine, num_compared = llm.engine, Counter()

    def watch(runner, own, name):
        def update_rows(output):
            own(output)
            runner.rows.flush()
            for request_id in output.num_scheduled_tokens if name == "model" else output.rewound_requests:
                request, row = engine.scheduler.requests[request_id], runner.batch.row_of[request_id]
                table, count = engine.kv_cache_manager.get_block_ids(request_id), request.num_tokens
                assert runner.batch.num_tokens[row] == count, f"{name}: {request!r} has {runner.batch.num_tokens[row]} tokens"
                assert runner.batch.num_blocks[row] == len(table), f"{name}: {request!r} has {runner.batch.num_blocks[row]} blocks"
                assert runner.rows.block_table[row, : len(table)].tolist() == table, f"{name}: {request!r} has another table"
                assert runner.rows.token_ids[row, :count].tolist() == [*request.all_token_ids], f"{name}: {request!r}, other tokens"
                num_compared[name] += 1
        return update_rows

    for name, runner in (("model", engine.runner), ("draft", engine.proposer.runner)):
        runner.update_rows = watch(runner, runner.update_rows, name)
    llm.enqueue(prompts_of(9, 5, 17), greedy(16))
    run_checked(llm)
    assert min(num_compared.values()) > 15 and 0 < llm.stats.num_accepted_tokens < llm.stats.num_draft_tokens, f"{num_compared}"


def test_a_launched_step_says_the_accepted_run_alone():
    """`ModelOutput` has one dict of logprobs for each token that counts, however many positions were sampled at."""
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    sampled = torch.tensor([3, 4, 5, 6, 2])
    step = AsyncOutput(["a", "a", "a", "b", "b"], sampled, drafts={"a": [3, 1], "b": [6]})
    step.add_logprobs(compute_logprobs(logits[:3], sampled[:3], 1), {0: 1, 1: 1, 2: 1})
    output = step.result()
    assert output.sampled_token_ids == {"a": [3, 4], "b": [6, 2]}
    assert [next(iter(entry)) for entry in output.logprobs["a"]] == [3, 4]


# The parts --------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), min_size=7, max_size=7))
def test_a_run_is_the_longest_matching_prefix_and_one_more(drafts, sampled):
    """A run is the samples as far as the drafts were the same, and the first sample behind them."""
    sampled = sampled[: len(drafts) + 1]
    expected = []
    for draft, token_id in zip([*drafts, None], sampled):
        expected.append(token_id)
        if draft != token_id:
            break
    said = accepted_run(drafts, sampled)
    assert said == expected, f"drafts {drafts}, sampled {sampled}: the run is {said}, and {expected} would be right"


def test_one_row_too_few_is_our_mistake_and_says_so():
    """Samples that are not one more than the drafts are refused with an assert that has a message."""
    for sampled in ([1, 1], [1, 1, 1, 1]):
        with refused(f"accepted_run([1, 2], {sampled})"):
            accepted_run([1, 2], sampled)


@given(st.lists(st.one_of(st.integers(0, 2), st.sampled_from([256, 65_536, 1 << 40])), max_size=30), st.integers(1, 4),
       st.integers(1, 4), st.integers(1, 5))
def test_look_up_finds_the_first_place_of_the_longest_end(token_ids, one, other, k):
    """What is found stands behind the first place of the longest end, as the slow way says: every place, token by token."""
    shortest, longest = sorted((one, other))
    expected = []
    for length in range(longest, shortest - 1, -1):
        places = [place for place in range(len(token_ids) - length) if token_ids[place : place + length] == token_ids[-length:]]
        if places:
            expected = token_ids[places[0] + length :][:k]
            break
    found = look_up(token_ids, longest, shortest, k)
    assert found == expected, f"{token_ids}, ends of {shortest} to {longest}, {k} tokens: found {found}, the slow way {expected}"


def test_a_draft_is_what_followed_the_last_time():
    """A draft is what followed the longest end of the text at its first place, and no place begins in the middle of a token."""
    cases = {"a longer end tells more": ([5, 8, 1, 7, 5, 8, 2, 7, 5, 8], 3, 1, 2, [2, 7]),
             "the first place has the most behind it": ([4, 4, 4, 4], 1, 1, 3, [4, 4, 4]),
             "nothing stood there before": ([1, 2, 3], 3, 1, 4, []),
             "half of a token is no place": ([0, 1, 256, 0, 1, 256, 1 << 40], 2, 1, 2, [])}
    for name, (token_ids, longest, shortest, k, expected) in cases.items():
        found = look_up(token_ids, longest, shortest, k)
        assert found == expected, f"{name}: behind {token_ids} comes {expected}, and {found} was found"


def test_what_pays():
    """1 + a + ... + a^k; break-even is where that is 1 + k cost."""
    assert tokens_per_step(0, 4) == 1 and tokens_per_step(1, 4) == 5 and math.isclose(tokens_per_step(0.5, 2), 1.75)
    for k, cost in ((1, 0.1), (4, 0.1), (5, 0.5)):
        assert math.isclose(tokens_per_step(break_even(k, cost), k), 1 + k * cost, rel_tol=1e-6)
    assert break_even(4, 0) < 1e-6 and break_even(4, 1.01) > 1


# The textbook's way -----------------------------------------------------------------------------------------------------------


def chi_square(counts: dict, probabilities: dict, number: int) -> float:
    """Sum of (seen - expected)^2 / expected, and no key without a probability."""
    assert all(probabilities.get(key, 0) > 0 for key in counts), "something impossible was drawn"
    return sum((counts.get(key, 0) - number * p) ** 2 / (number * p) for key, p in probabilities.items() if p > 0)


def distributions(seed: int, count: int, vocab: int = 6) -> torch.Tensor:
    logits = torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5
    return logits.softmax(-1)


# 0.1 % of right samplers would exceed these for 5 degrees of freedom
LIMIT = 20.5


def test_rejection_sampling_gives_the_targets_distribution_at_every_position():
    """k = 2 drafts of another model: what stands at each position, given that the run reaches it, is the target's."""
    p, q, generator = distributions(1, 3), distributions(2, 2), torch.Generator().manual_seed(0)
    counts, number = [Counter() for _ in range(3)], 6000
    for _ in range(number):
        drafts = torch.multinomial(q, 1, generator=generator)[:, 0]
        for position, token_id in enumerate(rejection_sample(p, q, drafts, generator)):
            counts[position][token_id] += 1
    overlap = torch.minimum(p[:2], q).sum(-1)
    for position in range(3):
        reached, share = sum(counts[position].values()), overlap[:position].prod().item()
        assert abs(reached / number - share) < 0.03, (
            f"of {number} runs {reached} reach position {position}; the two overlap so that {share * number:.0f} should")
        off = chi_square(counts[position], dict(enumerate(p[position].tolist())), reached)
        assert off < LIMIT, f"position {position} has another distribution than the target's: chi-square {off:.0f}, at most {LIMIT}"


def test_a_draft_of_the_target_itself_is_always_kept():
    """Where draft and target are one, every guess stands, and one token of the target comes on top."""
    p, generator = distributions(5, 4), torch.Generator().manual_seed(0)
    for _ in range(50):
        drafts = torch.multinomial(p[:3], 1, generator=generator)[:, 0]
        run = rejection_sample(p, p[:3], drafts, generator)
        assert (run[:3], len(run)) == (drafts.tolist(), 4), f"the drafts {drafts.tolist()} became {run}"


def test_a_token_that_the_target_never_says_is_never_kept():
    """A guess of probability 0 is replaced by one that the target has more of than the draft, and ends the run."""
    p = torch.tensor([[0.0, 0.5, 0.5, 0.0]] * 3, dtype=torch.float64)
    q, generator = torch.tensor([[0.4, 0.6, 0.0, 0.0]] * 2, dtype=torch.float64), torch.Generator().manual_seed(0)
    for _ in range(50):
        run = rejection_sample(p, q, torch.tensor([0, 1]), generator)
        assert run == [2], f"token 0 was guessed, and only token 2 can come instead: {run}"


def test_a_wrong_rejection_sampler_would_be_caught():
    """To replace a refused draft from p itself, and not from what p has beyond q, is the classic mistake."""
    p, q, generator, number = distributions(1, 1)[0], distributions(2, 1)[0], torch.Generator().manual_seed(0), 6000
    counts = Counter()
    for _ in range(number):
        token_id = int(torch.multinomial(q, 1, generator=generator))
        kept = torch.rand((), generator=generator) * q[token_id] < p[token_id]
        counts[token_id if kept else int(torch.multinomial(p, 1, generator=generator))] += 1
    assert chi_square(counts, dict(enumerate(p.tolist())), number) > LIMIT


def test_one_noise_for_both_accepts_nearly_as_often_as_the_textbook():
    """Draft and target drawn with one noise agree at least o / (2 - o) of the time, where rejection sampling accepts o; drawn
    apart they would agree less. And what the target says is its own distribution, whatever the draft was.
    """
    p, q = distributions(3, 1), distributions(4, 1)
    number = 20_000
    seeds, positions = torch.arange(number) * 7919, torch.arange(number) % 100
    keys = seed_keys(seeds)
    said = draw(p.log().float().expand(number, -1), keys, positions)
    guessed = draw(q.log().float().expand(number, -1), keys, positions)
    agreed, overlap, apart = (said == guessed).double().mean(), torch.minimum(p, q).sum(), (p * q).sum()
    assert overlap / (2 - overlap) - 0.01 < agreed <= overlap + 0.01
    assert agreed > apart + 0.1
    assert chi_square(Counter(said.tolist()), dict(enumerate(p[0].tolist())), number) < LIMIT


# The embedded pair ------------------------------------------------------------------------------------------------------------


def in_domain_prompts() -> list[str]:
    return ["What is a block?", "What is a KV cache?", "How does speculative decoding work?", "What is the scheduler?",
            *(f"tell me a story about {stories.article(kind)}" for kind in ("fox", "robot", "king", "dragon")),
            "What is 17 + 25?", "What is the capital of France?", *(asks[0] for asks, _ in smalltalk.TALK[:6])]


def test_the_embedded_draft_brings_two_and_a_half_tokens_a_step():
    """k = 4, greedy, what the toy was taught: tokens of a request for each step that it decodes in. A counter, not a clock."""
    chats = [[{"role": "user", "content": text}] for text in in_domain_prompts()]
    params = SamplingParams(temperature=0, max_tokens=150)
    shape = {"device": "cpu", "max_model_len": 512, "num_blocks": 400}
    llm = LLM(speculative_config={"num_speculative_tokens": 4}, **shape)
    outputs = llm.chat(chats, params, use_tqdm=False)
    stats = llm.stats
    num_decoded = stats.num_generated_tokens - len(chats)  # the first token of each comes with its prompt
    num_decodes = stats.num_scheduled_tokens - stats.num_draft_tokens - stats.num_prompt_tokens + stats.prefix_cache_hits
    per_step = num_decoded / num_decodes
    print(f"{per_step:.2f} tokens a step; accepted by position {stats.num_accepted_tokens_per_pos} of {stats.num_drafts}")
    assert per_step >= 2.5
    assert tokens_of(outputs) == tokens_of(LLM(**shape).chat(chats, params, use_tqdm=False))


@pytest.mark.parametrize(("checkpoint", "asked"), [
    (MODEL, {"model": DRAFT, "num_speculative_tokens": 4}), (DRAFT, {"model": MODEL, "num_speculative_tokens": 3}), (MODEL, NGRAM)],
    ids=["model", "draft", "ngram"])
@pytest.mark.parametrize("knobs", [{"num_blocks": 80}, {"num_blocks": 14, "block_size": 8, "max_num_batched_tokens": 40}])
def test_greedy_text_of_both_embedded_checkpoints_equals_hugging_face(checkpoint, asked, knobs):
    """Model and draft, each guessed for by the other or by looking up, in a pool for all and in one that preempts: its tokens."""
    texts = ["Once upon a time there was a", "A block is a block is a", "user: copy red blue red blue red\n", "The"]
    llm = LLM(checkpoint, device="cpu", dtype="float32", max_model_len=96, speculative_config=asked, **knobs)
    prompts = [llm.engine.tokenizer.encode(text) for text in texts]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    expected = [hf_greedy(model, prompt, 40) for prompt in prompts]
    llm.enqueue(prompts, greedy(40))
    done = run_checked(llm)
    for index, text in enumerate(texts):
        assert done[str(index)].outputs[0].token_ids == expected[index], f"what follows {text!r} is not Hugging Face's"
    assert llm.stats.num_accepted_tokens > 20, f"{llm.stats.num_accepted_tokens} guesses of {llm.stats.num_draft_tokens} are right"
    assert knobs["num_blocks"] > 14 or llm.stats.num_preemptions > 0, "the pool should be too small"


# What is asked for and what is told -------------------------------------------------------------------------------------------

WRONG = [
    ("ngram", "an object"), ({"num_speculative_tokens": 4, "method": "eagle"}, "method"),
    ({"method": "ngram"}, "num_speculative_tokens"), ({"method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens"),
    ({"method": "ngram", "num_speculative_tokens": True}, "integer"),
    ({"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2, "prompt_lookup_min": 3}, "prompt_lookup_min"),
    ({"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 0}, "prompt_lookup_max"),
    ({"method": "ngram", "num_speculative_tokens": 4, "model": DRAFT}, "model"),
    ({"model": DRAFT, "num_speculative_tokens": 4, "prompt_lookup_max": 3}, "prompt_lookup_max"),
    ({"model": 5, "num_speculative_tokens": 4}, "model"), ({"num_speculative_tokens": 4}, "method"),
    ({"method": "draft_model", "num_speculative_tokens": 4}, "only the embedded model"),
    ({"method": "ngram", "num_speculative_tokens": 4, "num_tokens": 3}, "num_tokens"),
    ({"method": "ngram", "num_speculative_tokens": 4, "draft_tensor_parallel_size": 2}, "draft_tensor_parallel_size"),
]


@pytest.mark.parametrize(("given_config", "named"), WRONG, ids=[str(index) for index in range(len(WRONG))])
def test_a_wrong_speculative_config_is_refused_by_name(given_config, named):
    """Before anything is loaded, with the key in the message."""
    with pytest.raises(ValidationError, match=named) as caught:
        engine_config_from_kwargs(model="somewhere", speculative_config=given_config)
    assert caught.value.parameter == "speculative_config"


def test_a_draft_that_cannot_guess_for_this_model_is_refused_by_name():
    """Another vocabulary (by size, by what an id means), too few positions, no such folder."""
    with pytest.raises(ValidationError, match="97 tokens and the model one of 4096"):
        LLM(speculative_config={"model": model_and_folder()[1], "num_speculative_tokens": 2}, device="cpu")
    _, short = random_qwen2(tempfile.mkdtemp(), vocab=VOCAB, max_position_embeddings=32)
    with pytest.raises(ValidationError, match="made for 32 positions and max_model_len is 64"):
        make_llm(speculative_config={"model": str(short), "num_speculative_tokens": 2})
    with pytest.raises(CheckpointError, match="does not exist"):
        make_llm(speculative_config={"model": "/nowhere/at/all", "num_speculative_tokens": 2})


def test_a_draft_whose_ids_mean_other_words_is_refused(tmp_path):
    """As many tokens are not the same tokens."""
    for file in Path(DRAFT).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    one, other = list(vocab)[20:22]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValidationError, match="has another vocabulary than the model"):
        LLM(speculative_config={"model": str(tmp_path), "num_speculative_tokens": 2}, device="cpu", num_blocks=20)


def test_steps_are_made_in_turn_and_whoever_wants_both_is_told():
    """async_scheduling=None becomes False, and True is refused."""
    assert make_llm(speculative_config=NGRAM).engine.config.async_scheduling is False
    with pytest.raises(UnsupportedError, match="async_scheduling"):
        make_llm(speculative_config=NGRAM, async_scheduling=True)


def test_every_spelling_means_the_same():
    """vLLM's dictionary, its short forms and the benches' flags; not both at once."""
    whole = engine_config_from_kwargs(speculative_config={"model": DRAFT, "num_speculative_tokens": 3})
    short = engine_config_from_kwargs(spec_model=DRAFT, spec_tokens=3, spec_method=None)
    assert whole == short
    with pytest.raises(ValidationError, match="keep one"):
        engine_config_from_kwargs(speculative_config=NGRAM, spec_tokens=3)
    with pytest.raises(ValidationError, match="did you mean `spec_tokens`"):
        engine_config_from_kwargs(spec_token=3)
    parser = OneLineParser()
    add_engine_flags(parser)
    kwargs = engine_kwargs(parse_flags(parser, ["--speculative-config", json.dumps(NGRAM)]))
    assert kwargs == {"speculative_config": NGRAM}
    assert engine_config_from_kwargs(speculative_config=None).speculative_config is None
    parsed = SpeculativeConfig.parse({"num_speculative_tokens": 2}, target_is_embedded=True)
    assert (parsed.method, parsed.model) == ("draft_model", None)
    lengths = SpeculativeConfig.parse({"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_min": 3},
                                      target_is_embedded=False)
    assert (lengths.prompt_lookup_min, lengths.prompt_lookup_max) == (3, 3)


def test_the_server_takes_the_same_flags(capsys):
    """--speculative-config as JSON, --spec-model and --spec-tokens; a wrong one is one line."""
    pytest.importorskip("fastapi", reason="the server's flags need fastapi")
    from minivllm.serve.args import parse_args

    assert parse_args(["--spec-tokens", "4"]).engine.speculative_config == {"num_speculative_tokens": 4}
    assert parse_args(["--speculative-config", json.dumps(NGRAM)]).engine.speculative_config == NGRAM
    named = parse_args(["--model", "m", "--spec-model", "d", "--spec-tokens", "2"]).engine.speculative_config
    assert named == {"model": "d", "num_speculative_tokens": 2}
    for argv, message in ((["--speculative-config", "ngram"], "--speculative-config: speculative_config must be an object"),
                          (["--spec-tokens", "0"], "num_speculative_tokens"), (["--spec-method", "eagle"], "--spec-method")):
        with pytest.raises(SystemExit):
            parse_args(argv)
        assert message in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_the_report_says_who_guesses_and_what_pays():
    """Method, tokens, the two sizes and the acceptance from which on it pays."""
    report = LLM(speculative_config={"num_speculative_tokens": 4}, device="cpu", num_blocks=20).engine.report
    (line,) = [line for line in report.splitlines() if line.strip().startswith("speculation")]
    assert "draft_model (embedded draft), 4 tokens; a draft costs 0.106 of a step" in line
    assert f"above {break_even(4, 0.106):.0%} pays (1 + a + ... + a^4 > 1 + 4 x 0.106)" in line
    assert "speculation        ngram, 4 tokens after the last 1 to 3" in make_llm(speculative_config=NGRAM).engine.report
    assert "speculation" not in make_llm().engine.report


def test_counters_and_metrics_have_vllms_names(caplog):
    """Prometheus and the log line say what `stats` counts; an engine that does not speculate says nothing of it."""
    pytest.importorskip("prometheus_client", reason="the metrics need prometheus-client")
    from minivllm.serve.metrics import EngineMetrics

    prompts = prompts_of(9, 6)
    truth = run_alone(prompts, [greedy(12)] * 2)
    llm, now = make_llm(speculative_config=NGRAM), [0.0]
    replaying(llm, lambda request: truth[int(request.request_id)], 0.8, 4)
    metrics = EngineMetrics(llm.engine, "tiny", "vllm", clock=lambda: now[0])
    llm.generate(prompts, greedy(12), use_tqdm=False)
    now[0] = 2.0
    with caplog.at_level(logging.INFO, logger="minivllm"):
        metrics.log()
        metrics.log()
    stats, text = llm.stats, metrics.render().decode()
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    assert sum(stats.num_accepted_tokens_per_pos) == stats.num_accepted_tokens
    labels = 'engine="0",model_name="tiny"'
    for name, value in (("num_drafts", stats.num_drafts), ("num_draft_tokens", stats.num_draft_tokens),
                        ("num_accepted_tokens", stats.num_accepted_tokens)):
        assert f"vllm:spec_decode_{name}_total{{{labels}}} {float(value)}" in text
    first = stats.num_accepted_tokens_per_pos[0]
    assert f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels},position="0"}} {float(first)}' in text
    (line,) = [record.message for record in caplog.records if "SpecDecoding" in record.message]
    assert line.startswith(f"SpecDecoding metrics: Mean acceptance length: {1 + stats.num_accepted_tokens / stats.num_drafts:.2f}, "
                           f"Accepted throughput: {stats.num_accepted_tokens / 2:.2f} tokens/s, Drafted throughput: ")
    assert f"Per-position acceptance rate: {first / stats.num_drafts:.3f}, " in line
    assert "spec_decode" not in EngineMetrics(make_llm().engine, "tiny").render().decode()
    assert SchedulerStats().num_accepted_tokens_per_pos == []


def test_a_trace_shows_drafts_and_what_is_taken_back(tmp_path):
    """The state rebuilt from the records is the engine's own after every step."""
    prompts = prompts_of(9, 14, 5, 12)
    truth = run_alone(prompts, [greedy(14)] * 4)
    llm, records = make_llm(num_blocks=18, block_size=2, speculative_config=NGRAM), []
    replaying(llm, lambda request: truth[int(request.request_id)], 0.7)
    engine = llm.engine
    engine.trace.subscribe(records.append)
    llm.enqueue(prompts, greedy(14))
    while engine.has_unfinished_requests():
        engine.step()
        *_, state = replay(records)
        assert state.requests == {request.request_id: {
            "num_prompt_tokens": request.num_prompt_tokens, "num_tokens": request.num_tokens,
            "num_computed_tokens": request.num_computed_tokens,
            "blocks": engine.kv_cache_manager.get_block_ids(request.request_id)} for request in engine.scheduler.running}
    assert any(record.get("drafts") for record in records) and any(record.get("rewound") for record in records)
