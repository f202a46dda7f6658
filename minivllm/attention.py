"""Lesson 8. Attention through a table: a request's keys and values lie in blocks scattered over one big tensor.

Owns the K and V tensors of one layer, where a token's K and V go, and the readable paged attention: gather a context into
logical order, then softmax. Knows no request and no reference count: it sees tensors and one `AttentionMetadata` a step.

    block_table[b] = [7, 2, 5]      P = 4 slots per block      seq_lens[b] = 10
    position       0  1  2  3 |  4  5  6  7 |  8  9
    slot          28 29 30 31 |  8  9 10 11 | 20 21      slot = block_table[b][position // P] * P + position % P

Logical order lives in the table, so any permutation of the blocks gives the same output. vLLM reads the table inside its
kernels (vllm/v1/attention/backends/); here the gather is a copy, and the price is stated at `PagedAttention`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

NULL_BLOCK = 0  # never handed out: padding reads and writes here, so that it can hurt nobody
QUERY_TILE = 128  # queries of a prefill chunk that share one mask: 128 x 32,768 positions are a mask of 4 MiB
# Decodes share a gather up to this many positions. On a CPU the copy should still be in the core's cache when it is used:
# 16 contexts of 2,048 take 20 ms a layer in one gather, and 12 in eight. On a GPU many launches cost more than that.
GATHER_POSITIONS = {"cpu": 8192, "cuda": 2**18}


@dataclass
class AttentionMetadata:
    """What one step of T tokens and B requests tells every layer. Requests with one query token (decodes) come first.

    Made anew for every step: the first layer works out the slots to read, and the other layers reuse them.
    """

    query_start_loc: Tensor  # (B+1,) int32  request b's tokens are rows query_start_loc[b]:query_start_loc[b+1]
    seq_lens: Tensor  # (B,) int32  tokens of request b whose K and V exist once this step has written
    block_table: Tensor  # (B, blocks in use) int32, padded with the null block
    slot_mapping: Tensor  # (T,) int64  where each token's K and V go; padded tokens go to the null block
    num_decodes: int  # the first num_decodes requests have exactly one query token
    # The same two facts as Python integers, which the runner knows anyway; when absent they are read back from the device.
    host_query_lens: list[int] = field(default_factory=list)
    host_seq_lens: list[int] = field(default_factory=list)
    # Who they are: no two residencies of requests share a number. Only what remembers steps needs it (standing_attention.py).
    request_keys: list[int] = field(default_factory=list)
    plan: StepPlan | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.host_seq_lens:
            self.host_query_lens = self.query_start_loc.diff().tolist()
            self.host_seq_lens = self.seq_lens.tolist()
        pairs = list(zip(self.host_query_lens, self.host_seq_lens, strict=True))
        assert all(1 <= query <= seq for query, seq in pairs), f"each request needs 1 <= query tokens <= context, got {pairs}"
        assert all(query == 1 for query, _ in pairs[: self.num_decodes]), "a decode has exactly one query token"

    @classmethod
    def build(
        cls, query_lens: list[int], seq_lens: list[int], block_tables: list[list[int]], block_size: int,
        device: str | torch.device = "cpu",
    ) -> AttentionMetadata:
        """Everything from plain lists, one entry per request: query tokens, context with them, and block ids."""
        width = max(len(table) for table in block_tables)
        padded = [ids + [NULL_BLOCK] * (width - len(ids)) for ids in block_tables]
        table = torch.tensor(padded, dtype=torch.int32, device=device)  # (B, blocks)
        rows = [row for row, query in enumerate(query_lens) for _ in range(query)]
        positions = [seq - query + i for query, seq in zip(query_lens, seq_lens, strict=True) for i in range(query)]
        slots = slot_mapping(table, torch.tensor(rows, device=device), torch.tensor(positions, device=device), block_size)
        starts = torch.tensor([0, *query_lens], device=device).cumsum(0).int()  # (B+1,)
        num_decodes = next((b for b, query in enumerate(query_lens) if query > 1), len(query_lens))
        lens = torch.tensor(seq_lens, dtype=torch.int32, device=device)
        return cls(starts, lens, table, slots, num_decodes, query_lens, seq_lens)


def slot_mapping(block_table: Tensor, rows: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """The slot of each token: its block's id times the block size, plus its offset in the block; int64.

    Shaped like `positions`. Token i is at `positions[i]` of the request in row `rows[i]` of `block_table` (B, blocks). A padded
    token has position -1 and gets slot 0, inside the null block: a slot of -1 would wrap around and overwrite the last block.
    """
    block_ids = block_table[rows, positions // block_size].long()  # int64 first: id * block_size may pass 2**31
    slots = block_ids * block_size + positions % block_size
    return torch.where(positions < 0, NULL_BLOCK * block_size, slots)


def context_slots(block_table: Tensor, seq_lens: Tensor, num_positions: int, block_size: int) -> Tensor:
    """The slots of every request's positions 0 .. num_positions - 1, in logical order: (B, num_positions) int64, in a handful of
    operations, however many requests there are.

    The table is int32, and a block's number times the block size may pass 2**31: int64 first, as in `slot_mapping`.
    Past a request's end its last position is repeated, so that nobody's slots and never a slot that was not written is read:
    what lies there may be NaN, and 0 * NaN is NaN, so a weight of zero would not make it harmless.
    """
    last = seq_lens.long()[:, None] - 1  # (B, 1)
    positions = torch.arange(num_positions, device=block_table.device).minimum(last)  # (B, S)
    rows = torch.arange(len(block_table), device=block_table.device)[:, None]  # (B, 1)
    return slot_mapping(block_table, rows, positions, block_size)


def gather_kv(cache: Tensor, slots: Tensor) -> Tensor:
    """Contexts in logical order, as a copy: result[k, ..., s, :] = cache[k, slots[..., s], :].

    cache (K, num_slots, D) and slots (..., S) give (K, ..., S, D), with the KV heads still first.
    """
    flat = cache.index_select(1, slots.flatten())  # (K, every slot, D)
    return flat.view(cache.shape[0], *slots.shape, cache.shape[2])  # (K, ..., S, D)


@dataclass
class DecodeGroup:
    """Decodes of similar length, which share one gather."""

    rows: Tensor  # (B,) int64  their rows in the query, one each
    slots: Tensor  # (B, S) int64
    mask: Tensor  # (1, B, 1, S) bool  True: this position exists


@dataclass
class PrefillChunk:
    """Several query tokens of one request, at the end of the context that lies in `slots`."""

    start: int  # its rows in the query are start:end
    end: int
    slots: Tensor  # (S,) int64


@dataclass
class StepPlan:
    """What to read in this step: the same for all layers, so worked out once."""

    decode_groups: list[DecodeGroup]
    prefill_chunks: list[PrefillChunk]


def group_by_length(seq_lens: list[int], max_positions: int) -> list[list[int]]:
    """Row numbers in groups of similar length, shortest first.

    A group is padded to its longest member, and then reads at most `max_positions`; a longer context is alone in its group.
    So one context of 4,096 beside 15 of 128 costs 6,016 positions and not 16 x 4,096.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(seq_lens)), key=lambda row: seq_lens[row]):
        if not groups or (len(groups[-1]) + 1) * seq_lens[row] > max_positions:
            groups.append([])
        groups[-1].append(row)
    return groups


def plan_decodes(metadata: AttentionMetadata, block_size: int) -> list[DecodeGroup]:
    """Work out which slots the decodes of this step read, from host integers alone: no wait for the device."""
    table, device, groups = metadata.block_table, metadata.block_table.device, []
    max_positions = GATHER_POSITIONS.get(device.type, GATHER_POSITIONS["cuda"])
    for group in group_by_length(metadata.host_seq_lens[: metadata.num_decodes], max_positions):
        rows = torch.tensor(group, device=device)
        seq_lens, longest = metadata.seq_lens[rows], max(metadata.host_seq_lens[row] for row in group)
        mask = torch.arange(longest, device=device) < seq_lens[:, None]  # (B, S)
        # Four axes, although three would broadcast: with three SDPA takes its slow path on a CPU, 1.5 to 2.7 times as long.
        groups.append(DecodeGroup(rows, context_slots(table[rows], seq_lens, longest, block_size), mask[None, :, None]))
    return groups


def plan_prefills(metadata: AttentionMetadata, block_size: int) -> list[PrefillChunk]:
    """The same for the requests behind the decodes, one chunk each."""
    chunks, start = [], metadata.num_decodes
    for row in range(metadata.num_decodes, len(metadata.host_seq_lens)):
        one, end = slice(row, row + 1), start + metadata.host_query_lens[row]
        slots = context_slots(metadata.block_table[one], metadata.seq_lens[one], metadata.host_seq_lens[row], block_size)[0]  # (S,)
        chunks.append(PrefillChunk(start, end, slots))
        start = end
    return chunks


def allocate_kv_cache(num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int,
                      dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensor:
    """Keys (0) and values (1) of all layers: (layers, 2, K, num_slots, D) with num_slots = num_blocks * block_size.

    Left as the memory was, so that an unused block costs nothing on a CPU: blocks are zeroed when they are handed out.
    """
    kv_cache = torch.empty(num_layers, 2, num_kv_heads, num_blocks * block_size, head_dim, dtype=dtype, device=device)
    zero_blocks(by_block(kv_cache, block_size), torch.tensor([NULL_BLOCK], device=device))
    return kv_cache


def by_block(kv_cache: Tensor, block_size: int) -> Tensor:
    """The same memory as blocks (num_blocks, layers, 2, K, P, D): in each layer and head one stretch of P * D numbers."""
    return kv_cache.unflatten(3, (-1, block_size)).movedim(3, 0)


def zero_blocks(blocks: Tensor, block_ids: Tensor) -> None:
    """Zero the blocks that are being handed out, so that no earlier owner's values (or NaN) can be read."""
    blocks[block_ids] = 0


class PagedAttention:
    """One layer's keys and values, (K, num_slots, D) each, and attention over them."""

    def __init__(self, kv_cache: Tensor, block_size: int) -> None:
        self.block_size = block_size
        self.kv_cache = kv_cache  # (2, K, num_slots, D)
        self.key_cache, self.value_cache = kv_cache.unbind(0)  # views

    def write(self, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        """Put each token's k and v (T, K, D) into its slot, in place. A negative slot is an error, not the last slot."""
        assert len(slot_mapping) == len(k) == len(v), f"one slot for every new token: {len(slot_mapping)} for {len(k)}"
        self.key_cache.index_copy_(1, slot_mapping, k.transpose(0, 1))
        self.value_cache.index_copy_(1, slot_mapping, v.transpose(0, 1))

    def attend(self, q: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Each query (T, H, D) over its own request's context, itself included; rows of padded tokens are zero."""
        if metadata.plan is None:
            metadata.plan = StepPlan(self.plan_decodes(metadata), plan_prefills(metadata, self.block_size))
        output = torch.zeros_like(q)
        for group in metadata.plan.decode_groups:
            output.index_copy_(0, group.rows, self.attend_decodes(q.index_select(0, group.rows), group))
        for chunk in metadata.plan.prefill_chunks:
            output[chunk.start : chunk.end] = self.attend_chunk(q[chunk.start : chunk.end], chunk.slots)
        return output

    def plan_decodes(self, metadata: AttentionMetadata) -> list[DecodeGroup]:
        """What the decodes of a step read. Asked of one layer, for all."""
        return plan_decodes(metadata, self.block_size)

    def contexts(self, group: DecodeGroup) -> tuple[Tensor, Tensor]:
        """K and V of a group, (K, B, S, D) each, in one batched gather.

        The copy is about half of the time; vLLM's kernels read through the table and copy nothing.
        """
        return gather_kv(self.key_cache, group.slots), gather_kv(self.value_cache, group.slots)

    def attend_decodes(self, q: Tensor, group: DecodeGroup) -> Tensor:
        """One query each, q (B, H, D)."""
        num_kv_heads, _, head_dim = self.key_cache.shape
        k, v = self.contexts(group)  # (K, B, S, D)
        # Query heads that share a KV head become its queries: K and V are read once, never repeated.
        q = q.view(len(q), num_kv_heads, -1, head_dim).transpose(0, 1)  # (K, B, H/K, D)
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask)  # (K, B, H/K, D)
        return output.transpose(0, 1).flatten(1, 2)  # (B, H, D)

    def attend_chunk(self, q: Tensor, slots: Tensor) -> Tensor:
        """Consecutive queries of one request, q (Tq, H, D), over its context (S,), whose last Tq positions are their own.

        A later chunk goes in tiles, because a mask of the whole chunk would be the largest tensor of the step, and because a
        tile needs no position after its own last one.
        """
        k, v = gather_kv(self.key_cache, slots)[None], gather_kv(self.value_cache, slots)[None]  # (1, K, S, D)
        if len(q) == len(slots):  # a prompt from its first token on: the kernel knows this mask by name and skips the future
            output = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, is_causal=True, enable_gqa=True)
            return output[0].transpose(0, 1)  # (Tq, H, D)
        positions = torch.arange(len(slots), device=q.device)
        output = torch.empty_like(q)
        for start in range(0, len(q), QUERY_TILE):
            tile = q[start : start + QUERY_TILE].transpose(0, 1)[None]  # (1, H, tile, D)
            first = len(slots) - len(q) + start  # the position of the tile's first query
            end = first + tile.shape[2]
            mask = positions[:end] <= positions[first:end, None]  # (tile, end)
            tile = F.scaled_dot_product_attention(tile, k[:, :, :end], v[:, :, :end], attn_mask=mask, enable_gqa=True)
            output[start : start + QUERY_TILE] = tile[0].transpose(0, 1)  # (tile, H, D)
        return output
