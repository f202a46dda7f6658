"""Lesson 1's promises: layer by layer the model is Hugging Face's Qwen2 to the last bits, and a wrong one would be caught."""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from types import SimpleNamespace

import pytest
import torch
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import hf_logits, ids, load_ours, our_logits, random_qwen2, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from minivllm import model as ours
from minivllm.compare import compare, main
from minivllm.config import ModelConfig

HEAD_RATIOS = [(14, 2), (12, 2), (16, 2), (28, 4), (40, 8), (64, 8)]  # every dense Qwen2.5
RAW_CONFIG = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
              "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}


@functools.lru_cache(maxsize=8)
def models(seed: int, dtype: torch.dtype, **shape):
    """minivllm's and Hugging Face's model of one random checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        theirs, path = random_qwen2(folder, seed, dtype=dtype, **shape)
        return load_ours(path, dtype), theirs


def check_parity(pair, length: int = 24, seed: int = 0, first_position: int = 0) -> None:
    """Every module's output, in order, is Hugging Face's within the contract: 1e-12 in float64, 1e-5 in float32."""
    input_ids = ids(seed, length, pair[0].config.vocab_size)
    comparison = compare(pair, input_ids, first_position=first_position)
    first = comparison.first_difference
    assert first is None, (f"{length} tokens from position {first_position}: {first.name} differs by "
                           f"{first.relative_error:.1e} of its largest value, allowed is {comparison.tolerance:.0e}")


# ---- Parity ----


@settings(max_examples=examples(25))
@given(seed=st.integers(0, 9999), kv_heads=st.integers(1, 3), group=st.integers(1, 4), half_head=st.integers(4, 8),
       layers=st.integers(1, 3), tie=st.booleans(), length=st.integers(1, 40), dtype=st.sampled_from(["float64", "float32"]))
def test_every_layer_equals_hugging_face(seed, kv_heads, group, half_head, layers, tie, length, dtype):
    """Whatever the shape, every module of every layer gives Hugging Face's numbers."""
    heads = kv_heads * group
    pair = models(seed, getattr(torch, dtype), layers=layers, heads=heads, kv_heads=kv_heads, hidden=heads * 2 * half_head,
                  tie=tie, vocab=61)
    check_parity(pair, length, seed)


@pytest.mark.parametrize(("heads", "kv_heads"), HEAD_RATIOS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_t30_every_published_head_ratio_equals_hugging_face(heads, kv_heads, dtype):
    """Each published grouping of query heads over key/value heads, 14 over 2 included, maps heads as Hugging Face does."""
    # 0.1: with 64 heads and 0.2 the scores are so large that float32 rounding alone reaches 2e-5 inside (2e-6 at the logits).
    check_parity(models(1, dtype, heads=heads, kv_heads=kv_heads, hidden=heads * 8, initializer_range=0.1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_t30_a_head_size_of_its_own_equals_hugging_face(dtype):
    """Heads that do not add up to the hidden size work as the config says."""
    check_parity(models(2, dtype, heads=4, kv_heads=2, hidden=40, head_dim=24))


@pytest.mark.parametrize("first_position", [0, 33, 127, 131_000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_yarn_equals_hugging_face_far_out(first_position, dtype):
    """With YaRN every module gives Hugging Face's numbers, before and beyond the original context."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    with tempfile.TemporaryDirectory() as folder:
        theirs, path = random_qwen2(folder, 3, dtype=dtype, head_dim=64, max_position_embeddings=32, rope_parameters=yarn)
        check_parity((load_ours(path, dtype), theirs), 16, first_position=first_position)


def test_bfloat16_is_no_further_from_the_truth_than_hugging_face():
    """In bfloat16 the log-probabilities miss float64's by no more than 1.5 times what Hugging Face's own bfloat16 misses."""
    ours_half, theirs_half = models(4, torch.bfloat16, layers=4, hidden=128)
    truth = load_truth(theirs_half)
    ours_misses, theirs_miss = [], []
    for seed in range(8):
        input_ids = ids(seed, 48)
        expected = hf_logits(truth, input_ids).log_softmax(-1)
        ours_misses.append((our_logits(ours_half, input_ids).double().log_softmax(-1) - expected).abs().mean())
        theirs_miss.append((hf_logits(theirs_half, input_ids).double().log_softmax(-1) - expected).abs().mean())
    mine, hf = float(sum(ours_misses)) / 8, float(sum(theirs_miss)) / 8
    assert mine <= 1.5 * hf, f"log-probabilities miss by {mine:.4f} on average, Hugging Face's by {hf:.4f}"


def load_truth(model):
    """The same weights in float64."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa").eval()


# ---- These tests can fail ----


def drop_rope(monkeypatch, model):
    monkeypatch.setattr(ours, "rope", lambda x, cos, sin: x)


def zero_attention(monkeypatch, model):
    monkeypatch.setattr(ours, "attention", lambda q, k, v, mask: torch.zeros_like(q))


def look_ahead(monkeypatch, model):
    plain = ours.attention
    monkeypatch.setattr(ours, "attention", lambda q, k, v, mask: plain(q, k, v, torch.ones_like(mask)))


def interleave_heads(monkeypatch, model):
    """Query head h reads key/value head h % K, not h // (H/K)."""
    plain = ours.attention

    def wrong(q, k, v, mask):
        order = torch.arange(q.shape[-3]).view(-1, k.shape[-3]).T.flatten()
        return plain(q[..., order, :, :], k, v, mask)[..., order.argsort(), :, :]

    monkeypatch.setattr(ours, "attention", wrong)


def restart_positions(monkeypatch, model):
    plain = ours.rope
    monkeypatch.setattr(ours, "rope", lambda x, cos, sin: plain(x, cos.roll(1, 0), sin.roll(1, 0)))


def drop_bias(monkeypatch, model, part=0):
    rows = (model.config.num_attention_heads + part) * model.config.head_dim if part else 0
    model.model.layers[-1].self_attn.qkv_proj.bias[rows: rows + model.config.head_dim] = 0


def drop_k_bias(monkeypatch, model):
    drop_bias(monkeypatch, model, part=1)


def drop_v_bias(monkeypatch, model):
    drop_bias(monkeypatch, model, part=model.config.num_key_value_heads)


def swap_gate_and_up(monkeypatch, model):
    weight = model.model.layers[0].mlp.gate_up_proj.weight
    weight.copy_(weight.roll(model.config.intermediate_size, 0))


@pytest.mark.parametrize("break_it", [drop_rope, zero_attention, look_ahead, interleave_heads, restart_positions, drop_bias,
                                      drop_k_bias, drop_v_bias, swap_gate_and_up])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parity_fails_when_the_model_is_broken(monkeypatch, break_it, dtype):
    """The parity check rejects a model without attention, RoPE, mask or one bias, or with its heads in another order."""
    with tempfile.TemporaryDirectory() as folder:
        theirs, path = random_qwen2(folder, 5, dtype=dtype, heads=6, kv_heads=2, hidden=48)
        mine = load_ours(path, dtype)
    check_parity((mine, theirs))
    break_it(monkeypatch, mine)
    with pytest.raises(AssertionError, match="differs by"):
        check_parity((mine, theirs))


def test_parity_fails_when_yarn_is_ignored():
    """The parity check rejects a model that reads a YaRN checkpoint as if it had none."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    with tempfile.TemporaryDirectory() as folder:
        theirs, path = random_qwen2(folder, 3, dtype=torch.float32, rope_parameters=yarn)
        mine = load_ours(path)
    mine.model.rotary_emb = ours.RotaryEmbedding(dataclasses.replace(mine.config, rope_scaling=None), "cpu")
    with pytest.raises(AssertionError, match="rotary_emb differs by"):
        check_parity((mine, theirs))


@pytest.mark.parametrize(("break_it", "module"), [
    (drop_rope, "model.layers.0.self_attn.o_proj input"), (drop_k_bias, "model.layers.1.self_attn.qkv_proj"),
    (swap_gate_and_up, "model.layers.0.mlp.gate_up_proj"),
])
def test_the_first_module_that_differs_is_named(monkeypatch, break_it, module):
    """A comparison names the module where the mistake is, not the ones after it that suffer from it."""
    with tempfile.TemporaryDirectory() as folder:
        theirs, path = random_qwen2(folder, 5, dtype=torch.float64, heads=6, kv_heads=2, hidden=48)
        mine = load_ours(path, torch.float64)
    break_it(monkeypatch, mine)
    comparison = compare((mine, theirs), ids(0, 24))
    assert comparison.first_difference.name == module, f"it names {comparison.first_difference.name}"
    marked = [line for line in str(comparison).splitlines() if "<-" in line]
    assert len(marked) == 1 and marked[0].startswith(module), f"the table marks {marked}"


def test_nan_counts_as_a_difference():
    """A NaN anywhere is a difference, though no comparison with NaN is true."""
    mine, theirs = models(6, torch.float64)
    mine.model.norm.weight[0], kept = math.nan, mine.model.norm.weight[0].clone()
    first = compare((mine, theirs), ids(0, 4)).first_difference
    mine.model.norm.weight[0] = kept
    assert first is not None and first.name == "model.norm", f"the first difference is {first}"


def test_compare_runs_from_the_command_line(capsys):
    """`python -m minivllm.compare`, without a model, compares the embedded checkpoint and ends with the verdict."""
    assert main(["--prompt", "Once upon a time"]) == 0, "the embedded checkpoint differs from Hugging Face"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("model.embed_tokens"), f"the first line is {lines[0]}"
    assert "equals Hugging Face" in lines[-1], f"the last line is {lines[-1]}"


# ---- RoPE ----


@settings(max_examples=examples(200))
@given(seed=st.integers(0, 9999), half=st.integers(1, 32), near=st.integers(0, 100), distance=st.integers(0, 100))
def test_rope_sees_only_the_distance(seed, half, near, distance):
    """The product of a rotated query and key depends on how far apart they stand, not on where."""
    q, k = torch.randn(2, 1, 1, 2 * half, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    angle = torch.rand(half, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1)).repeat(2)

    def product(query_position: int, key_position: int) -> float:
        turned = [ours.rope(x, (angle * position).cos()[None], (angle * position).sin()[None])
                  for x, position in ((q, query_position), (k, key_position))]
        return float((turned[0] * turned[1]).sum())

    here, there = product(distance, 0), product(near + distance, near)
    assert abs(here - there) < 1e-9, f"distance {distance}: {here} at 0, {there} at {near}"


@settings(max_examples=examples(50))
@given(seed=st.integers(0, 9999), half=st.integers(1, 16), heads=st.integers(1, 4), tokens=st.integers(1, 5))
def test_rope_turns_each_pair_as_one_complex_number(seed, half, heads, tokens):
    """The pair (i, i + D/2) of every head turns like a complex number by its token's i-th angle."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, heads, 2 * half, dtype=torch.float64, generator=generator)
    angles = torch.randn(tokens, half, dtype=torch.float64, generator=generator)
    turned = ours.rope(x, angles.repeat(1, 2).cos(), angles.repeat(1, 2).sin())
    spec = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    error = (turned - torch.cat((spec.real, spec.imag), -1)).abs().max().item()
    assert error < 1e-12, f"{tokens} tokens, {heads} heads of {2 * half}: a pair is off by {error:.1e}"


def test_rotate_half_is_a_quarter_turn():
    """A quarter turn takes (a, b) to (-b, a)."""
    turned = ours.rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
    assert turned == [-3.0, -4.0, 1.0, 2.0], f"(1, 2 | 3, 4) turns to {turned} instead of [-3.0, -4.0, 1.0, 2.0]"


@settings(max_examples=examples(150))
@given(factor=st.floats(1, 64), original=st.integers(16, 65536), head=st.integers(1, 64), theta=st.floats(1e3, 1e7),
       options=st.fixed_dictionaries({}, optional={
           "beta_fast": st.floats(2, 64), "beta_slow": st.floats(0.1, 2), "truncate": st.booleans(),
           "attention_factor": st.floats(0.5, 2), "mscale": st.floats(0.1, 2), "mscale_all_dim": st.floats(0.1, 2)}))
def test_yarn_frequencies_equal_transformers(factor, original, head, theta, options):
    """YaRN's frequencies and its factor are transformers', bit for bit, whatever the options."""
    scaling = options | {"rope_type": "yarn", "rope_theta": theta, "factor": factor}
    scaling["original_max_position_embeddings"] = original
    raw = RAW_CONFIG | {"max_position_embeddings": original, "head_dim": 2 * head, "hidden_act": "silu", "model_type": "qwen2"}
    mine, my_factor = ours.rope_frequencies(ModelConfig.from_dict(raw | {"rope_parameters": scaling}))
    theirs = Qwen2RotaryEmbedding(Qwen2Config(**raw, rope_parameters=dict(scaling)))
    assert torch.equal(mine, theirs.inv_freq), f"{scaling}: frequencies differ by {(mine - theirs.inv_freq).abs().max():.1e}"
    assert my_factor == theirs.attention_scaling, f"{scaling}: the factor is {my_factor}, not {theirs.attention_scaling}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_angles_are_float32_whatever_the_model(dtype):
    """Positions far out keep their own angles in half types, because only cos and sin are rounded."""
    mine, theirs = models(7, dtype, layers=1)
    positions = torch.tensor([0, 256, 257, 32_767])
    expected = theirs.model.rotary_emb(torch.zeros(1, dtype=dtype), positions[None])
    for name, mine_, theirs_ in zip(("cos", "sin"), mine.model.rotary_emb(positions, dtype), expected):
        assert mine_.dtype == dtype and torch.equal(mine_, theirs_[0]), f"{name} differs from Hugging Face's in {dtype}"


# ---- Attention ----


def attention_spec(q, k, v, mask):
    """One query at a time, in plain Python."""
    result = torch.zeros_like(q)
    group = q.shape[0] // k.shape[0]
    for head, query in ((h, t) for h in range(q.shape[0]) for t in range(q.shape[1])):
        slots = [s for s in range(k.shape[1]) if mask[query, s]]
        weights = [math.exp(float(q[head, query] @ k[head // group, s]) / math.sqrt(q.shape[2])) for s in slots]
        for slot, weight in zip(slots, weights):
            result[head, query] += weight / sum(weights) * v[head // group, slot]
    return result


def random_attention(seed: int, heads: int, kv_heads: int, queries: int, slots: int, dim: int, dtype=torch.float64):
    """q, k, v, and a mask in which every query may look at something."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(heads, queries, dim, generator=generator, dtype=torch.float64).to(dtype)
    k, v = torch.randn(2, kv_heads, slots, dim, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(queries, slots, generator=generator) < 0.5
    mask[torch.arange(queries), torch.randint(slots, (queries,), generator=generator)] = True
    return q, k, v, mask


@settings(max_examples=examples(60))
@given(seed=st.integers(0, 9999), kv_heads=st.integers(1, 3), group=st.integers(1, 7), queries=st.integers(1, 5),
       slots=st.integers(1, 9), dim=st.integers(1, 9))
def test_t30_attention_equals_the_plain_sum(seed, kv_heads, group, queries, slots, dim):
    """Each query head gets the softmax-weighted mean over the key/value head of its group, and over nothing that is masked."""
    q, k, v, mask = random_attention(seed, kv_heads * group, kv_heads, queries, slots, dim)
    error = (ours.attention(q, k, v, mask) - attention_spec(q, k, v, mask)).abs().max().item()
    assert error < 1e-12, f"{kv_heads * group} heads over {kv_heads}, {queries} queries, {slots} slots: off by {error:.1e}"


@settings(max_examples=examples(60))
@given(seed=st.integers(0, 9999), batch=st.integers(1, 4), queries=st.integers(1, 4), slots=st.integers(1, 9))
def test_attention_of_a_batch_is_that_of_its_rows(seed, batch, queries, slots):
    """Attention over a batch gives each row what it gets alone, with a mask of its own."""
    rows = [random_attention(seed + row, 6, 2, queries, slots, 4) for row in range(batch)]
    together = ours.attention(*(torch.stack(tensors) for tensors in zip(*rows)))
    for row, tensors in enumerate(rows):
        error = (together[row] - ours.attention(*tensors)).abs().max().item()
        assert error < 1e-12, f"row {row} of {batch} is off by {error:.1e}"


@settings(max_examples=examples(60))
@given(seed=st.integers(0, 9999), queries=st.integers(1, 4), used=st.integers(1, 5), unused=st.integers(1, 5),
       dtype=st.sampled_from(["float64", "float32", "bfloat16", "float16"]))
def test_t24_slots_that_nobody_may_read_leave_no_trace(seed, queries, used, unused, dtype):
    """Unwritten slots may hold NaN: masked ones change nothing, though 0 * NaN is NaN."""
    q, k, v, mask = random_attention(seed, 4, 2, queries, used, 8, getattr(torch, dtype))
    junk = torch.full((2, unused, 8), math.nan, dtype=k.dtype)
    longer = torch.cat((mask, torch.zeros(queries, unused, dtype=torch.bool)), dim=1)
    clean, dirty = ours.attention(q, k, v, mask), ours.attention(q, torch.cat((k, junk), 1), torch.cat((v, junk), 1), longer)
    assert dirty.isfinite().all(), f"{unused} unwritten slots beside {used}: the output is not finite"
    assert torch.allclose(dirty.double(), clean.double(), atol=1e-2 if v.element_size() == 2 else 1e-6), "the output changed"


def test_a_query_that_may_look_at_nothing_is_finite():
    """A padded row, which may look at nothing, gets numbers and no NaN."""
    q, k, v, mask = random_attention(0, 4, 2, 3, 5, 8)
    mask[1] = False
    assert ours.attention(q, k, v, mask).isfinite().all(), "the padded row is not finite"
    assert ours.attention(q, k * math.nan, v * math.nan, mask & False).isfinite().all(), "an all-padded step is not finite"


class LargestTensor(TorchDispatchMode):
    """Notes the most numbers that any operation's result holds in memory of its own."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_grouped_queries_copy_no_keys():
    """Seven query heads share one key/value head without seven copies of it."""
    q, k, v, mask = (tensor.clone() for tensor in random_attention(0, 14, 2, 1, 512, 64))
    with LargestTensor() as largest:
        ours.attention(q, k, v, mask)
    assert largest.numbers <= k.numel(), f"{largest.numbers} numbers were written at once; K holds {k.numel()}"


# ---- The module as a whole ----


def test_the_past_does_not_change():
    """What a token gets does not depend on the tokens after it."""
    mine, _ = models(8, torch.float64)
    input_ids = ids(0, 20)
    whole, prefix = our_logits(mine, input_ids), our_logits(mine, input_ids[:13])
    error = relative_error(prefix, whole[:13])
    assert error < 1e-12, f"the first 13 of 20 positions differ by {error:.1e}"


def test_a_tied_head_is_the_embedding():
    """A tied head is the same memory as the embedding and an untied one is not."""
    for tie in (True, False):
        mine, _ = models(9, torch.float32, tie=tie)
        is_shared = mine.lm_head.weight.data_ptr() == mine.model.embed_tokens.weight.data_ptr()
        assert is_shared == tie, f"tie_word_embeddings={tie}, but shared={is_shared}"
        assert ("lm_head.weight" in dict(mine.named_parameters())) != tie


def test_no_step_records_gradients():
    """The model is for inference: no parameter asks for a gradient, and no output carries a graph."""
    mine, _ = models(9, torch.float32, tie=True)
    assert not our_logits(mine, ids(0, 3)).requires_grad


def test_one_cache_for_each_layer_is_required():
    """Too few or too many caches are an error and not a model with fewer layers."""
    mine, _ = models(9, torch.float32, tie=True)
    for num_caches in (1, 3):
        with pytest.raises(ValueError, match="zip"):
            mine(ids(0, 3), torch.arange(3), [ours.NoCache() for _ in range(num_caches)], SimpleNamespace(slot_mapping=None))


def test_t31_the_model_reads_its_shape_from_one_config():
    """Every size of the model comes from its config, none from a default elsewhere."""
    config = models(9, torch.float32, tie=True)[0].config
    config = dataclasses.replace(config, head_dim=10, num_attention_heads=6, hidden_size=20)
    layer = ours.Qwen2ForCausalLM(config, dtype=torch.float16, device="meta").model.layers[0]
    assert layer.self_attn.qkv_proj.weight.shape == ((6 + 2 * 2) * 10, 20), "rows q, k, v of qkv_proj"
    assert layer.self_attn.o_proj.weight.shape == (20, 60) and layer.mlp.gate_up_proj.weight.shape == (256, 20)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float16}
