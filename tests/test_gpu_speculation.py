"""Verification as CUDA graphs: with guesses the same tokens as without, at every batch size. `pytest -m gpu`."""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np
import pytest
import torch
from test_engine import greedy, prompts_of, tokens_of
from test_engine_parity import hf_greedy
from test_gpu_graphs import make_llm, model_and_folder

from minivllm import LLM, SamplingParams
from minivllm.bench.replay import ReplayProposer
from minivllm.input_batch import StepInputs

K, MOST, VOCAB = 4, 17, 97
NGRAM = {"method": "ngram", "num_speculative_tokens": K}
SHARES = (1.0, 0.5, 0.0)


@functools.lru_cache(maxsize=1)
def guessing() -> LLM:
    """An engine with graphs for decodes, prompts and verifications, which nobody has asked yet."""
    return make_llm(max_num_seqs=MOST, speculative_config=NGRAM)


@functools.lru_cache(maxsize=1)
def readable() -> LLM:
    return make_llm("paged_gather", max_num_seqs=MOST)


@functools.lru_cache(maxsize=4)
def asked(temperature: float) -> tuple[list[list[int]], list[SamplingParams], list[list[int]]]:
    """17 prompts of all lengths, what is asked of them, and the readable rung's answers."""
    prompts = prompts_of(*range(3, 3 + 5 * MOST, 5), seed=int(temperature * 10))
    params = [SamplingParams(temperature=temperature, seed=index, max_tokens=9 + index % 7, ignore_eos=True)
              for index in range(MOST)]
    return prompts, params, tokens_of(readable().generate(prompts, params, use_tqdm=False))


def replaying(llm: LLM, prompts: list[list[int]], answers: list[list[int]], share: float) -> None:
    """Let the engine guess these answers, each token right with the probability `share`."""
    proposer = ReplayProposer(K, VOCAB)
    proposer.learn(prompts, answers, share)
    llm.engine.proposer = llm.engine.scheduler.proposer = proposer


def count_ways(llm: LLM, ways: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the replays of each kind of graph, and the steps that have none."""
    runner = llm.engine.runner
    parts = {"verified": (runner.verify_graphs, "launch"), "decoded": (runner.graphs, "launch"), "prompts": (runner, "forward"),
             "ungraphed": (runner, "forward_ungraphed")}
    for way, (part, method) in parts.items():
        own = getattr(part, method)
        monkeypatch.setattr(part, method, lambda *args, way=way, own=own: (ways.update([way]), own(*args))[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
class TestOneEngine:
    """All of it on one engine, since to compile one takes most of the time."""

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_tokens_are_those_without_guesses_at_every_batch_size(self, temperature, monkeypatch):
        """1 to 17 requests, guesses right, half right and wrong, greedy and sampled: the readable rung's tokens, all by graph."""
        prompts, params, expected = asked(temperature)
        if temperature == 0:
            model, _ = model_and_folder()
            for index in (0, 8, 16):
                theirs = hf_greedy(model, prompts[index], params[index].max_tokens)
                assert expected[index] == theirs, f"request {index} on the readable rung differs from Hugging Face"
        llm, ways = guessing(), Counter()
        count_ways(llm, ways, monkeypatch)
        for count in range(1, MOST + 1):
            for share in SHARES if count in (1, 2, 3, 4, 5, 8, 9, 16, 17) else (SHARES[count % 3],):
                llm.reset_prefix_cache()
                replaying(llm, prompts[:count], expected[:count], share)
                before, accepted, drafted = Counter(ways), llm.stats.num_accepted_tokens, llm.stats.num_draft_tokens
                ours = tokens_of(llm.generate(prompts[:count], params[:count], use_tqdm=False))
                wrong = [index for index in range(count) if ours[index] != expected[index]]
                assert not wrong, f"{count} requests, guesses right to {share:.0%}: requests {wrong} differ"
                taken = ways - before
                assert taken["verified"] > 0 and taken["prompts"] <= 2, f"{count} requests took the ways {dict(taken)}"
                accepted, drafted = llm.stats.num_accepted_tokens - accepted, llm.stats.num_draft_tokens - drafted
                assert share or accepted == 0, f"{accepted} of {drafted} wrong guesses were accepted"
                assert share < 1 or accepted == drafted > 0, f"{accepted} of {drafted} right guesses were accepted"

    def test_requests_that_ask_for_more_sample_behind_the_graph(self, monkeypatch):
        """top_p, penalties, masks, a bias and logprobs beside plain requests: the readable rung's tokens, and logprobs for each."""
        prompts = prompts_of(5, 9, 14, 7, 30, 12, 6, seed=8)
        params = [greedy(12), SamplingParams(temperature=1, seed=7, max_tokens=16, ignore_eos=True),
                  SamplingParams(temperature=1, top_k=9, top_p=0.8, seed=8, max_tokens=16, ignore_eos=True),
                  SamplingParams(temperature=0.9, repetition_penalty=1.3, seed=9, max_tokens=16, ignore_eos=True, logprobs=2),
                  SamplingParams(temperature=0, min_tokens=6, max_tokens=11, logprobs=0),
                  SamplingParams(temperature=1, top_p=0.9, seed=10, max_tokens=12, ignore_eos=True),
                  SamplingParams(temperature=1, logit_bias={5: 2.0}, seed=11, max_tokens=12, ignore_eos=True)]
        llm, ways = guessing(), Counter()
        for chosen in (slice(0, 5), slice(0, 2), slice(1, 4), slice(3, 4), slice(3, 6), slice(0, 7)):
            expected = tokens_of(readable().generate(prompts[chosen], params[chosen], use_tqdm=False))
            for share in SHARES:
                llm.reset_prefix_cache()
                replaying(llm, prompts[chosen], expected, share)
                with monkeypatch.context() as patch:
                    count_ways(llm, ways, patch)
                    outputs = llm.generate(prompts[chosen], params[chosen], use_tqdm=False)
                assert tokens_of(outputs) == expected, f"requests {chosen}, guesses right to {share:.0%}"
                for output, asked_for in zip(outputs, params[chosen]):
                    entries = output.outputs[0].logprobs
                    assert (entries is None) == (asked_for.logprobs is None)
                    assert entries is None or len(entries) == len(output.outputs[0].token_ids), "a logprob for each token"
        assert ways["verified"] > 0

    def test_t35_nothing_is_compiled_after_warm_up(self):
        """Verifications at any batch size, of plain requests and others: no compilation once the engine is ready."""
        prompts, params, expected = asked(0.0)
        llm = guessing()
        replaying(llm, prompts, expected, 0.7)
        llm.generate(prompts[:2], params[:2], use_tqdm=False)
        torch._dynamo.utils.counters.clear()
        for count in (1, 2, 3, 7, 11, MOST):
            llm.reset_prefix_cache()
            replaying(llm, prompts, expected, 0.7)
            llm.generate(prompts[:count], params[:count], use_tqdm=False)
        more = [SamplingParams(temperature=1, top_p=0.9, seed=index, max_tokens=9, ignore_eos=True) for index in range(5)]
        llm.generate(prompts[:5], more, use_tqdm=False)
        frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert frames == 0, f"{frames} graphs were compiled after warm-up"

    def test_t24_poisoned_memory_reaches_no_output(self):
        """With every block but the null block full of NaN beforehand, answers stay the same: padding reads nobody's blocks."""
        prompts, params, expected = asked(0.0)
        llm = guessing()
        for count, share in ((3, 0.5), (5, 1.0), (MOST, 0.5)):
            assert llm.reset_prefix_cache()
            for cache in llm.engine.runner.kv_caches:
                cache.kv_cache[:, :, cache.block_size:] = float("nan")
            torch.cuda.synchronize()  # the engine has a stream of its own
            replaying(llm, prompts[:count], expected[:count], share)
            ours = tokens_of(llm.generate(prompts[:count], params[:count], use_tqdm=False))
            assert ours == expected[:count], f"a batch of {count} reads what is not its own"

    def test_a_graph_equals_its_own_step_ungraphed_bit_by_bit(self):
        """The same compiled verification at the same bucket, replayed and called: hidden states, runs and rows are equal."""
        runner = guessing().engine.runner
        rows, graphs = runner.rows, runner.verify_graphs
        guessing().reset_prefix_cache()
        drawn, of_graphs = torch.Generator().manual_seed(0), dict(graphs.results)
        for count in (1, 3, 8, MOST):
            rows.block_table[:count] = torch.arange(1, count * 16 + 1, dtype=torch.int32, device="cuda").view(count, 16)
            rows.token_ids[:count, :60] = torch.randint(VOCAB, (count, 60), generator=drawn, dtype=torch.int32).cuda()
            runner.kv_cache.normal_()
            num_drafts = np.arange(count) % (K + 1)
            drafts = [torch.randint(VOCAB, (number,), generator=drawn).tolist() for number in num_drafts]
            positions = np.concatenate([np.arange(20 + row, 21 + row + number) for row, number in enumerate(num_drafts)])
            inputs = StepInputs(np.arange(count), 1 + num_drafts, 21 + np.arange(count) + num_drafts, np.zeros(0), positions, 0,
                                np.ones(count, dtype=bool), num_drafts)
            kept, results = rows.token_ids.clone(), []
            for use_graphs in (True, False):
                rows.token_ids.copy_(kept)
                rows.positions[:count] = torch.arange(20, 20 + count, dtype=torch.int32, device="cuda")
                graphs.use_graphs = use_graphs
                with torch.inference_mode():
                    hidden, runs = graphs.verify(inputs, drafts)
                    hidden = graphs.in_order(hidden, inputs)  # what belongs to nobody reads a slot that many write
                results.append((hidden.clone(), runs.clone(), rows.token_ids[:count].clone(), rows.positions[:count].clone()))
            graphs.use_graphs, graphs.results = True, dict(of_graphs)
            assert all(torch.equal(*pair) for pair in zip(*results)), f"a graph of {count} requests and its step ungraphed differ"
            won = results[0][1][:, 0].tolist()
            assert all(1 <= number <= 1 + guesses for number, guesses in zip(won, num_drafts)), f"{won} tokens of {num_drafts}"
        runner.kv_cache.zero_()
        torch.cuda.synchronize()  # the engine has a stream of its own


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
class TestOtherEngines:
    def test_preemption_and_joining_requests_do_not_confuse_the_rows(self):
        """On a pool too small for all, with requests joining and leaving, tokens equal the readable rung's."""
        knobs = {"num_blocks": 11, "max_num_batched_tokens": 48, "max_num_seqs": 4, "max_model_len": 128}
        prompts = prompts_of(30, 9, 44, 21, 5, 60, 13)
        params = [greedy(40), greedy(12), SamplingParams(temperature=1, seed=4, max_tokens=30, ignore_eos=True), greedy(50),
                  greedy(3), SamplingParams(temperature=0.7, seed=5, top_k=20, max_tokens=25, ignore_eos=True), greedy(33)]
        plain = make_llm("paged_gather", **knobs)
        expected = tokens_of(plain.generate(prompts, params, use_tqdm=False))
        plain.close()
        llm = make_llm(speculative_config=NGRAM, **knobs)
        for share in SHARES:
            llm.reset_prefix_cache()
            replaying(llm, prompts, expected, share)
            before = llm.stats.num_preemptions
            assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == expected, f"guesses right to {share:.0%}"
            assert llm.stats.num_preemptions > before, "the pool should be too small"
            assert llm.engine.kv_cache_manager.usage == 0
        llm.close()

    def test_a_draft_model_guesses_on_graphs_of_its_own(self):
        """The embedded pair in float32: the tokens of the model alone, and as many accepted as the two agree on."""
        shape = {"device": "cuda", "dtype": "float32", "max_model_len": 256, "max_num_seqs": 2, "num_blocks": 40}
        chats = [[{"role": "user", "content": text}] for text in ("What is a block?", "What is 17 + 25?", "Tell me a story.")]
        params = SamplingParams(temperature=0, max_tokens=48)
        with LLM(attention_backend="paged_gather", **shape) as plain:
            expected = tokens_of(plain.chat(chats, params, use_tqdm=False))
        with LLM(speculative_config={"num_speculative_tokens": K}, **shape) as llm:
            assert tokens_of(llm.chat(chats, params, use_tqdm=False)) == expected
            assert llm.engine.proposer.runner.graphs.graphs and llm.engine.proposer.runner.verify_graphs is None
            share = llm.stats.num_accepted_tokens / llm.stats.num_draft_tokens
            assert share > 0.3, f"of the draft's guesses {share:.0%} are right"
