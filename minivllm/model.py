"""Lesson 1. Qwen2 is four small functions: a norm, attention over rotated queries and keys, a gated MLP, a loop over layers.

Owns the arithmetic and the weights. Never knows a request or a block: every token of the step is one row of (T, E), its
`positions` say where in its own sequence it stands, and one cache per layer (recompute, dense, paged) decides what it may
look at.

    ids (T,) -> embed -> [norm -> attention -> + -> norm -> MLP -> +] x layers -> norm -> hidden (T, E) -> logits (R, V)

Shapes, here and everywhere: T tokens in the step, B requests, S context, H query heads, K KV heads, D head size, E hidden,
N blocks, P slots per block, V vocabulary, R rows of logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivllm.config import ModelConfig


class AttentionLayer(Protocol):
    """What a decoder layer asks of its cache. `metadata` describes the step and belongs to the cache's kind."""

    def write(self, k: Tensor, v: Tensor, slot_mapping: Any) -> None:
        """Keep k, v (T, K, D) of this step's tokens where `slot_mapping` says."""

    def attend(self, q: Tensor, metadata: Any) -> Tensor:
        """What each of q (T, H, D) gets from the keys and values that it may look at, this step's included: (T, H, D)."""


def rotate_half(x: Tensor) -> Tensor:
    """Turn every pair (x[i], x[i + D/2]) of the last axis by 90 degrees: the result is (-second half, first half)."""
    first, second = x.chunk(2, dim=-1)  # views (..., D/2)
    return torch.cat((-second, first), dim=-1)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head of x (T, heads, D) by its token's angles: x * cos + rotate_half(x) * sin, with cos, sin (T, D).

    The pair (i, i + D/2) is one point in a plane, and cos and sin hold that plane's angle in both halves. The product of a
    query and a key so rotated depends on the distance between their positions and on nothing else about them.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (T, 1, D): every head of a token turns alike
    return x * cos + rotate_half(x) * sin


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """For each query the mean of the values that it may look at, weighted by softmax(q k / sqrt(D)).

    q (..., H, Tq, D); k, v (..., K, S, D); mask, bool, broadcasts to (..., Tq, S), True = may look; returns (..., H, Tq, D).
    Heads are grouped: query heads j * H/K to (j + 1) * H/K - 1 share key/value head j, and k and v are not copied for them.
    The softmax of half types is in float32. A slot that no query may look at may hold NaN, in k and in v, and leaves no
    trace; a query that may look at nothing gets something finite.
    """
    num_kv_heads, group = k.shape[-3], q.shape[-3] // k.shape[-3]
    q = q.unflatten(-3, (num_kv_heads, group)).flatten(-3, -2)  # (..., K, H/K * Tq, D): a group's queries in a row
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (..., K, H/K * Tq, S)
    scores = scores.unflatten(-2, (group, -1))  # (..., K, H/K, Tq, S)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # The lowest number and not -inf: a row of -inf has no softmax, and padded rows are such rows.
    scores = scores.masked_fill(~mask[..., None, None, :, :], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1).to(v.dtype).flatten(-3, -2)  # (..., K, H/K * Tq, S)
    # The weight of a masked slot is 0, and 0 * NaN is NaN.
    v = v.masked_fill(~mask.any(-2)[..., None, :, None], 0)
    return (weights @ v).unflatten(-2, (group, -1)).flatten(-4, -3)  # (..., H, Tq, D)


class NoCache:
    """The cache that forgets (lesson 0): each step brings its whole sequence, and attention is causal within the step.

    One sequence a step, `metadata.slot_mapping` may be None.
    """

    def write(self, k: Tensor, v: Tensor, slot_mapping: Any) -> None:
        self.k, self.v = k, v

    def attend(self, q: Tensor, metadata: Any) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in (q, self.k, self.v))  # (H, T, D), (K, T, D)
        causal = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()  # (T, T)
        return attention(q, k, v, causal).transpose(0, 1)  # (T, H, D)


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """How far each pair of a head turns from one position to the next, in radians (D/2,), and a factor for cos and sin.

    Pair i turns by rope_theta ** (-2i/D): the first ones tell neighbours apart, the last ones chapters. YaRN stretches the
    context by `factor`: pairs that turn more than `beta_fast` times within the original context keep their speed, those that
    turn less than `beta_slow` times turn `factor` times slower, and a ramp over i joins the two.
    """
    dim, theta = config.head_dim, config.rope_theta
    periods = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)  # (D/2,)
    if (yarn := config.rope_scaling) is None:
        return 1.0 / periods, 1.0

    def pair_that_turns(times: float) -> float:
        return dim * math.log(yarn["original_max_position_embeddings"] / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(yarn["beta_fast"]), pair_that_turns(yarn["beta_slow"])
    if yarn["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)  # dim and not dim/2: as published, and as every checkpoint was tuned
    high += 0.001 if low == high else 0
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)  # (D/2,) 1: keeps its speed
    return 1.0 / (yarn["factor"] * periods) * (1 - kept) + 1.0 / periods * kept, yarn["attention_factor"]


class RotaryEmbedding(nn.Module):
    """Positions to cos and sin, once a step for all layers. Computed, not looked up: a table of 131,072 positions is 67 MB."""

    inv_freq: Tensor

    def __init__(self, config: ModelConfig, device: torch.device | str) -> None:
        super().__init__()
        inv_freq, self.attention_factor = rope_frequencies(config)
        self.register_buffer("inv_freq", inv_freq.to(device), persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (T, D). Angles in float32 whatever the model: bfloat16 cannot tell position 257 from 256."""
        angles = positions[:, None].float() * self.inv_freq  # (T, D/2)
        angles = torch.cat((angles, angles), dim=-1)  # (T, D): both numbers of a pair turn by one angle
        return (angles.cos() * self.attention_factor).to(dtype), (angles.sin() * self.attention_factor).to(dtype)


class EmptyLinear(nn.Linear):
    """A matrix whose memory is left as it was: drawing 7 billion numbers that a checkpoint replaces would take a minute."""

    def reset_parameters(self) -> None:
        """Draw nothing."""


class EmptyEmbedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Draw nothing."""


def make_linear(in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype,
                device: torch.device | str) -> nn.Linear:
    """Every matrix of the model is made here, empty: the one place to change for quantized or sharded weights."""
    return EmptyLinear(in_features, out_features, bias=bias, dtype=dtype, device=device)


class RMSNorm(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.empty(config.hidden_size, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Divide each row of x (T, E) by the root of its mean square plus eps, in float32; then scale by the weight in x's type."""
        wide = x.float()  # float64 is narrowed: Hugging Face does so, and parity is with Hugging Face
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        # One matrix with rows q, k, v: one large product is faster than three small ones.
        self.qkv_proj = make_linear(config.hidden_size, rows, bias=True, dtype=dtype, device=device)
        self.o_proj = make_linear(self.num_heads * self.head_dim, config.hidden_size, bias=False, dtype=dtype, device=device)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (T, H, D), rotated keys and values (T, K, D) of x (T, E). Kept keys are rotated once and for all."""
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, H + 2K, D)
        qk, v = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=1)  # views
        q, k = rope(qk, cos, sin).split((self.num_heads, self.num_kv_heads), dim=1)
        return q, k, v


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        inner = config.intermediate_size
        self.gate_up_proj = make_linear(config.hidden_size, 2 * inner, bias=False, dtype=dtype, device=device)  # rows gate, up
        self.down_proj = make_linear(inner, config.hidden_size, bias=False, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Each token for itself, (T, E) to (T, E): widen twice, gate and up, multiply up by silu(gate), narrow."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config, dtype, device)
        self.self_attn = Attention(config, dtype, device)
        self.post_attention_layernorm = RMSNorm(config, dtype, device)
        self.mlp = MLP(config, dtype, device)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: AttentionLayer, metadata: Any,
                wanted: Tensor | None = None) -> Tensor:
        """Tokens look at each other, then each thinks for itself, or the `wanted` ones (R,) alone: x (T, E) to (T, E) or (R, E).

        Both parts add to x and never replace it.
        """
        q = self.before_attention(x, cos, sin, cache, metadata.slot_mapping)
        seen = cache.attend(q, metadata)
        if wanted is not None:
            x, seen = x[wanted], seen[wanted]
        return self.after_attention(x, seen)

    def before_attention(self, x: Tensor, cos: Tensor, sin: Tensor, cache: AttentionLayer, slot_mapping: Any) -> Tensor:
        """Norm, project, rotate, remember: x (T, E) to the queries (T, H, D) that look back."""
        q, k, v = self.self_attn.project(self.input_layernorm(x), cos, sin)
        cache.write(k, v, slot_mapping)
        return q

    def after_attention(self, x: Tensor, seen: Tensor) -> Tensor:
        """Add what was seen (T, H, D), heads joined and projected, to x (T, E); then add what the MLP makes of the norm of that."""
        x = x + self.self_attn.o_proj(seen.flatten(1))
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2Model(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = EmptyEmbedding(*shape, dtype=dtype, device=device)
        self.rotary_emb = RotaryEmbedding(config, device)
        self.layers = nn.ModuleList(DecoderLayer(config, dtype, device) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config, dtype, device)

    def forward(self, input_ids: Tensor, positions: Tensor, kv_caches: Sequence[AttentionLayer], metadata: Any,
                wanted: Tensor | None = None) -> Tensor:
        x = self.embed_tokens(input_ids)  # (T, E)
        cos, sin = self.rotary_emb(positions, x.dtype)  # (T, D)
        for layer, cache in zip(self.layers, kv_caches, strict=True):
            # Others look at a token through its keys and values. When the last layer has them, only who is asked for goes on.
            x = layer(x, cos, sin, cache, metadata, wanted if layer is self.layers[-1] else None)
        return self.norm(x)


class Qwen2ForCausalLM(nn.Module):
    """The whole model. Its parameters are allocated and left as the memory was: `weights.load_model` fills them.

    Parameter names are Hugging Face's, except that q, k, v and gate, up are the rows of one matrix each.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config = config
        self.model = Qwen2Model(config, dtype, device)
        # On "meta" it takes no memory until it is tied: 0.27 of the 0.99 GB of Qwen2.5-0.5B would be there twice.
        where = "meta" if config.tie_word_embeddings else device
        self.lm_head = make_linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, device=where)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.requires_grad_(False)

    def forward(self, input_ids: Tensor, positions: Tensor, kv_caches: Sequence[AttentionLayer], metadata: Any,
                wanted: Tensor | None = None) -> Tensor:
        """Ids and positions (T,) of any mix of requests to hidden states after the final norm: (T, E), or (R, E) of the tokens
        `wanted` (R,).
        """
        return self.model(input_ids, positions, kv_caches, metadata, wanted)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (R, E), only of the rows that need a next token, to logits (R, V): 300 million flops a row at 0.5B."""
        return self.lm_head(hidden)
