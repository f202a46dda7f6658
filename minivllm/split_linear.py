"""Lesson 14. A product of few rows and few columns, summed in parts, so that all of a GPU reads weights.

Owns the projections back to the hidden size, `o_proj` and `down_proj`, for the steps of up to 256 tokens. A library cuts a product
by its columns, 64 at a time: the 896 columns of Qwen2.5-0.5B keep 14 of an H200's 132 processors busy, while each of them goes
through all 4,864 rows of `down_proj`. Cut into four along the rows too, 56 have work, and the norm that follows adds the parts:

    x (T, K) @ W' (K, N)   ->   x (p, T, K/p) @ W' (p, K/p, N) = parts (p, T, N)   ->   sum over p

Microseconds on an H200, bfloat16, without the sum, which costs less than one:

    rows                     32     128     256
    down_proj of 0.5B       7.5     8.1     9.4     whole
                            5.2     5.5     6.4     four parts
    down_proj of 7B        40.9    44.9    59.7     whole
                           37.8    38.8    57.5     two parts

cuBLAS has split products of its own, with a kernel more for the sum; in what it takes for best here it does not use them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minivllm.model import DecoderLayer

MOST_TOKENS = 256  # beyond it there are enough rows to keep all processors busy
MOST_PARTS, COLUMNS_AT_ONCE, NUM_PROCESSORS = 4, 64, 132
ALIGNMENT = 8  # numbers of 2 bytes: 16 bytes, what a processor loads at once


def num_parts(in_features: int, out_features: int) -> int:
    """Into how many parts to cut: one, two or four, as many as there are processors for and equal parts allow."""
    parts = MOST_PARTS
    while parts > 1 and (parts * out_features > NUM_PROCESSORS * COLUMNS_AT_ONCE or in_features % (parts * ALIGNMENT)):
        parts //= 2
    return parts


class SplitLinear(nn.Module):
    """What an `nn.Linear` without a bias computes. The parts are summed in float32."""

    weight: Tensor
    parts: int

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        assert linear.bias is None, "only projections without a bias are split"
        self.weight = linear.weight
        self.parts = num_parts(linear.in_features, linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) to (..., N)."""
        rows = x.flatten(0, -2)  # (T, K)
        if self.parts == 1 or len(rows) > MOST_TOKENS:
            return nn.functional.linear(x, self.weight)
        a = rows.unflatten(1, (self.parts, -1)).transpose(0, 1)  # (p, T, K/p) view
        b = self.weight.unflatten(1, (self.parts, -1)).permute(1, 2, 0)  # (p, K/p, N) view
        parts = torch.bmm(a, b) if x.dtype.itemsize > 2 else torch.bmm(a, b, out_dtype=torch.float32)
        total = parts[0]
        for part in parts[1:]:  # written out: torch.compile makes it a part of the kernel that reads the sum
            total = total + part
        return total.to(x.dtype).view(*x.shape[:-1], -1)


def split_linears(layer: DecoderLayer) -> None:
    """Let a layer compute its two projections back to the hidden size in parts. The weights stay where they are."""
    for parent, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
        setattr(parent, name, SplitLinear(getattr(parent, name)))
