"""Lesson 14. One token at a time: a matrix product with one row is a sum for each of its columns, and what is around it goes in.

Owns the layer of a step that has one token, as functions to be compiled. Such a step reads all weights for one row: nothing else
takes time but the start and the end of each kernel. A library's product is a kernel of its own; a sum is something that
torch.compile writes, and into one kernel with what is done with its result and with what was done to its input:

    norm, product, rotation       rms(x) is one number, so W (g * x / rms) = (W (g * x)) / rms, and the kernel sums both
    norm, product, silu * up      each row of gate is summed beside its row of up
    product, residual addition

Five kernels a layer beside attention, where `DecoderLayer` has nine. The same arithmetic in another order: in float32 the plain
layer's numbers but for the last digits, in bfloat16 closer to the truth, since what lies between is never rounded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minivllm.model import DecoderLayer, Qwen2ForCausalLM, RMSNorm


def product(weight: Tensor, x: Tensor) -> Tensor:
    """weight (..., E) times x (E,): (...) in float32. The weights must not be copied to be widened: only compiled."""
    return (weight.float() * x).sum(-1)


def inverse_rms(norm: RMSNorm, x: Tensor, like: Tensor) -> Tensor:
    """1 / rms of x (1, E), written as one sum beside each row of the weights `like` (..., E), so that it is computed with them."""
    squares = x[0].float().pow(2).expand(like.shape)
    return torch.rsqrt(squares.sum(-1) / x.shape[-1] + norm.eps)  # (...)


def in_memory(x: Tensor) -> Tensor:
    """x itself, which torch.compile now stores: what is read by strides has to lie somewhere."""
    return x.as_strided(x.shape, x.stride())


def before_attention(layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, cache: Any, slot: Any) -> Tensor:
    """`DecoderLayer.before_attention` for x (1, E): the queries (1, H, D)."""
    attention, norm = layer.self_attn, layer.input_layernorm
    num_heads, num_kv_heads, head_dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
    pairs = (num_heads + 2 * num_kv_heads, 2, head_dim // 2)  # number i of a head's first half turns with i of its second
    weight, bias = attention.qkv_proj.weight.view(*pairs, -1), attention.qkv_proj.bias.view(pairs)
    scaled = norm.weight.float() * x[0]  # (E,)
    scale = inverse_rms(norm, x, weight[:, 0])  # (H + 2K, D/2)
    first = product(weight[:, 0], scaled) * scale + bias[:, 0]
    second = product(weight[:, 1], scaled) * scale + bias[:, 1]
    turns = torch.arange(pairs[0], device=x.device)[:, None] < num_heads + num_kv_heads  # values do not
    cos, sin = cos[:, : pairs[2]], sin[:, : pairs[2]]
    # The last thing done to each half is a choice between two numbers. Such a result torch.compile stores at once, and here in its
    # place in the stack, so the kernel that sums does it all; rounding as the last thing would be left to one more kernel.
    first, second = (torch.where(turns, turned.to(x.dtype), plain.to(x.dtype)) for turned, plain in (
        (first * cos - second * sin, first), (second * cos + first * sin, second)))
    cache.write_halves(first, second, slot)
    return torch.stack((first, second), dim=1).view(1, -1, head_dim)[:, :num_heads]


def after_attention(layer: DecoderLayer, x: Tensor, seen: Tensor) -> Tensor:
    """`DecoderLayer.after_attention` for x (1, E) and seen (1, H, D)."""
    x = (x + product(layer.self_attn.o_proj.weight, seen.flatten())).to(x.dtype)
    norm, weight = layer.post_attention_layernorm, layer.mlp.gate_up_proj.weight.unflatten(0, (2, -1))  # (2, I, E)
    scaled, scale = norm.weight.float() * x[0], inverse_rms(norm, x, weight[0])
    gate, up = product(weight[0], scaled) * scale, product(weight[1], scaled) * scale  # (I,)
    inner = in_memory((F.silu(gate) * up).to(x.dtype))  # else it would be computed anew for every row of `down`
    return (x + product(layer.mlp.down_proj.weight, inner)).to(x.dtype)


def compute_logits(model: Qwen2ForCausalLM, hidden: Tensor) -> Tensor:
    """`Qwen2ForCausalLM.compute_logits` for hidden (1, E): logits (1, V)."""
    return product(model.lm_head.weight, hidden[0]).to(hidden.dtype)[None]
