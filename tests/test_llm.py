"""The offline face on the embedded checkpoint: text in, text out, the way a tutorial's script does it."""

from __future__ import annotations

import functools

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from minivllm import LLM, SamplingParams
from minivllm.exceptions import CheckpointError, UnsupportedError, ValidationError
from minivllm.tiny import checkpoint_path

STORY, FACT = "Once upon a time", "What is a KV cache?"


@functools.lru_cache(maxsize=1)
def toy() -> LLM:
    return LLM(max_model_len=512, num_blocks=256, block_size=16)


def greedy(max_tokens: int = 40, **more) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **more)


def complete(prompt, params: SamplingParams, llm: LLM | None = None):
    return (llm or toy()).generate(prompt, params, use_tqdm=False)[0].outputs[0]


@functools.lru_cache(maxsize=1)
def hugging_face():
    folder = str(checkpoint_path())
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval(), AutoTokenizer.from_pretrained(folder)


def hf_text(messages, max_tokens: int) -> str:
    model, tokenizer = hugging_face()
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens, repetition_penalty=1.0, temperature=None,
                            top_p=None, top_k=None)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


QUESTIONS = [FACT, "hi", "What is 17 + 25?", "Repeat this: red seven lamp tiger", "Say hello in Chinese.", "what is preemption"]


@pytest.mark.parametrize("knobs", [{}, {"block_size": 3, "num_blocks": 40, "max_num_batched_tokens": 16, "max_num_seqs": 3}])
def test_chat_answers_equal_hugging_faces(knobs):
    """The embedded model says in a chat, batched, chunked and crowded, what it says under transformers."""
    llm = LLM(**{"max_model_len": 128, **knobs})
    outputs = llm.chat([[{"role": "user", "content": question}] for question in QUESTIONS], greedy(48), use_tqdm=False)
    for question, output in zip(QUESTIONS, outputs):
        assert output.outputs[0].text == hf_text([{"role": "user", "content": question}], 48), f"the answer to {question!r}"
    llm.close()


def test_a_tutorials_script_runs_with_only_the_import_changed():
    """LLM takes the arguments that vLLM's tutorials pass, and generate takes a list of strings."""
    llm = LLM(model=str(checkpoint_path()), tokenizer=str(checkpoint_path()), max_model_len=256, trust_remote_code=True,
              dtype="float32", gpu_memory_utilization=0.8, max_num_seqs=4, enforce_eager=True, tensor_parallel_size=1)
    tokenizer = llm.get_tokenizer()
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": FACT}], tokenize=False, add_generation_prompt=True)
    params = SamplingParams(temperature=0.7, top_p=0.8, repetition_penalty=1.05, max_tokens=32,
                            stop_token_ids=[tokenizer.eos_token_id])
    outputs = llm.generate([prompt, STORY], params)
    assert [output.prompt for output in outputs] == [prompt, STORY]
    assert all(output.outputs[0].text for output in outputs), "every prompt has an answer"
    llm.close()


def test_every_form_of_a_prompt_means_the_same():
    """A string, token ids, and both as dicts give the same answer."""
    ids = toy().get_tokenizer().encode(STORY)
    forms = [STORY, ids, {"prompt": STORY}, {"prompt_token_ids": ids}, [STORY], [ids]]
    assert len({complete(form, greedy(8)).text for form in forms}) == 1


def test_text_is_the_one_shot_decode_of_the_tokens():
    """The answer's text is what the tokenizer makes of its tokens at once, without the token that ended it."""
    answer = complete(STORY, greedy(60))
    assert answer.text == toy().get_tokenizer().decode(answer.token_ids, skip_special_tokens=True)
    assert answer.finish_reason == "length"


def test_t43_a_stop_string_ends_the_text_before_it():
    """A stop string in the middle of the text ends the answer before it, or after it when asked, and says which one it was."""
    whole = complete(STORY, greedy(40)).text
    word = whole.split()[6]
    before = whole[: whole.index(word)]
    cut = complete(STORY, greedy(40, stop=["never seen", word]))
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (before, "stop", word)
    kept = complete(STORY, greedy(40, stop=word, include_stop_str_in_output=True))
    assert kept.text == before + word
    assert len(cut.token_ids) < 40, "generation ends when the stop string is complete"


def test_a_stop_string_completed_by_the_last_allowed_token_is_a_stop():
    """When one token reaches both max_tokens and a stop string, the answer ended by the stop string."""
    whole = complete(STORY, greedy(40))
    tokenizer = toy().get_tokenizer()
    last = tokenizer.decode(whole.token_ids[:12])[-3:]
    count = next(n for n in range(1, 13) if last in tokenizer.decode(whole.token_ids[:n]))
    answer = complete(STORY, greedy(count, stop=last))
    assert (answer.finish_reason, answer.stop_reason) == ("stop", last)


def test_bad_words_and_biases_change_what_is_said():
    """A banned word does not appear, a biased token does, allowed_token_ids leaves nothing else."""
    first = max(complete(STORY, greedy(12)).text.split(), key=len)
    assert first not in complete(STORY, greedy(12, bad_words=[first])).text
    token = toy().get_tokenizer().encode(" Paris")[0]
    assert complete(STORY, greedy(3, logit_bias={token: 100})).token_ids == [token] * 3
    assert set(complete(STORY, greedy(6, allowed_token_ids=[5, 6])).token_ids) <= {5, 6}


def test_logprobs_carry_each_tokens_text():
    """Every listed token comes with its text, and the sampled ones joined are the answer."""
    output = toy().generate([STORY], greedy(8, logprobs=2, prompt_logprobs=1), use_tqdm=False)[0]
    answer = output.outputs[0]
    assert "".join(entry[token].decoded_token for entry, token in zip(answer.logprobs, answer.token_ids)) == answer.text
    assert all(logprob.decoded_token is not None for entry in output.prompt_logprobs[1:] for logprob in entry.values())


def test_chat_refuses_what_it_cannot_render():
    """Wrong messages, a missing template and pictures are refused by name, and the engine serves the next conversation."""
    llm = toy()
    for messages, error, match in [
        ([{"content": "hi"}], ValidationError, "role"), ([], ValidationError, "at least one message"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], UnsupportedError, "image_url"),
        ([{"role": "user"}], ValidationError, "content"),
    ]:
        with pytest.raises(error, match=match):
            llm.chat(messages, greedy(4), use_tqdm=False)
    with pytest.raises(ValidationError, match="continue_final_message"):
        llm.chat([{"role": "user", "content": "hi"}], greedy(4), continue_final_message=True)
    parts = [{"role": "user", "content": [{"type": "text", "text": FACT}]}]
    plain = [{"role": "user", "content": FACT}]
    as_parts, as_text = (llm.chat(m, greedy(8), use_tqdm=False)[0].outputs[0].text for m in (parts, plain))
    assert as_parts == as_text, "a list with one text part is that text"


def test_a_repeated_prompt_is_found_in_the_cache_until_it_is_reset():
    """The second of two equal prompts reports its cached tokens; after reset_prefix_cache it reports none."""
    llm, prompt = toy(), [7] * 40
    llm.reset_prefix_cache()
    counts = [llm.generate([prompt], greedy(2), use_tqdm=False)[0].num_cached_tokens for _ in range(2)]
    assert llm.reset_prefix_cache()
    counts.append(llm.generate([prompt], greedy(2), use_tqdm=False)[0].num_cached_tokens)
    assert counts == [0, 32, 0], "two of the prompt's two and a half blocks can be shared"


def test_prompts_and_params_must_match_in_number():
    """Two prompts with three SamplingParams are refused before anything is queued."""
    with pytest.raises(ValidationError, match="2 prompts came with 3"):
        toy().generate([STORY, STORY], [greedy()] * 3)
    assert not toy().engine.has_unfinished_requests()
    with pytest.raises(ValidationError, match="lone surrogates"):
        toy().generate("half a smile: \ud83d", greedy())
    with pytest.raises(ValidationError, match="prompts must be"):
        toy().generate(7)


def test_a_folder_that_is_no_model_says_what_to_do(tmp_path):
    """A path that does not exist and an unknown architecture are named, before anything is loaded."""
    with pytest.raises(CheckpointError, match="does not exist"):
        LLM("/no/such/folder")
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM.*Qwen2ForCausalLM"):
        LLM(str(tmp_path))


def test_who_waits_for_the_end_gets_the_text_that_would_have_streamed(monkeypatch):
    """`generate` decodes an answer once, at its end, unless its text may end it; `step` token by token. The outputs are equal."""
    import minivllm.detokenizer as detokenizer

    llm, decoded = toy(), []
    push = detokenizer.TextStream.push
    monkeypatch.setattr(detokenizer.TextStream, "push", lambda self, token_id: (decoded.append(token_id), push(self, token_id))[1])
    tokenizer = llm.get_tokenizer()
    chat = tokenizer.apply_chat_template([{"role": "user", "content": FACT}], add_generation_prompt=True, tokenize=False)
    shown = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    asked = [(STORY, greedy(30)), (chat, greedy(200)), (chat, greedy(200, **shown)),
             (STORY, SamplingParams(temperature=1.2, seed=3, n=3, max_tokens=25)), (STORY, greedy(30, detokenize=False)),
             (STORY, greedy(5, logprobs=1)), (STORY, greedy(60, stop=["."])), (STORY, greedy(12, ignore_eos=True, min_tokens=12))]
    for prompt, params in asked:
        decoded.clear()
        (waited,) = llm.generate(prompt, params, use_tqdm=False)
        num_pushed = len(decoded)
        llm.engine.add_request("streamed", prompt, params)
        steps = []
        while llm.engine.has_unfinished_requests():
            steps += llm.engine.step()
        assert steps[-1].finished and steps[-1].outputs == waited.outputs, f"{params} gave {steps[-1].outputs}, {waited.outputs}"
        needed = params.logprobs is not None or params.stop_strings
        assert num_pushed == (len(waited.outputs[0].token_ids) if needed else 0), f"{num_pushed} tokens decoded one by one"
    assert waited.outputs[0].text and not llm.engine.output_processor.states
