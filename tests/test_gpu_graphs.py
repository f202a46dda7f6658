"""Compiled decode attention and CUDA graphs: the same tokens as the readable rung and as Hugging Face. `pytest -m gpu`."""

from __future__ import annotations

import functools
import tempfile

import pytest
import torch
from test_engine import greedy, prompts_of, tokens_of
from test_engine_parity import hf_greedy
from tiny_models import random_qwen2

from minivllm import LLM, SamplingParams
from minivllm.cuda_graphs import bucket_sizes


@pytest.mark.parametrize("most", [1, 2, 3, 17, 64, 65, 200, 256, 1000])
def test_t32_every_batch_size_has_a_bucket_and_no_bucket_is_too_large(most):
    """For any max_num_seqs the buckets cover 1..max_num_seqs, and the largest is max_num_seqs."""
    buckets = bucket_sizes(most)
    assert buckets == sorted(set(buckets)) and buckets[-1] == most, f"buckets of {most}: {buckets}"
    assert len(bucket_sizes(256)) <= 13, "each bucket costs a compilation at start"


@functools.lru_cache(maxsize=1)
def model_and_folder():
    """14 query heads on 2 KV heads of 16 numbers: a group of 7, as in Qwen2.5-0.5B."""
    model, folder = random_qwen2(tempfile.mkdtemp(), 5, dtype=torch.float32, layers=2, hidden=224, heads=14, kv_heads=2, vocab=97,
                                 initializer_range=0.2)
    return model.eval(), str(folder)


def make_llm(backend: str = "flex_attention", **knobs) -> LLM:
    knobs = {"max_model_len": 256, "block_size": 16, "num_blocks": 200, "max_num_seqs": 20, "dtype": "float32", **knobs}
    return LLM(model_and_folder()[1], skip_tokenizer_init=True, device="cuda", attention_backend=backend, **knobs)


@functools.lru_cache(maxsize=1)
def graphed() -> LLM:
    return make_llm()


@functools.lru_cache(maxsize=1)
def readable() -> LLM:
    return make_llm("paged_gather")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
class TestOnTheDevice:
    def test_tokens_equal_hugging_face_at_every_batch_size(self):
        """Batches of 1 to 17 requests, so every bucket and every padding, give Hugging Face's tokens in float32."""
        model, _ = model_and_folder()
        prompts = prompts_of(*range(3, 60, 3)[:17])
        expected = [hf_greedy(model, prompt, 12) for prompt in prompts]
        for count in (1, 2, 3, 4, 5, 8, 9, 15, 16, 17):
            ours = tokens_of(graphed().generate(prompts[:count], greedy(12), use_tqdm=False))
            assert ours == expected[:count], f"a batch of {count} on CUDA graphs differs from Hugging Face"

    def test_t33_a_small_batch_after_a_large_one_sees_nothing_of_it(self):
        """8 requests and then 5 through the same bucket give what each batch gives on the readable rung."""
        for count, seed in ((8, 1), (5, 2), (7, 3), (1, 4)):
            prompts = prompts_of(*range(20, 20 + count), seed=seed)
            outputs = [tokens_of(llm.generate(prompts, greedy(40), use_tqdm=False)) for llm in (graphed(), readable())]
            assert outputs[0] == outputs[1], f"a batch of {count} after a larger one differs from the readable rung"

    def test_t24_poisoned_memory_reaches_no_output(self):
        """With every block but the null block full of NaN beforehand, answers stay the same."""
        prompts = prompts_of(9, 33, 17)
        expected = tokens_of(graphed().generate(prompts, greedy(20), use_tqdm=False))
        graphed().reset_prefix_cache()
        for cache in graphed().engine.runner.kv_caches:
            for tensor in (cache.key_cache, cache.value_cache):
                tensor[:, cache.block_size:].fill_(float("nan"))
        assert tokens_of(graphed().generate(prompts, greedy(20), use_tqdm=False)) == expected

    def test_t35_nothing_is_compiled_after_warm_up(self):
        """Batches of any size, prompts of any length, sampled or greedy: no compilation once the engine is ready."""
        llm = graphed()
        llm.generate(prompts_of(5, 6), greedy(3), use_tqdm=False)  # the readable prefill has a first time too
        torch._dynamo.utils.counters.clear()
        for count in (1, 2, 3, 6, 11, 20):
            params = [SamplingParams(temperature=index % 2, seed=index, max_tokens=6, ignore_eos=True) for index in range(count)]
            llm.generate(prompts_of(*range(7, 7 + count), seed=count), params, use_tqdm=False)
        frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert frames == 0, f"{frames} graphs were compiled after warm-up"

    def test_t36_warming_up_leaves_nothing_behind(self):
        """A fresh engine has counted nothing, holds nothing and has cached nothing."""
        llm = make_llm(max_num_seqs=2)
        stats = llm.stats
        assert (stats.num_steps, stats.num_blocks_allocated, stats.prefix_cache_queries) == (0, 0, 0)
        assert llm.engine.kv_cache_manager.usage == 0
        llm.close()

    def test_sampling_in_the_graph_draws_what_the_readable_rung_draws(self):
        """Seeded requests, plain and with cut-offs and penalties in one batch, get the readable rung's tokens."""
        prompts = prompts_of(5, 9, 14, 7)
        plain = [SamplingParams(temperature=0.5 + index / 4, seed=index, max_tokens=16, ignore_eos=True) for index in range(4)]
        mixed = [*plain[:2], SamplingParams(temperature=1, top_k=9, top_p=0.8, seed=8, max_tokens=16, ignore_eos=True),
                 SamplingParams(temperature=0.9, repetition_penalty=1.3, seed=9, max_tokens=16, ignore_eos=True, logprobs=2)]
        for params in (plain, mixed, plain):
            outputs = [tokens_of(llm.generate(prompts, params, use_tqdm=False)) for llm in (graphed(), readable())]
            assert outputs[0] == outputs[1], "sampled tokens differ between graph and readable rung"

    def test_preemption_and_joining_requests_do_not_confuse_the_rows(self):
        """On a pool too small for all, with requests joining and leaving, tokens equal the readable rung's."""
        knobs = {"num_blocks": 14, "max_num_batched_tokens": 48, "max_num_seqs": 6, "max_model_len": 128}
        prompts = prompts_of(30, 9, 44, 21, 5, 60, 13)
        params = [greedy(count) for count in (40, 12, 30, 50, 3, 25, 33)]
        outputs = []
        for backend in ("flex_attention", "paged_gather"):
            llm = make_llm(backend, **knobs)
            outputs.append(tokens_of(llm.generate(prompts, params, use_tqdm=False)))
            assert llm.stats.num_preemptions > 0, "the pool should be too small"
            llm.close()
        assert outputs[0] == outputs[1]

    def test_the_kernel_for_decodes_is_the_one_that_runs(self):
        """The generated kernel splits the keys, as only the one for decodes does: not the general one, which is slower."""
        from torch._inductor.utils import run_and_get_code

        from minivllm.flex_attention import compiled_decode, decode_metadata, decode_options

        torch._dynamo.reset()
        positions = torch.tensor([5, 40], dtype=torch.int32, device="cuda")
        table = torch.tensor([[1, 0, 0], [2, 3, 4]], dtype=torch.int32, device="cuda")
        metadata = decode_metadata(positions, table, 16, 160, 7)
        q, k = torch.randn(2, 2, 7, 64, device="cuda"), torch.randn(1, 2, 160, 64, device="cuda")
        _, code = run_and_get_code(compiled_decode, q, k, k, block_mask=metadata.block_mask, kernel_options=decode_options(2, 2))
        assert any("SPLIT_KV" in text for text in code), "another kernel was generated"
