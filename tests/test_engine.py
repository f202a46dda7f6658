"""The engine as its users meet it: sharing, seeds, logprobs, aborts, failures, and every kind of bad input."""

from __future__ import annotations

import functools
import gc
import math
import random
import sys
import tempfile
import weakref

import pytest
import torch
from tiny_models import random_qwen2

from minivllm import LLM, SamplingParams
from minivllm.exceptions import EngineDeadError, ValidationError

VOCAB = 97


@functools.lru_cache(maxsize=1)
def model_and_folder():
    model, folder = random_qwen2(tempfile.mkdtemp(), 3, dtype=torch.float64, layers=2, hidden=32, heads=4, kv_heads=2, vocab=VOCAB,
                                 initializer_range=0.2)
    return model.eval(), str(folder)


def make_llm(**knobs) -> LLM:
    knobs = {"max_model_len": 64, "block_size": 4, "num_blocks": 64, "dtype": "float64", "device": "cpu", **knobs}
    return LLM(model_and_folder()[1], skip_tokenizer_init=True, **knobs)


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(1, VOCAB) for _ in range(length)] for length in lengths]


def greedy(max_tokens: int = 8, **more) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **more)


def tokens_of(outputs) -> list[list[int]]:
    return [answer.token_ids for output in outputs for answer in output.outputs]


def run_alone(prompts, params) -> list[list[int]]:
    llm = make_llm()
    return [tokens_of(llm.generate([prompt], one, use_tqdm=False))[0] for prompt, one in zip(prompts, params)]


def count_host_calls(llm: LLM, num_requests: int, num_tokens: int) -> tuple[float, int]:
    """Python functions called per token beside the model's own, and how often the whole answer of a request was copied."""
    engine, calls, copies = llm.engine, 0, 0
    execute = engine.runner.execute_model

    def count(frame, event, argument):
        nonlocal calls, copies
        calls += event == "call"
        copies += event == "call" and frame.f_code.co_name == "output_token_ids"

    def execute_uncounted(output):
        sys.setprofile(None)
        try:
            return execute(output)
        finally:
            sys.setprofile(count)

    engine.runner.execute_model = execute_uncounted
    params = [SamplingParams(max_tokens=num_tokens, ignore_eos=True, detokenize=False)] * num_requests
    llm.enqueue(prompts_of(*[5] * num_requests), params)
    sys.setprofile(count)
    try:
        llm.wait_for_completion(use_tqdm=False)
    finally:
        sys.setprofile(None)
    return calls / (num_requests * num_tokens), copies


def test_a_token_costs_the_host_some_twenty_calls_and_no_copy_of_the_answer():
    """On a GPU a step of a small model takes 2 ms for 256 requests: the host has 7 microseconds for a token, planning included."""
    for num_tokens in (10, 50):
        calls, copies = count_host_calls(make_llm(max_num_seqs=32, num_blocks=600), 32, num_tokens)
        assert calls <= 30, f"{calls:.1f} Python functions are called for a token, in answers of {num_tokens}"
        assert copies == 32, f"32 answers of {num_tokens} tokens were copied {copies} times"


def test_eight_requests_on_a_pool_for_two_all_finish_as_if_alone():
    """Requests that don't fit together wait or are preempted, and their tokens are those of running alone."""
    prompts, params = prompts_of(*[9] * 8), [greedy(12)] * 8
    llm = make_llm(num_blocks=11)  # 10 blocks of 4 slots: two requests of 20 positions
    llm.enqueue(prompts, params)
    done = {}
    while llm.engine.has_unfinished_requests():
        for output in llm.engine.step():
            if output.finished:
                done[output.request_id] = output.outputs[0].token_ids
        llm.engine.kv_cache_manager.check()
    assert [done[str(i)] for i in range(8)] == run_alone(prompts, params), "a full pool changes when tokens come, never which"
    assert llm.engine.kv_cache_manager.usage == 0, "all blocks are back"


@pytest.mark.parametrize("knobs", [{}, {"num_blocks": 13, "max_num_batched_tokens": 5}, {"max_num_seqs": 1},
                                   {"enable_prefix_caching": False, "block_size": 1}])
def test_t40_a_seed_gives_the_same_tokens_alone_batched_and_preempted(knobs):
    """Sampling depends on seed and position alone: not on neighbours, order, chunks or preemptions."""
    prompts = prompts_of(5, 11, 3, 8, 11, 6)
    params = [SamplingParams(temperature=1.2, top_k=40, top_p=0.95, seed=100 + i, max_tokens=12, ignore_eos=True,
                             repetition_penalty=1.1, presence_penalty=0.3) for i in range(6)]
    together = tokens_of(make_llm(**knobs).generate(prompts, params, use_tqdm=False))
    assert together == run_alone(prompts, params), f"the same seeds gave other tokens with {knobs}"
    backwards = tokens_of(make_llm(**knobs).generate(prompts[::-1], params[::-1], use_tqdm=False))
    assert backwards[::-1] == together, "the order of arrival is not part of a seeded request"


def test_unseeded_requests_repeat_with_the_engines_seed():
    """Two engines with one seed give one answer, another seed gives another, and equal prompts get different answers."""
    prompts, params = prompts_of(6, 6), SamplingParams(temperature=1.0, max_tokens=16, ignore_eos=True)
    first, again, other = (tokens_of(make_llm(seed=s).generate(prompts, params, use_tqdm=False)) for s in (7, 7, 8))
    assert first == again, "the same engine seed repeats the same answers"
    assert first != other, "another engine seed gives other answers"
    same = tokens_of(make_llm().generate([prompts[0]] * 2, params, use_tqdm=False))
    assert same[0] != same[1], "two unseeded requests for one prompt differ"


def test_t48_n_answers_share_the_prompts_blocks_and_child_i_draws_with_seed_plus_i():
    """One request for n answers equals n requests with consecutive seeds, and the prompt's full blocks exist once."""
    prompt = prompts_of(16)[0]
    llm = make_llm()
    output = llm.generate([prompt], SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=6, ignore_eos=True), use_tqdm=False)[0]
    single = [SamplingParams(temperature=1.0, seed=5 + i, max_tokens=6, ignore_eos=True) for i in range(3)]
    assert [answer.token_ids for answer in output.outputs] == run_alone([prompt] * 3, single)
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    assert llm.stats.prefix_cache_hits == 2 * 12, "two children find the first three of the prompt's four blocks"


def test_logprobs_are_hugging_faces_log_softmax():
    """Reported logprobs are those of the raw logits, for sampled and prompt tokens alike, with ranks."""
    model, _ = model_and_folder()
    prompt = prompts_of(9)[0]
    params = SamplingParams(temperature=0.7, top_k=5, seed=1, max_tokens=5, ignore_eos=True, logprobs=3, prompt_logprobs=2,
                            repetition_penalty=1.3)
    output = make_llm(max_num_batched_tokens=4).generate([prompt], params, use_tqdm=False)[0]
    answer = output.outputs[0]
    with torch.no_grad():
        expected = model(torch.tensor([prompt + answer.token_ids])).logits[0].float().log_softmax(-1)
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
    for position, entry in enumerate([*output.prompt_logprobs[1:], *answer.logprobs]):
        token = (prompt + answer.token_ids)[position + 1]
        truth = expected[position, token]
        assert math.isclose(entry[token].logprob, truth.item(), abs_tol=1e-5), f"logprob of position {position + 1}"
        assert entry[token].rank == int((expected[position] > truth).sum()) + 1, f"rank at position {position + 1}"
        best = expected[position].argmax().item()
        assert entry[best].rank == 1, f"the most likely token of position {position + 1} is listed with rank 1"
    total = sum(entry[token].logprob for entry, token in zip(answer.logprobs, answer.token_ids))
    assert math.isclose(answer.cumulative_logprob, total), "cumulative_logprob is the sum over the answer"


def test_prompt_logprobs_survive_preemption():
    """A request that is preempted and computes its prompt again reports each prompt position once."""
    prompts = prompts_of(12, 12, 12)
    params = greedy(12, prompt_logprobs=0)
    llm = make_llm(num_blocks=13, max_num_batched_tokens=9)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert llm.stats.num_preemptions > 0, "the pool should be too small for three requests"
    roomy = make_llm().generate(prompts, params, use_tqdm=False)
    for ours, expected in zip(outputs, roomy):
        assert len(ours.prompt_logprobs) == 12, "one entry per prompt token"
        for mine, theirs in zip(ours.prompt_logprobs[1:], expected.prompt_logprobs[1:]):
            assert mine.keys() == theirs.keys()


def test_t41_every_eos_id_ends_a_request_and_ignore_eos_does_not():
    """EOS ends an answer with reason stop; the id stays in token_ids; min_tokens forbids it until then."""
    prompt = prompts_of(7)[0]
    free_run = tokens_of(make_llm().generate([prompt], greedy(12), use_tqdm=False))[0]
    stop_at = free_run[4]
    first = free_run.index(stop_at)
    answer = make_llm().generate([prompt], greedy(12, stop_token_ids=[stop_at]), use_tqdm=False)[0].outputs[0]
    assert answer.token_ids == free_run[: first + 1], "the answer ends with the stop token and keeps it"
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop_at)
    late = make_llm().generate([prompt], greedy(12, stop_token_ids=[stop_at], min_tokens=first + 2), use_tqdm=False)[0].outputs[0]
    assert stop_at not in late.token_ids[: first + 1], "below min_tokens a stop token is never sampled"


def test_t20_abort_gives_every_block_back_in_any_state():
    """Aborting while waiting, in the middle of a prompt, or while generating frees all blocks at once, and the rest goes on."""
    llm = make_llm(max_num_batched_tokens=6, max_num_seqs=2)
    ids = llm.enqueue(prompts_of(20, 9, 9, 9), greedy(10))
    engine = llm.engine
    engine.step()
    engine.abort_request([ids[0], ids[3], "never existed"])  # mid-chunk, and waiting
    engine.kv_cache_manager.check()
    finished = {}
    while engine.has_unfinished_requests():
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    assert sorted(finished) == sorted(ids[1:3]), "the requests that were left alone finish"
    assert engine.kv_cache_manager.usage == 0
    assert engine.abort_request(ids) == [], "aborting what has ended changes nothing"


def test_a_failed_step_loses_nothing(monkeypatch):
    """When a forward pass raises, the error comes up, all requests wait again, and the next steps give the right tokens."""
    prompts, params = prompts_of(9, 6, 9), [greedy(8)] * 3
    llm = make_llm(max_num_batched_tokens=8)
    ids = llm.enqueue(prompts, params)
    runner, calls = llm.engine.runner, 0
    forward = runner.forward

    def failing(*args):
        nonlocal calls
        calls += 1
        if calls in (2, 3, 7):
            raise RuntimeError("out of memory")
        return forward(*args)

    monkeypatch.setattr(runner, "forward", failing)
    done, failures = {}, 0
    while llm.engine.has_unfinished_requests():
        try:
            done |= {output.request_id: output.outputs[0].token_ids for output in llm.engine.step() if output.finished}
        except RuntimeError:
            failures += 1
        llm.engine.kv_cache_manager.check()
    assert failures == 3
    assert [done[i] for i in ids] == run_alone(prompts, params)


BAD_REQUESTS = {
    "empty prompt": ([], {}, "cannot be empty"),
    "prompt too long": ([1] * 64, {}, "maximum context length is 64 tokens"),
    "larger than the pool": ([1] * 40, {"max_tokens": 20}, "blocks"),
    "id out of range": ([1, VOCAB], {}, f"Token id {VOCAB} is out of vocabulary"),
    "negative id": ([-1], {}, "Token id -1 is out of vocabulary"),
    "ids that are no integers": ([1.5], {}, "token ids"),
    "stop id out of range": ([1], {"stop_token_ids": [VOCAB]}, "out of vocabulary"),
    "nothing may be sampled": ([1], {"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 1}, "only tokens that end"),
    "too many logprobs": ([1], {"logprobs": 21}, "logprobs"),
    "stop string without a tokenizer": ([1], {"stop": "x"}, "tokenizer"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests_are_refused_by_name_and_the_engine_serves_the_next(case):
    """A wrong request raises before anything is allocated, says what is wrong, and the next request is served."""
    prompt, params, message = BAD_REQUESTS[case]
    llm = make_llm(num_blocks=9, max_model_len=64)  # 8 blocks: 32 positions
    with pytest.raises(ValidationError, match=message) as error:
        llm.generate([prompts_of(3)[0], prompt], SamplingParams(**{"max_tokens": 4, **params}), use_tqdm=False)
    assert error.value.parameter, "the error names the parameter"
    assert not llm.engine.has_unfinished_requests(), "the good request of the refused batch is not left behind"
    assert llm.engine.kv_cache_manager.usage == 0
    assert len(tokens_of(llm.generate([[1, 2]], greedy(3), use_tqdm=False))[0]) == 3


@pytest.mark.parametrize(("params", "named"), [
    ({"temperature": math.nan}, "temperature"), ({"temperature": 2.5}, "temperature"), ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"), ({"top_p": 1.1}, "top_p"), ({"top_k": -2}, "top_k"), ({"top_k": 1.5}, "top_k"),
    ({"min_p": -0.1}, "min_p"),
    ({"n": 0}, "n"), ({"n": 2, "temperature": 0}, "n"), ({"max_tokens": 0}, "max_tokens"), ({"min_tokens": 17}, "min_tokens"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"repetition_penalty": math.inf}, "repetition_penalty"),
    ({"presence_penalty": 2.1}, "presence_penalty"), ({"frequency_penalty": math.nan}, "frequency_penalty"),
    ({"stop": ["a"] * 5}, "stop"), ({"stop": [""]}, "stop"), ({"stop": 3}, "stop"), ({"seed": 2**63}, "seed"),
    ({"logit_bias": {3: 101}}, "logit_bias"), ({"logit_bias": {"3": 1}}, "logit_bias"), ({"logprobs": -2}, "logprobs"),
    ({"bad_words": ["x"] * 129}, "bad_words"), ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"stop_token_ids": "12"}, "stop_token_ids"), ({"stop": "\ud83d"}, "stop"), ({"bad_words": ["\ud83d"]}, "bad_words"),
    ({"ignore_eos": 1}, "ignore_eos"), ({"stop": "x", "detokenize": False}, "detokenize"),
])
def test_wrong_sampling_parameters_are_refused_by_name(params, named):
    """Every sampling parameter outside its domain raises on construction and is named."""
    with pytest.raises(ValidationError, match=named) as error:
        SamplingParams(**params)
    assert error.value.parameter == named


@pytest.mark.parametrize("large", [2**63, 2**64, 10**400], ids=["2**63", "2**64", "10**400"])
def test_no_integer_is_too_large_for_a_step(large):
    """Python's integers have no end, a tensor's do: each one means what it says, or is refused by name before it runs."""
    llm = make_llm()
    plain = {"temperature": 0.9, "seed": 1, "ignore_eos": True, "max_tokens": 6}

    def answer(**more) -> list[list[int]]:
        return tokens_of(llm.generate(prompts_of(5), SamplingParams(**plain | more), use_tqdm=False))

    assert answer(top_k=large) == answer(), "a top_k beyond the vocabulary cuts nothing off"
    assert len(answer(max_tokens=large)[0]) == 64 - 5, "the context ends first"
    refused = ["min_tokens", "logprobs", "prompt_logprobs", "seed", "n"]
    if large > 1e30:
        refused.append("repetition_penalty")
    else:
        assert answer(repetition_penalty=large) == answer(repetition_penalty=float(large)) != answer()
    for name in refused:
        with pytest.raises(ValidationError, match=name):
            answer(**{name: large})


def test_ten_engines_in_a_row_give_their_memory_and_threads_back():
    """`with LLM(...)` ten times leaves no thread, and a closed engine says so."""
    import threading

    before = threading.active_count()
    for _ in range(10):
        with make_llm() as llm:
            llm.generate([[1, 2, 3]], greedy(2), use_tqdm=False)
    assert threading.active_count() == before, "no engine leaves a thread behind"
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate([[1]], greedy(1), use_tqdm=False)


def test_a_closed_engine_lets_go_of_its_memory():
    """After close() nothing keeps the weights or the KV cache alive, even while the LLM object itself is kept."""
    llm = make_llm()
    llm.generate([[1, 2, 3]], greedy(2), use_tqdm=False)
    kept = [weakref.ref(llm.engine.runner.model), weakref.ref(llm.engine.runner.kv_caches[0])]
    llm.close()
    gc.collect()
    assert [reference() for reference in kept] == [None, None], "weights or KV cache are still there"


def test_t49_two_engines_live_side_by_side():
    """Two engines in one process share nothing: stepping them in turns gives each its own answers."""
    prompts = prompts_of(7, 9)
    one, two = make_llm(), make_llm(block_size=2)
    one.enqueue([prompts[0]], greedy(6))
    two.enqueue([prompts[1]], greedy(6))
    results = {}
    while one.engine.has_unfinished_requests() or two.engine.has_unfinished_requests():
        for name, llm in (("one", one), ("two", two)):
            for output in llm.engine.step():
                results[name] = output.outputs[0].token_ids
    assert [results["one"], results["two"]] == run_alone(prompts, [greedy(6)] * 2)


def test_an_interrupted_generate_aborts_its_requests(monkeypatch):
    """Ctrl-C in the middle of `generate` leaves no request behind, and the next call works."""
    llm = make_llm()
    step, calls = llm.engine.step, 0

    def interrupted():
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts_of(5, 5), greedy(9), use_tqdm=False)
    assert not llm.engine.has_unfinished_requests()
    assert llm.engine.kv_cache_manager.usage == 0
    assert len(llm.generate(prompts_of(5), greedy(2), use_tqdm=False)) == 1


def test_one_last_token_at_the_end_of_the_context():
    """A prompt one short of max_model_len gets exactly one token, and the answer says that length ended it."""
    llm = make_llm(max_model_len=16)
    answer = llm.generate([[1] * 15], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True), use_tqdm=False)[0].outputs[0]
    assert (len(answer.token_ids), answer.finish_reason) == (1, "length")


def test_outputs_come_in_input_order_whoever_finishes_first():
    """generate() answers in the order of its prompts."""
    prompts = prompts_of(3, 4, 5, 6)
    params = [greedy(count) for count in (12, 1, 7, 3)]
    outputs = make_llm().generate(prompts, params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [12, 1, 7, 3]
