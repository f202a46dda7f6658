"""Lesson 14. A product of few rows and few columns, cut so that all of a GPU reads weights.

Owns the projections to and from the heads, `qkv_proj` and `o_proj`, and `down_proj`, for steps of up to 256 tokens, in two forms.

In parts: a library cuts a product by its columns, 64 at a time. The 896 columns of Qwen2.5-0.5B keep 14 of an H200's 132 processors
busy, while each of them goes through all 4,864 rows of `down_proj`. Cut into four along the rows too, 56 have work, and whatever
kernel follows, a norm or the rotation, adds the parts:

    x (T, K) @ W' (K, N)   ->   x (p, T, K/p) @ W' (p, K/p, N) = parts (p, T, N)   ->   sum over p

In blocks: where there would be two parts, for up to 96 tokens. A batch of two products, x with each half of the columns, has the
same sums. But the library takes another kernel for it, and the norm has no parts to add:

    x (T, K) @ W' (K, N)   ->   x (2, T, K) @ W' (2, K, N/2) = blocks (2, T, N/2), put side by side

Microseconds on an H200, bfloat16, without the sum, which costs less than one:

    rows                     32      96     128     256
    down_proj of 0.5B       8.2     8.5     8.8    10.2     whole
                            5.6     5.9     5.8     7.1     four parts
    down_proj of 7B        41.9    45.4    45.6    58.5     whole
                           38.1    39.1    39.0    61.4     two parts
                           37.1    38.8    44.4    60.2     two blocks

cuBLAS has split products of its own, with a kernel more for the sum; in what it takes for best here it does not use them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minivllm.model import DecoderLayer

FEW_TOKENS, MOST_TOKENS = 96, 256  # beyond the second there are enough rows to keep all processors busy
MOST_PARTS, COLUMNS_AT_ONCE, NUM_PROCESSORS = 4, 64, 132
ALIGNMENT = 8  # numbers of 2 bytes: 16 bytes, what a processor loads at once


def num_parts(in_features: int, out_features: int) -> int:
    """Into how many parts to cut: one, two or four, as many as there are processors for and equal parts allow."""
    parts = MOST_PARTS
    while parts > 1 and (parts * out_features > NUM_PROCESSORS * COLUMNS_AT_ONCE or in_features % (parts * ALIGNMENT)):
        parts //= 2
    return parts


class SplitLinear(nn.Module):
    """What an `nn.Linear` computes. Parts are summed in float32, blocks are not summed."""

    weight: Tensor
    bias: Tensor | None
    parts: int

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.parts = num_parts(linear.in_features, linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) to (..., N)."""
        rows = x.flatten(0, -2)  # (T, K)
        if self.parts == 2 and self.bias is None and len(rows) <= FEW_TOKENS and len(self.weight) % (2 * ALIGNMENT) == 0:
            return self.by_blocks(rows).view(*x.shape[:-1], -1)
        if self.parts > 1 and len(rows) <= MOST_TOKENS:
            return self.by_parts(rows).view(*x.shape[:-1], -1)
        return nn.functional.linear(x, self.weight, self.bias)

    def by_blocks(self, rows: Tensor) -> Tensor:
        """(T, K) to (T, N). Compiled, putting them side by side is no copy: whoever reads a number finds it in its block."""
        blocks = torch.bmm(rows.expand(2, -1, -1), self.weight.unflatten(0, (2, -1)).transpose(1, 2))  # (2, T, N/2)
        return blocks.transpose(0, 1).flatten(1)

    def by_parts(self, rows: Tensor) -> Tensor:
        """(T, K) to (T, N)."""
        a = rows.unflatten(1, (self.parts, -1)).transpose(0, 1)  # (p, T, K/p) view
        b = self.weight.unflatten(1, (self.parts, -1)).permute(1, 2, 0)  # (p, K/p, N) view
        parts = torch.bmm(a, b) if rows.dtype.itemsize > 2 else torch.bmm(a, b, out_dtype=torch.float32)
        total = parts[0]
        # Written out: torch.compile makes it a part of the kernel that reads the sum.
        for part in [*parts[1:], *([] if self.bias is None else [self.bias])]:
            total = total + part
        return total.to(rows.dtype)


def split_linears(layer: DecoderLayer) -> None:
    """Let a layer compute these three projections in parts or blocks, where that pays. The weights stay where they are."""
    for parent, name in ((layer.self_attn, "qkv_proj"), (layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
        setattr(parent, name, SplitLinear(getattr(parent, name)))
