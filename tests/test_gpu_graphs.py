"""Compiled decode attention and CUDA graphs: the same tokens as the readable rung and as Hugging Face. `pytest -m gpu`."""

from __future__ import annotations

import copy
import functools
import json
import random
import tempfile

import numpy as np
import pytest
import torch
from test_engine import greedy, prompts_of, tokens_of
from test_engine_parity import hf_greedy
from tiny_models import random_qwen2

from minivllm import LLM, SamplingParams
from minivllm.bench.anatomy import profiled_replays
from minivllm.transfers import download, upload


@functools.lru_cache(maxsize=1)
def model_and_folder():
    """14 query heads on 2 KV heads of 16 numbers: a group of 7, as in Qwen2.5-0.5B."""
    model, folder = random_qwen2(tempfile.mkdtemp(), 5, dtype=torch.float32, layers=2, hidden=224, heads=14, kv_heads=2, vocab=97,
                                 initializer_range=0.2, max_position_embeddings=32_768)
    return model.eval(), str(folder)


def make_llm(backend: str = "flex_attention", **knobs) -> LLM:
    knobs = {"max_model_len": 256, "block_size": 16, "num_blocks": 400, "max_num_seqs": 20, "dtype": "float32", **knobs}
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
        """Batches of 1 to 20 requests, so every bucket and every padding, give Hugging Face's tokens in float32."""
        model, _ = model_and_folder()
        prompts = prompts_of(*range(3, 63, 3))
        expected = [hf_greedy(model, prompt, 12) for prompt in prompts]
        for count in range(1, 21):
            ours = tokens_of(graphed().generate(prompts[:count], greedy(12), use_tqdm=False))
            assert ours == expected[:count], f"a batch of {count} on CUDA graphs differs from Hugging Face"

    def test_long_prompts_behind_cached_ones_equal_hugging_face(self):
        """Prompts of several tiles and blocks, computed whole, in chunks and behind prefix hits, from blocks in shuffled order."""
        model, _ = model_and_folder()
        prompts = prompts_of(200, 129, 128, 64, 17, 1)
        prompts += [[*prompt[: len(prompt) // 2], 7, 3, 9] for prompt in prompts]  # the first half is a prefix hit
        expected = [hf_greedy(model, prompt, 8) for prompt in prompts]
        for knobs in ({}, {"max_num_batched_tokens": 100}, {"block_size": 64, "num_blocks": 60}):
            llm = make_llm(**knobs)
            queue = llm.engine.kv_cache_manager.pool.free_queue
            for block_id in random.Random(4).sample(list(queue), len(queue)):
                queue.move_to_end(block_id)
            for half in (prompts[:6], prompts[6:], prompts):
                ours = tokens_of(llm.generate(half, greedy(8), use_tqdm=False))
                assert ours == [expected[prompts.index(prompt)] for prompt in half], f"{knobs}: not Hugging Face's tokens"
            assert llm.stats.prefix_cache_hits > 0
            llm.close()

    def test_graphs_eager_and_one_step_ahead_give_the_same_tokens(self):
        """Launched ahead or in turn, on graphs or readable and eager: float32 tokens are equal, greedy, sampled, stopped."""
        prompts = prompts_of(5, 40, 9, 130, 14, 7, 33)
        free_run = tokens_of(graphed().generate(prompts, greedy(30), use_tqdm=False))
        params = [SamplingParams(temperature=index % 2, seed=index, max_tokens=30, stop_token_ids=[free_run[0][9], free_run[2][5]])
                  for index in range(7)]
        outputs = []
        for knobs in ({"async_scheduling": True}, {"async_scheduling": False}, {"enforce_eager": True, "backend": "auto"}):
            llm = make_llm(**knobs)
            outputs.append(tokens_of(llm.generate(prompts, params, use_tqdm=False)))
            llm.close()
        assert outputs[0] == outputs[1], "one step ahead the tokens differ"
        assert outputs[0] == outputs[2], "on graphs the tokens differ from the eager engine's"

    def test_in_bfloat16_a_graph_equals_its_own_step_ungraphed_bit_by_bit(self):
        """The same compiled step at the same bucket, replayed and called: the logits are equal in every bit."""
        llm = make_llm(dtype="bfloat16", max_num_seqs=6)
        runner = llm.engine.runner
        rows, graphs, recorded = runner.rows, runner.graphs, runner.graphs.results
        for count in (1, 2, 3, 6):
            rows.block_table[:count] = torch.arange(1, count * 16 + 1, dtype=torch.int32, device="cuda").view(count, 16)
            rows.token_ids[:count, :40] = torch.randint(97, (count, 40), dtype=torch.int32, device="cuda")
            runner.kv_cache.normal_()
            results = []
            for use_graphs in (True, False):
                rows.positions[:count] = torch.arange(20, 20 + count, dtype=torch.int32, device="cuda")
                # A step that is called leaves its own results, and one that is replayed writes into those it was recorded with.
                graphs.use_graphs, graphs.results = use_graphs, dict(recorded)
                with torch.inference_mode():
                    results.append(graphs.run(np.arange(count))[0].clone())
            assert torch.equal(*results), f"a graph of {count} rows and its step ungraphed differ"
            assert results[0].isfinite().all()
        llm.close()

    def test_logprobs_in_bfloat16_are_as_close_to_the_truth_as_hugging_faces(self):
        """In bfloat16 no logprob is further from float32's than twice the worst of Hugging Face's own in bfloat16."""
        model, _ = model_and_folder()
        rounded = copy.deepcopy(model).bfloat16()
        llm = make_llm(dtype="bfloat16")
        ours, theirs = [0.0], [0.0]
        for output in llm.generate(prompts_of(30, 130, 9), greedy(6, logprobs=0, prompt_logprobs=0), use_tqdm=False):
            ids = output.prompt_token_ids + output.outputs[0].token_ids
            with torch.no_grad():
                truth, peer = (each(torch.tensor([ids])).logits[0].float().log_softmax(-1) for each in (model, rounded))
            entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
            for place, (token, entry) in enumerate(zip(ids[1:], entries, strict=True)):
                ours.append(abs(entry[token].logprob - truth[place, token].item()))
                theirs.append(abs(float(peer[place, token] - truth[place, token])))
        assert max(ours) < 2 * max(theirs), f"a logprob is off by {max(ours):.3f}, Hugging Face's worst by {max(theirs):.3f}"
        llm.close()

    def test_a_compiled_step_writes_kv_in_place(self):
        """Steps of every kind allocate far less than one layer's KV cache: a write that copied it would need all of that."""
        llm = make_llm(num_blocks=60_000)
        layer_bytes = llm.engine.runner.kv_cache[0].nbytes
        llm.generate(prompts_of(9, 130), greedy(4), use_tqdm=False)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        llm.generate(prompts_of(*[200] * 20, seed=2), greedy(20), use_tqdm=False)
        grown = torch.cuda.max_memory_allocated() - before
        assert grown < layer_bytes / 2, f"steps took {grown:,} bytes more, and a layer's KV is {layer_bytes:,}"
        llm.close()

    def test_a_long_prompt_takes_no_more_memory_than_its_chunks(self):
        """A prompt eight times as long, in chunks of the same size, needs the memory of one chunk."""
        peaks = []
        llm = make_llm(num_blocks=2100, max_model_len=32_768, max_num_batched_tokens=4096)
        for length in (4096, 4096, 32_000):
            torch.cuda.reset_peak_memory_stats()
            llm.generate(prompts_of(length, seed=length), greedy(2), use_tqdm=False)
            peaks.append(torch.cuda.max_memory_allocated())
        assert peaks[2] < peaks[1] + 2**26, f"peaks of 4,096 and 32,000 tokens: {peaks[1]:,} and {peaks[2]:,} bytes"
        llm.close()

    def test_t34_what_is_uploaded_may_be_overwritten_at_once(self):
        """While the device is busy, many uploads from one array that keeps changing all arrive with what it held at the time."""
        device, array = torch.device("cuda"), np.zeros(1000, dtype=np.int64)
        torch.cuda._sleep(200_000_000)  # some 0.1 s in which no copy can start
        arrived = []
        for number in range(200):
            array[:] = number
            arrived.append(upload(array, device))
        assert [int(tensor.max()) for tensor in arrived] == [int(tensor.min()) for tensor in arrived] == list(range(200))
        assert download(arrived[0]).is_pinned(), "a copy to memory that is not pinned is one that the host waits for"

    def test_sampled_tokens_are_written_to_the_host_and_not_copied(self):
        """Neither behind prompts nor behind decodes, by temperature alone or as chat models ask, is a copy made for the host."""
        llm, chat = graphed(), {"temperature": 0.8, "seed": 3, "top_k": 9, "repetition_penalty": 1.1}
        for params in ({"temperature": 0}, {"temperature": 1, "seed": 5}, chat):
            params = SamplingParams(max_tokens=30, ignore_eos=True, detokenize=False, **params)
            expected = tokens_of(readable().generate(prompts_of(4, 9, 30), params, use_tqdm=False))
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                found = tokens_of(llm.generate(prompts_of(4, 9, 30), params, use_tqdm=False))
            copies = {event.key: event.count for event in profile.key_averages() if "DtoH" in event.key}
            assert found == expected and not copies, f"{params}: {copies}"

    def test_all_that_an_engine_does_is_on_one_stream(self, tmp_path):
        """From its weights on, with prompts, decodes and whatever samplers: a second stream makes all kernels of a graph slower."""
        chat = {"temperature": 0.8, "top_k": 9, "repetition_penalty": 1.1, "logprobs": 2, "logit_bias": {5: 2.0}}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            with make_llm(max_num_seqs=4) as llm:
                for params in ({"temperature": 0}, {"temperature": 1, "seed": 5}, chat):
                    llm.generate(prompts_of(4, 9, 200), SamplingParams(max_tokens=5, ignore_eos=True, **params), use_tqdm=False)
        profile.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        of_the_device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
        streams = {event["args"]["stream"] for event in of_the_device}
        assert len(of_the_device) > 1000 and len(streams) == 1, f"{len(of_the_device)} kernels and copies on streams {streams}"

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
        torch.cuda.synchronize()  # the engine has a stream of its own
        assert tokens_of(graphed().generate(prompts, greedy(20), use_tqdm=False)) == expected

    def test_t35_nothing_is_compiled_after_warm_up(self):
        """Batches of any size, prompts of any length, sampled or greedy: no compilation once the engine is ready."""
        llm = graphed()
        llm.generate(prompts_of(5, 6), greedy(3), use_tqdm=False)  # the readable prefill has a first time too
        torch._dynamo.utils.counters.clear()
        for count in (1, 2, 3, 6, 11, 20):
            params = [SamplingParams(temperature=index % 2, seed=index, max_tokens=6, ignore_eos=True) for index in range(count)]
            llm.generate(prompts_of(*range(7, 7 + count), seed=count), params, use_tqdm=False)
        llm.generate(prompts_of(*range(100, 250, 4), seed=9), greedy(4), use_tqdm=False)  # more than the prompt graphs take
        llm.generate([*prompts_of(*[250] * 9, seed=3), *prompts_of(*[3] * 30, seed=4)], greedy(4), use_tqdm=False)
        frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert frames == 0, f"{frames} graphs were compiled after warm-up"

    def test_requests_join_a_large_batch_by_graph(self):
        """Prompts beside more decodes than a graph has prompts: by graph, nothing compiled, tokens of the readable rung."""
        knobs = {"max_num_seqs": 70, "num_blocks": 900, "max_num_batched_tokens": 200}
        prompts = prompts_of(*[5] * 66, *[9, 23, 140, 3, 67] * 6)
        params = [SamplingParams(temperature=index % 2, seed=index, max_tokens=40 if index < 66 else 5, ignore_eos=True)
                  for index in range(len(prompts))]
        llm, others, joined = make_llm(**knobs), make_llm("paged_gather", **knobs), []
        llm.generate(prompts_of(5, 6), greedy(3), use_tqdm=False)
        graphs = llm.engine.runner.prompt_graphs
        own = graphs.run
        graphs.run = lambda inputs, size: (joined.append((inputs.num_decodes, len(inputs.rows))), own(inputs, size))[1]
        torch._dynamo.utils.counters.clear()
        ours, theirs = (tokens_of(each.generate(prompts, params, use_tqdm=False)) for each in (llm, others))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0, "a step of decodes and prompts was compiled anew"
        assert ours == theirs, "decodes and prompts in one graph differ from the readable rung"
        large = [step for step in joined if step[0] > 32 and step[1] > step[0]]
        assert len(large) > 5, f"steps by graph, decodes and requests: {joined}"
        llm.close()
        others.close()

    def test_many_users_of_one_prefix_are_one_step_by_graph(self):
        """50 requests behind a shared prefix, each with a few tokens of its own: by graph, tokens of the readable rung."""
        prefix, *own_tokens = prompts_of(190, *range(8, 58))
        prompts = [prefix + tokens for tokens in own_tokens]
        knobs = {"max_num_seqs": 64, "num_blocks": 900, "max_num_batched_tokens": 8192}
        llm, others, steps = make_llm(**knobs), make_llm("paged_gather", **knobs), []
        graphs = llm.engine.runner.prompt_graphs
        own = graphs.run
        graphs.run = lambda inputs, size: (steps.append((len(inputs.rows), int(inputs.query_lens.sum()))), own(inputs, size))[1]
        ours, theirs = (tokens_of(each.generate(prompts, greedy(6), use_tqdm=False)) for each in (llm, others))
        assert steps[:1] == [(50, sum(map(len, prompts)) - 49 * 176)], f"requests and tokens of steps by graph: {steps}"
        assert ours == theirs, "50 prompts in one graph differ from the readable rung"
        llm.close()
        others.close()

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

    def test_what_chat_models_ask_of_the_sampler_is_drawn_by_graph(self):
        """Penalties, top_k, top_p and min_p, a top_p alone and masked tokens in batches of every size: the readable rung's tokens,
        and nothing is compiled anew.
        """
        asked = [SamplingParams(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.1, seed=1, max_tokens=12),
                 SamplingParams(temperature=1, min_p=0.1, presence_penalty=1.5, seed=2, max_tokens=16, ignore_eos=True),
                 SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=9, ignore_eos=True),
                 SamplingParams(temperature=1.4, top_k=64, frequency_penalty=0.6, seed=3, max_tokens=14, ignore_eos=True)]
        nucleus = SamplingParams(temperature=1.2, top_p=0.8, presence_penalty=0.3, seed=4, max_tokens=13, ignore_eos=True)
        masked = SamplingParams(temperature=1, seed=5, min_tokens=7, stop_token_ids=list(range(0, 97, 2)), max_tokens=12)
        runs = []
        samplers = graphed().engine.runner.sampler.sampler_graphs
        own = samplers.run
        samplers.run = lambda count, by_mass: (runs.append((count, by_mass)), own(count, by_mass=by_mass))[1]
        torch._dynamo.utils.counters.clear()
        for chosen in (asked, [nucleus, *asked], [masked, asked[0]], [masked, nucleus]):
            for count in (1, 2, 3, 9, 20):
                prompts = prompts_of(*range(5, 5 + count), seed=count)
                params = [chosen[index % len(chosen)] for index in range(count)]
                outputs = [tokens_of(llm.generate(prompts, params, use_tqdm=False)) for llm in (graphed(), readable())]
                assert outputs[0] == outputs[1], f"{count} of {chosen}: tokens differ between graph and readable rung"
        expected = {(count, by_mass) for count in (1, 2, 3, 20) for by_mass in (False, True)}
        assert set(runs) >= expected, f"batches drawn by graph: {set(runs)}"
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0, "something was compiled after warm-up"
        samplers.run = own

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

    @pytest.mark.parametrize("block_size", [16, 64])
    def test_decodes_of_every_batch_size_read_their_own_contexts_and_nothing_else(self, block_size):
        """Split and unsplit, at the edges between them: shuffled blocks, NaN wherever nobody looks, against plain softmax."""
        from minivllm.flex_attention import FlexPagedAttention, decode_metadata, ends, num_splits

        num_kv_heads, group, head_dim, blocks_each = 2, 7, 64, 192 // block_size
        sizes, torch_rng = (1, 2, 16, 64, 80, 128, 256, 257, 320), torch.Generator("cuda").manual_seed(0)
        assert {num_splits(size, num_kv_heads) for size in sizes} >= {1, 2, 3, 4, 8, 16}, "every form of the kernel is meant"
        num_blocks = 1 + max(sizes) * blocks_each
        cache = torch.full((2, num_kv_heads, num_blocks * block_size, head_dim), float("nan"), device="cuda")
        attention = FlexPagedAttention(cache, block_size)
        table = 1 + torch.randperm(num_blocks - 1, generator=torch_rng, device="cuda").int().view(max(sizes), blocks_each)
        lens = torch.randint(1, blocks_each * block_size + 1, (max(sizes),), generator=torch_rng, device="cuda", dtype=torch.int32)
        lens[:3] = torch.tensor([1, block_size, blocks_each * block_size])
        offsets = torch.arange(blocks_each * block_size, device="cuda")
        slots = table[:, offsets // block_size].long() * block_size + offsets % block_size  # (B, positions)
        is_seen = offsets < lens[:, None]
        cache[:, :, slots[offsets // block_size * block_size < lens[:, None]]] = 0  # as blocks are when they are handed out
        cache[:, :, slots[is_seen]] = torch.randn(2, num_kv_heads, int(is_seen.sum()), head_dim, generator=torch_rng, device="cuda")
        q = torch.randn(max(sizes), num_kv_heads * group, head_dim, generator=torch_rng, device="cuda")
        keys, values = cache[:, :, slots].masked_fill(~is_seen[..., None], 0).repeat_interleave(group, dim=1)
        expected = torch.nn.functional.scaled_dot_product_attention(  # keys and values (H, B, positions, D)
            q[:, :, None], keys.transpose(0, 1), values.transpose(0, 1), is_seen[:, None, None])[:, :, 0]
        for size in sizes:
            last = ends(lens[:size] - 1, table[:size], block_size)
            metadata = decode_metadata(last, table[:size], block_size, cache.shape[2], group)
            found = attention.attend_decode(q[:size].clone(), metadata)
            error = ((found - expected[:size]).norm() / expected[:size].norm()).item()
            assert error < 1e-4, f"{size} decodes in {num_splits(size, num_kv_heads)} parts each: relative error {error}"

    def test_the_kernel_for_decodes_is_the_one_that_runs(self):
        """The generated kernel splits the keys, as only the one for decodes does: not the general one. Another joins the parts.
        Where nobody splits, all batch sizes share one kernel, which takes the queries of a KV head as its tile.
        """
        from torch._inductor.utils import run_and_get_code

        from minivllm.flex_attention import FlexPagedAttention, decode_metadata, ends, num_splits

        torch._dynamo.reset()
        attention = FlexPagedAttention(torch.zeros(2, 2, 160, 64, device="cuda"), 16)
        for size, splits, expected in ((4, 16, 2), (64, 4, 2), (300, 1, 1)):
            assert num_splits(size, 2) == splits
            positions = torch.arange(size, dtype=torch.int32, device="cuda") % 48
            table = torch.tensor([[2, 3, 4]], dtype=torch.int32, device="cuda").repeat(size, 1)
            metadata = decode_metadata(ends(positions, table, 16), table, 16, 160, 7)
            _, code = run_and_get_code(attention.attend_decode, torch.randn(size, 14, 64, device="cuda"), metadata)
            assert any("SPLIT_KV" in text for text in code) == (splits > 1), f"{splits} parts: another kernel was generated"
            kernels = sum(text.count("async_compile.triton(") for text in code)
            assert kernels == expected, f"{splits} parts: {kernels} kernels, not {expected}: one attends, one joins the parts"
        assert any("BLOCK_M : tl.constexpr = 16" in text for text in code), "a tile of 16 rows for the 7 queries of a KV head"

    def test_a_layer_takes_no_more_kernels_than_it_has_to(self):
        """Six generated ones: all there is of a decode of one request, beside four of the library's for several."""
        counts = []
        for layers in (2, 4):
            _, folder = random_qwen2(tempfile.mkdtemp(), 5, layers=layers, hidden=448, heads=14, kv_heads=2, vocab=97, head_dim=32)
            llm = LLM(str(folder), skip_tokenizer_init=True, device="cuda", attention_backend="flex_attention", max_model_len=256,
                      block_size=16, num_blocks=400, dtype="bfloat16", max_num_seqs=4)
            launches = [profiled_replays(llm.engine.runner.graphs.graphs[size]) for size in (1, 4)]
            counts.append([sum(count for name, _, count in kernels if name.startswith("triton")) for kernels in launches])
            llm.close()
        of_a_layer = np.subtract(counts[1], counts[0]) / 2
        assert of_a_layer.tolist() == [6, 6], f"a layer of one and of four requests takes {of_a_layer} generated kernels"

    def test_large_batches_share_one_kernel_for_decodes(self):
        """From the batch size on at which no context is split, no bucket has attention compiled anew; tokens are Hugging Face's."""
        from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics

        from minivllm.cuda_graphs import bucket_sizes
        from minivllm.flex_attention import num_splits

        model, folder = random_qwen2(tempfile.mkdtemp(), 5, layers=2, hidden=64, heads=64, kv_heads=32, vocab=97, head_dim=16)
        split = [size for size in bucket_sizes(96) if num_splits(size, 32) > 1]
        assert split == [1, 4, 8, 16]
        torch._dynamo.reset()
        clear_compilation_metrics()
        llm = LLM(str(folder), skip_tokenizer_init=True, device="cuda", attention_backend="flex_attention", max_model_len=128,
                  block_size=16, num_blocks=900, dtype="float32", max_num_seqs=96)
        compiled = [metrics.co_name for metrics in get_compilation_metrics()].count("flex_attention")
        assert compiled == len(split) + 2, f"{compiled} attentions; {len(split)} split, one is for the others, one for prompts"
        prompts = prompts_of(*range(3, 99))
        expected = [hf_greedy(model, prompt, 6) for prompt in prompts[::7]]
        for count in (16, 17, 64, 96):
            ours = tokens_of(llm.generate(prompts[:count], greedy(6), use_tqdm=False))[::7]
            assert ours == expected[: len(ours)], f"a batch of {count} differs from Hugging Face"
        llm.close()
