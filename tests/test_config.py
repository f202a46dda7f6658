"""What config.json may say, what it must say, and how every refusal names its field; then the engine's knobs."""

from __future__ import annotations

import json

import pytest
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.config import EngineConfig, ModelConfig
from minivllm.exceptions import CheckpointError, UnsupportedError, ValidationError

# config.json of Qwen2.5-0.5B-Instruct, as published.
QWEN25_05B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}  # as Qwen2.5's model cards write it
# hidden, layers, heads, kv heads, intermediate
SHAPES = {
    "0.5B": (896, 24, 14, 2, 4864), "1.5B": (1536, 28, 12, 2, 8960), "3B": (2048, 36, 16, 2, 11008),
    "7B": (3584, 28, 28, 4, 18944), "14B": (5120, 48, 40, 8, 13824), "32B": (5120, 64, 40, 8, 27648),
    "72B": (8192, 80, 64, 8, 29568),
}


def changed(**fields: object) -> dict[str, object]:
    """The published config with these fields; None removes one."""
    return {name: value for name, value in (QWEN25_05B | fields).items() if value is not None}


@pytest.mark.parametrize("size", SHAPES)
def test_every_dense_shape_is_read_as_published(size):
    """Every published dense size gives its own heads, and a head size of 64 or 128."""
    hidden, layers, heads, kv_heads, inner = SHAPES[size]
    config = ModelConfig.from_dict(changed(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                                           num_key_value_heads=kv_heads, intermediate_size=inner))
    assert config.head_dim == (64 if size == "0.5B" else 128), f"{size} has heads of {config.head_dim}"
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (hidden, layers, heads)
    assert (config.num_key_value_heads, config.intermediate_size) == (kv_heads, inner)
    assert config.max_model_len == 32768 and config.torch_dtype == "bfloat16" and config.rope_scaling is None


def test_a_token_of_qwen25_05b_keeps_12288_bytes():
    """Grouped queries keep 12,288 bytes of keys and values for a token, a seventh of one pair for each query head."""
    config = ModelConfig.from_dict(QWEN25_05B)
    kv_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    assert kv_bytes == 12_288, f"a token takes {kv_bytes} bytes"


def test_both_spellings_of_rope_mean_the_same():
    """The old and the new way to write rope_theta and dtype give one config."""
    new = changed(rope_theta=None, torch_dtype=None, dtype="bfloat16",
                  rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"})
    assert ModelConfig.from_dict(new) == ModelConfig.from_dict(QWEN25_05B), "the two spellings differ"


@pytest.mark.parametrize("rope", [
    {}, {"rope_parameters": None}, {"rope_parameters": {"rope_type": "default"}}, {"rope_scaling": YARN},
    {"rope_parameters": YARN},
])
def test_t45_a_missing_rope_theta_is_an_error_and_no_default(rope):
    """A config that does not say rope_theta is refused: with a wrong one the model still talks, only worse."""
    with pytest.raises(CheckpointError, match="`rope_theta`"):
        ModelConfig.from_dict(changed(rope_theta=None, **rope))


@pytest.mark.parametrize("name", [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings", "hidden_act",
])
@pytest.mark.parametrize("value", ["absent", None, "896", -1, 0, [1]])
def test_t45_a_missing_or_senseless_field_is_named(name, value):
    """A field that is absent, or is not what it must be, is named in the error."""
    raw = dict(QWEN25_05B) | {name: value}
    if value == "absent":
        del raw[name]
    with pytest.raises((CheckpointError, UnsupportedError), match=f"`{name}`"):
        ModelConfig.from_dict(raw)


def test_true_is_no_number():
    """JSON's true is not taken for the integer 1."""
    with pytest.raises(CheckpointError, match=r"`num_hidden_layers` must be a positive integer, got True"):
        ModelConfig.from_dict(changed(num_hidden_layers=True))


@pytest.mark.parametrize("rope", [
    {"rope_scaling": YARN}, {"rope_scaling": {**YARN, "rope_type": "yarn"}},
    {"rope_theta": None, "rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 1000000.0}},
    {"rope_theta": None, "rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
])
def test_every_spelling_of_yarn_reaches_131072_positions(rope):
    """YaRN with a factor of 4 over 32,768 positions reaches 131,072, however it is written."""
    config = ModelConfig.from_dict(changed(**rope))
    assert config.max_model_len == 131_072, f"{rope} reaches {config.max_model_len}"
    assert config.rope_theta == 1000000.0
    assert config.rope_scaling is not None and config.rope_scaling["rope_type"] == "yarn"


def test_yarn_does_not_shorten_a_context():
    """The longer of max_position_embeddings and factor times original counts."""
    config = ModelConfig.from_dict(changed(max_position_embeddings=200_000, rope_scaling=YARN))
    assert config.max_model_len == 200_000


@pytest.mark.parametrize(("field", "value"), [
    ("factor", None), ("factor", 0.5), ("factor", "4"), ("original_max_position_embeddings", None), ("beta_fast", -1),
    ("attention_factor", "x"), ("truncate", 1), ("partial_rotary_factor", 0.5), ("low_freq_factor", 1.0),
])
def test_yarn_with_a_wrong_field_is_refused(field, value):
    """A YaRN that lacks a field, has a senseless one, or has one that YaRN does not know is refused by the field's name."""
    with pytest.raises(CheckpointError, match=field):
        ModelConfig.from_dict(changed(rope_scaling={**YARN, field: value}))


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "llama3", "longrope", "mrope", 7])
def test_other_kinds_of_rope_are_refused_by_name(rope_type):
    """A RoPE that is not implemented is refused, and the error lists those that are."""
    with pytest.raises(UnsupportedError, match=f"{rope_type}.*supported: default, yarn"):
        ModelConfig.from_dict(changed(rope_scaling={"type": rope_type, "factor": 2.0}))


def test_a_scaling_without_a_type_is_refused():
    """A factor that no type of RoPE claims is not dropped in silence."""
    with pytest.raises(CheckpointError, match="factor"):
        ModelConfig.from_dict(changed(rope_scaling={"factor": 2.0}))


def test_two_values_of_rope_theta_are_refused():
    """A config that gives rope_theta twice, differently, is refused."""
    with pytest.raises(CheckpointError, match="two values of `rope_theta`"):
        ModelConfig.from_dict(changed(rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}))


@pytest.mark.parametrize(("fields", "named"), [
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"layer_types": ["full_attention"] * 23 + ["sliding_attention"]}, "sliding_attention"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config.*awq"),
    ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
    ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "LlamaForCausalLM.*Qwen2ForCausalLM"),
    ({"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForSequenceClassification.*Qwen2ForCausalLM"),
    ({"architectures": ["LlamaForCausalLM"], "model_type": None}, "LlamaForCausalLM.*Qwen2ForCausalLM"),
    ({"architectures": None, "model_type": "qwen2_moe"}, "qwen2_moe.*Qwen2ForCausalLM"),
    ({"model_type": "qwen3"}, "qwen3.*Qwen2ForCausalLM"),
])
def test_what_would_change_the_result_is_refused_by_name(fields, named):
    """A setting that changes what the model computes, and is not implemented, is refused and never ignored."""
    with pytest.raises(UnsupportedError, match=named):
        ModelConfig.from_dict(changed(**fields))


def test_a_config_without_an_architecture_is_judged_by_its_model_type():
    """`architectures` may be absent if `model_type` says qwen2; without both nothing is assumed."""
    assert ModelConfig.from_dict(changed(architectures=None)).architecture == "Qwen2ForCausalLM"
    with pytest.raises(CheckpointError, match="neither `architectures` nor `model_type`"):
        ModelConfig.from_dict(changed(architectures=None, model_type=None))


def test_t30_head_size_comes_from_the_config_else_from_the_hidden_size():
    """A head size in the config counts; without one the hidden size must divide by the heads."""
    assert ModelConfig.from_dict(changed(head_dim=128)).head_dim == 128
    assert ModelConfig.from_dict(QWEN25_05B | {"head_dim": None}).head_dim == 64
    with pytest.raises(CheckpointError, match="hidden_size=896 is not a multiple of num_attention_heads=15"):
        ModelConfig.from_dict(changed(num_attention_heads=15, num_key_value_heads=3))


@pytest.mark.parametrize(("fields", "named"), [
    ({"num_key_value_heads": 4}, "num_attention_heads=14 is not a multiple of num_key_value_heads=4"),
    ({"head_dim": 63}, "head_dim=63 is odd"),
    ({"torch_dtype": "int8"}, "torch_dtype.*int8"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
])
def test_a_contradiction_is_refused(fields, named):
    """Numbers that cannot describe a model are refused with the numbers."""
    with pytest.raises(CheckpointError, match=named):
        ModelConfig.from_dict(changed(**fields))


@pytest.mark.parametrize("content", [None, b"{", b"[1]", b"\xff\xfe", b""])
def test_an_unreadable_config_names_the_file(tmp_path, content):
    """A config.json that is absent, broken or no object is an error that names the path."""
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


FIELDS = st.sampled_from([*QWEN25_05B, "rope_scaling", "rope_parameters", "head_dim", "quantization_config", "layer_types"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("yarn")
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.sampled_from(list(YARN)), SCALARS)


@settings(max_examples=examples(300))
@given(st.dictionaries(FIELDS, VALUES, max_size=3))
def test_no_config_ends_in_anything_but_a_model_or_a_typed_error(fields):
    """Whatever a config holds, the answer is a config or an error of ours, never a TypeError deep inside."""
    raw = json.loads(json.dumps(QWEN25_05B | fields))
    try:
        config = ModelConfig.from_dict(raw)
    except (CheckpointError, UnsupportedError):
        return
    assert config.max_model_len > 0, f"{fields} gives a context of {config.max_model_len}"


@pytest.mark.parametrize(("name", "value"), [
    ("dtype", "int8"), ("attention_backend", "magic"), ("load_format", "gguf"), ("max_num_seqs", 0), ("max_num_seqs", True),
    ("max_num_seqs", None), ("max_model_len", 0), ("block_size", 0), ("num_blocks", 1), ("seed", -1),
    ("gpu_memory_utilization", 0), ("gpu_memory_utilization", 1.5), ("enforce_eager", 1), ("async_scheduling", 1),
    ("max_logprobs", -2),
])
def test_a_wrong_knob_is_named(name, value):
    """An engine setting out of range is refused with its name and value, before anything is allocated."""
    with pytest.raises(ValidationError, match=name) as caught:
        EngineConfig(**{name: value})
    assert (caught.value.parameter, caught.value.value) == (name, value), f"the error names {caught.value.parameter}"


def test_a_budget_below_the_longest_prompt_needs_chunking():
    """Without chunked prefill a token budget below max_model_len is refused; with it, it is fine."""
    with pytest.raises(ValidationError, match="max_num_batched_tokens=64 is smaller than max_model_len=128"):
        EngineConfig(max_num_batched_tokens=64, max_model_len=128, enable_chunked_prefill=False)
    assert EngineConfig(max_num_batched_tokens=64, max_model_len=128).enable_chunked_prefill
