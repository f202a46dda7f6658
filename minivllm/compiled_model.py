"""Lesson 14. The model in compiled regions: what lies between two attentions becomes one function, and all layers share it.

Owns where torch.compile cuts. A layer is cut at its look back, since attention has kernels of its own, some for one batch size;
the rest of it and the beginning of the next layer are one region, so that adding, norm, silu, rotation and the write of the KV
become four kernels around the matrix products. Compiling all 24 layers at once takes 40 s for every batch size; one region
takes a few, once, because the weights are its inputs.

    opening                 between                                         between           closing
    embed, norm, qkv, KV -> attention -> o, MLP | norm, qkv, KV -> attention -> ... -> o, MLP, norm

The plain `Qwen2ForCausalLM.forward` computes the same, one operation after the other. A step of one token has layers written for
it (`one_token.py`), and one of up to 256 its own way through two of the matrices (`split_linear.py`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from minivllm import one_token
from minivllm.attention import PagedAttention
from minivllm.model import DecoderLayer, Qwen2ForCausalLM, Qwen2Model, rope
from minivllm.split_linear import MOST_TOKENS, split_linears

# torch.compile gives a function up after 8 shapes unless told otherwise. 1,024 requests have 28 buckets, and three kinds of steps
# one attention kernel for each: decodes, verifications, and decodes of a draft model.
COMPILED_SHAPES = 128


def opening(model: Qwen2Model, input_ids: Tensor, positions: Tensor, cache: PagedAttention, slot_mapping: Tensor,
            before: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (T, E), cos and sin (T, D), and the first layer's queries (T, H, D)."""
    x = model.embed_tokens(input_ids)
    cos, sin = model.rotary_emb(positions, x.dtype)
    return x, cos, sin, before(model.layers[0], x, cos, sin, cache, slot_mapping)


def between(layer: DecoderLayer, following: DecoderLayer, x: Tensor, seen: Tensor, cos: Tensor, sin: Tensor,
            cache: PagedAttention, slot_mapping: Tensor, before: Callable[..., Tensor],
            after: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """From what one layer has seen to what the following one asks: x (T, E) and queries (T, H, D)."""
    x = after(layer, x, seen)
    return x, before(following, x, cos, sin, cache, slot_mapping)


def closing(model: Qwen2Model, x: Tensor, seen: Tensor, after: Callable[..., Tensor]) -> Tensor:
    """From what the last layer has seen to hidden states (T, E)."""
    return model.norm(after(model.layers[-1], x, seen))


def before_attention(layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, cache: Any, slot_mapping: Tensor) -> Tensor:
    """The layer's own, whose rotation and write to the cache would be two kernels: one goes through queries and keys, the other
    through keys and values. Here both go through all heads. It gives queries (T, H, D) of x (T, E).
    """
    attention = layer.self_attn
    heads = attention.qkv_proj(layer.input_layernorm(x)).unflatten(-1, (-1, attention.head_dim))  # (T, H + 2K, D)
    turns = torch.arange(heads.shape[1], device=x.device)[:, None] < attention.num_heads + attention.num_kv_heads  # values do not
    heads = torch.where(turns, rope(heads, cos, sin), heads)
    cache.write_heads(heads, slot_mapping)
    return heads[:, : attention.num_heads]


def after_attention(layer: DecoderLayer, x: Tensor, seen: Tensor) -> Tensor:
    """The layer's own, on x (1, T, E): inductor would make `x + product` of (T, E) one call of the library, which copies x first.
    As a part of the norm that follows, the addition is free. Its result is stored there, or the next norm would add it up again.
    """
    x = one_token.in_memory(x[None] + layer.self_attn.o_proj(seen.flatten(1)))
    return (x + layer.mlp(layer.post_attention_layernorm(x)))[0]


def first_half(num_tokens: int) -> Callable[..., Tensor]:
    """How a layer begins, up to its look back."""
    return one_token.before_attention if num_tokens == 1 else before_attention


def second_half(num_tokens: int) -> Callable[..., Tensor]:
    """How a layer goes on behind its look back."""
    return one_token.after_attention if num_tokens == 1 else after_attention


# A kernel starts while the one before it ends, and waits where it reads what that one wrote (Programmatic Dependent Launch). What
# it loads first is on its way by then, if that is no loop: weights (row_tiles.py). torch puts everything else behind the wait.
ONE_TOKEN: dict[str, Any] = {"triton.enable_pdl": True}

# The sum of a product's parts is not stored before its heads are rotated, which reads each number twice.
MANY_TOKENS: dict[str, Any] = {"realize_reads_threshold": 20, "realize_opcount_threshold": 100}

# Of a kernel's possible tiles torch takes one by rules. For sums its option "deterministic" says so too, but the first function
# that is compiled sets that back (torch.use_deterministic_algorithms). This one is there for torch's own tests, and stays; a
# torch without it would time them again.
NOTHING_TIMED = {"triton.autotune_pointwise": False, "test_configs.force_filter_reduction_configs": True}


@contextmanager
def compiling() -> Iterator[None]:
    """As long as this lasts, what is compiled in this thread is compiled quickly, and sums have the tiles of `row_tiles.py`.

    Nothing is searched for by timing kernels: that took 16 s of a start and more, and found worse tiles than these. And a sum in
    other tiles has other last bits, so an answer would be another after the next cold start. Numbers like a norm's epsilon are
    constants: by itself torch.compile makes them inputs, finds at the end that nothing varies, and begins anew. And Python's
    collector waits: a tenth of the time went into looking for garbage among the compiler's objects.

    The option "inductor_choices_class" only names the tiles to torch's cache: torch reads it once a thread, and would then keep
    ours for the host program's own functions, or never see ours.
    """
    from torch._inductor import config as inductor
    from torch._inductor.virtualized import V  # the compiler: two seconds

    from minivllm.row_tiles import RowTiles

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_SHAPES)  # for good: they stay
    collects = gc.isenabled()
    known = {name: NOTHING_TIMED[name] for name in inductor.get_config_copy() if name in NOTHING_TIMED}
    with V.set_choices_handler(RowTiles()), inductor.patch(known), torch._dynamo.config.patch(specialize_float=True):
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


class OneAndMany:
    """A function compiled twice, for one token and for any other number of them: torch.compile would part the two anyway.

    Its arguments that are tensors have a line for each token. Of these the number may vary; all other sizes are constants.
    """

    def __init__(self, function: Callable[..., Any], many: dict[str, Any] | None = None) -> None:
        from minivllm.row_tiles import RowTiles  # the compiler: two seconds

        self.one = torch.compile(function, dynamic=False, options=ONE_TOKEN | {"inductor_choices_class": RowTiles})
        self.many = torch.compile(function, dynamic=False, options=many)

    def __call__(self, num_tokens: int, *args: Any) -> Any:
        if num_tokens == 1:
            return self.one(*args)
        for arg in args:
            if isinstance(arg, Tensor):
                torch._dynamo.mark_dynamic(arg, 0)
        return self.many(*args)


class CompiledModel:
    """`Qwen2ForCausalLM.forward` in regions, for any number of tokens. Changes how the model's layers compute their projections."""

    def __init__(self, model: Qwen2ForCausalLM) -> None:
        self.model = model.model
        for layer in self.model.layers:
            split_linears(layer)  # type: ignore[arg-type]
        self.opening, self.between, self.closing = (OneAndMany(region, MANY_TOKENS) for region in (opening, between, closing))

    def __call__(self, input_ids: Tensor, positions: Tensor, kv_caches: Sequence[PagedAttention], metadata: Any,
                 wanted: Tensor | None = None) -> Tensor:
        """Ids and positions (T,) to hidden states (T, E) after the final norm, or to those of the `wanted` tokens (R,) alone.

        What a prompt's tokens have to give is in the cache before the last layer's second half, so only those go through it.
        """
        num_tokens, layers, slots = len(input_ids), self.model.layers, metadata.slot_mapping
        before, after = first_half(num_tokens), second_half(num_tokens)
        # Graphs have positions of 4 bytes, an upload of 8: torch.compile would make one more function for another type.
        x, cos, sin, q = self.opening(num_tokens, self.model, input_ids, positions.int(), kv_caches[0], slots, before)
        for index in range(len(layers) - 1):
            seen = kv_caches[index].attend(q, metadata)
            x, q = self.between(num_tokens, layers[index], layers[index + 1], x, seen, cos, sin, kv_caches[index + 1], slots,
                                before, after)
        seen = kv_caches[-1].attend(q, metadata)
        if wanted is not None:
            x, seen = x[wanted], seen[wanted]
        if len(x) <= MOST_TOKENS:
            return self.finish(x, seen) if len(x) else x  # nobody: all are in the middle of their prompts
        # No more at a time than a decode step has, so that nothing is compiled for more: seldom are so many wanted.
        return torch.cat([self.finish(*part) for part in zip(x.split(MOST_TOKENS), seen.split(MOST_TOKENS))])

    def finish(self, x: Tensor, seen: Tensor) -> Tensor:
        """From what the last layer has seen of up to MOST_TOKENS tokens to their hidden states (T, E)."""
        return self.closing(len(x), self.model, x, seen, second_half(len(x)))
