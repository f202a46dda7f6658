"""Lesson 14. The same paged attention for decodes, compiled by torch.compile: the block table *is* the sparsity pattern.

Owns the way from a block table to a FlexAttention `BlockMask`. Knows no request. The readable rung copies each context into
logical order; here one generated kernel walks each request's blocks where they lie, because the order of keys does not
matter to a softmax, and the only thing to mask is the part of the last block that is not filled yet:

    block_table[b] = [7, 2, 5]     position 9, P = 4
    kv_indices[b]  = [7, 2, 5]     kv_num_blocks[b] = 3     last block 5, filled 2: its slots 22 and 23 are masked

The query heads of a KV head stand in the query axis: `enable_gqa` with a group that is no power of two (7 in Qwen2.5-0.5B and
7B) falls back to a slower kernel without a word. vLLM has the same idea in vllm/v1/attention/backends/flex_attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from minivllm.attention import PagedAttention

QUERY_BLOCK = 128  # FlexAttention's own block of queries; a group of heads is one such block

# Static shapes: the kernel for decodes exists only for a batch size that is known, so there is one per bucket.
compiled_flex_attention = torch.compile(flex_attention, dynamic=False)


@dataclass
class DecodeMetadata:
    """A step of B decodes on fixed addresses, as a CUDA graph needs it: everything follows from positions and tables."""

    slot_mapping: Tensor  # (B,) int64
    block_mask: BlockMask


def make_decode_metadata(positions: Tensor, block_table: Tensor, block_size: int, num_slots: int, group: int) -> DecodeMetadata:
    """What every layer needs for one new token at `positions` (B,) of each request in `block_table` (B, blocks), both int32.

    A padded row has position 0 and a table of null blocks: it writes and reads slot 0. No value is read by the host.
    """
    last_index = positions // block_size  # (B,) which entry of its table holds the new token
    last_block = block_table.gather(1, last_index.long()[:, None])[:, 0]  # (B,) int32
    filled = positions % block_size + 1  # (B,) int32

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv // block_size != last_block[b]) | (kv % block_size < filled[b])

    # No block is listed as full: with full blocks the kernel would split its work by the length of the whole pool.
    block_mask = BlockMask.from_kv_blocks(
        kv_num_blocks=(last_index + 1).view(-1, 1, 1), kv_indices=block_table[:, None, None, :],
        BLOCK_SIZE=(QUERY_BLOCK, block_size), mask_mod=mask_mod, seq_lengths=(group, num_slots), compute_q_blocks=False)
    slots = last_block.long() * block_size + (positions % block_size).long()
    return DecodeMetadata(slots, block_mask)


class FlexPagedAttention(PagedAttention):
    """The readable rung's tensors. A step of decodes (`DecodeMetadata`) runs compiled; any other as in the rung below.

    torch.compile does not look into `write` and `attend`: the layer around them is compiled in two regions, before and after.
    """

    @torch.compiler.disable
    def write(self, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        super().write(k, v, slot_mapping)

    @torch.compiler.disable
    def attend(self, q: Tensor, metadata: Any) -> Tensor:
        if not isinstance(metadata, DecodeMetadata):
            return super().attend(q, metadata)
        num_kv_heads, _, head_dim = self.key_cache.shape
        q = q.view(len(q), num_kv_heads, -1, head_dim)  # (B, K, H/K, D): the group is the query axis
        output = compiled_flex_attention(q, self.key_cache[None], self.value_cache[None], block_mask=metadata.block_mask)
        return output.flatten(1, 2)  # (B, H, D)
