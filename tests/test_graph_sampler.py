"""Lesson 14, the part without a GPU: the sampler that a graph holds draws, token for token, what `sample` draws.

Graphs themselves: test_gpu_graphs.py.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from depth import examples
from flex_double import flex_on_cpu  # noqa: F401 - a fixture
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import greedy, make_llm, prompts_of, tokens_of

from minivllm import SamplingParams, graph_sampler
from minivllm.graph_sampler import SamplerGraphs, largest_by_parts, penalize
from minivllm.input_batch import MOST_TOP_K, RowTensors, wishes_of
from minivllm.sampler import NEVER, apply_penalties, sample, top_p
from minivllm.sampling_metadata import RowParams, SamplingMetadata
from minivllm.scheduler_output import NewRequestData

MAX_MODEL_LEN = 48
ASKED = [SamplingParams(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.1, seed=1, max_tokens=9, ignore_eos=True),
         SamplingParams(temperature=1.5, top_k=3, seed=2, max_tokens=12), greedy(11),
         SamplingParams(temperature=1, min_p=0.2, presence_penalty=1.5, seed=3, max_tokens=7, ignore_eos=True, logprobs=2),
         SamplingParams(temperature=0, repetition_penalty=1.4, frequency_penalty=0.5, max_tokens=10, ignore_eos=True),
         SamplingParams(temperature=1, seed=4, max_tokens=14, ignore_eos=True)]
NUCLEUS = SamplingParams(temperature=1.1, top_p=0.7, frequency_penalty=0.2, seed=5, max_tokens=8, ignore_eos=True, logprobs=1)
MASKED = [SamplingParams(temperature=1, seed=6, min_tokens=5, stop_token_ids=list(range(0, 60, 3)), max_tokens=9, logprobs=0),
          SamplingParams(temperature=0.8, top_p=0.9, seed=7, allowed_token_ids=[5, 6, 7, 11, 40], max_tokens=8, logprobs=3),
          SamplingParams(temperature=0, repetition_penalty=1.5, min_tokens=6, stop_token_ids=list(range(1, 60, 2)), max_tokens=7)]


def drawn_params(rng: random.Random) -> SamplingParams:
    """Everything that a row has a number for, off or on."""
    return SamplingParams(
        temperature=rng.choice([0.0, 0.06, 0.7, 1.0, 2.0]), top_k=rng.choice([-1, -1, 1, 2, 5, 20, MOST_TOP_K]),
        top_p=rng.choice([1.0, 0.05, 0.6, 0.95]),
        min_p=rng.choice([0.0, 0.0, 0.01, 0.5]), repetition_penalty=rng.choice([1.0, 0.8, 1.3]),
        presence_penalty=rng.choice([0.0, -1.0, 1.5]), frequency_penalty=rng.choice([0.0, -0.5, 0.7]))


def rows_of(asked: list[SamplingParams], histories: list[list[int]], prompt_lens: list[int], seeds: list[int]) -> RowTensors:
    """Request i in row i: behind its history stands what a longer request has left."""
    rows = RowTensors(len(asked), MAX_MODEL_LEN, 4, 16, torch.device("cpu"))
    rows.token_ids += 3
    numbers = range(len(asked))
    rows.start_rows(numbers, [NewRequestData(str(i), histories[i], prompt_lens[i], asked[i], seeds[i], [1], 0) for i in numbers])
    rows.write_tokens(numbers, [0] * len(asked), histories)
    rows.flush()
    rows.positions[: len(asked)] = torch.tensor([len(history) for history in histories])
    return rows


def sample_as_recorded(logits: torch.Tensor, rows: RowTensors, index: torch.Tensor, back: torch.Tensor, by_mass: bool):
    """What a graph computes for these rows, without a graph."""
    return SamplerGraphs(SimpleNamespace(rows=rows, use_compile=False)).sample(logits, index, back, by_mass=by_mass)


def check_a_batch(seed: int, vocab_size: int, num_rows: int, has_ties: bool) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    asked = [drawn_params(rng) for _ in range(num_rows)]
    by_mass = any("a nucleus" in wishes_of(params) for params in asked)
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
    found = sample_as_recorded(logits.flip(0), rows, index, back.flip(0), by_mass).flip(0)
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
        self.flush()
        self.cuts[place, :-1] = self.cuts[place, -1]
    return RowTensors, "start_rows", start_rows


@pytest.mark.parametrize("fault", [
    *map(without, ("top_k", "top_p", "min_p", "repetition", "presence", "frequency")),
    (graph_sampler, "FAINT", 1.0), (graph_sampler, "FAINT", 0.0), (graph_sampler, "MOST_TOP_K", 19),
    (graph_sampler, "NUM_PASSES", 12), (graph_sampler, "WIDEST", 2**27),
    (SamplerGraphs, "find_floor", lambda self, logits, *_: torch.full(logits.shape[:1], NEVER)),
    (graph_sampler, "largest_by_parts", lambda logits, num: largest_by_parts(logits, num).roll(1, 1))],
    ids=lambda fault: f"{fault[1]}")
def test_the_check_above_can_fail(fault, monkeypatch):
    """Without any one of the cuts, with a prompt's tokens counted as the output's or not at all, or with half a search for a
    threshold, tokens differ.
    """
    monkeypatch.setattr(*fault)
    with pytest.raises((AssertionError, RuntimeError)):
        check_many_batches()


@settings(max_examples=examples(200))
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 7, 128, 5000]), st.sampled_from([0.01, 1.0, 30.0]), st.booleans(),
       st.booleans(), st.sampled_from([1e-45, 1e-6, 0.1, 0.5, 0.9, 0.999, 1 - 2.0**-24]))
def test_the_threshold_of_a_nucleus_is_found_without_putting_logits_in_order(seed, vocab_size, spread, has_ties, has_masks, p):
    """The floor that the search finds is the smallest logit that `top_p` keeps, for any spread, equal and masked logits, any p."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocab_size, generator=generator) * spread
    logits = (logits * 4).round() / 4 if has_ties else logits
    if has_masks:
        logits[:, 1:] = logits[:, 1:].masked_fill(torch.rand(3, vocab_size - 1, generator=generator) < 0.5, NEVER)
    rows = rows_of([SamplingParams(top_p=p), SamplingParams(top_p=p, top_k=2), SamplingParams()], [[0]] * 3, [1] * 3, [0] * 3)
    graphs, index = SamplerGraphs(SimpleNamespace(rows=rows, use_compile=False)), torch.arange(3)
    floor = graphs.find_floor(logits, rows, index)
    shifted = logits - logits.amax(dim=1, keepdim=True)
    kept = top_p(shifted, torch.full((3,), p))[0]
    assert floor[0] == kept[kept > NEVER].min(), f"{kept[kept > NEVER].numel()} of {vocab_size} tokens are kept"
    assert floor[1:].tolist() == [NEVER, NEVER], "a top_p behind a top_k, or none at all, has no floor here"


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
        rows, index = rows_of([asked], [[5]], [prompt_len], [0]), torch.zeros(1, dtype=torch.int64)
        rows.token_ids, rows.positions = history, torch.tensor([length])
        found = penalize(logits, rows, index, index)
        assert found[0].tolist() == [1, 1, 1, 1, 1, expected, 1, 1]
        whole = SamplingMetadata.from_requests([RowParams(asked, 0, length, prompt_len, [5] * length)], 8)
        assert torch.equal(found, apply_penalties(logits, whole))


@pytest.mark.parametrize(("asked", "wishes"), [
    ({}, ""), ({"top_k": 20, "top_p": 0.8}, "m"), ({"top_k": MOST_TOP_K}, "m"), ({"min_p": 0.1}, "m"), ({"top_p": 0.9}, "mn"),
    ({"top_k": MOST_TOP_K + 1, "top_p": 0.9}, "me"), ({"temperature": 0, "top_p": 0.9, "top_k": 99}, ""), ({"min_tokens": 1}, "ms"),
    ({"temperature": 0.01, "top_k": 5}, "me"), ({"logit_bias": {1: 2.0}}, "me"), ({"allowed_token_ids": [1]}, "ms"),
    ({"temperature": 0, "bad_words": ["no"]}, "ms"), ({"repetition_penalty": 1.1, "presence_penalty": -1.0}, "m"),
    ({"temperature": 0, "frequency_penalty": 0.1}, "m"), ({"prompt_logprobs": 0}, "p"),
    ({"logprobs": 0}, "l")])
def test_what_a_request_costs_its_batch(asked, wishes):
    """Penalties and cuts by a small top_k are numbers in a row, a top_p alone needs a search, masks are applied before, and a table
    of biases, a large top_k and a tiny temperature are left to the whole sampler.
    """
    letters = {"m": "more than a temperature", "n": "a nucleus", "s": "masks", "e": "everything", "p": "prompt_logprobs",
               "l": "logprobs"}
    assert wishes_of(SamplingParams(**asked)) == [letters[letter] for letter in wishes]


def test_a_real_checkpoints_defaults_are_sampled_by_graph(flex_on_cpu):  # noqa: F811
    """Requests with cuts, a nucleus or masks, alone and among others, joining and preempted: the readable rung's tokens and
    logprobs, drawn behind decode graphs.
    """
    prompts = prompts_of(30, 9, 44, 5, 17, 1)
    outputs, drawn = [], []
    knobs = {"num_blocks": 9, "max_num_seqs": 5, "max_num_batched_tokens": 48, "max_model_len": 64, "block_size": 16}
    for backend in ("flex_attention", "paged_gather"):
        llm = make_llm(attention_backend=backend, **knobs)
        if samplers := llm.engine.runner.sampler.sampler_graphs:
            own = samplers.run
            samplers.run = lambda count, by_mass, own=own: (drawn.append((count, by_mass)), own(count, by_mass=by_mass))[1]
        batches = ASKED, [ASKED[0]] * 5 + [ASKED[1]], [NUCLEUS, *ASKED[1:]], [*MASKED, *ASKED[:2], NUCLEUS]
        answers = [llm.generate(prompts, params, use_tqdm=False) for params in batches]
        answers += [llm.generate(prompts[:1], params, use_tqdm=False) for params in (ASKED[0], NUCLEUS, *MASKED)]
        outputs.append([(tokens_of(one), logprobs_of(one)) for one in answers])
        assert llm.stats.num_preemptions > 0
        llm.close()
    for place, (ours, readable) in enumerate(zip(*outputs)):
        assert ours[0] == readable[0], f"batch {place}: tokens differ"
        assert ours[1] == pytest.approx(readable[1], abs=1e-4), f"batch {place}: the same tokens have other logprobs"
    for by_mass in (False, True):
        counts = [count for count, searched in drawn if searched == by_mass]
        assert len(counts) > 10 and max(counts) > 1 and min(counts) == 1, f"batches that were drawn by graph: {counts}"


def logprobs_of(outputs) -> list[float]:
    """Of all chosen tokens of all requests that asked, and of those beside them, in order."""
    found = [answer.logprobs for output in outputs for answer in output.outputs if answer.logprobs is not None]
    return [entry[token].logprob for answer in found for entry in answer for token in sorted(entry)]
