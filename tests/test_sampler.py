"""Lesson 4: choosing a token is a pure function of logits, parameters, seed and position, and Hugging Face agrees with it."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import generation as hf

from minivllm import sampler
from minivllm.input_batch import wishes_of
from minivllm.logprobs import compute_logprobs, prompt_logprobs, to_dicts
from minivllm.sampler import NEVER, at_position, mask_and_bias, noise_of, sample, seed_keys, warp
from minivllm.sampling_metadata import RowParams, SamplingMetadata, encode_bad_words
from minivllm.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
seeds_strategy = st.integers(0, 2**31)


def random_logits(seed, num_rows, vocab_size, scale=3.0):
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def metadata_of(params, vocab_size, **row):
    """The metadata of one row, or of as many rows as there are params."""
    many = params if isinstance(params, list) else [params]
    return SamplingMetadata.from_requests([RowParams(each, **{"seed": 0, "position": 0, **row}) for each in many], vocab_size)


def repeat(metadata, num_rows):
    """One row's metadata at positions 0..num_rows-1: as many independent draws."""
    views = metadata.rows(torch.zeros(num_rows, dtype=torch.long))  # indexing by a tensor repeats the row
    return views.advance(torch.arange(num_rows))


def kept(logits):
    """Which tokens can still be chosen, as a list of sets."""
    return [set(row.nonzero().flatten().tolist()) for row in logits > NEVER]


def random_params(generator, vocab_size):
    """Parameters that use everything at least now and then, also at its limits."""
    pick = generator.choice
    return SamplingParams(
        temperature=pick([0.0, 0.05, 0.7, 1.0, 2.0]), top_k=pick([-1, 0, 1, 2, 5, vocab_size, vocab_size + 9]),
        top_p=pick([1.0, 0.1, 0.5, 0.9, 0.999]), min_p=pick([0.0, 0.0, 0.02, 0.3, 1.0]),
        repetition_penalty=pick([1.0, 1.0, 0.8, 1.3]), presence_penalty=pick([0.0, 0.0, -1.0, 1.5]),
        frequency_penalty=pick([0.0, 0.0, -0.5, 0.7]), min_tokens=pick([0, 0, 3]), max_tokens=None,
        stop_token_ids=pick([None, [0, vocab_size - 1]]), logit_bias=pick([None, {0: 5.0, vocab_size - 1: -100.0}]),
        allowed_token_ids=pick([None, None, list(range(0, vocab_size, 2))]))


def random_row(generator, vocab_size):
    length = generator.randrange(1, 12)
    token_ids = [generator.randrange(vocab_size) for _ in range(length)]
    bad_words = [[generator.choice(token_ids), generator.randrange(vocab_size)], [generator.randrange(vocab_size)]]
    return RowParams(random_params(generator, vocab_size), seed=generator.randrange(-2**63, 2**63), position=length,
                     num_prompt_tokens=generator.randrange(length + 1), token_ids=token_ids, eos_token_ids=(1,),
                     bad_words_token_ids=generator.choice([[], bad_words]))


# The same tokens as Hugging Face keeps


def hf_warpers(params):
    """Hugging Face's processors for these parameters, in the order in which `generate` puts them."""
    warpers = [hf.TemperatureLogitsWarper(float(params.temperature))]
    if params.top_k > 0:
        warpers.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(hf.MinPLogitsWarper(params.min_p))
    return hf.LogitsProcessorList(warpers)


def is_near_border(logits, params):
    """Whether float32 may see a token on the other side of p than exact arithmetic, whoever computes."""
    probs = (logits.double() / params.temperature).softmax(-1).sort(descending=True).values
    if params.top_k > 0:
        probs = probs[:, : params.top_k] / probs[:, : params.top_k].sum(-1, keepdim=True)
    distances = torch.cat([probs.cumsum(-1) - params.top_p, probs / probs[:, :1] - params.min_p])
    return bool((distances.abs() < 1e-5).any())


def check_warp(seed, num_rows, vocab_size, params):
    """The tokens that temperature, top_k, top_p and min_p leave, and their probabilities, are Hugging Face's."""
    logits = random_logits(seed, num_rows, vocab_size)
    ours, theirs = warp(logits, metadata_of([params] * num_rows, vocab_size)), hf_warpers(params)(None, logits)
    for row, (mine, wanted) in enumerate(zip(kept(ours), kept(theirs))):
        assert mine == wanted, f"row {row} keeps tokens {sorted(mine)}, Hugging Face {sorted(wanted)}, with {params}"
    difference = (ours.softmax(-1) - theirs.softmax(-1)).abs().max()
    assert difference < 1e-5, f"a token's probability is off by {difference}, with {params}"


@given(seed=seeds_strategy, num_rows=st.integers(1, 4), vocab_size=st.integers(2, 40), temperature=st.floats(0.1, 2.0),
       top_k=st.integers(0, 45), top_p=st.floats(0.01, 1.0), min_p=st.floats(0.0, 1.0))
def test_t38_temperature_top_k_top_p_and_min_p_keep_the_tokens_that_hugging_face_keeps(
        seed, num_rows, vocab_size, temperature, top_k, top_p, min_p):
    """Temperature, top_k, top_p and min_p, in this order, leave the tokens that Hugging Face leaves, as likely as there."""
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assume(not is_near_border(random_logits(seed, num_rows, vocab_size), params))
    check_warp(seed, num_rows, vocab_size, params)


@given(seed=seeds_strategy, vocab_size=st.integers(2, 40), k=st.integers(1, 45), p=st.floats(0.001, 0.999))
def test_t38_top_p_keeps_the_token_that_crosses_p(seed, vocab_size, k, p):
    """With top_p the likeliest tokens stay until they sum to p: without the last one the sum is below p, with it p is reached."""
    logits = random_logits(seed, 1, vocab_size)
    result = sampler.top_p(logits, torch.tensor([p]))
    survivors = logits.double().softmax(-1)[result > NEVER].sort(descending=True).values
    assert len(survivors) >= 1, "no token is left"
    assert survivors.sum() >= p - 1e-6, f"{len(survivors)} tokens sum to {survivors.sum():.6f}, less than p={p}"
    assert survivors[:-1].sum() < p + 1e-6, f"without the last they sum to {survivors[:-1].sum():.6f}, not less than p={p}"
    k = min(k, vocab_size)
    limited = sampler.top_k(logits, torch.tensor([k]))
    narrow, full = (sampler.top_p(limited, torch.tensor([p]), width) for width in (k, None))
    assert torch.equal(narrow, full), f"after top_k={k}, ordering {k} logits gives {kept(narrow)}, ordering all {kept(full)}"


@given(seed=seeds_strategy, vocab_size=st.integers(3, 40), k=st.integers(1, 40))
def test_t39_top_k_keeps_k_tokens_and_what_ties_with_the_last(seed, vocab_size, k):
    """With top_k exactly the tokens stay that fewer than k others beat, as in Hugging Face, also where many logits are equal."""
    logits = random_logits(seed, 2, vocab_size).round().clamp(-1, 1)  # three values: ties everywhere
    result = sampler.top_k(logits, torch.tensor([min(k, vocab_size)] * 2), min(k, vocab_size))
    theirs = hf.TopKLogitsWarper(k)(None, logits)
    assert kept(result) == kept(theirs), f"top_k={k} keeps {kept(result)} of {logits.tolist()}, Hugging Face {kept(theirs)}"
    full = kept(sampler.top_k(logits, torch.tensor([min(k, vocab_size)] * 2)))
    assert full == kept(theirs), f"top_k={k} without a width keeps {full} of {logits.tolist()}, Hugging Face {kept(theirs)}"


def test_t39_top_p_keeps_equal_tokens_together():
    """Of four equally likely tokens top_p = 0.3 can't prefer one: equal tokens stay or go together."""
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0, NEVER, -50.0]])
    result = kept(sampler.top_p(logits, torch.tensor([0.3])))[0]
    assert result == {0, 1, 2, 3}, f"top_p = 0.3 of four equal tokens keeps {result} instead of {{0, 1, 2, 3}}"


@pytest.mark.parametrize("top_k", [-1, 0, 7, 8, 10**9])
def test_t39_top_k_off_changes_nothing(top_k):
    """top_k = 0, -1, the vocabulary's size and beyond all mean every token."""
    metadata = metadata_of(SamplingParams(top_k=top_k), 7)
    assert not metadata.has_top_k, f"top_k={top_k} of 7 tokens orders logits for nothing"
    logits = random_logits(0, 1, 7)
    assert kept(sampler.top_k(logits, metadata.top_k)) == [set(range(7))], f"top_k={top_k} removes tokens"


def test_t39_tokens_at_minus_infinity_stay_there():
    """A row that leaves two tokens gives these two, whatever top_k, top_p and min_p ask for."""
    logits = torch.full((1, 9), NEVER)
    logits[0, 3], logits[0, 5] = 1.0, 0.5
    for params in (SamplingParams(), SamplingParams(top_k=4), SamplingParams(top_p=0.999),
                   SamplingParams(top_k=4, top_p=0.999, min_p=0.01)):
        drawn = set(sample(logits.expand(500, 9), repeat(metadata_of(params, 9), 500)).tolist())
        assert drawn == {3, 5}, f"500 draws gave tokens {drawn} instead of {{3, 5}}, with {params}"


@pytest.mark.parametrize("top_p", [1e-30, 1e-60])
def test_t38_the_smallest_top_p_keeps_the_likeliest(top_p):
    """Even a top_p that float32 can't tell from 0 leaves one token."""
    logits = random_logits(3, 50, 12)
    tokens = sample(logits, repeat(metadata_of(SamplingParams(top_p=top_p), 12), 50))
    assert torch.equal(tokens, logits.argmax(-1)), f"top_p={top_p} drew {tokens.tolist()} instead of {logits.argmax(-1).tolist()}"


# Masks and penalties


def check_processed(seed, num_rows, vocab_size):
    """Masks, bias and penalties change every logit as Hugging Face's processors do (and a slow spec where it has none)."""
    generator = random.Random(seed)
    rows = [random_row(generator, vocab_size) for _ in range(num_rows)]
    metadata, logits = SamplingMetadata.from_requests(rows, vocab_size), random_logits(seed, num_rows, vocab_size)
    processed = sampler.apply_penalties(mask_and_bias(logits, metadata), metadata)
    for index, row in enumerate(rows):
        wanted, mine = expected_logits(logits[index : index + 1], row), processed[index]
        is_same = torch.isclose(mine, wanted, rtol=1e-5, atol=1e-5) | (mine == wanted)
        wrong = (~is_same).nonzero().flatten().tolist()
        assert not wrong, f"row {index}: the logits of tokens {wrong} differ from Hugging Face's, for {row}"


def expected_logits(logits, row):
    """One row's logits after Hugging Face's processors; then presence and frequency, which it lacks, in plain Python."""
    params, vocab_size = row.params, logits.shape[-1]
    processors = hf.LogitsProcessorList()
    if params.allowed_token_ids:
        processors.append(hf.SuppressTokensLogitsProcessor(list(set(range(vocab_size)) - set(params.allowed_token_ids))))
    if row.bad_words_token_ids:
        processors.append(hf.NoBadWordsLogitsProcessor([list(word) for word in row.bad_words_token_ids]))
    stops = sorted({*row.eos_token_ids, *(params.stop_token_ids or ())})
    processors.append(hf.MinNewTokensLengthLogitsProcessor(row.num_prompt_tokens, params.min_tokens, stops))
    if params.logit_bias:
        processors.append(hf.SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias.items()}))
    processors.append(hf.RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    result = processors(torch.tensor([row.token_ids]), logits.clone())[0]
    for token in set(row.token_ids[row.num_prompt_tokens :]):
        times = list(row.token_ids[row.num_prompt_tokens :]).count(token)
        result[token] -= params.presence_penalty + times * params.frequency_penalty
    return result


@given(seed=seeds_strategy, num_rows=st.integers(1, 5), vocab_size=st.integers(3, 30))
def test_t39_masks_bias_and_penalties_are_hugging_faces(seed, num_rows, vocab_size):
    """Allowed ids, bad words, min_tokens, logit_bias and penalties give each row of a batch what it gets alone elsewhere."""
    check_processed(seed, num_rows, vocab_size)


def test_min_tokens_holds_off_every_way_to_stop():
    """Below min_tokens neither EOS nor a stop token can be chosen; the position alone decides when that ends."""
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[2])
    metadata = metadata_of(params, 4, position=5, num_prompt_tokens=5, eos_token_ids=(3,))
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    tokens = [int(sample(logits, metadata.advance(torch.tensor([position])))) for position in (5, 6, 7)]
    assert tokens == [1, 1, 3], f"the first three output tokens are {tokens}"


def test_a_bad_word_ends_before_its_last_token():
    """Only the token that would complete a bad word is banned, and only after the others; prompt tokens count."""
    metadata = metadata_of(GREEDY, 5, position=2, num_prompt_tokens=1, token_ids=[1, 2], bad_words_token_ids=[[1, 2, 4], [3]])
    logits = torch.tensor([[0.0, 0.5, 1.0, 2.0, 3.0]])
    histories = {(1, 2): 2, (2, 2): 4, (2, 1): 4}
    for history, wanted in histories.items():
        token = int(sample(logits, metadata.advance(metadata.positions, torch.tensor([history]))))
        assert token == wanted, f"after tokens {history} comes {token}, not {wanted}"


def test_bad_words_are_spelled_with_and_without_a_space():
    """A word is banned where it starts a text and where a space comes before it, each spelling once."""
    class Letters:
        def encode(self, text, add_special_tokens):
            return [ord(char) for char in text]

    assert encode_bad_words(Letters(), [" no", "no"]) == [[110, 111], [32, 110, 111]]
    assert encode_bad_words(None, None) == [], "without bad words no tokenizer is needed"


# Temperature 0 and near it


@given(seed=seeds_strategy, num_rows=st.integers(1, 6), vocab_size=st.integers(2, 50))
def test_t37_temperature_zero_is_the_largest_logit_in_any_batch(seed, num_rows, vocab_size):
    """A row at temperature 0 gives its largest logit, whoever shares the batch and whatever else it asks for."""
    generator = random.Random(seed)
    logits = random_logits(seed, num_rows + 1, vocab_size)
    others = [SamplingParams(temperature=generator.choice([0.3, 1.0]), top_p=0.9) for _ in range(num_rows)]
    metadata = metadata_of([SamplingParams(temperature=0, top_k=3, top_p=0.2, min_p=0.1), *others], vocab_size)
    tokens = sample(logits, metadata)
    assert tokens[0] == logits[0].argmax(), f"token {tokens[0]} was chosen, the largest logit is that of {logits[0].argmax()}"


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-38, 1e-42, 1e-300])
def test_t37_the_smallest_temperature_does_not_overflow(temperature):
    """A temperature is used as given, down to the smallest: the largest logit wins, and nothing becomes NaN."""
    logits = random_logits(1, 40, 30, scale=1e4)
    tokens = sample(logits, repeat(metadata_of(SamplingParams(temperature=temperature), 30), 40))
    assert torch.equal(tokens, logits.argmax(-1)), f"at temperature {temperature} other tokens win: {tokens.tolist()}"


def test_t37_equal_logits_stay_equally_likely_at_the_smallest_temperature():
    """Two tokens that tie for the first place share the draws also near temperature 0."""
    logits = torch.tensor([[5.0, 5.0, 1.0]]).expand(4000, 3)
    tokens = sample(logits, repeat(metadata_of(SamplingParams(temperature=1e-30), 3), 4000))
    share = float((tokens == 0).float().mean())
    assert set(tokens.tolist()) == {0, 1} and abs(share - 0.5) < 0.04, f"token 0 got {share:.3f} of the draws"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_choice_is_made_in_float32(dtype):
    """Logits of any type are used as float32 and stay as they were."""
    logits = random_logits(2, 20, 50).to(dtype)
    before = logits.clone()
    for params in (GREEDY, SamplingParams(top_k=9, top_p=0.9, repetition_penalty=1.2)):
        metadata = repeat(metadata_of(params, 50), 20)
        assert torch.equal(sample(logits, metadata), sample(logits.float(), metadata)), f"{dtype} changes the choice"
    assert torch.equal(logits, before), "sampling has written to the logits"


# The draw


def chi_square_z(counts, probs):
    """The chi-square statistic of these counts as standard deviations of a normal variable (Wilson and Hilferty 1931)."""
    expected = probs.double() * counts.sum()
    is_possible = expected > 0
    assert counts[~is_possible].sum() == 0, f"{int(counts[~is_possible].sum())} draws of tokens that have no probability"
    degrees = int(is_possible.sum()) - 1
    statistic = float(((counts - expected)[is_possible] ** 2 / expected[is_possible]).sum())
    spread = 2 / (9 * max(degrees, 1))  # a cube root makes the statistic nearly normal, also with few degrees of freedom
    return ((statistic / max(degrees, 1)) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def check_draws(params, seed=0, num_draws=20_000):
    """The draws of a row at many positions follow the distribution that Hugging Face draws from."""
    logits = random_logits(11, 1, 12, scale=1.5)
    probs = hf_warpers(params)(None, logits).softmax(-1)[0]
    tokens = sample(logits.expand(num_draws, 12), repeat(metadata_of(params, 12, seed=seed), num_draws))
    z = chi_square_z(torch.bincount(tokens, minlength=12), probs)
    assert z < 5, f"{num_draws} draws are {z:.1f} standard deviations from the distribution, with {params}"


@pytest.mark.parametrize("params", [
    SamplingParams(), SamplingParams(temperature=0.5), SamplingParams(temperature=1.7, top_k=4), SamplingParams(top_p=0.7),
    SamplingParams(min_p=0.2), SamplingParams(temperature=0.8, top_k=8, top_p=0.9), SamplingParams(top_p=0.95, min_p=0.1),
    SamplingParams(temperature=1.3, top_k=9, top_p=0.9, min_p=0.05),
], ids=lambda params: f"T{params.temperature}-k{params.top_k}-p{params.top_p}-m{params.min_p}")
def test_draws_follow_the_distribution(params):
    """Drawn often, each token comes as often as its probability says, and no other token ever."""
    for seed in (0, 1, -5, 2**62):
        check_draws(params, seed)


def test_draws_over_seeds_follow_the_distribution():
    """One position of many seeds, as the children of a request have them, follows the distribution too."""
    logits = random_logits(5, 1, 10, scale=1.0)
    metadata = repeat(metadata_of(SamplingParams(), 10), 20_000)
    metadata = replace(metadata, seeds=torch.arange(20_000), positions=torch.full((20_000,), 7))
    z = chi_square_z(torch.bincount(sample(logits.expand(20_000, 10), metadata), minlength=10), logits.softmax(-1)[0])
    assert z < 5, f"20,000 seeds are {z:.1f} standard deviations from the distribution"


@pytest.mark.parametrize(("vocab_size", "part"), [(13, 1), (96, 32), (640, 64)])
def test_parts_are_as_likely_as_their_tokens(vocab_size, part):
    """Many tokens, the first part of them impossible and the second full of unlikely ones: all come as often as they should."""
    logits = random_logits(3, 1, vocab_size, scale=1.0)
    logits[:, :part], logits[:, part : 2 * part] = NEVER, logits[:, part : 2 * part] - 6
    num_draws = 40_000
    tokens = sampler.draw(logits.expand(num_draws, -1), seed_keys(torch.full((num_draws,), 5)), torch.arange(num_draws))
    z = chi_square_z(torch.bincount(tokens, minlength=vocab_size), logits.softmax(-1)[0])
    assert z < 5, f"draws from {vocab_size} tokens are {z:.1f} standard deviations from the distribution"


def exponential_noise(seeds, positions, num_ids):
    return noise_of(at_position(seed_keys(seeds), positions), torch.arange(num_ids, dtype=torch.int32))


def check_pairs(name, first, second):
    """Two columns of noise fill an 8 x 8 table of their quantiles evenly: they have nothing to do with each other."""
    cells = (torch.exp(-first) * 8).long().clamp(max=7) * 8 + (torch.exp(-second) * 8).long().clamp(max=7)
    z = chi_square_z(torch.bincount(cells.flatten(), minlength=64), torch.full((64,), 1 / 64))
    assert z < 5, f"noise of {name} is related: {z:.1f} standard deviations from independence"


@pytest.mark.parametrize("distance", [1, 2, 3, 16, 256, 2**15, 2**31, 2**32, 2**33])
def test_noise_of_neighbors_is_independent(distance):
    """The noise of two seeds, positions or tokens at any distance, and of a seed's next position, is unrelated."""
    base = torch.arange(400) * 7919
    zero, rows = torch.zeros(400, dtype=torch.long), 50
    noise = exponential_noise(base, zero, rows)
    check_pairs(f"seeds {distance} apart", noise, exponential_noise(base + distance, zero, rows))
    check_pairs(f"positions {distance} apart", noise, exponential_noise(base, zero + distance % 2**31 + 1, rows))
    check_pairs(f"seed and position {distance} apart", noise, exponential_noise(base + distance, zero + distance % 2**31, rows))
    step = 1 + distance % 40
    check_pairs(f"tokens {step} apart", noise[:, :-step], noise[:, step:])


def test_noise_is_exponential_also_where_it_is_small():
    """A share v of all noise lies below -log(1 - v), for v from a half down to 2**-18: winners are found down there."""
    noise = exponential_noise(torch.arange(64), torch.arange(64), 50_000)
    for power in range(1, 19):
        share, wanted = int((noise < -math.log1p(-(2.0**-power))).sum()), noise.numel() * 2.0**-power
        deviation = abs(share - wanted) / math.sqrt(wanted)
        assert deviation < 5, f"{share} of {noise.numel()} lie below the 2**-{power} quantile, not {wanted:.0f}"
    assert torch.isfinite(noise).all() and (noise > 0).all(), "noise is 0 or infinite"


def slow_noise(seed, position, token):
    """The hash in plain Python integers."""
    def scramble(x):
        x = (x ^ (x >> 16)) * 0x21F0AAAD % 2**32
        x = (x ^ (x >> 15)) * 0x735A2D97 % 2**32
        return x ^ (x >> 15)

    low, high = seed % 2**32, (seed % 2**64) >> 32
    odd, offset = (scramble(scramble(scramble(low ^ start) ^ high) ^ position) for start in (0x9E3779B9, 0x7F4A7C15))
    return -math.log1p(-(scramble((token * (odd | 1) + offset) % 2**32) % 2**31 + 0.5) / 2**31)


@given(seed=st.integers(-(2**63), 2**63 - 1), position=st.integers(0, 2**31), vocab_size=st.integers(1, 200_000))
def test_t40_noise_is_the_published_hash_bit_for_bit(seed, position, vocab_size):
    """Seed, position and token id, 64, 32 and 18 bits of them, make the noise that plain integers make."""
    token = vocab_size - 1
    noise = float(exponential_noise(torch.tensor([seed]), torch.tensor([position]), vocab_size)[0, token])
    wanted = min(slow_noise(seed, position, token), -math.log(2.0**-24))
    # 1 - v has 24 bits: at the smallest v that is taken from a logarithm, 2**-10, that is 3e-5 of the noise.
    assert math.isclose(noise, wanted, rel_tol=1e-3 if wanted > 1 else 4e-5), f"noise is {noise}, plain integers give {wanted}"


@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([7, 97, 128, 640, 1000]), st.booleans())
def test_the_plain_sampler_chooses_what_the_whole_one_chooses(seed, num_rows, vocab_size, has_ties):
    """For rows of nothing but a temperature the form for compilers gives the same tokens, in ties the first one when greedy."""
    rng = random.Random(seed)
    logits = random_logits(seed, num_rows, vocab_size)
    logits = logits.round() if has_ties else logits
    rows = [RowParams(SamplingParams(temperature=rng.choice([0, 0.05, 0.7, 1.0, 2.0])), rng.randrange(2**40), rng.randrange(999))
            for _ in range(num_rows)]
    metadata = SamplingMetadata.from_requests(rows, vocab_size)
    assert not any(wishes_of(row.params) for row in rows)
    plain = sampler.sample_plain(logits, metadata.temperature, sampler.seed_keys(metadata.seeds), metadata.positions)
    assert plain.tolist() == sample(logits, metadata).tolist()


@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([7, 97, 128, 640, 1000]), st.booleans())
def test_few_candidates_are_drawn_from_as_all_tokens_are(seed, num_rows, vocab_size, has_ties):
    """Where every row has a top_k, looking at its largest logits alone gives the same tokens; ties beyond them are seen in time."""
    generator, logits = random.Random(seed), random_logits(seed, num_rows, vocab_size)
    logits = logits.round() if has_ties else logits
    rows = [RowParams(SamplingParams(temperature=generator.choice([0.0, 0.7, 2.0]), top_k=generator.choice([1, 2, 5, 20]),
                                     top_p=generator.choice([1.0, 0.5, 0.9]), min_p=generator.choice([0.0, 0.1])),
                      generator.getrandbits(40), generator.randrange(1000)) for _ in range(num_rows)]
    metadata = SamplingMetadata.from_requests(rows, vocab_size)
    tokens = sample(logits, metadata)
    with mock.patch.object(sampler, "candidates", return_value=None):
        assert sample(logits, metadata).tolist() == tokens.tolist(), f"others of all tokens than of few: {rows}"


def test_candidates_are_found_only_where_nothing_else_can_be_drawn():
    """Not where a row has no top_k, nor where a logit that was left out ties with the k-th; greedy rows do not matter."""
    logits = torch.tensor([[5.0, 1, 4, 3, 0, 0, 0, 0], [0, 1, 2, 2, 2, 2, 2, 2]])
    cases = [([{"top_k": 2}, {"temperature": 0}], True), ([{"top_k": 2}, {"top_k": 2}], False), ([{}, {"temperature": 0}], False),
             ([{"top_k": 2, "top_p": 0.9}, {"temperature": 0, "top_p": 0.5}], True), ([{"temperature": 0}, {"top_k": 6}], True)]
    for asked, found in cases:
        few = sampler.candidates(logits, metadata_of([SamplingParams(**one) for one in asked], 8))
        assert (few is not None) == found, f"candidates for {asked}"
    values, ids = sampler.candidates(logits[:1], metadata_of(SamplingParams(top_k=2), 8))
    assert (values.tolist(), ids.tolist()) == ([[5, 4, 3]], [[0, 2, 3]])


@pytest.mark.parametrize("field", [
    {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1.1}, {"presence_penalty": 1}, {"frequency_penalty": -1},
    {"logit_bias": {3: 1.0}}, {"allowed_token_ids": [1]}, {"bad_words": ["x"]}, {"min_tokens": 2}, {"temperature": 0.01}])
def test_whatever_else_is_asked_for_is_not_plain(field):
    """Every parameter that changes logits or cuts them off, and a tiny temperature, takes a request off the plain path."""
    assert not wishes_of(SamplingParams(temperature=0.7, max_tokens=9))
    assert not wishes_of(SamplingParams(temperature=0, top_k=3, max_tokens=9)), "a greedy request cuts nothing off"
    assert "more than a temperature" in wishes_of(SamplingParams(**{"temperature": 0.7, "max_tokens": 9, **field}))


# Alone or in a batch


def check_alone_or_batched(seed, num_rows, vocab_size):
    """A row's token is the same alone, in a batch, and in the batch turned round."""
    generator = random.Random(seed)
    rows = [random_row(generator, vocab_size) for _ in range(num_rows)]
    logits = random_logits(seed, num_rows, vocab_size)
    if generator.random() < 0.5:
        logits = logits.bfloat16().float()  # as a model in bfloat16 has them: full of ties
    together = sample(logits, SamplingMetadata.from_requests(rows, vocab_size)).tolist()
    turned = sample(logits.flip(0), SamplingMetadata.from_requests(rows[::-1], vocab_size)).tolist()[::-1]
    for index, row in enumerate(rows):
        alone = int(sample(logits[index : index + 1], SamplingMetadata.from_requests([row], vocab_size)))
        assert alone == together[index], f"row {index} gives {alone} alone and {together[index]} among {num_rows}, for {row}"
        assert alone == turned[index], f"row {index} gives {alone} alone and {turned[index]} in the batch turned round, for {row}"


@given(seed=seeds_strategy, num_rows=st.integers(1, 9), vocab_size=st.integers(3, 60))
def test_t40_alone_or_in_any_batch_the_token_is_the_same(seed, num_rows, vocab_size):
    """Whatever the neighbors ask for, a row's token is the one it would get alone, bit for bit."""
    check_alone_or_batched(seed, num_rows, vocab_size)


@pytest.mark.parametrize("vocab_size", [3_000, 151_936])
def test_t40_the_same_token_in_a_large_vocabulary(vocab_size):
    """In a real vocabulary too, where rows are taken in turns and sums are long."""
    check_alone_or_batched(vocab_size, 6, vocab_size)


def test_t40_a_seed_repeats_itself_and_another_does_not():
    """The same seed gives the same 64 tokens twice; its neighbor gives others; so does the next position."""
    logits = torch.zeros(1, 1000).expand(64, 1000)
    runs = {seed: sample(logits, repeat(metadata_of(SamplingParams(), 1000, seed=seed), 64)).tolist() for seed in (5, 6)}
    again = sample(logits, repeat(metadata_of(SamplingParams(), 1000, seed=5), 64)).tolist()
    assert runs[5] == again, "the same seed gave other tokens"
    same = sum(a == b for a, b in zip(runs[5], runs[6]))
    assert same <= 3, f"seeds 5 and 6 agree on {same} of 64 tokens"
    assert len(set(again)) > 50, f"64 positions gave only {len(set(again))} different tokens"


# What is known of a step


def test_greedy_rows_switch_nothing_on():
    """A batch of greedy rows costs an argmax, and a greedy row in a mixed batch orders no logits for others."""
    greedy = SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.5)
    alone = metadata_of([greedy, greedy], 100)
    assert alone.all_greedy and not (alone.has_top_k or alone.has_top_p or alone.has_min_p), f"two greedy rows: {alone}"
    mixed = metadata_of([greedy, SamplingParams(top_k=20, top_p=0.8)], 100)
    widths = mixed.top_k_width, mixed.top_p_width
    assert widths == (32, 32), f"{widths} logits are ordered, not 32"


def test_history_is_copied_only_if_someone_looks_back():
    """Without penalties and bad words of several tokens no history goes to the device."""
    row = {"position": 4, "token_ids": [1, 2, 3, 4]}
    assert metadata_of(SamplingParams(), 9, **row).token_ids.shape == (1, 0), "a plain row carries its history"
    assert not metadata_of(SamplingParams(), 9, bad_words_token_ids=[[3]], **row).needs_history, "one banned token looks back"
    metadata = metadata_of(SamplingParams(presence_penalty=1), 9, **row)
    assert metadata.needs_history and metadata.token_ids.tolist() == [[1, 2, 3, 4]], f"history is {metadata.token_ids.tolist()}"


@given(seed=seeds_strategy, num_rows=st.integers(1, 4))
def test_advancing_is_the_same_as_building_anew(seed, num_rows):
    """Replacing positions and history gives what a metadata built for the next token gives."""
    generator = random.Random(seed)
    rows = [random_row(generator, 20) for _ in range(num_rows)]
    grown = [replace(row, token_ids=[*row.token_ids, 3], position=row.position + 1) for row in rows]
    fresh = SamplingMetadata.from_requests(grown, 20)
    moved = SamplingMetadata.from_requests(rows, 20)
    moved = moved.advance(moved.positions + 1, fresh.token_ids if moved.needs_history else None)
    logits = random_logits(seed, num_rows, 20)
    assert torch.equal(sample(logits, moved), sample(logits, fresh)), f"advanced rows give other tokens: {rows}"


# Logprobs


@given(seed=seeds_strategy, num_rows=st.integers(1, 4), vocab_size=st.integers(1, 30), num=st.integers(-1, 8))
def test_logprobs_and_ranks_are_those_of_the_raw_logits(seed, num_rows, vocab_size, num):
    """The chosen token comes first, then the most likely in order; a rank counts the tokens that are strictly more likely."""
    generator = random.Random(seed)
    logits = random_logits(seed, num_rows, vocab_size).round()  # ties
    chosen = [generator.randrange(vocab_size) for _ in range(num_rows)]
    dicts = to_dicts(compute_logprobs(logits.double(), torch.tensor(chosen), num))
    for row, (entries, token) in enumerate(zip(dicts, chosen)):
        exact = logits[row].double().log_softmax(-1).tolist()
        k = vocab_size if num == -1 else min(num, vocab_size)
        assert next(iter(entries)) == token, f"row {row} starts with {next(iter(entries))}, not with the chosen {token}"
        assert len(entries) in {max(k, 1), k + 1}, f"row {row} has {len(entries)} entries for logprobs={num}"
        best = sorted(exact, reverse=True)[:k]
        shown = sorted((entry.logprob for key, entry in entries.items()), reverse=True)[:k]
        assert shown == pytest.approx(best, abs=1e-5), f"row {row} shows {shown}, the best are {best}"
        for key, entry in entries.items():
            rank = 1 + sum(round(other, 9) > round(exact[key], 9) for other in exact)
            assert entry.logprob == pytest.approx(exact[key], abs=1e-5), f"row {row}, token {key}: {entry}, not {exact[key]}"
            assert entry.rank == rank, f"row {row}, token {key}: rank {entry.rank}, but {rank - 1} tokens are likelier"


def test_each_row_gets_as_many_logprobs_as_it_asked_for():
    """Rows that ask for 0, 2 and all logprobs share one computation and get 1, up to 3, and all."""
    tensors = compute_logprobs(random_logits(0, 3, 10), torch.tensor([9, 9, 9]), -1)
    sizes = [len(entries) for entries in to_dicts(tensors, [0, 2, -1])]
    assert sizes[0] == 1 and sizes[1] in (2, 3) and sizes[2] == 10, f"rows got {sizes} entries"


@given(seed=seeds_strategy, num_tokens=st.integers(0, 20), chunk=st.integers(1, 8))
def test_prompt_logprobs_come_in_chunks(seed, num_tokens, chunk):
    """However long the prompt, logits of at most a chunk of it exist at once, and the result is that of the whole."""
    hidden, head = random_logits(seed, num_tokens, 6).double(), random_logits(seed + 1, 6, 15).double()  # sums in any order agree
    token_ids = torch.arange(num_tokens) % 15
    sizes = []

    def compute_logits(states):
        sizes.append(states.shape[0])
        return states @ head

    got = list(prompt_logprobs(hidden, token_ids, compute_logits, 3, chunk))
    assert max(sizes, default=0) <= chunk, f"{max(sizes)} rows of logits at once, the chunk is {chunk}"
    whole = to_dicts(compute_logprobs(hidden @ head, token_ids, 3)) if num_tokens else []
    assert len(got) == num_tokens, f"{len(got)} entries for {num_tokens} tokens"
    for index, (mine, wanted) in enumerate(zip(got, whole)):
        assert mine.keys() == wanted.keys(), f"token {index} shows {list(mine)}, computed at once {list(wanted)}"
        assert all(mine[key].logprob == pytest.approx(wanted[key].logprob, abs=5e-5) for key in mine), f"token {index} differs"


# These checks can fail


def top_p_without_the_crossing_token(logits, p, width=None):
    ordered = logits.sort(dim=-1, descending=True).values
    is_kept = ordered.softmax(-1).cumsum(-1) <= p[:, None]
    is_kept[:, 0] = True
    return logits.masked_fill(logits < ordered.masked_fill(~is_kept, math.inf).amin(-1, keepdim=True), NEVER)


def top_k_one_too_many(logits, k, width=None):
    return TRUE["top_k"](logits, (k + 1).clamp(max=logits.shape[-1]))


def penalty_twice(logits, seen, penalty):
    return TRUE["repetition_penalty"](TRUE["repetition_penalty"](logits, seen, penalty), seen, penalty)


def penalty_divides_always(logits, seen, penalty):
    return torch.where(seen, logits / penalty[:, None], logits)


def keys_without_position(keys, positions):
    return TRUE["at_position"](keys, torch.zeros_like(positions))


def keys_by_row(seeds):
    return TRUE["seed_keys"](seeds + torch.arange(len(seeds)))


def uniform_noise(keys, ids):
    return TRUE["noise_of"](keys, ids).neg().exp()


def parts_of_equal_weight(logits):
    return torch.full_like(TRUE["token_weights"](logits), 2**40)


def luck_of_parts_alone(logits, keys, ids, luck):
    return TRUE["race"](logits, keys, ids, luck if ids.ndim == 1 else 0)


def temperature_multiplies(logits, temperature):
    return logits * temperature[:, None]


TRUE = {name: getattr(sampler, name) for name in ("top_k", "repetition_penalty", "seed_keys", "at_position", "noise_of",
                                                  "token_weights", "race")}
PLANTED = [
    ("top_p", top_p_without_the_crossing_token), ("top_k", top_k_one_too_many), ("repetition_penalty", penalty_twice),
    ("repetition_penalty", penalty_divides_always), ("at_position", keys_without_position), ("seed_keys", keys_by_row),
    ("noise_of", uniform_noise), ("token_weights", parts_of_equal_weight), ("race", luck_of_parts_alone),
    ("apply_temperature", temperature_multiplies),
]


def check_everything():
    check_warp(4, 3, 20, SamplingParams(temperature=0.7, top_k=3))
    check_warp(4, 3, 20, SamplingParams(temperature=0.7, top_k=8, top_p=0.8))
    check_draws(SamplingParams())
    for seed in range(10):
        check_processed(seed, 4, 20)
        check_alone_or_batched(seed, 4, 20)


@pytest.mark.parametrize(("name", "mistake"), PLANTED, ids=[mistake.__name__ for _, mistake in PLANTED])
def test_a_planted_mistake_is_caught(monkeypatch, name, mistake):
    """The checks hold for the sampler as it is, and fail for each of these wrong versions of one of its functions."""
    check_everything()
    monkeypatch.setattr(sampler, name, mistake)
    with pytest.raises(AssertionError):
        check_everything()


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [50, 151_936])
def test_t40_a_gpu_gives_the_same_tokens_without_waiting(vocab_size):
    """A GPU draws what the CPU draws, rows do not depend on their batch, and the host is never made to wait."""
    generator = random.Random(vocab_size)
    rows = [random_row(generator, vocab_size) for _ in range(9)]
    logits = random_logits(1, 9, vocab_size).cuda()
    metadata = SamplingMetadata.from_requests(rows, vocab_size, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens = sample(logits, metadata)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    alone = [int(sample(logits[index : index + 1], SamplingMetadata.from_requests([row], vocab_size, "cuda")))
             for index, row in enumerate(rows)]
    on_cpu = sample(logits.cpu(), SamplingMetadata.from_requests(rows, vocab_size))
    assert alone == tokens.tolist(), f"alone {alone}, together {tokens.tolist()}"
    assert on_cpu.tolist() == tokens.tolist(), f"the CPU draws {on_cpu.tolist()}, the GPU {tokens.tolist()}"
