"""Lesson 14. The same paged attention, compiled by torch.compile: the block table *is* the sparsity pattern.

Owns the way from block tables to FlexAttention's `BlockMask`, for decodes and for prompts. Knows no request. The readable
rung copies each context into logical order; here one generated kernel walks each request's blocks where they lie, because
the order of keys does not matter to a softmax. Only what a block holds beyond a query's own position has to be masked:

    a decode at position 9, P = 4      block_table[b] = [7, 2, 5]     in block 5 slots 22 and 23 are not filled yet
    a tile of queries 8..11            blocks 7 and 2 are seen whole, 5 up to the query's own position

A step has two kernels, one for its decodes and one for all its prompts, however many requests it has. vLLM has the same
idea in vllm/v1/attention/backends/flex_attention.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from minivllm.attention import NULL_BLOCK, PagedAttention

QUERY_TILE = 64  # FlexAttention's own block of queries; each tile belongs to one request
# Into how many parts the kernel for decodes cuts each context, and up to how many programs, all requests together. Contexts differ
# in length, and the longest ends the kernel: of many short parts each of a GPU's hundred-odd processors gets its share. But parts
# have to be joined. Steps of 0.5B in microseconds, with half as many parts and with these: 16 contexts of 1,500 tokens 960 and 903,
# 48 of 1,200 1,163 and 1,105, 256 of 120 to 1,080 1,830 and 1,708; with twice as many 25 of 140 836 and 818. What it costs: 256
# that are all of 600 take 1,774 instead of 1,665.
MOST_SPLITS = 16
SPLITS = ((MOST_SPLITS, 256), (4, 512), (2, 1024))  # parts, the most programs
# No listed block reaches beyond the cache, and no tile of a prompt beyond its queries. FlexAttention cannot know, and would look at
# every read whether it lies within bounds. (A decode's few queries have a switch of their own, which is left alone.)
WHOLE = {"IS_DIVISIBLE": True}
# Three stages hide the wait for memory (two: 16 contexts of 1,500 tokens 903 -> 943). Four warps do better than two where contexts
# are few or differ (one of 3,900 tokens: 617 -> 600).
DECODE_KERNEL = WHOLE | {"num_warps": 4, "num_stages": 3}
# The general kernel for decodes that nobody splits takes the few queries of a KV head as one tile, padded to the 16 that a
# tensor core wants: here it has to look where they end.
UNSPLIT_KERNEL, UNSPLIT_QUERIES, UNSPLIT_KEYS = {"num_warps": 4, "num_stages": 3}, 16, 64
# Microseconds a layer for 8,192 tokens of 0.5B and of 7B: 76 and 205 with prompts of 100 to 1,024 tokens, 143 and 390 with four of
# 2,048. With the checks and tiles of 128 queries: 127 and 290, 213 and 507.
PROMPT_KERNEL, KEYS_AT_ONCE = WHOLE | {"num_warps": 4, "num_stages": 2, "BLOCK_M": QUERY_TILE}, 32
# One kernel joins the parts of a context: each of its few sums is written out, and nothing on the way is stored. Left alone,
# torch.compile makes two or three (a decode of 0.5B: 5.5 -> 4.7 microseconds, eight of 7B: 12.4 -> 9.5).
JOINED_AT_ONCE: dict[str, Any] = {"unroll_reductions_threshold": MOST_SPLITS + 1, "realize_opcount_threshold": 1000,
                                  "realize_reads_threshold": 100, "realize_acc_reads_threshold": 100}
# For one request the kernel that joins lets the next one begin, which loads weights meanwhile (a step of 0.5B: 566 -> 555
# microseconds). What follows more than one is the library's product, which does not know of that (25 requests: 843 -> 849).
JOINED_FOR_ONE = JOINED_AT_ONCE | {"triton.enable_pdl": True}


@functools.cache
def compiled(*, dynamic: bool, for_one: bool = False) -> Any:
    """The kernel that splits contexts exists only for a batch size that is known, so there is one per bucket that wants it. The
    general one has a dynamic number of queries, and is compiled once for prompts and once for the decodes of all larger batches.
    Made when first asked for: to import the compiler takes two seconds.
    """
    return torch.compile(flex_attention, dynamic=dynamic, options=JOINED_FOR_ONE if for_one else JOINED_AT_ONCE)


@dataclass
class DecodeMetadata:
    """One new token for each of B requests."""

    block_mask: BlockMask


@dataclass
class PrefillMetadata:
    """Prompts, or chunks of them, cut into Q tiles of up to QUERY_TILE queries of one request each."""

    block_mask: BlockMask
    tile_rows: Tensor  # (Q * QUERY_TILE,) int64  which of the step's tokens stands in each row of the tiles


@dataclass
class FlexMetadata:
    """What one step tells every layer: first the tokens of its decodes, then those of its prompts."""

    slot_mapping: Tensor  # (T,) int64
    decode: DecodeMetadata | None  # of the first num_decodes tokens; the batch may be padded beyond them
    prefill: PrefillMetadata | None
    num_decodes: int  # in a graph all that it has room for: those behind the step's own are computed, and nobody looks at them
    places: Tensor | None = None  # (T,) int64  with prompts: where each token stands in (all decodes, then all rows of tiles)


def ends(positions: Tensor, block_table: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """How many blocks hold each context up to `positions` (B,), which is the last, how much of it is filled: (B,) int32 each."""
    last_index = positions // block_size  # (B,) which entry of its table holds the new token
    last_block = block_table.gather(1, last_index.long()[:, None])[:, 0]
    return last_index + 1, last_block, positions % block_size + 1


def decode_metadata(last: Sequence[Tensor], block_table: Tensor, block_size: int, num_slots: int, group: int) -> DecodeMetadata:
    """One token at the end of each context in `block_table` (B, blocks) int32, `group` query heads a KV head.

    `last` is what `ends` says of these. A padded row has position 0 and a table of null blocks: it reads slot 0. No value is
    read by the host.
    """
    # As views of them: what a compiled function returns is marked as of any length, and a kernel for one batch size would be no
    # longer the same as another process compiles it (compile_ahead.py).
    num_blocks, last_block, filled = (one.view(-1) for one in last)  # (B,) each

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv // block_size != last_block[b]) | (kv % block_size < filled[b])

    # No block is listed as full: with full blocks the kernel would split its work by the length of the whole pool.
    return DecodeMetadata(BlockMask.from_kv_blocks(
        kv_num_blocks=num_blocks.view(-1, 1, 1), kv_indices=block_table[:, None, None, :],
        BLOCK_SIZE=(QUERY_TILE, block_size), mask_mod=mask_mod, seq_lengths=(group, num_slots), compute_q_blocks=False))


@dataclass
class Tiles:
    """Host arrays, int32: for each tile its request's row, its first query's position and place in the step, its length."""

    arrays: np.ndarray  # (4, Q) rows, first positions, first tokens, lengths
    token_rows: np.ndarray  # (prefill tokens,) in which row of the tiles each token stands


def cut_into_tiles(rows: np.ndarray, query_lens: np.ndarray, seq_lens: np.ndarray, num_decodes: int = 0) -> Tiles:
    """The tiles of requests that compute their last `query_lens` of `seq_lens` positions; one numpy pass, no loop. In the step
    their tokens stand behind those of `num_decodes` others.

    At least two tiles: torch.compile would make a kernel of its own for exactly one. The extra one repeats the last.
    """
    num_tiles = -(-query_lens // QUERY_TILE)  # (B,)
    num_tiles[-1] += int(num_tiles.sum() == 1)
    owner = np.repeat(np.arange(len(rows)), num_tiles)  # (Q,)
    index = np.arange(len(owner)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)  # (Q,) which tile of its request
    offset = np.minimum(index * QUERY_TILE, (query_lens[owner] - 1) // QUERY_TILE * QUERY_TILE)
    starts = np.cumsum(query_lens) - query_lens
    first_tile = np.cumsum(num_tiles) - num_tiles
    token_rows = np.arange(query_lens.sum()) + np.repeat(first_tile * QUERY_TILE - starts, query_lens)
    arrays = np.stack((rows[owner], (seq_lens - query_lens)[owner] + offset, num_decodes + starts[owner] + offset,
                       np.minimum(query_lens[owner] - offset, QUERY_TILE)))
    return Tiles(arrays.astype(np.int32), token_rows.astype(np.int32))


def prefill_metadata(tiles: Tensor, block_table: Tensor, block_index: Tensor, block_size: int) -> PrefillMetadata:
    """`tiles` (4, Q) is `Tiles.arrays` on the device; block_table (rows, blocks) int32.

    `block_index` (N,) int32 says where in its request each block stands. It is one number whoever asks: a block that
    several requests share is at the same place in all of them, because its hash covers all that lies before it.
    """
    rows, first_positions, first_tokens, lengths = tiles.unbind(0)  # (Q,) each
    lane = torch.arange(QUERY_TILE, dtype=torch.int32, device=tiles.device).minimum(lengths[:, None] - 1)  # (Q, tile)
    positions = (first_positions[:, None] + lane).flatten()  # rows beyond a tile's length repeat its last query
    num_full = (first_positions + 1) // block_size  # (Q,) blocks that every query of the tile sees whole
    num_seen = (first_positions + lengths - 1) // block_size + 1  # (Q,)
    table = block_table[rows]  # (Q, blocks) int32
    # As wide as the table of full blocks: the kernel of torch 2.11 finds its line in both by one stride.
    partial = num_full[:, None] + torch.arange(table.shape[1], dtype=torch.int32, device=tiles.device)  # (Q, blocks)
    partial_blocks = table.gather(1, partial.clamp(max=table.shape[1] - 1).long())

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return block_index[kv // block_size] * block_size + kv % block_size <= positions[q]

    block_mask = BlockMask.from_kv_blocks(
        kv_num_blocks=(num_seen - num_full)[None, None], kv_indices=partial_blocks[None, None],
        full_kv_num_blocks=num_full[None, None], full_kv_indices=table[None, None], BLOCK_SIZE=(QUERY_TILE, block_size),
        mask_mod=mask_mod, seq_lengths=(len(positions), len(block_index) * block_size), compute_q_blocks=False)
    return PrefillMetadata(block_mask, (first_tokens[:, None] + lane).flatten().long())


def num_splits(batch_size: int, num_kv_heads: int) -> int:
    """Into how many parts each context of a batch of decodes is cut, as measured on an H200."""
    return max(1, *(min(parts, programs // (batch_size * num_kv_heads)) for parts, programs in SPLITS))


def decode_options(num_splits: int, group: int, block_size: int) -> Any:
    """How the kernel for decodes is built, with `group` queries a KV head."""
    if num_splits > 1:
        return DECODE_KERNEL | {"SPLIT_KV": num_splits}
    queries = max(UNSPLIT_QUERIES, 1 << (group - 1).bit_length())
    return UNSPLIT_KERNEL | {"BLOCK_M": queries, "BLOCK_N": min(UNSPLIT_KEYS, block_size)}


def tile_options(block_size: int) -> Any:
    """Queries and keys that one program of the kernel for prompts holds at a time: they must divide tile and block."""
    return PROMPT_KERNEL | {"BLOCK_N": min(KEYS_AT_ONCE, block_size)}


class FlexPagedAttention(PagedAttention):
    """The readable rung's memory, and another way to read it."""

    def __init__(self, kv_cache: Tensor, block_size: int) -> None:
        super().__init__(kv_cache, block_size)
        self.keys, self.values = self.key_cache[None], self.value_cache[None]  # (1, K, num_slots, D) views
        # Two writes to one tensor are two kernels for torch.compile. Of these here it cannot see that they are one.
        self.same_memory = torch.from_dlpack(kv_cache)
        # `_base` holds all layers; in inference mode it is None.
        for tensor in (kv_cache, self.same_memory, self.keys, self.values, self.keys._base):
            if tensor is not None:
                torch._dynamo.mark_static(tensor)  # its shape is a constant of every kernel

    def write(self, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        """One write to one tensor, the whole cache of the layer: a compiled write to a view of it would copy all of it."""
        self.kv_cache.index_copy_(2, slot_mapping, torch.stack((k, v)).transpose(1, 2))  # (2, K, T, D)

    def write_heads(self, heads: Tensor, slot_mapping: Tensor) -> None:
        """`write` of the last 2K of heads (T, H + 2K, D), as a loop over all of them, which torch.compile joins with the loop that
        computes them.
        """
        self.kv_cache.index_put_(self.places(heads, slot_mapping), heads)

    def write_halves(self, first: Tensor, second: Tensor, slot_mapping: Tensor) -> None:
        """`write_heads` of one token, of each head (H + 2K, D/2) the first and the second half."""
        places, lane = self.places(first[None], slot_mapping), torch.arange(first.shape[-1], device=first.device)
        where = [place.view(-1, 1) for place in places]
        self.kv_cache.index_put_((*where, lane), first)
        self.same_memory.index_put_((*where, lane + len(lane)), second)

    def places(self, heads: Tensor, slot_mapping: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each of heads (T, H + 2K, ...) the first three indices in the cache. Queries, the first H, go where nobody reads, all
        over the null block: in one place they would queue.
        """
        num_tokens, num_heads = heads.shape[:2]
        num_kv_heads = len(self.key_cache)
        head = torch.arange(num_heads, device=heads.device) - (num_heads - 2 * num_kv_heads)  # a query's is negative
        nowhere = (torch.arange(num_tokens, device=heads.device)[:, None] + head) % self.block_size + NULL_BLOCK * self.block_size
        # As a view of as many tokens: of two numbers of tokens torch.compile would not know that they are one, and make two loops.
        slots = torch.where(head < 0, nowhere, slot_mapping.view(num_tokens, 1))  # (T, H + 2K)
        return (head >= num_kv_heads).long(), head % num_kv_heads, slots

    def attend(self, q: Tensor, metadata: Any) -> Tensor:
        """Each query (T, H, D) over its own request's context, itself included."""
        parts = []
        if metadata.decode is not None:
            parts.append(self.attend_decode(q[: metadata.num_decodes], metadata.decode))
        if metadata.prefill is not None:
            parts.append(self.attend_tiles(q, metadata.prefill))
        seen = parts[0] if len(parts) == 1 else torch.cat(parts)
        return seen if metadata.places is None else seen[metadata.places]

    def attend_decode(self, q: Tensor, metadata: DecodeMetadata) -> Tensor:
        """One query each, q (B, H, D). The query heads of a KV head stand in the query axis: `enable_gqa` with a group that is
        no power of two (7 in Qwen2.5-0.5B and 7B) would fall back to a slower kernel without a word.
        """
        num_kv_heads, _, head_dim = self.key_cache.shape
        count, size = len(q), len(metadata.block_mask.kv_num_blocks)
        if count < size:  # in a mixed step; the batch of a decode step is padded from the start
            padded = q.new_empty_strided((size, *q.shape[1:]), q.stride())  # with other strides it would be compiled anew
            padded[:count], padded[count:] = q, 0
            q = padded
        splits, q = num_splits(size, num_kv_heads), q.view(size, num_kv_heads, -1, head_dim)
        if splits == 1:  # nothing but the batch size may differ
            for dim in (1, 2, 3):
                torch._dynamo.mark_static(q, dim)
            torch._dynamo.mark_static(metadata.block_mask.kv_indices, 3)
        kernel = compiled(dynamic=splits == 1, for_one=size == 1)
        output = kernel(q, self.keys, self.values, block_mask=metadata.block_mask,
                        kernel_options=decode_options(splits, q.shape[2], self.block_size))
        return output.flatten(1, 2)[:count]  # (B, H, D)

    def attend_tiles(self, q: Tensor, metadata: PrefillMetadata) -> Tensor:
        """What the rows of all tiles see (Q * tile, H, D), of the step's queries q (T, H, D)."""
        tiles = q[metadata.tile_rows].transpose(0, 1)[None]  # (1, H, Q * tile, D)
        output = compiled(dynamic=True)(tiles, self.keys, self.values, block_mask=metadata.block_mask, enable_gqa=True,
                                        kernel_options=tile_options(self.block_size))
        return output[0].transpose(0, 1)
