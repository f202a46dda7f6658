"""The cost model against what PyTorch counts and what tensors weigh."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ids, load_ours, random_qwen2
from torch.utils.flop_counter import FlopCounterMode

from minivllm import cost
from minivllm.config import ModelConfig
from minivllm.dense_cache import DenseMetadata
from minivllm.generate import dense_caches
from minivllm.model import NoCache, Qwen2ForCausalLM

QWEN_05B = ModelConfig(
    vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, head_dim=64, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=32_768,
    tie_word_embeddings=True,
)
SHAPES: list[dict] = [
    {},
    {"tie": True},
    {"heads": 14, "kv_heads": 2, "hidden": 112, "vocab": 97},
    {"layers": 3, "head_dim": 32, "kv_heads": 4},
]


@functools.cache
def model_of(shape: int) -> Qwen2ForCausalLM:
    """The model of SHAPES[shape], with random weights."""
    return load_ours(random_qwen2(tempfile.mkdtemp(), **SHAPES[shape])[1], torch.float32)


def test_a_token_of_qwen_takes_12288_bytes():
    """Keys and values of one token of Qwen2.5-0.5B take 12,288 bytes in bfloat16, and 86,016 if no heads were shared."""
    shared, own = (cost.kv_bytes_per_token(replace(QWEN_05B, num_key_value_heads=heads)) for heads in (2, 14))
    assert (shared, own) == (12_288, 86_016), f"2 KV heads: {shared:,} bytes a token; 14: {own:,}"


def test_qwen_has_494_million_parameters():
    """Qwen2.5-0.5B has 494,032,768 parameters, 988 million bytes in bfloat16."""
    assert cost.num_parameters(QWEN_05B) == 494_032_768, f"counted {cost.num_parameters(QWEN_05B):,}"
    assert cost.weight_bytes(QWEN_05B) == 988_065_536, f"counted {cost.weight_bytes(QWEN_05B):,} bytes"


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_parameters_are_those_of_the_model(shape):
    """The count from the config is the count of numbers in the loaded model, tied or not."""
    model = model_of(shape)
    real = sum(parameter.numel() for parameter in model.parameters())
    assert cost.num_parameters(model.config) == real, f"counted {cost.num_parameters(model.config):,}, the model has {real:,}"
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert cost.weight_bytes(model.config, 4) == num_bytes, f"the model's tensors take {num_bytes:,} bytes"


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_kv_bytes_are_those_of_the_cache(shape):
    """A cache of 10 tokens takes 10 times what one token is said to take."""
    model = model_of(shape)
    real = sum(cache.keys.nbytes + cache.values.nbytes for cache in dense_caches(model, 1, 10))
    assert 10 * cost.kv_bytes_per_token(model.config, 4) == real, f"10 tokens take {real:,} bytes in the cache"


@settings(max_examples=examples(20))
@given(st.sampled_from(range(len(SHAPES))), st.integers(1, 40))
def test_flops_of_a_prompt_are_what_pytorch_counts(shape, num_tokens):
    """The operations of a prefill are those that PyTorch counts while the model runs it."""
    model, tokens = model_of(shape), ids(0, num_tokens, 97)
    with FlopCounterMode(display=False) as counter:
        caches, nothing = [NoCache() for _ in model.model.layers], SimpleNamespace(slot_mapping=None)
        model.compute_logits(model(tokens, torch.arange(num_tokens), caches, nothing)[-1:])
    counted, real = cost.flops(model.config, [num_tokens], [num_tokens]), counter.get_total_flops()
    assert counted == real, f"a prompt of {num_tokens} tokens: {counted:,} by the formula, {real:,} by PyTorch"
    with FlopCounterMode(display=False) as counter:
        last = torch.tensor([num_tokens - 1])
        model.compute_logits(model(tokens, torch.arange(num_tokens), caches, nothing, last))
    saved = real - counter.get_total_flops()
    assert saved == cost.flops_left_out(model.config, [num_tokens]), f"asked for the last hidden state alone it saves {saved:,}"


@settings(max_examples=examples(20))
@given(st.sampled_from(range(len(SHAPES))), st.integers(1, 6), st.integers(1, 40))
def test_flops_of_a_decode_batch_are_what_pytorch_counts(shape, num_requests, context):
    """The operations of a decode step are those that PyTorch counts while a batch of equal contexts runs it."""
    model = model_of(shape)
    caches = dense_caches(model, num_requests, context)
    positions = torch.full((num_requests, 1), context - 1)
    metadata = DenseMetadata.build(positions, torch.zeros(num_requests, dtype=torch.int64), context)
    with FlopCounterMode(display=False) as counter:
        model.compute_logits(model(ids(0, num_requests, 97), positions.flatten(), caches, metadata))
    counted, real = cost.flops(model.config, [1] * num_requests, [context] * num_requests), counter.get_total_flops()
    assert counted == real, f"{num_requests} decodes at {context} tokens: {counted:,} by the formula, {real:,} by PyTorch"


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_bytes_moved_are_weights_and_context(shape):
    """A step reads each weight once, an embedding row for each token, every context, and writes its own tokens."""
    model = model_of(shape)
    query_lens, context_lens = [1, 1, 5], [7, 2, 9]
    weights = sum(parameter.nbytes for name, parameter in model.named_parameters() if "embed_tokens" not in name)
    weights += model.lm_head.weight.nbytes if model.config.tie_word_embeddings else 0
    rows = 7 * model.model.embed_tokens.weight[0].nbytes
    kv = sum(cache.keys.nbytes + cache.values.nbytes for cache in dense_caches(model, 1, sum(context_lens) + sum(query_lens)))
    moved = cost.bytes_moved(model.config, query_lens, context_lens, 4)
    assert moved == weights + rows + kv, f"{moved:,} bytes by the formula, {weights + rows + kv:,} by the tensors"


def test_a_batch_reads_the_weights_once():
    """64 decodes cost 64 times the operations of one, and far less than 64 times the bytes."""
    flops = [cost.flops(QWEN_05B, [1] * n, [512] * n) for n in (1, 64)]
    moved = [cost.bytes_moved(QWEN_05B, [1] * n, [512] * n) for n in (1, 64)]
    assert flops[1] == 64 * flops[0], f"64 decodes take {flops[1] / flops[0]} times the operations of one"
    assert moved[1] < 2 * moved[0], f"64 decodes move {moved[1] / moved[0]:.2f} times the bytes of one"


def test_decode_is_reading_and_prefill_is_arithmetic():
    """A decode of Qwen2.5-0.5B does 1 operation a byte, a prefill of 512 tokens hundreds: opposite sides of an H200's 185."""
    decode, prefill = (cost.arithmetic_intensity(QWEN_05B, [n], [512]) for n in (1, 512))
    assert round(decode) == 1, f"decode: {decode:.2f} operations a byte"
    assert 380 < prefill < 400, f"prefill of 512: {prefill:.0f} operations a byte"


def test_the_slower_side_decides():
    """Time on a machine is the longer of computing and moving."""
    assert cost.roofline_seconds(100, 10, peak_flops=50, bandwidth=10) == 2, "100 operations at 50 a second take 2 seconds"
    assert cost.roofline_seconds(100, 40, peak_flops=50, bandwidth=10) == 4, "40 bytes at 10 a second take 4 seconds"
    floor = cost.roofline_seconds(cost.flops(QWEN_05B, [1], [1]), cost.bytes_moved(QWEN_05B, [1], [1]), 790e12, 4.19e12)
    assert 0.00023 < floor < 0.00025, f"an H200 reads Qwen2.5-0.5B in 0.24 ms, not {floor * 1e3:.2f} ms"
