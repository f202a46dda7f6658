"""What FlexAttention computes, in plain words: a stand-in for the compiled kernels, so that all around them runs on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm import flex_attention, startup


def seen_slots(block_mask: Any, b: int, tile: int, q: Tensor, num_slots: int) -> Tensor:
    """(queries, num_slots) bool: what queries `q` of one tile may look at: full blocks, and of listed ones what the mask shows."""
    size = block_mask.BLOCK_SIZE[1]
    seen = torch.zeros(len(q), num_slots, dtype=torch.bool)
    slots = torch.arange(size, dtype=torch.int32)
    for block in block_mask.kv_indices[b, 0, tile, : int(block_mask.kv_num_blocks[b, 0, tile])].tolist():
        zero = torch.tensor(0)
        kv = block * size + slots
        seen[:, kv.long()] |= block_mask.mask_mod(torch.tensor(b), zero, q[:, None], kv[None])
    if block_mask.full_kv_num_blocks is not None:
        same = block_mask.full_kv_indices.stride() == block_mask.kv_indices.stride()
        assert same, "the kernel of torch 2.11 walks both lists by one stride"
        for block in block_mask.full_kv_indices[b, 0, tile, : int(block_mask.full_kv_num_blocks[b, 0, tile])].tolist():
            seen[:, block * size : (block + 1) * size] = True
    return seen


def listed_attention(q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any, enable_gqa: bool = False,
                     kernel_options: Any = None) -> Tensor:
    """q (B, H, Tq, D) over k, v (1, K, num_slots, D). Slots of a listed block that the mask hides are read with weight 0, as in
    the kernel: NaN there would show.
    """
    output = torch.empty_like(q)
    tile_size = block_mask.BLOCK_SIZE[0]
    for b in range(len(q)):
        for start in range(0, q.shape[2], tile_size):
            rows = torch.arange(start, min(start + tile_size, q.shape[2]), dtype=torch.int32)
            mask = seen_slots(block_mask, b, start // tile_size, rows, k.shape[2])
            read = mask.any(0)  # whole blocks are read
            size = block_mask.BLOCK_SIZE[1]
            read = read.view(-1, size).any(1).repeat_interleave(size)
            keys, values, tile = k[0][:, read], v[0][:, read], q[b, :, rows.long()]  # (K, S, D), (H, Tq, D)
            group = len(tile) // len(keys)
            scores = tile @ keys.repeat_interleave(group, 0).transpose(1, 2) / q.shape[3] ** 0.5
            weights = scores.masked_fill(~mask[:, read], float("-inf")).softmax(-1)
            output[b, :, rows.long()] = weights @ values.repeat_interleave(group, 0)
    return output


def use_flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """attention_backend="flex_attention" on a CPU: the same metadata, runner and buckets, another kernel."""
    monkeypatch.setattr(flex_attention, "compiled", lambda **_: listed_attention)
    monkeypatch.setattr(startup, "decide_attention_backend", lambda config, *_: config.attention_backend)


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    use_flex_on_cpu(monkeypatch)
