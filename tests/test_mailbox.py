"""Lesson 14: the mailbox that sampled tokens come by, under all that may happen to a row while they are on their way."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from depth import examples
from flex_double import flex_on_cpu, use_flex_on_cpu  # noqa: F401 - a fixture
from hypothesis import given, settings
from hypothesis import strategies as st
from test_async_scheduling import DRAFT, FAULTS, asks, assert_clean, assert_same, play

from minivllm import LLM, SamplingParams, async_output, transfers
from minivllm.engine import LLMEngine
from minivllm.input_batch import RowTensors
from minivllm.mailbox import NUM_SLOTS, deliver

# Eight blocks for three requests of up to four: somebody is preempted while a token of theirs is on its way.
FLEX = {"attention_backend": "flex_attention", "block_size": 16, "num_blocks": 9, "max_num_batched_tokens": 16, "max_num_seqs": 3}


@functools.cache
def engine_of(*, is_async: bool, flex: bool) -> LLMEngine:
    """One engine for all examples."""
    knobs = FLEX if flex else FLEX | {"attention_backend": "paged_gather"}
    with pytest.MonkeyPatch.context() as patch:
        use_flex_on_cpu(patch)
        return LLM(DRAFT, max_model_len=64, dtype="float64", device="cpu", async_scheduling=is_async, **knobs).engine


@settings(max_examples=examples(100), deadline=None)
@given(st.data())
def test_every_token_is_read_that_is_among_the_last_of_its_row(data):
    """Rows sample in any mixture, and a step is read after as many more of its rows' tokens as a mailbox holds, less one."""
    on_device, number = RowTensors(4, 300, 2, 16, torch.device("cpu")), 0
    positions, unread = np.array([data.draw(st.integers(0, 200)) for _ in range(4)]), []
    for _ in range(data.draw(st.integers(1, 30))):
        rows = np.array(data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True)))
        tokens = np.arange(number, number + len(rows))
        number += len(rows)
        unread.append((rows, positions[rows], tokens, on_device.mailbox.reader(rows, positions[rows])))
        deliver(on_device, torch.from_numpy(rows), torch.from_numpy(positions[rows]), torch.from_numpy(tokens))
        assert on_device.token_ids[rows, positions[rows]].tolist() == tokens.tolist(), "the next step would read another token"
        positions[rows] += 1
        if data.draw(st.booleans()):
            continue
        for asked, where, expected, read in unread:
            assert (positions[asked] - where <= NUM_SLOTS).all()  # 30 steps are fewer
            assert read() == expected.tolist(), f"rows {asked} at positions {where}"
        unread.clear()


@settings(max_examples=examples(25), deadline=None)
@given(asks(mishaps=True), st.dictionaries(st.integers(1, 25), st.sampled_from(FAULTS), max_size=4))
def test_what_comes_by_mailbox_is_what_each_step_has_sampled(workload, faults):
    """One step ahead on a CPU a step is computed before the one before it is read: whatever it writes over would be missed. Rows
    change hands by aborts, preemptions, failures and ends, and every answer is that of the readable rung, made in turn.
    """
    calm = [type(ask)(ask.prompt, ask.params, 0) for ask in workload]
    in_turn, ahead = engine_of(is_async=False, flex=False), engine_of(is_async=True, flex=True)
    with pytest.MonkeyPatch.context() as patch:
        use_flex_on_cpu(patch)
        found = play(ahead, workload, faults)
    for ours, theirs, ask in zip(found, play(in_turn, calm), workload, strict=True):
        if "abort" not in [answer.finish_reason for answer in ours.outputs]:
            assert_same(ours, theirs, f"{ask}, failures {faults}")
        for mine, whole in zip(ours.outputs, theirs.outputs, strict=True):
            assert mine.token_ids == whole.token_ids[: len(mine.token_ids)], f"{ask}, failures {faults}"
    assert_clean(ahead)


@pytest.mark.usefixtures("flex_on_cpu")
def test_a_step_that_a_graph_samples_copies_nothing_to_the_host(monkeypatch):
    """By temperature alone or as chat models ask for it. What only the whole sampler knows is copied, and so are logprobs."""
    copied = []
    monkeypatch.setattr(async_output, "download", lambda tensor: copied.append(tensor.shape) or transfers.download(tensor))
    llm = LLM(DRAFT, max_model_len=64, dtype="float32", device="cpu", **FLEX)

    def num_copies(**params) -> int:
        copied.clear()
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True, **params), use_tqdm=False)
        return len(copied)

    assert num_copies(temperature=0.7) == num_copies(temperature=0.7, top_k=9, top_p=0.8, repetition_penalty=1.1) == 0
    assert num_copies(temperature=0, bad_words=["the"]) == 0
    assert num_copies(temperature=0.7, logit_bias={3: 1.0}) == 4
    assert num_copies(temperature=0, logprobs=1) > 4
    llm.close()


@pytest.mark.usefixtures("flex_on_cpu")
def test_more_guesses_than_a_mailbox_holds_are_all_read():
    """A draft model launches a step for each guess before it reads any. One that is the model itself is always right."""
    knobs = FLEX | {"num_blocks": 30, "max_num_batched_tokens": 256}
    asked = {"model": DRAFT, "num_speculative_tokens": NUM_SLOTS + 9}
    llm = LLM(DRAFT, max_model_len=128, dtype="float64", device="cpu", speculative_config=asked, **knobs)
    propose, most = llm.engine.proposer.propose, [0]

    def watched(requests, room):
        drafts = propose(requests, room)
        most.extend(map(len, drafts.values()))
        return drafts

    llm.engine.proposer.propose = watched
    llm.generate([[5, 6, 7]], SamplingParams(temperature=1, seed=3, max_tokens=100, ignore_eos=True), use_tqdm=False)
    assert max(most) == NUM_SLOTS + 9
    assert llm.stats.num_accepted_tokens == llm.stats.num_draft_tokens, "guesses were lost on their way"
    llm.close()
