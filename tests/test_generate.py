"""Every rung says what Hugging Face says, token for token, and counts what it cost."""

from __future__ import annotations

import functools
import random
import tempfile
from typing import NamedTuple

import pytest
import torch
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ids, load_ours, random_qwen2

from minivllm import attention, dense_cache, generate
from minivllm.attention import PagedAttention
from minivllm.generate import GenerationStats, greedy, greedy_cached, greedy_paged, greedy_static_batch, left_pad
from minivllm.slot_batching import SlotRequest, SlotScheduler, greedy_continuous

SHAPES = [(4, 2, 2, False), (4, 4, 1, True), (6, 1, 2, False), (14, 2, 2, True)]  # query heads, KV heads, layers, tied


class Models(NamedTuple):
    hf: torch.nn.Module
    ours: torch.nn.Module


@functools.cache
def models(shape: int, dtype: str) -> Models:
    """A random Qwen2 as Hugging Face runs it, and ours of the same files."""
    heads, kv_heads, layers, tie = SHAPES[shape]
    kind = getattr(torch, dtype)
    hf, folder = random_qwen2(tempfile.mkdtemp(), shape, dtype=kind, layers=layers, hidden=8 * heads, heads=heads,
                              kv_heads=kv_heads, vocab=97, tie=tie)
    return Models(hf, load_ours(folder, kind))


def hf_greedy(model, prompt: list[int], num_tokens: int, eos: tuple[int, ...] = ()) -> list[int]:
    """What `generate` says alone, with its hidden defaults neutralised."""
    if num_tokens == 0:
        return []
    tokens = torch.tensor([prompt])
    output = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=num_tokens,
                            eos_token_id=list(eos) or None, pad_token_id=0, repetition_penalty=1.0)
    return output[0, len(prompt) :].tolist()


@st.composite
def workloads(draw):
    """Sizes and a seed: a model, prompts of 1 to 20 tokens, limits of 0 to 12, and which tokens end an output."""
    lens = draw(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 12)), min_size=1, max_size=5))
    return draw(st.integers(0, len(SHAPES) - 1)), lens, draw(st.booleans()), draw(st.integers(0, 9))


class Case(NamedTuple):
    ours: torch.nn.Module
    prompts: list[list[int]]
    limits: list[int]
    eos: tuple[int, ...]
    expected: list[list[int]]

    def check(self, rung: str, results: list[list[int]]) -> None:
        for row, (result, want) in enumerate(zip(results, self.expected, strict=True)):
            agree = next((i for i, (a, b) in enumerate(zip(result, want)) if a != b), min(len(result), len(want)))
            assert result == want, (
                f"{rung}: request {row} (prompt of {len(self.prompts[row])}, limit {self.limits[row]}) leaves Hugging Face "
                f"after {agree} tokens: {result[agree : agree + 3]} instead of {want[agree : agree + 3]}")


def make_case(workload, dtype: str) -> Case:
    shape, lens, with_eos, seed = workload
    hf, ours = models(shape, dtype)
    prompts = [ids(100 * seed + row, length, 97).tolist() for row, (length, _) in enumerate(lens)]
    limits = [limit for _, limit in lens]
    expected = [hf_greedy(hf, prompt, limit) for prompt, limit in zip(prompts, limits)]
    said = sorted({token for output in expected for token in output})
    eos = tuple(random.Random(seed).sample(said, min(2, len(said)))) if with_eos else ()
    if eos:
        expected = [hf_greedy(hf, prompt, limit, eos) for prompt, limit in zip(prompts, limits)]
    return Case(ours, prompts, limits, eos, expected)


def each(rung, case: Case) -> list[list[int]]:
    return [rung(case.ours, prompt, limit, case.eos) for prompt, limit in zip(case.prompts, case.limits)]


# ---- The same tokens on every rung ----


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@settings(max_examples=examples(15))
@given(workload=workloads())
def test_recomputing_says_what_hugging_face_says(dtype, workload):
    """The loop that recomputes everything says what Hugging Face says, end-of-sequence token included."""
    case = make_case(workload, dtype)
    case.check("greedy", each(greedy, case))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@settings(max_examples=examples(15))
@given(workload=workloads())
def test_caching_changes_no_token(dtype, workload):
    """With keys and values kept, the tokens are still Hugging Face's."""
    case = make_case(workload, dtype)
    case.check("greedy_cached", each(greedy_cached, case))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@settings(max_examples=examples(15))
@given(workload=workloads())
def test_padding_changes_no_token(dtype, workload):
    """In a left-padded batch each request says what it says alone."""
    case = make_case(workload, dtype)
    case.check("greedy_static_batch", greedy_static_batch(case.ours, case.prompts, case.limits, case.eos))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@settings(max_examples=examples(15))
@given(workload=workloads(), num_rows=st.integers(1, 4))
def test_joining_and_leaving_changes_no_token(dtype, workload, num_rows):
    """However few the rows, and whoever had them before, each request says what it says alone."""
    case = make_case(workload, dtype)
    case.check("greedy_continuous", greedy_continuous(case.ours, case.prompts, case.limits, case.eos, num_rows=num_rows))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@settings(max_examples=examples(15))
@given(workload=workloads(), block_size=st.integers(1, 17), seed=st.integers(0, 9))
def test_t27_scattered_blocks_change_no_token(dtype, workload, block_size, seed):
    """Whatever the block size and the order of the blocks, each request says what it says alone."""
    case = make_case(workload, dtype)
    results = greedy_paged(case.ours, case.prompts, case.limits, case.eos, block_size=block_size, seed=seed)
    case.check(f"greedy_paged, blocks of {block_size}", results)


def test_the_random_models_have_something_to_say():
    """Each random model's output varies: a model that repeats one token would pass every comparison."""
    for shape in range(len(SHAPES)):
        said = greedy_cached(models(shape, "float64").ours, ids(shape, 12, 97).tolist(), 40)
        assert len(set(said)) >= 8, f"model {SHAPES[shape]} says {len(set(said))} different tokens in 40"


WORKLOAD = (0, [(9, 12), (3, 12), (14, 12)], False, 0)


@pytest.mark.parametrize("breakage", ["attention is zero", "slots are off by one", "a block is lost", "padding is seen",
                                      "RoPE is dropped"])
def test_a_broken_engine_is_noticed(breakage, monkeypatch):
    """The comparison with Hugging Face fails when attention, slots, tables, padding or positions are wrong."""
    case, rung = make_case(WORKLOAD, "float64"), greedy_paged
    if breakage == "attention is zero":
        monkeypatch.setattr(PagedAttention, "attend", lambda self, q, metadata: torch.zeros_like(q))
    elif breakage == "slots are off by one":
        right = attention.context_slots
        monkeypatch.setattr(attention, "context_slots", lambda *args: (right(*args) - 1).clamp(min=0))
    elif breakage == "a block is lost":
        right_step = generate.paged_step

        def paged_step(model, caches, tokens, num_computed, tables, stats):
            lost = [[0, *table[1:]] if len(table) > 2 else table for table in tables]
            return right_step(model, caches, tokens, num_computed, lost, stats)

        monkeypatch.setattr(generate, "paged_step", paged_step)
    elif breakage == "padding is seen":
        rung, right_mask = greedy_static_batch, dense_cache.causal_mask
        monkeypatch.setattr(dense_cache, "causal_mask", lambda columns, first: right_mask(columns, torch.zeros_like(first)))
    else:
        monkeypatch.setattr("minivllm.model.rope", lambda x, cos, sin: x)
    kwargs = {} if rung is greedy_static_batch else {"block_size": 4}
    with pytest.raises(AssertionError, match="leaves Hugging Face"):
        case.check(breakage, rung(case.ours, case.prompts, case.limits, case.eos, **kwargs))


# ---- What it costs ----


def test_64_tokens_after_64_cost_6112_positions_or_127():
    """Recomputing 64 new tokens after a prompt of 64 computes 6,112 positions; with a cache it is 127, 48.1 times less."""
    model, prompt, stats = models(0, "float32").ours, ids(0, 64, 97).tolist(), [GenerationStats(), GenerationStats()]
    greedy(model, prompt, 64, stats=stats[0])
    greedy_cached(model, prompt, 64, stats=stats[1])
    computed = [one.positions_computed for one in stats]
    assert computed == [6112, 127], (
        f"positions computed by recomputing, and with a cache: {computed} instead of [6112, 127]")
    assert [one.useful_positions for one in stats] == [127, 127], f"useful: {[one.useful_positions for one in stats]}, want 127"


def test_the_counter_counts_what_the_model_computes(monkeypatch):
    """On every rung, the positions counted are the rows that went through the model, and the useful ones are the same."""
    model, prompts, limits = models(0, "float32").ours, [ids(row, 3 + 5 * row, 97).tolist() for row in range(4)], [9, 2, 5, 1]
    rows, forward = [], type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, ids, *rest: rows.append(len(ids)) or forward(self, ids, *rest))
    useful = sum(len(prompt) + limit - 1 for prompt, limit in zip(prompts, limits))
    for rung in (greedy, greedy_cached, greedy_static_batch, greedy_continuous, greedy_paged):
        stats = GenerationStats()
        rows.clear()
        if rung in (greedy, greedy_cached):
            for prompt, limit in zip(prompts, limits):
                rung(model, prompt, limit, stats=stats)
        else:
            rung(model, prompts, limits, stats=stats)
        computed = stats.positions_computed
        assert computed == sum(rows), f"{rung.__name__} counts {computed} positions, the model computed {sum(rows)}"
        assert stats.useful_positions == useful, f"{rung.__name__} counts {stats.useful_positions} useful positions of {useful}"


def test_a_static_batch_pays_for_its_longest_request():
    """Prompts of 4 and 10, limits of 2 and 8: 8 steps over 2 rows, 34 positions of which 22 are useful."""
    model, stats = models(0, "float32").ours, GenerationStats()
    greedy_static_batch(model, [ids(0, 4, 97).tolist(), ids(1, 10, 97).tolist()], [2, 8], stats=stats)
    got = stats.steps, stats.positions_computed, stats.useful_positions
    assert got == (8, 2 * 10 + 2 * 7, 4 + 1 + 10 + 7), f"steps, positions, useful: {got}"


def test_joining_at_once_takes_fewer_steps():
    """Limits 2, 4, 4, 2 over two rows take 6 steps when requests join at every step, and 8 in batches of two."""
    model, limits = models(0, "float32").ours, [2, 4, 4, 2]
    prompts = [ids(row, 5, 97).tolist() for row in range(4)]
    continuous, static = GenerationStats(), GenerationStats()
    greedy_continuous(model, prompts, limits, stats=continuous, num_rows=2)
    for half in (slice(0, 2), slice(2, 4)):
        greedy_static_batch(model, prompts[half], limits[half], stats=static)
    assert (continuous.steps, static.steps) == (6, 8), (
        f"continuous {continuous.steps} steps instead of 6, static {static.steps} instead of 8")


def test_blocks_copy_no_key_twice():
    """Over blocks every token's key is written once, while a tight dense batch would be rebuilt at every join and leave."""
    model, limits = models(0, "float32").ours, [3, 9, 5, 7, 2, 6]
    prompts = [ids(row, 10, 97).tolist() for row in range(6)]
    paged, dense = GenerationStats(), GenerationStats()
    greedy_paged(model, prompts, limits, stats=paged)
    greedy_continuous(model, prompts, limits, stats=dense, num_rows=3)
    slots, tokens = paged.kv_slots_written, paged.useful_positions
    assert slots == tokens, f"{slots} slots were written for {tokens} tokens"
    assert dense.kv_slots_repacked > paged.kv_slots_written, f"only {dense.kv_slots_repacked} slots would be repacked"


# ---- Padding and rows ----


@given(st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=9), min_size=1, max_size=6))
def test_left_padding_is_exact(prompts):
    """Padded rows end together; masks show real tokens; positions count from the first real token, and backwards over padding."""
    token_ids, positions, mask = left_pad(prompts)
    longest = max(map(len, prompts))
    for tensor in (token_ids, positions, mask):
        assert tensor.shape == (len(prompts), longest), f"a shape is {tuple(tensor.shape)}, not {len(prompts)} x {longest}"
    for row, prompt in enumerate(prompts):
        pad = longest - len(prompt)
        assert token_ids[row].tolist() == [0] * pad + prompt, (
            f"row {row} of {prompts} is {token_ids[row].tolist()} instead of {[0] * pad + prompt}")
        real, counted = [False] * pad + [True] * len(prompt), list(range(-pad, len(prompt)))
        assert mask[row].tolist() == real, f"the mask of row {row} is {mask[row].tolist()} instead of {real}"
        assert positions[row].tolist() == counted, f"positions of row {row} are {positions[row].tolist()} instead of {counted}"


@given(st.lists(st.integers(0, 6), max_size=12), st.integers(1, 4))
def test_rows_are_given_in_order_and_never_idle(limits, num_rows):
    """Requests are seated first come, first served; no row is free while somebody waits; all of them finish."""
    requests = [SlotRequest([0], limit) for limit in limits]
    scheduler, order = SlotScheduler(requests, num_rows), []
    for step in range(sum(limits) + 1):
        seated = scheduler.schedule()
        order += [scheduler.rows[row] for row in seated]
        running = scheduler.running
        assert len(running) == num_rows or not scheduler.waiting, f"step {step}: {len(running)} of {num_rows} rows, others wait"
        assert not any(request.is_finished for request in running.values()), f"step {step}: a finished request keeps its row"
        for request in running.values():
            request.output.append(1)
    assert all(request.is_finished for request in requests), f"limits {limits} in {num_rows} rows: not all finished"
    came = [request for request in requests if request.limit > 0]
    assert [id(request) for request in order] == [id(request) for request in came], "requests were not seated as they came"
