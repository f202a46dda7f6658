"""The first promise, end to end: whatever the batch, blocks, chunks, preemptions or cache hits, the tokens are Hugging Face's."""

from __future__ import annotations

import functools
import tempfile

import pytest
import torch
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_qwen2

from minivllm import LLM, SamplingParams
from minivllm import attention as attention_module

HEADS = [(4, 4), (4, 2), (4, 1), (14, 2), (6, 3)]
MAX_MODEL_LEN = 128


@functools.lru_cache(maxsize=24)
def oracle(seed: int, heads: int, kv_heads: int, layers: int, tie: bool, dtype: str):
    """A random Qwen2 as Hugging Face runs it, and the folder that we load."""
    folder = tempfile.mkdtemp()
    model, folder = random_qwen2(folder, seed, dtype=getattr(torch, dtype), layers=layers, hidden=heads * 8, heads=heads,
                                 kv_heads=kv_heads, vocab=97, initializer_range=0.2, tie=tie)
    return model.eval(), str(folder)


def hf_greedy(model, prompt: list[int], num_tokens: int) -> list[int]:
    """What `generate` says with its hidden defaults neutralised."""
    output = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
                            max_new_tokens=num_tokens, min_new_tokens=num_tokens, repetition_penalty=1.0, eos_token_id=None,
                            pad_token_id=0)
    return output[0, len(prompt):].tolist()


@st.composite
def workloads(draw):
    """Sizes only: a model, prompts of 1 token to 4 blocks (some with a shared beginning), and a pool that may be too small."""
    heads, kv_heads = draw(st.sampled_from(HEADS))
    block_size = draw(st.integers(1, 16))
    lengths = draw(st.lists(st.integers(1, min(4 * block_size, 48)), min_size=1, max_size=5))
    max_tokens = draw(st.integers(1, 12))
    longest = max(lengths) + max_tokens - 1  # positions with KV
    smallest_pool = -(-longest // block_size) + 1
    return {
        "model": (draw(st.integers(0, 1)), heads, kv_heads, draw(st.integers(1, 2)), draw(st.booleans())),
        "dtype": draw(st.sampled_from(["float64", "float32"])),
        "lengths": lengths, "shared": draw(st.integers(0, 24)), "max_tokens": max_tokens, "seed": draw(st.integers(0, 999)),
        "engine": {
            "block_size": block_size, "num_blocks": smallest_pool + draw(st.integers(0, 8)),
            "max_num_batched_tokens": draw(st.integers(1, 40)), "max_num_seqs": draw(st.integers(1, 5)),
            "enable_prefix_caching": draw(st.booleans()), "long_prefill_token_threshold": draw(st.sampled_from([0, 0, 3])),
        },
    }


def make_prompts(lengths: list[int], shared: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 97, (len(lengths) + 1, 48), generator=generator).tolist()
    return [(tokens[0][:shared] + own)[:length] for own, length in zip(tokens[1:], lengths)]


def check_workload(workload) -> LLM:
    model, folder = oracle(*workload["model"], workload["dtype"])
    prompts = make_prompts(workload["lengths"], workload["shared"], workload["seed"])
    llm = LLM(folder, skip_tokenizer_init=True, dtype=workload["dtype"], max_model_len=MAX_MODEL_LEN, device="cpu",
              **workload["engine"])
    for prompt in prompts:
        llm.enqueue([prompt], SamplingParams(temperature=0, max_tokens=workload["max_tokens"], ignore_eos=True))
    ours = llm.wait_for_completion(use_tqdm=False)
    llm.engine.kv_cache_manager.check()
    for index, (prompt, output) in enumerate(zip(prompts, ours)):
        expected, tokens = hf_greedy(model, prompt, workload["max_tokens"]), output.outputs[0].token_ids
        first = next((i for i, pair in enumerate(zip(tokens, expected)) if pair[0] != pair[1]), None)
        assert tokens == expected, (
            f"request {index} differs at token {first}: ours {tokens}, Hugging Face {expected} "
            f"(prompt of {len(prompt)} tokens, block size {workload['engine']['block_size']})")
    return llm


@settings(max_examples=examples(200))
@given(workloads())
def test_tokens_equal_hugging_face_under_any_blocks_chunks_and_preemptions(workload):
    """The engine's greedy tokens are Hugging Face's for every shape, block size, pool, budget and cache setting."""
    llm = check_workload(workload)
    assert llm.engine.kv_cache_manager.usage == 0, "when all requests have ended, no block is in use"
    llm.close()


def test_t42_the_oracle_has_no_hidden_repetition_penalty():
    """A penalty in Hugging Face's generation_config does not reach the oracle; asked for openly, both apply the same one."""
    model, folder = oracle(0, 4, 2, 2, False, "float64")
    prompt = make_prompts([20], 0, 5)[0]
    plain = hf_greedy(model, prompt, 16)
    model.generation_config.repetition_penalty = 1.5
    try:
        hidden = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16, min_new_tokens=16, eos_token_id=None,
                                pad_token_id=0)[0, 20:].tolist()
        assert hidden != plain, "a penalty of 1.5 should change this answer, or the test shows nothing"
        assert hf_greedy(model, prompt, 16) == plain, "the oracle must not follow generation_config"
    finally:
        model.generation_config.repetition_penalty = 1.0
    llm = LLM(folder, skip_tokenizer_init=True, dtype="float64", max_model_len=MAX_MODEL_LEN, device="cpu", num_blocks=20)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, repetition_penalty=1.5)
    assert llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids == hidden, "our penalty is Hugging Face's"


TIGHT = {
    "model": (0, 4, 2, 2, False), "dtype": "float64", "lengths": [13, 9, 30, 22], "shared": 8, "max_tokens": 10, "seed": 1,
    "engine": {"block_size": 4, "num_blocks": 14, "max_num_batched_tokens": 7, "max_num_seqs": 4, "enable_prefix_caching": True,
               "long_prefill_token_threshold": 0},
}


def test_the_tight_workload_meets_every_edge_at_once():
    """The workload that the broken models below are run on preempts, chunks and hits the cache, and equals Hugging Face."""
    stats = check_workload(TIGHT).stats
    assert stats.num_preemptions > 0, "the pool should be too small for all at once"
    assert stats.prefix_cache_hits > 0, "prompts with one beginning should share its blocks"


@pytest.mark.parametrize("broken", ["attention zeroed", "one block lost", "RoPE dropped", "slots shifted"])
def test_the_parity_test_can_fail(broken, monkeypatch):
    """A model broken on purpose no longer gives Hugging Face's tokens, so equality above means something."""
    import minivllm.model as model_module

    paged = attention_module.PagedAttention
    original_attend, original_write = paged.attend, paged.write
    if broken == "attention zeroed":
        monkeypatch.setattr(paged, "attend", lambda self, q, metadata: torch.zeros_like(q))
    elif broken == "one block lost":
        def attend(self, q, metadata):
            metadata.block_table[:, 0] = 0
            return original_attend(self, q, metadata)
        monkeypatch.setattr(paged, "attend", attend)
    elif broken == "RoPE dropped":
        monkeypatch.setattr(model_module, "rope", lambda x, cos, sin: x)
    else:
        monkeypatch.setattr(paged, "write", lambda self, k, v, slots: original_write(self, k, v, slots.roll(1)))
    with pytest.raises(AssertionError, match="differs at token"):
        check_workload(TIGHT)
