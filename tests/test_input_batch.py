"""The order of a step's requests, and which of its tokens get a next one."""

from __future__ import annotations

import numpy as np
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.input_batch import InputBatch, StepInputs
from minivllm.sampling_params import SamplingParams
from minivllm.scheduler_output import NewRequestData, SchedulerOutput


def batch_of(computed: list[int]) -> InputBatch:
    """Requests "0", "1", ... with 100 tokens each, of which so many have their KV."""
    batch = InputBatch(len(computed))
    for index, count in enumerate(computed):
        batch.add(NewRequestData(str(index), list(range(100)), 50, SamplingParams(), 0, [], count), [])
    return batch


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.tuples(st.integers(0, 90), st.integers(1, 9)), min_size=1, max_size=8))
def test_decodes_come_first_and_the_longest_of_them_before_all(requests):
    """Whatever the order of the schedule: decodes by falling context, then prompts, and each keeps its own row and length."""
    batch = batch_of([computed for computed, _ in requests])
    inputs = batch.prepare(SchedulerOutput(num_scheduled_tokens={str(i): count for i, (_, count) in enumerate(requests)}))
    lens = inputs.seq_lens[: inputs.num_decodes].tolist()
    assert lens == sorted(lens, reverse=True), f"contexts of the decodes stand as {lens}: a long one at the end ends the step late"
    assert (inputs.query_lens[: inputs.num_decodes] == 1).all() and (inputs.query_lens[inputs.num_decodes :] > 1).all()
    found = {int(row): (int(seq_len - query_len), int(query_len))
             for row, query_len, seq_len in zip(inputs.rows, inputs.query_lens, inputs.seq_lens)}
    assert found == {batch.row_of[str(i)]: pair for i, pair in enumerate(requests)}


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5), st.booleans()), min_size=1, max_size=8))
def test_the_tokens_that_sample(requests):
    """Of a request that samples the newest known token and its guesses, which are its last; of others none."""
    query_lens = np.array([known + guesses for known, guesses, _ in requests])
    num_drafts, samples = np.array([guesses for _, guesses, _ in requests]), np.array([samples for *_, samples in requests])
    zeros = np.zeros(len(requests), dtype=np.int64)
    inputs = StepInputs(zeros, query_lens, query_lens, zeros, zeros, 0, samples, num_drafts)
    expected, start = [], 0
    for known, guesses, does in requests:
        expected += range(start + known - 1, start + known + guesses) if does else ()
        start += known + guesses
    assert inputs.sampling_tokens.tolist() == expected
