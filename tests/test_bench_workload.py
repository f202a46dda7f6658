"""The bench's workloads: a function of the seed, in the lengths that were asked for."""

from __future__ import annotations

import argparse
import random

import pytest
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm import cost
from minivllm.bench.cost_floor import least_bytes
from minivllm.bench.shapes import SHAPES, write_shape
from minivllm.bench.workload import (
    BenchRequest,
    Source,
    add_workload_flags,
    prefix_repetition_requests,
    preset,
    random_requests,
    requests_from_flags,
)
from minivllm.config import ModelConfig

IDS = range(1000)
LENGTHS = st.integers(1, 60)


def lengths(requests: list[BenchRequest]) -> list[tuple[int, int]]:
    return [(len(one.prompt_token_ids), one.max_tokens) for one in requests]


@settings(max_examples=examples(50))
@given(st.integers(0, 10), st.integers(1, 20), LENGTHS, LENGTHS, st.floats(0, 0.99), st.integers(0, 9))
def test_a_seed_is_a_workload(seed, num_prompts, input_len, output_len, ratio, prefix_len):
    """The same seed gives the same ids, every length lies in mean * (1 +- ratio), and the prefix is everybody's."""
    first, again = (random_requests(Source.of(seed, IDS), num_prompts, input_len, output_len, ratio, prefix_len)
                    for _ in range(2))
    assert first == again, f"seed {seed} gave two workloads"
    assert len(first) == num_prompts, f"{len(first)} requests, asked for {num_prompts}"
    for num_inner, num_out in ((inputs - prefix_len, out) for inputs, out in lengths(first)):
        assert input_len * (1 - ratio) - 1 < num_inner < input_len * (1 + ratio) + 1, f"{num_inner} tokens around {input_len}"
        assert max(1, output_len * (1 - ratio) - 1) <= num_out < output_len * (1 + ratio) + 1, f"{num_out} around {output_len}"
    prefixes = {tuple(one.prompt_token_ids[:prefix_len]) for one in first}
    assert len(prefixes) == 1, f"{len(prefixes)} different prefixes of {prefix_len} tokens"


def test_another_seed_is_another_workload():
    """Two seeds share no prompt."""
    first, other = ({tuple(one.prompt_token_ids) for one in random_requests(Source.of(seed, IDS), 20, 8, 4)} for seed in (0, 1))
    assert len(first) == len(other) == 20, "prompts of one seed differ among themselves"
    assert not first & other, f"seeds 0 and 1 share {len(first & other)} prompts"


def test_another_run_asks_for_the_same_lengths_in_other_words():
    """The run's id changes every prompt and no length, so that a second run meets a prefix cache with nothing of its own."""
    first, other = (random_requests(Source.of(0, IDS, run_id), 20, 8, 4, 0.5) for run_id in ("a", "b"))
    assert lengths(first) == lengths(other), "two runs of one seed ask for different lengths"
    assert not {tuple(one.prompt_token_ids) for one in first} & {tuple(one.prompt_token_ids) for one in other}


def test_lengths_reach_both_ends_of_their_range():
    """4 * (1 +- 0.5) means 2, 3, 4, 5 and 6, all of them."""
    drawn = {len(one.prompt_token_ids) for one in random_requests(Source.of(0, IDS), 200, 4, 4, 0.5)}
    assert drawn == {2, 3, 4, 5, 6}, f"drawn: {sorted(drawn)}"


def test_prefixes_repeat():
    """Each of 3 prefixes begins 4 prompts (14 // 3), which differ behind it, and arrivals mix them."""
    requests = prefix_repetition_requests(Source.of(0, IDS), 14, 16, 8, 3, 5)
    assert lengths(requests) == [(24, 5)] * 12, f"lengths: {lengths(requests)}"
    prefixes = [tuple(one.prompt_token_ids[:16]) for one in requests]
    assert sorted(prefixes.count(one) for one in set(prefixes)) == [4, 4, 4], "each prefix begins 4 prompts"
    assert len({tuple(one.prompt_token_ids) for one in requests}) == 12, "no two prompts are equal"
    assert prefixes != sorted(prefixes, key=prefixes.index), "arrivals mix the prefixes"


def test_preset_b_is_nano_vllms_bench():
    """Seed 0 gives the 133,966 output tokens that nano-vllm's README reports for its benchmark."""
    made = preset("B", random.Random(0), 151_936)
    assert made.num_output_tokens == 133_966, f"{made.num_output_tokens:,} output tokens"
    assert all(100 <= number <= 1024 for pair in lengths(made.requests) for number in pair), "lengths lie in 100 to 1,024"
    assert (len(made.requests), made.temperature) == (256, 0.6)


@pytest.mark.parametrize(("name", "num_prompts", "output_len", "temperature"), [("A", 25, 128, 1.0), ("C", 1, 256, 0.0)])
def test_presets_are_those_of_the_ledger(name, num_prompts, output_len, temperature):
    """A is 25 x 64 -> 128 at temperature 1, C one greedy prompt of 64 -> 256; ids stay inside a small vocabulary."""
    made = preset(name, random.Random(0), 50)
    assert lengths(made.requests) == [(64, output_len)] * num_prompts and made.temperature == temperature
    assert all(token_id < 50 for one in made.requests for token_id in one.prompt_token_ids), "an id lies beyond the vocabulary"


def test_flags_become_requests():
    """--input-len is --random-input-len, and prefix_repetition has lengths of its own."""
    parser = argparse.ArgumentParser()
    add_workload_flags(parser)
    args = parser.parse_args("--num-prompts 3 --input-len 5 --random-output-len 7".split())
    assert lengths(requests_from_flags(args, Source.of(0, IDS))) == [(5, 7)] * 3
    flags = "--dataset-name prefix_repetition --num-prompts 4 --prefix-repetition-num-prefixes 2 --output-len 9"
    args = parser.parse_args(f"{flags} --prefix-repetition-prefix-len 6 --prefix-repetition-suffix-len 2".split())
    assert lengths(requests_from_flags(args, Source.of(0, IDS))) == [(8, 9)] * 4


@pytest.mark.parametrize(("name", "num_parameters"), [
    ("qwen2.5-0.5b", 494_032_768), ("qwen2.5-1.5b", 1_543_714_304), ("qwen2.5-7b", 7_615_616_512)])
def test_shapes_are_the_published_models(tmp_path, name, num_parameters):
    """Each shape has as many parameters as its model card says."""
    config = ModelConfig.from_folder(write_shape(name, tmp_path))
    assert cost.num_parameters(config) == num_parameters, f"{name}: {cost.num_parameters(config):,} parameters"


def test_every_shape_is_a_config_that_transformers_reads_alike(tmp_path):
    """transformers reads the written config.json as minivllm does."""
    from transformers import AutoConfig

    for name in SHAPES:
        folder = write_shape(name, tmp_path)
        ours, theirs = ModelConfig.from_folder(folder), AutoConfig.from_pretrained(folder)
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps"):
            assert getattr(ours, field) == getattr(theirs, field), f"{name}: {field}"
        assert theirs.rope_parameters["rope_theta"] == ours.rope_theta, f"{name}: rope_theta"


def test_the_floor_reads_the_weights_once_a_step(tmp_path):
    """Two requests that run side by side share every read of the weights; one after the other, nobody does."""
    config = ModelConfig.from_folder(write_shape("tiny-cpu", tmp_path))
    requests = [BenchRequest([1, 2, 3], 2), BenchRequest([4], 1)]
    steps = [([3, 1], [3, 1]), ([1], [4])]
    alone = [([3], [3]), ([1], [4]), ([1], [1])]
    for max_num_seqs, wanted in ((2, steps), (1, alone)):
        by_hand = sum(cost.bytes_moved(config, queries, contexts, 4) for queries, contexts in wanted)
        moved = least_bytes(config, requests, 4, max_num_seqs)
        assert moved == by_hand, f"{max_num_seqs} at once: {moved:,} bytes, {by_hand:,} by hand"
