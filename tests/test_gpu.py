"""The same engine on a GPU, on the readable attention. Run with `pytest -m gpu` where there is one."""

from __future__ import annotations

import pytest
import torch
from test_engine import greedy, model_and_folder, prompts_of, tokens_of
from test_engine_parity import TIGHT, hf_greedy

from minivllm import LLM, SamplingParams
from minivllm.exceptions import ValidationError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")]


def make_llm(device: str, **knobs) -> LLM:
    knobs = {"max_model_len": 64, "block_size": 4, "num_blocks": 64, "dtype": "float64", **knobs}
    return LLM(model_and_folder()[1], skip_tokenizer_init=True, device=device, **knobs)


@pytest.mark.parametrize("knobs", [{}, TIGHT["engine"], {"block_size": 64, "num_blocks": 9}])
def test_tokens_on_the_gpu_equal_hugging_face(knobs):
    """In float64 the GPU gives Hugging Face's tokens, also chunked and preempted."""
    model, _ = model_and_folder()
    prompts = prompts_of(13, 9, 24, 22)
    ours = tokens_of(make_llm("cuda", **knobs).generate(prompts, greedy(10), use_tqdm=False))
    for index, (prompt, tokens) in enumerate(zip(prompts, ours)):
        assert tokens == hf_greedy(model, prompt, 10), f"request {index} on the GPU differs from Hugging Face on the CPU"


def test_a_seed_gives_the_same_tokens_on_both_devices():
    """Noise is a hash and not a generator: the GPU draws what the CPU draws."""
    prompts = prompts_of(5, 11, 3)
    params = [SamplingParams(temperature=1.1, top_k=30, top_p=0.9, min_p=0.01, seed=i, max_tokens=12, ignore_eos=True,
                             frequency_penalty=0.2, logit_bias={5: 2.0}, min_tokens=4) for i in range(3)]
    assert tokens_of(make_llm("cuda").generate(prompts, params, use_tqdm=False)) == tokens_of(
        make_llm("cpu").generate(prompts, params, use_tqdm=False))


def test_nothing_unreferenced_reaches_the_output():
    """With every slot of the pool poisoned with NaN beforehand, answers stay the same."""
    llm = make_llm("cuda")
    for cache in llm.engine.runner.kv_caches:
        cache.key_cache.fill_(float("nan"))
        cache.value_cache.fill_(float("nan"))
    torch.cuda.synchronize()  # the engine has a stream of its own
    prompts = prompts_of(9, 17)
    assert tokens_of(llm.generate(prompts, greedy(8), use_tqdm=False)) == tokens_of(
        make_llm("cpu").generate(prompts, greedy(8), use_tqdm=False))


def test_closing_gives_the_gpus_memory_back():
    """Ten engines in a row leave no memory allocated on the device, but for what CUDA's libraries keep since the first one. Starts
    between them that fail neither leave any nor keep the stream.
    """
    before, streams = None, set()
    for _ in range(11):
        with make_llm("cuda") as llm:
            llm.generate(prompts_of(5), greedy(2), use_tqdm=False)
            streams.add(llm.engine.runner.stream)
        before = before or torch.cuda.memory_allocated()
        with pytest.raises(ValidationError, match="standing"):  # found when the weights are loaded
            make_llm("cuda", attention_backend="standing")
    assert len(streams) == 1, "an engine takes the stream of a closed one, and what libraries keep for it"
    assert torch.cuda.memory_allocated() <= before + 2**20, "a closed engine keeps nothing on the device"


def test_the_embedded_model_speaks_in_bfloat16():
    """dtype="auto" on a GPU is the checkpoint's bfloat16, and a fact is still told right."""
    with LLM(max_model_len=256) as llm:
        answer = llm.chat([{"role": "user", "content": "What is 17 + 25?"}], greedy(24), use_tqdm=False)[0].outputs[0].text
        assert llm.engine.config.dtype == "bfloat16"
    assert "42" in answer, f"17 + 25 is 42, and the model says {answer!r}"
