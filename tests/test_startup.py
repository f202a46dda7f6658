"""Everything decided before the first request: sizes, defaults, arguments, and errors that say the way out."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from test_engine import greedy, model_and_folder

from minivllm import LLM
from minivllm.config import EngineConfig, ModelConfig
from minivllm.engine_args import engine_config_from_kwargs
from minivllm.exceptions import CheckpointError, UnsupportedError, ValidationError
from minivllm.generation_config import read_generation_config
from minivllm.memory import kv_bytes_per_block
from minivllm.startup import decide_device, decide_sizes


def model_config() -> ModelConfig:
    return ModelConfig.from_folder(model_and_folder()[1])


def sizes(**knobs) -> EngineConfig:
    return decide_sizes(EngineConfig(**knobs), model_config(), torch.float32, torch.device("cpu"))[0]


def test_the_pool_is_the_memory_divided_by_the_bytes_of_a_block():
    """kv_cache_memory_bytes gives exactly as many blocks as fit."""
    block_bytes = kv_bytes_per_block(model_config(), 16, torch.float32)
    assert block_bytes == 2 * 2 * 2 * 8 * 4 * 16, "K and V x layers x KV heads x head size x bytes x slots"
    assert sizes(kv_cache_memory_bytes=10 * block_bytes + 1, max_model_len=64).num_blocks == 10


def test_a_length_nobody_asked_for_is_lowered_and_one_asked_for_stays():
    """A pool too small for the model's context lowers max_model_len only when it was not given."""
    assert sizes(num_blocks=5, block_size=4).max_model_len == 17, "4 blocks of 4 slots, and a last token without KV"
    assert sizes(num_blocks=5, block_size=4, max_model_len=100).max_model_len == 100


def test_the_pool_is_never_larger_than_all_requests_at_full_length():
    """However much memory is free, the pool holds at most max_num_seqs requests of max_model_len tokens."""
    config = sizes(max_num_seqs=3, max_model_len=100, block_size=16)
    assert config.num_blocks == 3 * 7 + 1


def test_without_chunked_prefill_the_budget_holds_the_longest_prompt():
    """Turning chunking off raises the default budget to max_model_len, and a budget below it is refused."""
    assert sizes(enable_chunked_prefill=False).max_num_batched_tokens >= 512
    with pytest.raises(ValidationError, match="splits prompts"):
        EngineConfig(enable_chunked_prefill=False, long_prefill_token_threshold=8)
    with pytest.raises(ValidationError, match="could never run"):
        EngineConfig(enable_chunked_prefill=False, max_num_batched_tokens=8, max_model_len=64)


@pytest.mark.parametrize(("knobs", "named"), [
    ({"block_size": 0}, "block_size"), ({"num_blocks": 1}, "num_blocks"), ({"max_num_seqs": 0}, "max_num_seqs"),
    ({"dtype": "int8"}, "dtype"), ({"gpu_memory_utilization": 0}, "gpu_memory_utilization"),
    ({"max_model_len": "64"}, "max_model_len"),
    ({"enable_prefix_caching": "yes"}, "enable_prefix_caching"), ({"attention_backend": "flash"}, "attention_backend"),
    ({"seed": -1}, "seed"),
])
def test_wrong_knobs_are_refused_by_name(knobs, named):
    """A knob outside its domain raises at once and is named."""
    with pytest.raises(ValidationError, match=named) as error:
        EngineConfig(**knobs)
    assert error.value.parameter == named


def test_a_context_beyond_the_model_is_refused():
    """max_model_len may not pass the positions that the model was made for."""
    with pytest.raises(ValidationError, match="beyond the 512 positions"):
        sizes(max_model_len=513)


def test_no_room_for_one_block_gives_advice():
    """A pool without a usable block is refused with the bytes that it would take."""
    with pytest.raises(ValidationError, match="no room for the KV cache"):
        sizes(kv_cache_memory_bytes=100)


def test_arguments_of_vllm_are_taken_or_refused_by_name():
    """vLLM's arguments work at the value that changes nothing; others are refused, and near misses are named."""
    config = engine_config_from_kwargs(model="m", tensor_parallel_size=1, trust_remote_code=True, num_gpu_blocks_override=9,
                                       enforce_eager=True, swap_space=0, gpu_memory_utilization=0.5)
    assert (config.num_blocks, config.enforce_eager) == (9, True)
    with pytest.raises(UnsupportedError, match="tensor_parallel_size=2"):
        engine_config_from_kwargs(tensor_parallel_size=2)
    with pytest.raises(UnsupportedError, match="quantization='awq'"):
        engine_config_from_kwargs(quantization="awq")
    with pytest.raises(ValidationError, match="did you mean `max_model_len`"):
        engine_config_from_kwargs(max_model_length=3)
    with pytest.raises(ValidationError, match="alias"):
        engine_config_from_kwargs(num_blocks=4, num_gpu_blocks_override=5)


def test_a_device_that_is_not_there_is_refused():
    """An unknown device, and CUDA without CUDA, are refused by name."""
    for asked in ("tpu", "cuda:x", "cuda:05", "cuda:٣", "cpu:", "meta"):
        with pytest.raises(ValidationError, match="device"):
            decide_device(asked)
    with pytest.raises(ValidationError, match="got 'cuda:1'; CUDA_VISIBLE_DEVICES chooses a GPU"):
        decide_device("cuda:1")
    assert decide_device("cpu:0").type == "cpu"


def copy_model(tmp_path, **generation_config):
    folder = tmp_path / "model"
    shutil.copytree(model_and_folder()[1], folder)
    (folder / "generation_config.json").write_text(json.dumps(generation_config))
    return folder


def test_generation_config_fills_what_a_caller_leaves_out(tmp_path):
    """generate() without params uses the checkpoint's defaults, `"none"` turns them off, EOS ids stay."""
    folder = copy_model(tmp_path, temperature=0.5, top_k=7, eos_token_id=[5, 6], max_new_tokens=11)
    llm = LLM(folder, skip_tokenizer_init=True, max_model_len=64)
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_k, params.max_tokens) == (0.5, 7, 11)
    assert llm.engine.eos_token_ids == (5, 6)
    off = LLM(folder, skip_tokenizer_init=True, max_model_len=64, generation_config="none")
    assert off.get_default_sampling_params().temperature == 1.0
    assert off.engine.eos_token_ids == (5, 6), "which tokens end a text is a fact about the model, not a default"


def test_a_wrong_generation_config_is_refused(tmp_path):
    """A file that is no JSON, or holds a value outside its domain, is named; so is a folder without one."""
    with pytest.raises(CheckpointError, match="temperature"):
        read_generation_config(copy_model(tmp_path, temperature=9), "auto", None)
    with pytest.raises(ValidationError, match="generation_config"):
        read_generation_config(tmp_path / "model", str(tmp_path), None)
    (tmp_path / "model" / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_generation_config(tmp_path / "model", "auto", None)


def test_the_report_says_what_was_decided(caplog):
    """The start-up report names weights, pool, longest request, sampling defaults, EOS ids and the chat template."""
    with caplog.at_level(logging.INFO, "minivllm"):
        llm = LLM(model_and_folder()[1], skip_tokenizer_init=True, num_blocks=9, block_size=4, max_model_len=16)
    assert "8 blocks x 4 slots = 32 tokens" in llm.engine.report
    assert "2.0 of them fit at once" in llm.engine.report, "a pool of 32 tokens holds two requests of 16"
    for word in ("weights", "sampling defaults", "EOS ids", "chat template", "attention", "ready in"):
        assert word in caplog.text, f"the report says nothing about {word}"


def test_random_weights_come_only_when_asked_for(tmp_path):
    """load_format="dummy" runs on a folder with only a config, and the same folder is refused without it."""
    shutil.copy(f"{model_and_folder()[1]}/config.json", tmp_path)
    llm = LLM(tmp_path, skip_tokenizer_init=True, load_format="dummy", max_model_len=32)
    assert len(llm.generate([[1, 2]], greedy(3), use_tqdm=False)[0].outputs[0].token_ids) == 3
    with pytest.raises(CheckpointError):
        LLM(tmp_path, skip_tokenizer_init=True)
