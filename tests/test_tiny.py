"""The embedded checkpoint: it loads everywhere, it speaks, and the program that made it still runs."""

from __future__ import annotations

import json
import subprocess
import sys
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_answers import ANSWERS
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from minivllm.tiny import checkpoint_path, corpus, draft_path, evaluate, skills, smalltalk, stories

MODEL, DRAFT = checkpoint_path(), draft_path()
MAX_BYTES = 16_000_000  # for both folders together


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def test_the_answers_cover_what_the_model_was_taught():
    """The table of known answers holds at least twenty prompts of every kind, and each prompt only once."""
    kinds = [kind for kind, _, _, _ in ANSWERS]
    wanted = {"fact": 8, "copy": 3, "arithmetic": 3, "story": 2, "small talk": 2, "foreign": 1, "out of domain": 1}
    few = {kind: kinds.count(kind) for kind, least in wanted.items() if kinds.count(kind) < least}
    assert not few, f"too few answers of these kinds: {few}"
    assert len({prompt for _, _, prompt, _ in ANSWERS}) == len(ANSWERS) >= 20, "a prompt comes twice"


@pytest.mark.parametrize("form", ["chat", "completion"])
def test_the_model_gives_exactly_these_answers(model, tokenizer, form):
    """Greedy, in float32, the model answers twenty prompts of its domain fluently and rightly, to the letter."""
    rows = [(prompt, answer) for _, its_form, prompt, answer in ANSWERS if its_form == form]
    answer_all = evaluate.ask if form == "chat" else evaluate.complete
    got = answer_all(model, tokenizer, [prompt for prompt, _ in rows], 260)
    for (prompt, answer), text in zip(rows, got, strict=True):
        assert text == answer, f"the answer to {prompt!r} is {text!r}, not {answer!r}"


def test_held_out_sums_are_right(model, tokenizer):
    """Of sums and differences that training never showed, at least 95 in 100 are right."""
    held = [(a, b) for a in range(100) for b in range(100) if skills.held_out(a, b)]
    chosen = Random(1).sample(held, 100)
    questions = [f"What is {a} {'+-'[i % 2]} {b}?" for i, (a, b) in enumerate(chosen)]
    right = [skills.solution("+-"[i % 2], a, b) for i, (a, b) in enumerate(chosen)]
    got = evaluate.ask(model, tokenizer, questions, 24)
    correct = sum(map(str.__eq__, got, right))
    assert correct >= 95, f"only {correct} of 100 held-out sums are right"


def test_lists_of_random_words_are_copied(model, tokenizer):
    """A list of 20 to 40 random words, in an order that was never seen, is repeated word for word."""
    rng = Random(2)
    texts = [" ".join(rng.choice(skills.WORDS) for _ in range(rng.randint(20, 40))) for _ in range(20)]
    got = evaluate.ask(model, tokenizer, [f"Repeat this: {text}" for text in texts], 120)
    correct = sum(map(str.__eq__, got, texts))
    assert correct >= 19, f"only {correct} of 20 lists were copied exactly"


def test_unseen_phrasings_are_mostly_understood(model, tokenizer):
    """Most questions about the engine are answered rightly in words that training never used."""
    turns = corpus.held_out_facts()[::4]
    got = evaluate.ask(model, tokenizer, [question for question, _ in turns], 90)
    correct = sum(text == answer for text, (_, answer) in zip(got, turns, strict=True))
    assert correct >= 0.75 * len(turns), f"only {correct} of {len(turns)} held-out phrasings are understood"


def test_both_tokenizers_give_the_same_ids(tokenizer):
    """AutoTokenizer, which rebuilds a Qwen2 tokenizer, and tokenizer.json itself give the same ids."""
    raw = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    for text in [*corpus.documents("test", 200), "don't  stop\n\n  12345 ﬁ e\u0301 नमस्ते 🦊❤️\t<|im_end|> x"]:
        assert tokenizer(text)["input_ids"] == raw.encode(text).ids, f"the ids differ for {text!r}"


@settings(max_examples=200)
@given(st.text(max_size=200))
def test_any_text_survives_the_tokenizer(text):
    """Any text is encoded without unknown tokens and decoded to itself, up to Unicode's NFC form."""
    raw = _tokenizer_once()
    ids = raw.encode(text, add_special_tokens=False).ids
    assert raw.decode(ids, skip_special_tokens=False) == raw.normalizer.normalize_str(text), f"{text!r} became {raw.decode(ids)!r}"


def _tokenizer_once(cache={}):  # noqa: B006  (hypothesis calls the test often, and the file is read once)
    if not cache:
        cache["tokenizer"] = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    return cache["tokenizer"]


def test_the_folders_are_small():
    """Both checkpoints together stay under 16 MB, the model has 4 to 7 million parameters and the draft about a tenth."""
    size = sum(path.stat().st_size for folder in (MODEL, DRAFT) for path in folder.iterdir())
    assert size <= MAX_BYTES, f"the checkpoints take {size:,} bytes of {MAX_BYTES:,}"
    large, small = (AutoModelForCausalLM.from_pretrained(folder) for folder in (MODEL, DRAFT))
    assert large.dtype == small.dtype == torch.bfloat16, f"the weights are stored as {large.dtype} and {small.dtype}"
    assert 4e6 < large.num_parameters() < 7e6, f"the model has {large.num_parameters():,} parameters"
    ratio = large.num_parameters() / small.num_parameters()
    assert 8 < ratio < 12, f"the model is {ratio:.1f} times as large as the draft"


def test_the_model_is_a_true_qwen2():
    """The configuration is a Qwen2 with grouped queries, tied embeddings and at least 1,024 positions."""
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "qwen2", f"model_type is {config['model_type']}"
    assert config["tie_word_embeddings"], "the embeddings are not tied"
    assert config["num_attention_heads"] > config["num_key_value_heads"] > 1, "the queries are not grouped"
    assert config["max_position_embeddings"] >= 1024, f"the context is {config['max_position_embeddings']} tokens"
    assert config["rope_parameters"]["rope_theta"] > 0, "no rope_theta"


def test_both_end_tokens_are_known(tokenizer):
    """Generation ends on either of two tokens, as for Qwen2.5-Instruct, and padding is <|endoftext|>."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}
    generation = GenerationConfig.from_pretrained(MODEL)
    assert generation.eos_token_id == [ids["<|im_end|>"], ids["<|endoftext|>"]], f"the end ids are {generation.eos_token_id}"
    assert generation.pad_token_id == tokenizer.pad_token_id == ids["<|endoftext|>"], f"padding is {generation.pad_token_id}"
    assert tokenizer.eos_token == "<|im_end|>", f"the tokenizer ends with {tokenizer.eos_token}"


def test_the_chat_template_writes_chatml(tokenizer):
    """The chat template gives the ChatML that the corpus was written in, with a default system message."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello!"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == corpus.render([("hi", "Hello!")], corpus.SYSTEM), f"the template wrote {text!r}"
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(system, tokenize=False, add_generation_prompt=True)
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text == expected, f"the template wrote {text!r}"
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    text = tokenizer.apply_chat_template(system, tools=tools, tokenize=False)
    assert '"name": "clock"' in text.split("<|im_end|>")[0], f"the tools are not in the system message: {text!r}"


def test_the_draft_shares_the_tokenizer():
    """The draft has the very same tokenizer and loads, so its guesses mean the same tokens."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (MODEL / name).read_bytes() == (DRAFT / name).read_bytes(), f"{name} differs between model and draft"


def test_the_draft_mostly_agrees_with_the_model(model, tokenizer):
    """On answers about the engine, at least nine of ten greedy tokens of the draft are those of the model."""
    draft = AutoModelForCausalLM.from_pretrained(DRAFT, dtype=torch.float32).eval()
    rng, same, total = Random(3), 0, 0
    for question, answer in (corpus.fact(rng) for _ in range(15)):
        start = len(tokenizer(corpus.render([(question, "")], corpus.SYSTEM))["input_ids"]) - 3
        ids = tokenizer(corpus.render([(question, answer)], corpus.SYSTEM), return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            equal = model(ids).logits.argmax(-1) == draft(ids).logits.argmax(-1)
        same, total = same + int(equal[0, start:-2].sum()), total + equal[0, start:-2].numel()
    assert same >= 0.9 * total, f"the draft agrees on {same} of {total} tokens"


def test_the_corpus_is_a_function_of_its_seed():
    """The same seed gives the same documents, another seed gives others."""
    assert corpus.documents(7, 50) == corpus.documents(7, 50), "the same seed gave different text"
    assert corpus.documents(7, 50) != corpus.documents(8, 50), "two seeds gave the same text"
    raw = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    first, second = (corpus.batch(1, 2, raw, 2048, 512) for _ in range(2))
    assert first.shape == (4, 512) and (first == second).all(), f"two equal batches differ, or have shape {first.shape}"


def test_what_is_held_out_stays_out():
    """No training text contains a held-out sum or a held-out question."""
    rng = Random(4)
    held = {question for question, _ in corpus.held_out_facts()}
    seen = [corpus.fact(rng)[0] for _ in range(5000)]
    assert not held.intersection(seen), f"training asks {held.intersection(seen)}"
    pairs = [skills.pair(rng, 100) for _ in range(5000)]
    assert not any(skills.held_out(a, b) for a, b in pairs), "a held-out pair of numbers was drawn"


def test_stories_keep_to_their_wish():
    """A story about a fox has a fox in it, and every placeholder is filled."""
    rng = Random(5)
    for kind in stories.ANIMALS:
        text = stories.tell(rng, stories.fill(rng, kind))
        assert kind in text and "{" not in text, f"a story about {kind}: {text!r}"
    assert "" not in (smalltalk.invented(rng) for _ in range(100)), "an invented word is empty"


def test_the_training_program_runs(tmp_path):
    """One command trains a model and a draft from nothing and writes folders that load."""
    command = [sys.executable, "-m", "minivllm.tiny.train", "--out", str(tmp_path), "--steps", "12", "--small", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"the training program failed: {done.stderr[-2000:]}"
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in done.stdout.splitlines() if "loss" in line]
    assert losses[11] < losses[0], f"the loss went from {losses[0]} to {losses[11]}"
    for folder in (tmp_path / "model", tmp_path / "draft"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.config.vocab_size == len(AutoTokenizer.from_pretrained(folder)), f"{folder.name} has another vocabulary"
