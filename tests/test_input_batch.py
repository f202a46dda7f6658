"""The order of a step's requests, which of its tokens get a next one, and what is written to the device's rows."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.cuda_graphs import ZERO_BUCKETS, NewBlocks
from minivllm.input_batch import MOST_NEW_BLOCKS, InputBatch, RowTensors, StepInputs
from minivllm.sampler import seed_keys
from minivllm.sampling_params import SamplingParams
from minivllm.scheduler_output import NewRequestData, SchedulerOutput

FIELDS = ("token_ids", "block_table", "positions", "temperature", "seed_keys", "cuts", "block_index", "block_ids_to_zero")


def batch_of(computed: list[int]) -> InputBatch:
    """Requests "0", "1", ... with 100 tokens each, of which so many have their KV."""
    batch = InputBatch(len(computed))
    for index, count in enumerate(computed):
        batch.add(NewRequestData(str(index), list(range(100)), 50, SamplingParams(), 0, [], count), [])
    return batch


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.tuples(st.integers(0, 90), st.integers(1, 9)), min_size=1, max_size=8))
def test_decodes_come_first_and_the_longest_of_them_before_all(requests):
    """Whatever the order of the schedule: decodes by falling context, then prompts likewise, and each keeps its row and length."""
    batch = batch_of([computed for computed, _ in requests])
    inputs = batch.prepare(SchedulerOutput(num_scheduled_tokens={str(i): count for i, (_, count) in enumerate(requests)}))
    lens = inputs.seq_lens[: inputs.num_decodes].tolist()
    assert lens == sorted(lens, reverse=True), f"contexts of the decodes stand as {lens}: a long one at the end ends the step late"
    lens = inputs.seq_lens[inputs.num_decodes :].tolist()
    assert lens == sorted(lens, reverse=True), f"contexts of the prompts stand as {lens}: as decodes they would stand otherwise"
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


REMEMBERED = Counter[bool]()


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.integers(5, 90), min_size=1, max_size=5), st.data())
def prepared_as_any_other(computed, data):
    batch, forgetful, present = batch_of(computed), batch_of(computed), set(map(str, range(len(computed))))
    for step in range(data.draw(st.integers(2, 8))):
        kind = data.draw(st.sampled_from(["decode", "decode", "decode", "some", "prompt", "go", "rewind", "wait"]))
        everyone, some = sorted(present), st.lists(st.sampled_from(sorted(present)), unique=True).map(sorted)
        chosen = everyone if kind in ("decode", "prompt") else data.draw(some)
        counts = dict.fromkeys(chosen, 3 if kind == "prompt" else 1)
        if kind == "go" and len(present) > len(chosen):
            present -= set(chosen)
        for one in (batch, forgetful):
            rows = [one.row_of[name] for name in chosen]
            if kind == "go":
                for name in sorted(counts.keys() - present):
                    one.remove(name)
            elif kind == "rewind" and rows:
                one.rewind(rows, [2] * len(rows), [3] * len(rows), 4)
            elif kind == "wait":  # their tokens are known, or not yet
                one.num_tokens[rows] = one.num_computed[rows] + 1
        counts = {name: count for name, count in counts.items() if name in present} or {min(present): 1}
        forgetful.last, remembers = None, batch.last is not None and batch.last[0] == counts
        inputs, expected = (one.prepare(SchedulerOutput(num_scheduled_tokens=dict(counts))) for one in (batch, forgetful))
        REMEMBERED[remembers] += 1
        for name, value in vars(expected).items():
            assert np.array_equal(vars(inputs)[name], value), f"{name} of step {step} ({kind}) is not what it would be anew"
        assert np.array_equal(batch.num_computed, forgetful.num_computed)


def test_a_step_that_is_as_the_last_is_prepared_as_any_other():
    """Whoever decodes, stops, comes or goes: the same arrays as of a batch that remembers no step. Many steps are as the last."""
    REMEMBERED.clear()
    prepared_as_any_other()
    assert min(REMEMBERED[True], REMEMBERED[False]) > 50, f"{REMEMBERED} steps were as the last one"


def new_request(name: str, token_ids: list[int], computed: int, blocks: list[int], **params) -> NewRequestData:
    return NewRequestData(name, token_ids, len(token_ids), SamplingParams(**params), 7, blocks, computed)


@settings(max_examples=examples(60), deadline=None)
@given(st.data())
def test_rows_are_written_as_noted_and_nothing_else_is(data):
    """Tokens, tables and positions in any rows, then one flush: the device's numbers are those of a plain model of the rows."""
    num_rows, max_model_len, num_blocks = 4, 37, 11
    rows = RowTensors(num_rows, max_model_len, num_blocks, 8, torch.device("cpu"))
    expected = {name: getattr(rows, name).clone() for name in FIELDS}
    for _ in range(data.draw(st.integers(1, 4))):
        chosen = data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=num_rows, unique=True))
        starts = [data.draw(st.integers(0, 20)) for _ in chosen]
        tokens = [data.draw(st.lists(st.integers(0, 2**31 - 1), max_size=17)) for _ in chosen]
        tables = [data.draw(st.lists(st.integers(1, num_blocks - 1), max_size=2)) for _ in chosen]
        rows.write_tokens(chosen, starts, tokens)
        rows.write_blocks(chosen, [1] * len(chosen), tables)
        for _ in range(2):  # the last one counts
            positions = [data.draw(st.integers(0, max_model_len)) for _ in chosen]
            rows.write_positions(np.array(chosen), np.array(positions))
        for row, start, some, table, position in zip(chosen, starts, tokens, tables, positions):
            expected["token_ids"][row, start : start + len(some)] = torch.tensor(some, dtype=torch.int32)
            expected["block_table"][row, 1 : 1 + len(table)] = torch.tensor(table, dtype=torch.int32)
            for place, block in enumerate(table):
                expected["block_index"][block] = 1 + place
            expected["positions"][row] = position
        if len({block for table in tables for block in table}) < sum(map(len, tables)):
            expected["block_index"] = None  # one block at two places: no real table has that
        rows.flush()
        for name, values in expected.items():
            if values is None:
                expected[name] = rows.block_index.clone()
            else:
                assert torch.equal(getattr(rows, name), values), f"{name} is not what was noted"


@pytest.mark.parametrize(("write", "start", "values"), [("write_tokens", 15, [1, 2]), ("write_blocks", 2, [3])])
def test_what_does_not_fit_into_a_row_is_refused(write, start, values):
    """All rows are one tensor, and what is beyond the end of one is the beginning of the next."""
    rows = RowTensors(3, 16, 4, 8, torch.device("cpu"))
    getattr(rows, write)([1], [start - 1], [values])
    with pytest.raises(AssertionError, match="next row"):
        getattr(rows, write)([1], [start], [values])


def test_a_row_starts_with_all_that_its_request_asks_for():
    """Temperature, cuts and seed in their own rows, exactly, beside others that stay as they were."""
    rows = RowTensors(3, 16, 4, 8, torch.device("cpu"))
    neutral = rows.cuts[:, 0].clone()
    asked = new_request("a", [5, 6], 1, [2], temperature=0.3, top_k=9, top_p=0.7, min_p=0.1, presence_penalty=0.5)
    rows.start_rows([1], [asked])
    assert rows.temperature.tolist() == [0] * 4 and rows.positions.tolist() == [0] * 4, "written before the flush"
    rows.flush()
    assert rows.temperature.tolist() == [0, torch.tensor(0.3).item(), 0, 0] and rows.positions.tolist() == [0, 1, 0, 0]
    assert torch.equal(rows.cuts[:, 1], torch.tensor([9, 0.7, 0.1, 1.0, 0.5, 0.0, 2])) and torch.equal(rows.cuts[:, 2], neutral)
    assert torch.equal(rows.seed_keys[1], seed_keys(torch.tensor([7]))[0]) and rows.seed_keys[[0, 2, 3]].abs().sum() == 0
    rows.flush()  # nothing is noted any more
    assert not rows.noted and not rows.moved


def test_what_a_failing_step_has_noted_is_written_all_the_same():
    """The next step is told what has changed since, so what was noted before an error must not be lost with it."""
    rows = RowTensors(2, 16, 4, 8, torch.device("cpu"))
    with pytest.raises(IndexError), rows.flushed():
        rows.write_tokens([1, 0], [3, 2], [[8, 9], [7]]) or [][0]
    assert rows.token_ids[1, 3:5].tolist() == [8, 9]


class OneKernel:
    """In place of a graph: computes when replayed, and counts."""

    def __init__(self, compute) -> None:
        self.compute, self.num_replays = compute, 0

    def replay(self) -> None:
        self.num_replays += 1
        self.compute()


@settings(max_examples=examples(40), deadline=None)
@given(st.lists(st.integers(1, 99), unique=True, min_size=1, max_size=99), st.booleans(), st.booleans())
def test_new_blocks_are_zeroed_and_no_others(block_ids, has_graphs, fails):
    """Few by a graph and many at once, without a graph all at once; null blocks may be zeroed with them, the others' never."""
    rows = RowTensors(2, 16, 100, 8, torch.device("cpu"))
    new = NewBlocks(torch.ones(100, 2, 3), rows)
    if has_graphs:
        new.graphs = {size: OneKernel(lambda size=size: new.compute(size)) for size in ZERO_BUCKETS}
    new.zero(np.array(block_ids))
    if fails:
        rows.flush()
        new.forget()
    rows.flush()
    new.run()
    new.run()  # nothing is left
    is_noted = has_graphs and len(block_ids) <= MOST_NEW_BLOCKS
    zeroed = set(block_ids) if not (is_noted and fails) else set()
    assert {block for block in range(1, 100) if not new.blocks[block].any()} == zeroed
    assert all(new.blocks[block].all() for block in range(1, 100) if block not in zeroed)
    if has_graphs:
        assert sum(graph.num_replays for graph in new.graphs.values()) == (is_noted and not fails)
