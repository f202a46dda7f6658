"""Lesson 3. What a step costs: multiplications, and bytes that must come from memory. Two numbers, no clock, no torch.

Owns the arithmetic about the model's arithmetic. Never runs anything. A step is two lists, one entry per request: the tokens
that it computes (`query_lens`) and the tokens that it may look at, those included (`context_lens`).

    config = ModelConfig of Qwen2.5-0.5B                       flops         bytes       flops a byte
    decode, one request      query [1],    context [512]       1.03e9        0.99e9      1
    decode, 64 requests      query [1]*64, context [512]*64    66e9          1.4e9       47
    prefill of 512 tokens    query [512],  context [512]       389e9         1.0e9       389

An H200 does 185 flops in the time of one byte (790e12 / 4.26e12): below that memory decides, above it arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

from minivllm.config import ModelConfig


def layer_matrix_numbers(config: ModelConfig) -> int:
    """Numbers in one decoder layer's matrices: q, k, v; the way back; gate, up and down."""
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    return config.hidden_size * heads * config.head_dim + second_half_numbers(config)


def second_half_numbers(config: ModelConfig) -> int:
    """Of these the ones behind attention: the way back; gate, up and down."""
    return config.num_attention_heads * config.head_dim * config.hidden_size + 3 * config.hidden_size * config.intermediate_size


def num_parameters(config: ModelConfig) -> int:
    """Every number that is learned; an output matrix tied to the embedding counts once."""
    biases = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    norms = 2 * config.hidden_size
    embedding = config.vocab_size * config.hidden_size
    layers = config.num_hidden_layers * (layer_matrix_numbers(config) + biases + norms)
    return layers + config.hidden_size + embedding * (1 if config.tie_word_embeddings else 2)


def weight_bytes(config: ModelConfig, dtype_bytes: int = 2) -> int:
    """Memory that the weights take: 988 million bytes for Qwen2.5-0.5B in bfloat16."""
    return num_parameters(config) * dtype_bytes


def kv_bytes_per_token(config: ModelConfig, dtype_bytes: int = 2) -> int:
    """What one token's keys and values take in all layers: 12,288 bytes for Qwen2.5-0.5B, 86,016 if heads shared nothing."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype_bytes


def flops(config: ModelConfig, query_lens: Sequence[int], context_lens: Sequence[int]) -> int:
    """Floating-point operations of a step's matrix products, 2 for each multiplication and its addition.

    Every token goes through the matrices of every layer; every token meets every token of its context, in every query head,
    once for its score and once for its value (masked ones too: a mask hides a score, it does not save it); one row of logits
    for each request. Norms, RoPE and softmax are left out: under 1 %.
    """
    num_tokens = sum(query_lens)
    pairs = sum(query * context for query, context in zip(query_lens, context_lens, strict=True))
    matrices = 2 * num_tokens * layer_matrix_numbers(config)
    scores_and_values = 2 * 2 * pairs * config.num_attention_heads * config.head_dim
    logits = 2 * len(query_lens) * config.hidden_size * config.vocab_size
    return config.num_hidden_layers * (matrices + scores_and_values) + logits


def flops_left_out(config: ModelConfig, query_lens: Sequence[int]) -> int:
    """What a step saves that asks for each request's last hidden state alone: the second half of the last layer for all others."""
    return 2 * (sum(query_lens) - len(query_lens)) * second_half_numbers(config)


def bytes_moved(config: ModelConfig, query_lens: Sequence[int], context_lens: Sequence[int], dtype_bytes: int = 2) -> int:
    """The least bytes that a step moves: each weight read once whatever the batch, the step's keys and values written, and
    every request's context read once.

    Of an embedding only the rows of the step's tokens are read; a tied one is read whole all the same, as the output matrix.
    Activations are left out: they stay in the caches of the chip.
    """
    num_tokens = sum(query_lens)
    embedding = config.vocab_size * config.hidden_size
    matrices = num_parameters(config) - (0 if config.tie_word_embeddings else embedding)
    looked_up = num_tokens * config.hidden_size
    kv_tokens = num_tokens + sum(context_lens)
    return (matrices + looked_up) * dtype_bytes + kv_tokens * kv_bytes_per_token(config, dtype_bytes)


def arithmetic_intensity(
    config: ModelConfig, query_lens: Sequence[int], context_lens: Sequence[int], dtype_bytes: int = 2
) -> float:
    """Operations for each byte moved: what a machine must be good at."""
    return flops(config, query_lens, context_lens) / bytes_moved(config, query_lens, context_lens, dtype_bytes)


def roofline_seconds(num_flops: float, num_bytes: float, peak_flops: float, bandwidth: float) -> float:
    """The least time of a step on a machine of `peak_flops` operations and `bandwidth` bytes a second.

    Both go on at once, so the slower one decides; no real step is faster, and most are slower.
    """
    return max(num_flops / peak_flops, num_bytes / bandwidth)
