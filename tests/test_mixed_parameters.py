"""Everything at once: requests with any parameters share steps, blocks and chunks, and each gets what it gets alone."""

from __future__ import annotations

import functools
import math
import random

import pytest
from depth import examples

from minivllm import LLM, SamplingParams

PROMPTS = ["Once upon a time", "The scheduler", "hello 你好 🙂", "What is a block?", "a b c d e f g", "\n\n", "The KV cache " * 6]
CROWDED = [
    {"num_blocks": 14, "block_size": 8, "max_num_batched_tokens": 24, "max_num_seqs": 5},
    {"num_blocks": 9, "block_size": 16, "max_num_batched_tokens": 64, "long_prefill_token_threshold": 16},
    {"num_blocks": 300, "block_size": 1, "max_num_seqs": 3},
]


@functools.lru_cache(maxsize=1)
def engines() -> list[LLM]:
    """The first one runs each request alone, without a prefix cache."""
    return [LLM(max_model_len=256, **knobs) for knobs in ({"num_blocks": 64, "enable_prefix_caching": False}, *CROWDED)]


def draw_params(rng: random.Random) -> SamplingParams:
    """Any combination that SamplingParams allows, with a seed."""
    max_tokens = rng.choice([1, 2, 7, 20, 60])
    choices = {
        "temperature": [0, 0.2, 0.7, 1.0, 1.7], "seed": [0, 7, 2**62, -9], "stop": ["e", [" the", "."], ["\n"], "。"], "n": [2, 3],
        "include_stop_str_in_output": [True], "ignore_eos": [True], "min_tokens": [max_tokens // 2], "top_k": [1, 3, 50],
        "top_p": [0.1, 0.8, 0.99], "min_p": [0.05], "repetition_penalty": [0.8, 1.3], "presence_penalty": [1.0],
        "frequency_penalty": [-0.5], "logprobs": [0, 2, 5], "prompt_logprobs": [1], "bad_words": [["the", "bee"]],
        "logit_bias": [{5: 40.0, 300: -100.0}], "allowed_token_ids": [[7, 20, 300, 900]], "skip_special_tokens": [False],
    }
    always = {"temperature", "seed"}
    drawn = {name: rng.choice(values) for name, values in choices.items() if name in always or rng.random() < 0.25}
    if drawn["temperature"] == 0:
        drawn.pop("n", None)  # refused: all answers would be equal
    return SamplingParams(max_tokens=max_tokens, **drawn)


def what_was_said(output) -> list:
    return [(answer.text, answer.token_ids, answer.finish_reason, answer.stop_reason) for answer in output.outputs]


def all_logprobs(output) -> list[float]:
    entries = [entry for answer in output.outputs for entry in answer.logprobs or ()] + (output.prompt_logprobs or [])[1:]
    return [logprob.logprob for entry in entries for logprob in entry.values()]


@pytest.mark.timeout(examples(300))
def test_any_mix_of_parameters_gives_each_request_what_it_gets_alone():
    """Text, tokens, reasons and logprobs do not depend on who else runs, on block size, chunks, seats or cache."""
    alone, *crowded = engines()
    for seed in range(examples(12)):
        rng = random.Random(seed)
        prompts = [rng.choice(PROMPTS) for _ in range(rng.randint(2, 8))]
        params = [draw_params(rng) for _ in prompts]
        expected = [alone.generate([prompt], one, use_tqdm=False)[0] for prompt, one in zip(prompts, params)]
        for knobs, llm in zip(CROWDED, crowded):
            for index, (ours, theirs) in enumerate(zip(llm.generate(prompts, params, use_tqdm=False), expected)):
                story = f"seed {seed}, request {index} of {len(prompts)}, {prompts[index]!r}, {params[index]}, engine {knobs}"
                assert what_was_said(ours) == what_was_said(theirs), story
                pairs = list(zip(all_logprobs(ours), all_logprobs(theirs), strict=True))
                assert all(math.isclose(*pair, abs_tol=1e-3) for pair in pairs), f"logprobs differ: {story}"
            llm.engine.kv_cache_manager.check()
            assert llm.engine.kv_cache_manager.usage == 0, f"seed {seed}: blocks are left in use"
    assert sum(llm.stats.num_preemptions for llm in crowded) > 0, "the workloads should preempt somebody"
