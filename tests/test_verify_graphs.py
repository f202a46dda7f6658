"""Lesson 14, the part without a GPU: verification as one step of fixed shape says what the plain way says.

Graphs themselves: test_gpu_speculation.py.
"""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np
import pytest
import torch
from depth import examples
from flex_double import flex_on_cpu  # noqa: F401 - a fixture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_async_scheduling import DRAFT, Ask, asks, assert_clean, assert_same, play
from test_engine import VOCAB, greedy, make_llm, prompts_of, tokens_of
from test_speculative import NGRAM, check_cache, failures, half_right_draft, replaying, run_checked, truth_of

from minivllm import LLM, SamplingParams
from minivllm.bench.replay import ReplayProposer
from minivllm.input_batch import RowTensors, StepInputs
from minivllm.verify_graphs import accept_into_rows, read_guesses

ASKED = [
    SamplingParams(temperature=0, max_tokens=13, ignore_eos=True),
    SamplingParams(temperature=1.1, seed=3, max_tokens=17, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=6), SamplingParams(temperature=0.7, seed=8, max_tokens=1, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=11, stop_token_ids=[5, 9, 40, 77]),
    SamplingParams(temperature=0.9, seed=5, max_tokens=12, ignore_eos=True),
]
MORE = [
    SamplingParams(temperature=0.8, seed=4, top_k=9, repetition_penalty=1.2, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=12, min_tokens=9, presence_penalty=1.0, logprobs=2),
    SamplingParams(temperature=1, seed=6, max_tokens=9, logprobs=1, ignore_eos=True),
    SamplingParams(temperature=1, seed=6, max_tokens=9, top_p=0.8, bad_words=None, logit_bias={4: 3.0}, ignore_eos=True),
    SamplingParams(temperature=1, seed=9, max_tokens=13, min_tokens=8, top_p=0.9, stop_token_ids=[*range(0, 90, 4)], logprobs=0),
]
SHAPE = {"attention_backend": "flex_attention", "block_size": 16, "dtype": "float64"}
WAYS = Counter()  # how many steps went which way


def count_ways(llm: LLM) -> LLM:
    """Let WAYS know of every verification by graph, and of every step without one."""
    runner = llm.engine.runner
    for name, part, method in (("graph", runner.verify_graphs, "verify"), ("plain", runner, "forward"),
                               ("decode", runner.graphs, "run"), ("cuts", runner.sampler.sampler_graphs, "sample")):
        own = getattr(part, method)
        setattr(part, method, lambda *args, name=name, own=own, **more: (WAYS.update([name]), own(*args, **more))[1])
    return llm


@functools.cache
def told_alone(index: int, length: int) -> tuple[list[int], object]:
    """What each request says alone on the readable rung, and its logprobs."""
    llm = make_llm(attention_backend="paged_gather", dtype="float64")
    (output,) = llm.generate([prompts_of(length, seed=length)[0]], (ASKED + MORE)[index], use_tqdm=False)
    return output.outputs[0].token_ids, output.outputs[0].logprobs


@st.composite
def drawn_workloads(draw):
    """Requests (which parameters, how long a prompt), an engine's sizes, a proposer."""
    plain_only = draw(st.booleans())
    numbers = st.integers(0, len(ASKED) - 1 if plain_only else len(ASKED + MORE) - 1)
    requests = draw(st.lists(st.tuples(numbers, st.integers(1, 34)), min_size=1, max_size=9))
    knobs = {"num_blocks": draw(st.sampled_from([5, 5, 5, 6, 7, 40])), "max_num_seqs": draw(st.sampled_from([1, 3, 5, 17])),
             "max_num_batched_tokens": draw(st.sampled_from([9, 24, 64]))}
    proposer = draw(st.sampled_from(["replay", "replay", "replay", "draft"]))
    return requests, knobs, proposer, draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])), draw(st.integers(1, 5)), draw(st.integers(0, 99))


@settings(max_examples=examples(40))
@given(drawn_workloads())
def every_request_says_what_it_says_alone(drawn):
    requests, knobs, proposer, right, k, seed = drawn
    asked = NGRAM | {"num_speculative_tokens": k} if proposer == "replay" else {"model": half_right_draft()[1],
                                                                               "num_speculative_tokens": k}
    llm = count_ways(make_llm(speculative_config=asked, **SHAPE, **knobs))
    expected = [told_alone(index, length) for index, length in requests]
    if proposer == "replay":
        replaying(llm, lambda request: expected[int(request.request_id)][0], right, k, VOCAB, seed)
    for tensor in llm.engine.runner.kv_cache:
        tensor[:, :, 16:] = float("nan")  # all but the null block
    llm.enqueue([prompts_of(length, seed=length)[0] for _, length in requests], [(ASKED + MORE)[index] for index, _ in requests])
    done = run_checked(llm)
    for number, (tokens, logprobs) in enumerate(expected):
        said = done[str(number)].outputs[0]
        assert said.token_ids == tokens, f"request {number}: {requests[number]} on {knobs}, {proposer}, k = {k}, right {right}"
        assert (said.logprobs is None) == (logprobs is None)
    WAYS["preempted"] += llm.stats.num_preemptions
    WAYS["rejected"] += llm.stats.num_draft_tokens - llm.stats.num_accepted_tokens
    llm.close()


def test_verified_by_graph_every_request_says_what_it_says_alone(flex_on_cpu):  # noqa: F811
    """Any mix of requests, sizes, preemptions and chunks, and drafts that are right, wrong or half right, of k or fewer tokens.

    Among them are verifications by graph, decodes by graph, steps with prompts, preemptions and refused drafts.
    """
    WAYS.clear()
    every_request_says_what_it_says_alone()
    assert min(WAYS[way] for way in ("graph", "plain", "decode", "cuts", "preempted", "rejected")) > 3, f"{WAYS}"


@functools.cache
def two_engines():
    """One that does not guess, and one on graphs in a pool for three requests. Each example has to leave them clean."""
    plain = LLM(DRAFT, max_model_len=64, device="cpu", dtype="float64", num_blocks=40, attention_backend="paged_gather")
    return plain.engine, count_ways(LLM(DRAFT, max_model_len=64, device="cpu", num_blocks=14, max_num_seqs=6,
                                        max_num_batched_tokens=48, speculative_config=NGRAM, **SHAPE)).engine


@settings(max_examples=examples(20), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asks(mishaps=True), failures(), st.sampled_from([0.5, 1.0]))
def test_aborts_stop_strings_and_failed_steps_among_graphs_change_no_other_answer(flex_on_cpu, workload, faults, right):  # noqa: F811
    """Text, tokens and reasons are those of an engine that does not guess; who is aborted has said a prefix of its answer."""
    plain, guessing = two_engines()
    theirs, truth = truth_of(plain, [Ask(ask.prompt, ask.params, 0) for ask in workload])
    replaying(guessing, truth, right, 4, 4096)
    for ours, whole, ask in zip(play(guessing, workload, faults), theirs, workload, strict=True):
        story = f"{ask}, failures {faults}, right {right}"
        if "abort" not in [answer.finish_reason for answer in ours.outputs]:
            assert_same(ours, whole, story)
        for mine, other in zip(ours.outputs, whole.outputs, strict=True):
            assert mine.token_ids == other.token_ids[: len(mine.token_ids)], story
    assert_clean(guessing)


def test_only_steps_of_decodes_with_few_enough_guesses_are_verified_by_graph(flex_on_cpu):  # noqa: F811
    """A step with a prompt, or with more guesses than k, goes the way of prompts; one without guesses that of decodes."""
    prompts = prompts_of(9, 7)
    expected = tokens_of(make_llm(attention_backend="paged_gather").generate(prompts, greedy(24), use_tqdm=False))
    for longest, ways in ((4, {"graph"}), (6, {"graph", "plain"}), (0, {"decode"})):
        llm = count_ways(make_llm(speculative_config=NGRAM, num_blocks=20, **SHAPE))
        replaying(llm, lambda request: expected[int(request.request_id)], 0.8, longest)
        before = Counter(WAYS)
        assert tokens_of(llm.generate(prompts, greedy(24), use_tqdm=False)) == expected
        taken = WAYS - before
        assert taken["plain"] == 1 or longest == 6, f"of {dict(taken)} steps only the first has prompts"
        assert ways <= set(taken) and (taken["decode"] > 0 or longest), f"{dict(taken)} with up to {longest} guesses"


def test_penalties_behind_the_graph_count_the_guesses_and_not_what_was_plainly_sampled(flex_on_cpu):  # noqa: F811
    """The graph samples without penalties and writes that into the rows; what counts there afterwards is what was guessed."""
    prompts = prompts_of(9, 7, 3)
    strong = [SamplingParams(temperature=0, max_tokens=20, presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=2.0,
                             ignore_eos=True), *[greedy(20)] * 2]
    expected = tokens_of(make_llm(attention_backend="paged_gather").generate(prompts, strong, use_tqdm=False))
    llm = make_llm(speculative_config=NGRAM, num_blocks=20, **SHAPE)
    proposer = ReplayProposer(4, VOCAB)
    proposer.learn(prompts, expected, 1.0)
    llm.engine.proposer = llm.engine.scheduler.proposer = proposer
    assert tokens_of(llm.generate(prompts, strong, use_tqdm=False)) == expected
    stats = llm.stats
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 0, f"of {stats.num_draft_tokens} {stats.num_accepted_tokens} count"


def made_up_rows(num_rows: int, positions: list[int]) -> RowTensors:
    """Rows with a block table of their own each, blocks of 4, at these positions; tokens count up from 10 * row."""
    rows = RowTensors(num_rows, 16, 1 + 4 * num_rows, 4, torch.device("cpu"))
    for row in range(num_rows):
        rows.block_table[row] = torch.arange(4) + 1 + 4 * row
        rows.token_ids[row] = torch.arange(16) + 10 * row
    rows.positions[:num_rows] = torch.tensor(positions)
    return rows


def test_a_request_with_fewer_guesses_writes_nothing_more():
    """Each query has its own token, position and slot; those that are not there repeat the last one and write to the null block."""
    rows = made_up_rows(3, [7, 0, 3])
    step = torch.tensor([[2, 1, 44, 0, 0], [0, 3, 51, 52, 53], [3, 0, 0, 0, 0]], dtype=torch.int32)  # row 3 is padding
    ids, positions, slots, table, counts, *_ = (part.view(3, 4, -1).squeeze(-1).tolist() for part in read_guesses(rows, step, 4))
    assert ids == [[23, 44, 44, 44], [7, 51, 52, 53], [0, 0, 0, 0]], "the newest token of each row, then its guesses"
    assert positions == [[3, 4, 4, 4], [7, 8, 9, 10], [0, 0, 0, 0]]
    first, third = 4 * 9, 4 * 1
    assert slots == [[first + 3, first + 4, 0, 0], [third + 7, third + 8, third + 9, third + 10], [0, 0, 0, 0]]
    assert [line[0] for line in table] == [rows.block_table[row].tolist() for row in (2, 0, 3)]
    assert counts == [[1, 2, 2, 2], [2, 3, 3, 3], [1, 1, 1, 1]], "each query reads the blocks up to its own position"


@pytest.mark.parametrize(("sampled", "guesses", "won"), [
    ([5, 6, 7], [5, 6], 3), ([5, 6, 7], [5, 9], 2), ([5, 6, 7], [9, 6], 1), ([5, 6, 7], [5], 2), ([5, 5, 5], [5], 2),
    ([0, 0, 0], [], 1)])
def test_a_row_moves_on_by_what_was_accepted(sampled, guesses, won):
    """As many tokens as `accepted_run` says, the row's position behind them, and its cells beyond the step as they were."""
    rows = made_up_rows(2, [3, 8])
    before, count = rows.token_ids.clone(), len(guesses)
    logits = torch.full((6, 97), -1.0)
    logits[torch.arange(3), torch.tensor(sampled)] = 1.0
    step = torch.tensor([[1, count, *guesses, *[0] * (2 - count)], [2, 0, 0, 0]], dtype=torch.int32)
    (line, _) = accept_into_rows(logits, rows, step)
    assert line[: 1 + won].tolist() == [won, *sampled[:won]], f"{guesses} guessed and {sampled} sampled: {line.tolist()}"
    assert rows.positions.tolist() == [3, 8 + won, 0], "the padding row stays where it is"
    assert rows.token_ids[1, 9 : 9 + won].tolist() == sampled[:won]
    before[1, 9 : 10 + count] = rows.token_ids[1, 9 : 10 + count]
    assert torch.equal(rows.token_ids[:2], before[:2]), "a cell beyond the guesses has changed, or another row's"


def test_verification_steps_read_their_own_blocks_alone(flex_on_cpu, monkeypatch):  # noqa: F811
    """With NaN in every block that no request owns, before every step, no token changes."""
    prompts = prompts_of(15, 31, 2)
    expected = tokens_of(make_llm(attention_backend="paged_gather").generate(prompts, greedy(20), use_tqdm=False))
    llm = make_llm(speculative_config=NGRAM, num_blocks=20, enable_prefix_caching=False, **SHAPE)
    replaying(llm, lambda request: expected[int(request.request_id)], 0.6, 4)
    engine = llm.engine
    llm.enqueue(prompts, greedy(20))
    done = {}
    while engine.has_unfinished_requests():
        owned = {block for table in engine.kv_cache_manager.block_tables.values() for block in table}
        for block in set(range(1, 20)) - owned:
            for layer in engine.runner.kv_cache:
                layer[:, :, block * 16 : (block + 1) * 16] = float("nan")
        done |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
        check_cache(engine)
    assert [done[str(index)] for index in range(3)] == expected
    assert llm.stats.num_draft_tokens > llm.stats.num_accepted_tokens > 0


def test_host_arrays_of_a_step_name_the_right_hidden_states(flex_on_cpu):  # noqa: F811
    """`in_order` takes of k + 1 lines a request those that it computes, in the order of the flat batch."""
    llm = make_llm(speculative_config=NGRAM, num_blocks=20, **SHAPE)
    graphs = llm.engine.runner.verify_graphs
    inputs = StepInputs(np.array([4, 1]), np.array([1, 3]), np.array([8, 6]), np.array([4, 1, 1, 1]), np.array([7, 3, 4, 5]), 1,
                        np.array([True, True]), np.array([0, 2]))
    assert graphs.fits(inputs)
    assert graphs.in_order(torch.arange(10), inputs).tolist() == [0, 5, 6, 7]
