"""Measure what a checkpoint learned, on questions that it never saw: python -m minivllm.tiny.evaluate DIR

Greedy, in float32 from the stored bfloat16 weights, as the engine runs it on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

from . import corpus, skills, smalltalk, stories, world

SENTENCES = (
    "I went to the market yesterday and bought three kilos of potatoes.", "The meeting is on Friday at 10:30 in room B12.",
    "My phone number is 555-0192, please call me back.", "To be, or not to be, that is the question.",
    "Please send the report to anna.schmidt@example.com before noon!", "She sells sea shells by the sea shore.",
    "All happy families are alike; every unhappy family is unhappy in its own way.", "import numpy as np; x = np.zeros((3, 4))",
    "We hold these truths to be self-evident.", "The train from Berlin to Paris leaves at seven.",
    "It was a bright cold day in April, and the clocks were striking thirteen.",
)


def exams(number: int) -> dict[str, list[corpus.Turn]]:
    """Questions and right answers of each kind, from a seed that training does not use."""
    rng = Random("minivllm exam")
    held = [(a, b) for a in range(100) for b in range(100) if skills.held_out(a, b)]
    large = [(a, b) for a, b in held if a > 12 and b > 12][:number]
    words = [" ".join(rng.choice(skills.WORDS) for _ in range(rng.randint(20, 40))) for _ in range(number)]
    scraps = [" ".join(skills.scrap(rng) for _ in range(rng.randint(5, 30))) for _ in range(number)]
    return {
        "held-out sums": [(f"What is {a} + {b}?", skills.solution("+", a, b)) for a, b in rng.sample(held, number)],
        "held-out differences": [(f"{a} - {b}", skills.solution("-", a, b)) for a, b in rng.sample(held, number)],
        "products up to 12": [(f"What is {a} * {b}?", skills.solution("*", a, b)) for a in range(2, 13) for b in range(2, 13)],
        "held-out large products": [(f"What is {a} * {b}?", skills.solution("*", a, b)) for a, b in large],
        "any sum, any words": [corpus.sum_turn(rng) for _ in range(number)],
        "copy 20 to 40 words": [(f"Repeat this: {text}", text) for text in words],
        "copy scraps": [(f"Repeat this: {text}", text) for text in scraps],
        "copy everyday sentences": [(f"Repeat this: {text}", text) for text in SENTENCES],
        "copy anything": [skills.copying(rng) for _ in range(number)],
        "facts, seen phrasings": [corpus.fact(rng) for _ in range(number)],
        "facts, held-out phrasings": corpus.held_out_facts(),
        "facts, held-out, lower case": [(q.lower().rstrip("?."), a) for q, a in corpus.held_out_facts()],
        "world": [world.question(rng) for _ in range(number)],
        "small talk": [(asks[0], answers[0]) for asks, answers in smalltalk.TALK if len(answers) == 1],
        "other languages": [smalltalk.foreign(rng) for _ in range(number)],
        "out of domain": [(ask.format(smalltalk.invented(rng)),
                           smalltalk.SORRY) for ask in smalltalk.UNKNOWN[:6] for _ in range(8)],
    }


def ask(model: Qwen2ForCausalLM, tokenizer, questions: list[str], max_new_tokens: int = 400) -> list[str]:
    """The greedy answers to chat questions, as one padded batch."""
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False,
                                             add_generation_prompt=True) for q in questions]
    return complete(model, tokenizer, prompts, max_new_tokens)


def complete(model: Qwen2ForCausalLM, tokenizer, prompts: list[str], max_new_tokens: int = 400) -> list[str]:
    """The greedy continuations of raw prompts, as one padded batch."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, do_sample=False, temperature=None, top_p=None, top_k=None,
                                max_new_tokens=max_new_tokens)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m minivllm.tiny.evaluate", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--number", type=int, default=200, help="questions of each kind")
    parser.add_argument("--wrong", type=int, default=3, help="wrong answers to show of each kind")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model = Qwen2ForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    for name, turns in exams(options.number).items():
        answers = ask(model, tokenizer, [question for question, _ in turns])
        wrong = [(q, right, got) for (q, right), got in zip(turns, answers, strict=True) if got != right]
        print(f"{name}: {len(turns) - len(wrong)} of {len(turns)} right ({100 - 100 * len(wrong) / len(turns):.1f} %)")
        for question, right, got in wrong[:options.wrong]:
            print(f"    {question!r}\n        right {right!r}\n        got   {got!r}")
    raw = ("Once upon a time", "The scheduler", "The capital of France is", "Paged attention", "A KV cache")
    wishes = [f"tell me a story about {stories.article(kind)}" for kind in ("fox", "robot", "king", "dragon")]
    for prompt, text in zip(raw + tuple(wishes), complete(model, tokenizer, list(raw), 250) + ask(model, tokenizer, wishes),
                            strict=True):
        print(f"--- {prompt!r}\n{text}")


if __name__ == "__main__":
    main()
