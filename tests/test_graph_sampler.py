"""Lesson 14, the part without a GPU: the sampler that a graph holds draws, token for token, what `sample` draws.

Graphs themselves: test_gpu_graphs.py.
"""

from __future__ import annotations

import random

import pytest
import torch
from depth import examples
from flex_double import flex_on_cpu  # noqa: F401 - a fixture
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import greedy, make_llm, prompts_of, tokens_of

from minivllm import SamplingParams, graph_sampler
from minivllm.graph_sampler import largest_by_parts, penalize, sample_by_cuts
from minivllm.input_batch import RowTensors
from minivllm.sampler import apply_penalties, sample
from minivllm.sampling_metadata import MOST_TOP_K, RowParams, SamplingMetadata, fits_in_row, is_plain
from minivllm.scheduler_output import NewRequestData

MAX_MODEL_LEN = 48
ASKED = [SamplingParams(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.1, seed=1, max_tokens=9, ignore_eos=True),
         SamplingParams(temperature=1.5, top_k=3, seed=2, max_tokens=12), greedy(11),
         SamplingParams(temperature=1, min_p=0.2, presence_penalty=1.5, seed=3, max_tokens=7, ignore_eos=True, logprobs=2),
         SamplingParams(temperature=0, repetition_penalty=1.4, frequency_penalty=0.5, max_tokens=10, ignore_eos=True),
         SamplingParams(temperature=1, seed=4, max_tokens=14, ignore_eos=True)]


def drawn_params(rng: random.Random) -> SamplingParams:
    """Everything that a row has a number for, off or on."""
    top_k = rng.choice([-1, 1, 2, 5, 20, MOST_TOP_K])
    return SamplingParams(
        temperature=rng.choice([0.0, 0.06, 0.7, 1.0, 2.0]), top_k=top_k,
        top_p=1.0 if top_k < 1 else rng.choice([1.0, 0.05, 0.6, 0.95]),
        min_p=rng.choice([0.0, 0.0, 0.01, 0.5]), repetition_penalty=rng.choice([1.0, 0.8, 1.3]),
        presence_penalty=rng.choice([0.0, -1.0, 1.5]), frequency_penalty=rng.choice([0.0, -0.5, 0.7]))


def rows_of(asked: list[SamplingParams], histories: list[list[int]], prompt_lens: list[int], seeds: list[int]) -> RowTensors:
    """Request i in row i: behind its history stands what a longer request has left."""
    rows = RowTensors(len(asked), MAX_MODEL_LEN, 4, 16, torch.device("cpu"))
    rows.token_ids += 3
    numbers = range(len(asked))
    rows.start_rows(numbers, [NewRequestData(str(i), histories[i], prompt_lens[i], asked[i], seeds[i], [1], 0) for i in numbers])
    rows.write_tokens(numbers, [0] * len(asked), histories)
    rows.positions[: len(asked)] = torch.tensor([len(history) for history in histories])
    return rows


def check_a_batch(seed: int, vocab_size: int, num_rows: int, has_ties: bool) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    asked = [drawn_params(rng) for _ in range(num_rows)]
    assert all(fits_in_row(params) for params in asked)
    histories = [rng.choices(range(min(vocab_size, 9)), k=rng.randint(1, MAX_MODEL_LEN - 6)) for _ in asked]
    prompt_lens, seeds = [rng.randint(1, len(history)) for history in histories], [rng.getrandbits(40) for _ in asked]
    logits = torch.randn(num_rows, vocab_size, generator=generator) * 4
    logits[:, :9] += 4  # where histories have their tokens
    logits = (logits.round() if has_ties else logits).bfloat16()
    expected = sample(logits, SamplingMetadata.from_requests(
        [RowParams(*row[:3], *row[3:]) for row in zip(asked, seeds, map(len, histories), prompt_lens, histories)], vocab_size))
    rows, index = rows_of(asked, histories, prompt_lens, seeds), torch.arange(num_rows).flip(0)
    back = torch.tensor([rng.randint(0, 5) for _ in asked])  # as many guesses stand behind what counts
    rows.positions[:num_rows] += back
    found = sample_by_cuts(logits.flip(0), rows, index, back.flip(0)).flip(0)
    rows.positions[:num_rows] -= back
    assert found.tolist() == expected.tolist(), f"{asked} behind {histories}, prompts of {prompt_lens}"
    newest = rows.token_ids[torch.arange(num_rows), rows.positions[:num_rows].long()]
    assert newest.tolist() == expected.tolist(), "the token is not its row's newest"


def check_many_batches() -> None:
    for seed in range(60):
        check_a_batch(seed, 640, 6, has_ties=False)


@settings(max_examples=examples(150))
@given(st.integers(0, 10**6), st.sampled_from([7, 97, 128, 640, 6400]), st.integers(1, 6), st.booleans())
def test_a_graphs_sampler_chooses_what_the_whole_one_chooses(seed, vocab_size, num_rows, has_ties):
    """Penalties, top_k, top_p and min_p of every kind in one batch, equal logits too: the tokens of `sample`, in the rows."""
    check_a_batch(seed, vocab_size, num_rows, has_ties)


def without(name: str):
    """A cut that does nothing: its line of `cuts` is neutral."""
    place = ("top_k", "top_p", "min_p", "repetition", "presence", "frequency").index(name)
    own = RowTensors.start_rows

    def start_rows(self, rows, new):
        own(self, rows, new)
        self.cuts[place, :-1] = self.cuts[place, -1]
    return RowTensors, "start_rows", start_rows


@pytest.mark.parametrize("fault", [
    *map(without, ("top_k", "top_p", "min_p", "repetition", "presence", "frequency")),
    (graph_sampler, "FAINT", 1.0), (graph_sampler, "FAINT", 0.0), (graph_sampler, "MOST_TOP_K", 19),
    (graph_sampler, "largest_by_parts", lambda logits, num: largest_by_parts(logits, num).roll(1, 1))],
    ids=lambda fault: f"{fault[1]}")
def test_the_check_above_can_fail(fault, monkeypatch):
    """Without any one of the cuts, or with a prompt's tokens counted as the output's or not at all, tokens differ."""
    monkeypatch.setattr(*fault)
    with pytest.raises((AssertionError, RuntimeError)):
        check_many_batches()


@settings(max_examples=examples(60))
@given(st.integers(0, 10**6), st.sampled_from([5, 64, 97, 640, 12_800]), st.integers(1, 70), st.booleans())
def test_the_largest_are_found_in_few_parts(seed, vocab_size, num, has_ties):
    """As many of the largest values as asked for, in order, as a sort of everything has them."""
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(seed))
    logits = logits.mul(2).round() if has_ties else logits
    expected = logits.sort(dim=1, descending=True).values[:, :num]
    assert torch.equal(largest_by_parts(logits, num), expected)


def test_a_long_prompt_of_one_token_is_no_output():
    """However often a token stands in the prompt, only the repetition penalty minds; one in the output, and all three do."""
    asked, length = SamplingParams(presence_penalty=1.5, frequency_penalty=2.0, repetition_penalty=2.0), 130_000
    history = torch.full((1, length), 5, dtype=torch.int32)
    logits = torch.ones(1, 8)
    for prompt_len, expected in ((length, 0.5), (length - 1, 0.5 - 1.5 - 2.0)):
        rows = rows_of([asked], [[5]], [prompt_len], [0])
        found = penalize(logits, history, torch.tensor([length]), rows.cuts[:, :1, None])
        assert found[0].tolist() == [1, 1, 1, 1, 1, expected, 1, 1]
        whole = SamplingMetadata.from_requests([RowParams(asked, 0, length, prompt_len, [5] * length)], 8)
        assert torch.equal(found, apply_penalties(logits, whole))


@pytest.mark.parametrize(("asked", "fits"), [
    ({}, True), ({"top_k": 20, "top_p": 0.8}, True), ({"top_k": MOST_TOP_K}, True), ({"min_p": 0.1}, True), ({"top_p": 0.9}, False),
    ({"top_k": MOST_TOP_K + 1}, False), ({"temperature": 0, "top_p": 0.9}, True), ({"min_tokens": 1}, False),
    ({"temperature": 0.01, "top_k": 5}, False), ({"logit_bias": {1: 2.0}}, False), ({"allowed_token_ids": [1]}, False),
    ({"temperature": 0, "bad_words": ["no"]}, False), ({"repetition_penalty": 1.1, "presence_penalty": -1.0}, True)])
def test_what_a_row_has_numbers_for(asked, fits):
    """Penalties and cuts by a small top_k are numbers; masks, tables and what has to sort the vocabulary are not."""
    params = SamplingParams(**asked)
    assert fits_in_row(params) == fits
    assert fits or not is_plain(params), "what is plain fits in any case"


def test_a_real_checkpoints_defaults_are_sampled_by_graph(flex_on_cpu):  # noqa: F811
    """Requests with cuts, alone and among others, joining and preempted: the readable rung's tokens, drawn behind decode graphs."""
    prompts = prompts_of(30, 9, 44, 5, 17, 1)
    outputs, drawn = [], []
    knobs = {"num_blocks": 9, "max_num_seqs": 5, "max_num_batched_tokens": 48, "max_model_len": 64, "block_size": 16}
    for backend in ("flex_attention", "paged_gather"):
        llm = make_llm(attention_backend=backend, **knobs)
        if samplers := llm.engine.runner.sampler_graphs:
            own = samplers.run
            samplers.run = lambda count, own=own: (drawn.append(count), own(count))[1]
        batches = ASKED, [ASKED[0]] * 5 + [ASKED[1]], [SamplingParams(temperature=1, top_p=0.7, seed=5, max_tokens=8), *ASKED[1:]]
        outputs.append([tokens_of(llm.generate(prompts, params, use_tqdm=False)) for params in batches])
        outputs[-1] += tokens_of(llm.generate(prompts[:1], ASKED[0], use_tqdm=False))
        assert llm.stats.num_preemptions > 0
        llm.close()
    assert outputs[0] == outputs[1]
    assert len(drawn) > 10 and max(drawn) > 1 and min(drawn) == 1, f"batches that were drawn by graph: {drawn}"
