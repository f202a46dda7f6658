"""The block masks of decodes and prompts say what the block tables say; the kernels are tested on a GPU (test_gpu_graphs.py)."""

from __future__ import annotations

import functools
import tempfile

import numpy as np
import pytest
import torch
from depth import examples
from flex_double import flex_on_cpu, seen_slots  # noqa: F401 - a fixture
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import greedy, prompts_of, tokens_of
from tiny_models import random_qwen2

from minivllm import LLM, SamplingParams
from minivllm.flex_attention import QUERY_TILE, cut_into_tiles, decode_metadata, ends, prefill_metadata


def deal_blocks(seed: int, num_requests: int, num_blocks: int) -> list[list[int]]:
    """A table of `num_blocks` scattered blocks for each request; nobody has the null block."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randperm(num_requests * num_blocks, generator=generator) + 1).view(num_requests, num_blocks).tolist()


def slots_of(table: list[int], num_positions: int, block_size: int) -> set[int]:
    return {table[p // block_size] * block_size + p % block_size for p in range(num_positions)}


def visible(positions: list[int], tables: list[list[int]], block_size: int) -> list[set[int]]:
    """Which slots a decode at each of these positions sees."""
    num_slots = (max(max(table) for table in tables) + 1) * block_size
    table = torch.tensor(tables, dtype=torch.int32)
    last = ends(torch.tensor(positions, dtype=torch.int32), table, block_size)
    mask = decode_metadata(last, table, block_size, num_slots, group=7).block_mask
    query = torch.zeros(1, dtype=torch.int32)
    return [set(seen_slots(mask, row, 0, query, num_slots)[0].nonzero()[:, 0].tolist()) for row in range(len(positions))]


@settings(max_examples=examples(60))
@given(st.integers(0, 9999), st.integers(1, 4), st.sampled_from([2, 16]), st.integers(1, 3))
def test_a_decode_sees_its_own_positions_and_nothing_else(seed, num_requests, block_size, num_blocks):
    """Each request sees exactly the slots of positions 0 to its own, wherever its blocks lie."""
    tables = deal_blocks(seed, num_requests, num_blocks)
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(num_blocks * block_size, (num_requests,), generator=generator).tolist()
    for row, seen in enumerate(visible(positions, tables, block_size)):
        expected = slots_of(tables[row], positions[row] + 1, block_size)
        assert seen == expected, f"request {row} at position {positions[row]} sees {sorted(seen)}, not {sorted(expected)}"


def test_t23_a_padded_row_reads_the_null_block():
    """Position 0 and a table of null blocks, as padding has them, read slot 0 alone."""
    assert visible([0, 17], [[0, 0], [1, 2]], 16)[0] == {0}


chunks = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 90)), min_size=1, max_size=4)


@settings(max_examples=examples(40))
@given(chunks, st.sampled_from([16, 64, 256]), st.integers(0, 99))
def test_a_prompts_token_sees_what_lies_before_it(chunks, block_size, seed):
    """Each token of a chunk behind `computed` positions sees its request's slots up to its own, and each stands in a tile."""
    query_lens, computed = np.array([q for q, _ in chunks]), np.array([c for _, c in chunks])
    num_blocks = int((query_lens + computed).max() - 1) // block_size + 1
    tables = deal_blocks(seed, len(chunks), num_blocks)
    block_index = torch.zeros(len(chunks) * num_blocks + 1, dtype=torch.int32)
    for table in tables:
        block_index[torch.tensor(table)] = torch.arange(num_blocks, dtype=torch.int32)
    tiles = cut_into_tiles(np.arange(len(chunks)), query_lens, query_lens + computed)
    metadata = prefill_metadata(torch.from_numpy(tiles.arrays), torch.tensor(tables, dtype=torch.int32), block_index, block_size)
    assert len(metadata.tile_rows) >= 2 * QUERY_TILE, "one tile alone would be compiled anew"
    assert torch.equal(metadata.tile_rows[tiles.token_rows], torch.arange(query_lens.sum())), "a token is not in its tile"
    token, num_slots = 0, len(block_index) * block_size
    for request, (count, start) in enumerate(chunks):
        for index in range(0, count, 37):  # some tokens of each
            row = int(tiles.token_rows[token + index])
            query = torch.tensor([row], dtype=torch.int32)
            seen = set(seen_slots(metadata.block_mask, 0, row // QUERY_TILE, query, num_slots)[0].nonzero()[:, 0].tolist())
            expected = slots_of(tables[request], start + index + 1, block_size)
            assert seen == expected, f"token {index} of request {request} behind {start}: {len(seen)} slots, not {len(expected)}"
        token += count


@functools.lru_cache(maxsize=1)
def folder() -> str:
    """14 query heads on 2 KV heads: a group of 7, as in Qwen2.5-0.5B."""
    return str(random_qwen2(tempfile.mkdtemp(), 5, dtype=torch.float32, layers=2, hidden=56, heads=14, kv_heads=2, vocab=97,
                            initializer_range=0.2)[1])


@pytest.mark.parametrize("knobs", [
    {}, {"async_scheduling": True}, {"num_blocks": 26, "max_num_batched_tokens": 48, "max_num_seqs": 6, "async_scheduling": True},
    {"block_size": 64, "max_num_batched_tokens": 200}])
def test_the_engine_around_the_kernels_gives_the_readable_rungs_tokens(knobs, flex_on_cpu):  # noqa: F811
    """Buckets, tiles, rows on the device and prefix hits, with a stand-in for the kernels: the same tokens, greedy and sampled."""
    prompts = prompts_of(30, 9, 144, 5, 60, 1, 129)
    knobs = {"max_model_len": 256, "block_size": 16, "num_blocks": 80, "max_num_seqs": 20, "dtype": "float32", **knobs}
    sampled = SamplingParams(temperature=0.8, seed=3, max_tokens=8, ignore_eos=True, logprobs=2, repetition_penalty=1.2)
    outputs = []
    for backend in ("flex_attention", "paged_gather"):
        llm = LLM(folder(), skip_tokenizer_init=True, attention_backend=backend, **knobs)
        outputs.append([tokens_of(llm.generate(prompts, params, use_tqdm=False)) for params in (greedy(12), sampled, greedy(3))])
        assert llm.engine.kv_cache_manager.usage == 0
    assert outputs[0] == outputs[1]
