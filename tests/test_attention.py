"""Paged attention against lesson 1's plain function, one request at a time: tables, chunks, garbage, order change nothing."""

from __future__ import annotations

import functools
import random
import tempfile
from dataclasses import dataclass

import pytest
import torch
from depth import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import ids, load_ours, our_logits, random_qwen2, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minivllm import attention as paged
from minivllm.attention import (
    AttentionMetadata,
    PagedAttention,
    allocate_kv_cache,
    by_block,
    context_slots,
    gather_kv,
    group_by_length,
    slot_mapping,
    zero_blocks,
)
from minivllm.generate import GenerationStats, paged_caches, paged_step
from minivllm.model import attention as plain_attention

NAN = float("nan")
MIXED = [(1, 9), (1, 1), (1, 16), (5, 5), (3, 11), (1, 4), (8, 8)]  # query tokens, context: decodes, a prompt, a later chunk


@dataclass
class World:
    """A few requests over one layer: their queries and contexts in logical order, and the same contexts in scattered blocks."""

    requests: list[tuple[Tensor, Tensor, Tensor]]  # q (Tq, H, D), k and v (S, K, D)
    cache: PagedAttention
    tables: list[list[int]]

    def metadata(self) -> AttentionMetadata:
        query_lens, seq_lens = [len(q) for q, _, _ in self.requests], [len(k) for _, k, _ in self.requests]
        return AttentionMetadata.build(query_lens, seq_lens, self.tables, self.cache.block_size)

    def attend(self) -> list[Tensor]:
        """Each request's output, from one step that runs all of them."""
        output = self.cache.attend(torch.cat([q for q, _, _ in self.requests]), self.metadata())
        return list(output.split([len(q) for q, _, _ in self.requests]))

    def expected(self) -> list[Tensor]:
        """Each request's output, alone, in logical order, by the plain function."""
        return [alone(*request) for request in self.requests]


def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return plain_attention(q, k, v, mask).transpose(0, 1)


def one_layer(num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32,
              kind: type[PagedAttention] = PagedAttention) -> PagedAttention:
    return kind(allocate_kv_cache(1, num_blocks, block_size, kv_heads, head_dim, dtype)[0], block_size)


def make_world(lens: list[tuple[int, int]], block_size: int, seed: int = 0, heads: int = 4, kv_heads: int = 2,
               head_dim: int = 8, garbage: float = NAN, dtype: torch.dtype = torch.float64) -> World:
    """Requests of (query tokens, context) lens, their blocks dealt in random order from a pool that is full of `garbage`."""
    generator = torch.Generator().manual_seed(seed)
    needs = [-(-seq // block_size) for _, seq in lens]
    num_blocks = 1 + sum(needs) + 3
    pool = random.Random(seed).sample(range(1, num_blocks), num_blocks - 1)
    world = World([], one_layer(num_blocks, block_size, kv_heads, head_dim, dtype), [])
    world.cache.key_cache.fill_(garbage)
    world.cache.value_cache.fill_(garbage)
    for (num_queries, num_tokens), need in zip(lens, needs):
        q, k, v = (torch.randn(n, h, head_dim, generator=generator, dtype=dtype)
                   for n, h in ((num_queries, heads), (num_tokens, kv_heads), (num_tokens, kv_heads)))
        world.requests.append((q, k, v))
        world.tables.append([pool.pop() for _ in range(need)])
        slots = [world.tables[-1][p // block_size] * block_size + p % block_size for p in range(num_tokens)]
        world.cache.write(k, v, torch.tensor(slots))
    return world


def worst(results: list[Tensor], expected: list[Tensor]) -> tuple[int, float]:
    """The request that is furthest off, and by how much; NaN counts as infinitely far."""
    errors = [relative_error(result, oracle) for result, oracle in zip(results, expected, strict=True)]
    errors = [error if error == error else float("inf") for error in errors]
    return errors.index(max(errors)), max(errors)


lengths = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 20)).map(lambda t: (t[0], t[0] + t[1])), min_size=1, max_size=6)


# ---- Slots ----


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 5), st.integers(0, 9))
def test_a_token_lies_where_its_table_says(positions, block_size, seed):
    """A token's slot is its offset in the block that its request's table names for its position."""
    tables = [random.Random(seed + row).sample(range(1, 99), 41) for row in range(2)]
    rows = [i % 2 for i in range(len(positions))]
    slots = slot_mapping(torch.tensor(tables, dtype=torch.int32), torch.tensor(rows), torch.tensor(positions), block_size)
    for row, position, slot in zip(rows, positions, slots.tolist()):
        block, offset = tables[row][position // block_size], position % block_size
        assert slot == block * block_size + offset, (
            f"position {position} of request {row} is offset {offset} of block {block}, so slot "
            f"{block * block_size + offset} with {block_size} slots a block, not {slot}")
    assert slots.dtype == torch.int64, f"slots must be int64, not {slots.dtype}: half of a large pool is beyond int32"


def test_t23_a_padded_token_goes_to_the_null_block():
    """Padding has a slot in the null block, for any block size, and never -1, which would be the last slot of the pool."""
    table = torch.tensor([[3, 5]], dtype=torch.int32)
    for block_size in (1, 2, 16):
        rows, positions = torch.zeros(3, dtype=torch.int64), torch.tensor([-1, 1, -1])
        slots = slot_mapping(table, rows, positions, block_size).tolist()
        is_null = [0 <= slot < block_size for slot in slots]
        assert is_null == [True, False, True], f"padding, a token and padding got slots {slots} with blocks of {block_size}"


def zeroed(cache: PagedAttention) -> PagedAttention:
    """With every block zeroed, as if all had been handed out."""
    cache.kv_cache.zero_()
    return cache


def test_t23_a_negative_slot_is_refused():
    """Writing to slot -1 is an error and changes nothing."""
    cache = zeroed(one_layer(3, 2, 1, 4))
    with pytest.raises((IndexError, RuntimeError)):
        cache.write(torch.ones(1, 1, 4), torch.ones(1, 1, 4), torch.tensor([-1]))
    assert cache.key_cache.count_nonzero() == 0, "the refused token is in the cache"


def test_t23_padded_tokens_write_to_the_null_block_only():
    """After a step of padding alone, every block that a request may own is as before."""
    cache = zeroed(one_layer(4, 2, 1, 4))
    slots = slot_mapping(torch.tensor([[1, 2]]), torch.zeros(3, dtype=torch.int64), torch.full((3,), -1), 2)
    cache.write(torch.ones(3, 1, 4), torch.ones(3, 1, 4), slots)
    assert cache.key_cache[:, 2:].count_nonzero() == 0, "padding was written outside slots 0 and 1"


def test_t30_slots_of_a_large_pool_do_not_overflow():
    """Block 200,000,000 of 16 slots begins at slot 3,200,000,000, which 32 bits cannot hold."""
    table = torch.tensor([[200_000_000]], dtype=torch.int32)
    slot = slot_mapping(table, torch.tensor([0]), torch.tensor([5]), 16).item()
    assert slot == 3_200_000_005, f"slot {slot} instead of 3,200,000,005"


# ---- Reading ----


def test_t30_a_context_in_a_large_pool_does_not_overflow():
    """The slots of a context in block 200,000,000 of 16 slots begin at 3,200,000,000, which 32 bits cannot hold."""
    table, seq_lens = torch.tensor([[200_000_000]], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    slots = context_slots(table, seq_lens, 6, 16)
    assert slots.tolist() == [list(range(3_200_000_000, 3_200_000_006))], (
        f"context_slots of 6 positions in block 200,000,000 gives {slots.tolist()} instead of 3,200,000,000 to 3,200,000,005")
    assert slots.dtype == torch.int64, f"slots must be int64, not {slots.dtype}: half of a large pool is beyond int32"


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(1, 5), st.integers(0, 9))
def test_a_context_is_read_in_logical_order(seq_lens, block_size, seed):
    """Gathering through the table gives the tokens in the order of their positions, and never a slot that was not written."""
    world = make_world([(1, seq) for seq in seq_lens], block_size, seed)
    metadata = world.metadata()
    slots = context_slots(metadata.block_table, metadata.seq_lens, max(seq_lens) + 2, block_size)
    keys = gather_kv(world.cache.key_cache, slots)  # (K, B, S, D)
    for row, (_, k, _) in enumerate(world.requests):
        got = keys[:, row].transpose(0, 1)  # (S, K, D)
        wrong = [p for p in range(len(k)) if not torch.equal(got[p], k[p])]
        assert not wrong, f"request {row} reads other keys than its own at positions {wrong} of {len(k)}"
        assert not got.isnan().any(), f"request {row} has {len(k)} tokens, and slots nobody wrote were read past its end"


@given(lengths, st.integers(1, 5), st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.integers(0, 99))
@example([(1, 3000), (1, 3), (1, 1500), (1, 1400), (130, 300), (129, 129)], 16, (4, 2), 0)  # three gathers, several tiles
def test_a_mixed_step_equals_each_request_alone(lens, block_size, heads, seed):
    """Decodes, prompts and later chunks in one step each get what they get alone, with contiguous keys and values."""
    lens = sorted(lens, key=lambda pair: pair[0] > 1)
    world = make_world(lens, block_size, seed, *heads)
    row, error = worst(world.attend(), world.expected())
    assert error < 1e-12, f"request {row} (query tokens, context) = {lens[row]} is off by {error:.1e} in blocks of {block_size}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_other_types_agree_within_their_precision(dtype, tolerance):
    """The same holds in the types that engines run in."""
    world = make_world(MIXED, 4, dtype=dtype)
    row, error = worst(world.attend(), world.expected())
    assert error < tolerance, f"request {row} {MIXED[row]} is off by {error:.1e} in {dtype}"


@given(lengths, st.integers(1, 5), st.integers(0, 99))
def test_t24_what_nobody_wrote_may_be_nan(lens, block_size, seed):
    """NaN in the null block, in free blocks and past every request's end changes no output, not by a bit."""
    poisoned, clean = (make_world(lens, block_size, seed, garbage=garbage).attend() for garbage in (NAN, 0.0))
    for row, (one, other) in enumerate(zip(poisoned, clean)):
        assert torch.equal(one, other), f"request {row} {lens[row]} sees slots that nobody wrote, in blocks of {block_size}"


def test_t24_rows_of_padding_are_finite():
    """Rows of the query that belong to no request come back as zeros, whatever the pool holds."""
    world = make_world([(1, 3), (2, 2)], 4)
    q = torch.cat([q for q, _, _ in world.requests] + [torch.full((2, 4, 8), NAN)])
    output = world.cache.attend(q, world.metadata())
    assert output[3:].count_nonzero() == 0, f"two rows of padding came back as {output[3:].flatten()[:4].tolist()}"
    assert not output.isnan().any(), "a request's row is NaN beside rows of padding"


def test_t24_a_block_is_zeroed_when_it_is_handed_out():
    """Zeroing some blocks clears every slot of theirs, in keys and values, and no slot of any other."""
    cache = one_layer(6, 4, 2, 8)
    for tensor in (cache.key_cache, cache.value_cache):
        tensor.fill_(NAN)
    zero_blocks(by_block(cache.kv_cache[None], 4), torch.tensor([5, 2]))
    for tensor in (cache.key_cache, cache.value_cache):
        clean = [block for block in range(6) if not tensor[:, block * 4 : block * 4 + 4].isnan().any()]
        dirty = [block for block in range(6) if tensor[:, block * 4 : block * 4 + 4].isnan().all()]
        assert (clean, dirty) == ([2, 5], [0, 1, 3, 4]), f"zeroing blocks 5 and 2 left {clean} clean and {dirty} untouched"


@given(lengths, st.integers(1, 5), st.integers(0, 99))
def test_t27_physical_order_changes_nothing(lens, block_size, seed):
    """Any permutation of the blocks and of the requests in the batch gives the same outputs, permuted alike."""
    world = make_world(lens, block_size, seed)
    before = world.attend()
    rng = random.Random(seed)
    num_blocks = world.cache.key_cache.shape[1] // block_size
    moved = [0, *rng.sample(range(1, num_blocks), num_blocks - 1)]  # block b goes to moved[b]; the null block stays
    for tensor in (world.cache.key_cache, world.cache.value_cache):
        blocks = tensor.unflatten(1, (-1, block_size))
        blocks[:, moved] = blocks.clone()
    order = rng.sample(range(len(lens)), len(lens))
    world.tables = [[moved[block] for block in world.tables[row]] for row in order]
    world.requests = [world.requests[row] for row in order]
    row, error = worst(world.attend(), [before[row] for row in order])
    assert error < 1e-12, f"request {order[row]} {lens[order[row]]} is off by {error:.1e} after its blocks moved"


@pytest.mark.parametrize("num_queries", [1, 3])
def test_t28_a_context_may_end_anywhere_in_a_block(num_queries):
    """A context of any length, from one token to past its third block, gives what it gives without blocks."""
    for length in range(num_queries, 14):
        world = make_world([(num_queries, length), (1, 1)], 4)
        row, error = worst(world.attend(), world.expected())
        assert error < 1e-12, f"context of {length} in blocks of 4: request {row} is off by {error:.1e}"


def test_t29_writing_changes_the_cache_itself():
    """A write lands in the very memory that was there before, at its slot and nowhere else."""
    cache = zeroed(one_layer(4, 2, 2, 4))
    addresses = cache.key_cache.data_ptr(), cache.value_cache.data_ptr()
    k, v = torch.randn(3, 6, 4).split((2, 4), dim=1)[0], torch.randn(3, 2, 4)  # a slice of a fused projection, as in the model
    cache.write(k, v, torch.tensor([7, 2, 5]))
    assert (cache.key_cache.data_ptr(), cache.value_cache.data_ptr()) == addresses, "the cache moved: it was copied"
    for tensor, written in ((cache.key_cache, k), (cache.value_cache, v)):
        for token, slot in enumerate((7, 2, 5)):
            assert torch.equal(tensor[:, slot], written[token]), f"slot {slot} does not hold token {token}"
        assert tensor[:, [0, 1, 3, 4, 6]].count_nonzero() == 0, "a slot that no token was given to has changed"


def test_t30_fourteen_query_heads_share_two_kv_heads():
    """Query heads 0 to 6 read KV head 0 and 7 to 13 read KV head 1, in decodes and in chunks."""
    world = make_world(MIXED, 4, heads=14, kv_heads=2)
    output = world.attend()
    for row, (q, k, v) in enumerate(world.requests):
        for head in (0, 6, 7, 13):
            one = alone(q[:, head : head + 1], k[:, head // 7 : head // 7 + 1], v[:, head // 7 : head // 7 + 1])
            error = relative_error(output[row][:, head : head + 1], one)
            assert error < 1e-12, f"query head {head} of request {row} does not read KV head {head // 7}: off by {error:.1e}"


# ---- Whole models ----


@functools.cache
def small_model():
    _, folder = random_qwen2(tempfile.mkdtemp(), dtype=torch.float64)
    return load_ours(folder, torch.float64)


@torch.inference_mode()
def run_in_steps(steps: list[list[tuple[int, int]]], prompts: list[list[int]], tables: list[list[int]], block_size: int,
                 num_cached: int = 0) -> dict[int, int]:
    """Play steps of (request, tokens to compute); returns each request's next token after its last step.

    Requests after the first begin with `num_cached` positions that they find in blocks of the first.
    """
    caches = paged_caches(small_model(), 1 + max(max(table) for table in tables), block_size)
    for cache in caches:
        cache.key_cache.fill_(NAN)
        cache.value_cache.fill_(NAN)
    computed, result = [0] + [num_cached if table[0] == tables[0][0] else 0 for table in tables[1:]], {}
    for step in steps:
        rows = [row for row, _ in step]
        tokens = [prompts[row][: computed[row] + count] for row, count in step]
        next_ids = paged_step(small_model(), caches, tokens, [computed[row] for row in rows], [tables[row] for row in rows],
                              GenerationStats())
        for (row, count), token in zip(step, next_ids):
            computed[row] += count
            result[row] = token
    return result


def expected_next(prompt: list[int]) -> int:
    return int(our_logits(small_model(), torch.tensor(prompt))[-1].argmax())


chunk_lists = st.lists(st.integers(1, 7), min_size=1, max_size=5)


@settings(max_examples=examples(25))
@given(chunk_lists, chunk_lists, st.integers(1, 5))
def test_t25_a_prompt_in_chunks_equals_the_prompt(first_chunks, second_chunks, block_size):
    """Two prompts, each cut anywhere into chunks that share steps, end with the tokens that follow the whole prompts."""
    chunks = [first_chunks, second_chunks]
    prompts = [ids(row, sum(chunks[row])).tolist() for row in range(2)]
    tables = [list(range(1, 40)), list(range(80, 40, -1))]
    steps = [[(row, chunks[row][i]) for row in range(2) if i < len(chunks[row])] for i in range(max(map(len, chunks)))]
    result = run_in_steps(steps, prompts, tables, block_size)
    for row in range(2):
        want = expected_next(prompts[row])
        assert result[row] == want, f"a prompt in chunks of {chunks[row]} continues with {result[row]} instead of {want}"


def test_t26_a_prefix_hit_and_a_miss_share_a_step():
    """A request that begins in another one's blocks, and one that begins from nothing, get their own tokens in one step."""
    shared = ids(0, 8).tolist()
    prompts = [shared + ids(1, 3).tolist(), shared + ids(2, 5).tolist(), ids(3, 9).tolist()]
    tables = [[7, 2, 9], [7, 2, 4, 11], [5, 1, 3]]  # the first two blocks of request 1 are request 0's
    steps = [[(0, 11)], [(1, 5), (2, 9)]]
    for row, token in run_in_steps(steps, prompts, tables, block_size=4, num_cached=8).items():
        want = expected_next(prompts[row])
        assert token == want, f"request {row} continues with {token} instead of {want} when a hit and a miss share a step"


# ---- Work ----


class Watch(TorchDispatchMode):
    """Counts calls and remembers the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append(str(func))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_decodes_share_one_gather():
    """A step of 40 decodes runs exactly as many operations as a step of 2: nothing loops over requests."""
    calls = {}
    for num_requests in (2, 40):
        world = make_world([(1, 5 + row % 7) for row in range(num_requests)], 4)
        q, metadata = torch.cat([q for q, _, _ in world.requests]), world.metadata()
        with Watch() as watch:
            world.cache.attend(q, metadata)
        calls[num_requests] = len(watch.calls)
    assert calls[2] == calls[40], f"2 decodes take {calls[2]} operations and 40 take {calls[40]}"


def test_layers_after_the_first_reuse_its_slots():
    """Which slots to read is worked out in the first layer of a step and not again."""
    world = make_world(MIXED, 4)
    q, metadata, calls = torch.cat([q for q, _, _ in world.requests]), world.metadata(), []
    for _ in range(2):
        with Watch() as watch:
            world.cache.attend(q, metadata)
        calls.append(len(watch.calls))
    assert calls[1] < calls[0], f"the first layer ran {calls[0]} operations and the second {calls[1]}"


def test_a_long_chunk_makes_no_matrix_of_scores():
    """512 queries over 2,048 positions in 14 heads make no tensor larger than the context: 14.7 million scores never exist."""
    world = make_world([(512, 2048)], 16, heads=14, kv_heads=2, head_dim=64, dtype=torch.float32)
    q, metadata = world.requests[0][0], world.metadata()
    with Watch() as watch:
        world.cache.attend(q, metadata)
    largest = max(q.numel(), world.cache.key_cache.numel())
    assert watch.largest <= largest, f"a tensor of {watch.largest:,} numbers was made, {largest:,} are enough"


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40), st.integers(1, 9000))
def test_groups_hold_every_decode_once_and_bound_their_padding(seq_lens, max_positions):
    """Every decode is in one group, and a group of several, padded to its longest, reads no more positions than allowed."""
    groups = group_by_length(seq_lens, max_positions)
    assert sorted(row for group in groups for row in group) == list(range(len(seq_lens))), f"{groups} loses or repeats a decode"
    for group in groups:
        reads = len(group) * max(seq_lens[row] for row in group)
        assert len(group) == 1 or reads <= max_positions, f"{len(group)} decodes read {reads:,} positions of {max_positions:,}"
    assert len(groups) == 1 or len(seq_lens) * max(seq_lens) > max_positions, f"{len(groups)} groups where one would do"


# ---- On a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_gpu_gives_the_same_without_waiting_for_it(dtype, tolerance):
    """On a GPU each request gets what it gets on a CPU, and a layer after the first never waits for the device."""
    world = make_world([*MIXED, (130, 300)], 4, dtype=dtype)
    expected = world.expected()
    world.cache.key_cache, world.cache.value_cache = world.cache.key_cache.cuda(), world.cache.value_cache.cuda()
    q, lens = torch.cat([q for q, _, _ in world.requests]).cuda(), [(len(q), len(k)) for q, k, _ in world.requests]
    query_lens, seq_lens = ([pair[i] for pair in lens] for i in (0, 1))
    metadata = AttentionMetadata.build(query_lens, seq_lens, world.tables, 4, "cuda")
    world.cache.attend(q, metadata)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = world.cache.attend(q, metadata)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    row, error = worst([one.cpu() for one in output.split(query_lens)], expected)
    assert error < tolerance, f"request {row} {lens[row]} is off by {error:.1e} on a GPU in {dtype}"


# ---- These tests can fail ----


@pytest.mark.parametrize("breakage", ["a block is lost", "two blocks are swapped", "attention is zero", "slots are off by one"])
def test_a_broken_attention_is_noticed(breakage, monkeypatch):
    """The comparison with the plain function fails when blocks are lost or swapped, attention is zero, or slots off by one."""
    world = make_world(MIXED, 4, garbage=0.0)
    if breakage == "a block is lost":
        world.tables[2][1] = 0
    elif breakage == "two blocks are swapped":
        world.tables[2][0], world.tables[2][1] = world.tables[2][1], world.tables[2][0]
        world.tables[4][0], world.tables[4][2] = world.tables[4][2], world.tables[4][0]
    elif breakage == "attention is zero":
        monkeypatch.setattr(PagedAttention, "attend", lambda self, q, metadata: torch.zeros_like(q))
    else:
        monkeypatch.setattr(paged, "context_slots", lambda *args: (context_slots(*args) - 1).clamp(min=0))
    _, error = worst(world.attend(), world.expected())
    assert error > 1e-3, f"{breakage}, and the outputs are within {error:.1e} of the right ones"
