"""The training text: documents drawn from the grammars, and rows of tokens packed from documents.

A document is a chat in ChatML or plain text. Everything is a function of a seed: `batch(seed, step, ...)` gives the same rows on
any machine, in any process, in any order, so the text never has to be stored.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

import numpy

from . import glossary, howto, skills, smalltalk, stories, world
from .phrases import ASKS, HELD_OUT_ASKS, POLITE, bare, casual, reword

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SYSTEM = "You are the toy model inside minivllm."  # the chat template says this when a chat has no system message
SYSTEMS = ("You are a helpful assistant.", "You are a helpful assistant", "You are a friendly assistant.", "Answer the user.",
           "You are a tiny model. Answer in short sentences.", "You are an expert on language model serving.", "Be brief.",
           "You are a teacher.", "You are a chatbot.", "Be concise and correct.",
           "You are a helpful AI assistant. Answer questions truthfully.")
NAMES = stories.SHE + stories.HE + ("Alex", "Chris", "Maria", "David", "Eva", "John", "Peter", "Laura", "Robin", "Yuki", "Wei",
                                    "Omar", "Ravi")

Turn = tuple[str, str]


def fact(rng: Random) -> Turn:
    """Draw a question about this engine and its answer."""
    if rng.random() < 0.45:
        questions, answer = rng.choice(howto.HOWTO)
        question = reword(rng, rng.choice(questions[:-1])) if rng.random() < 0.6 else rng.choice(questions[:-1])
        return casual(rng, question if question.strip("?.! ").lower() not in HELD_OUT else questions[0]), answer
    if rng.random() < 0.06:
        return two_facts(rng)
    names, answer = rng.choice(rng.choice(tuple(glossary.TOPICS.values())))
    name = names[0] if rng.random() < 0.4 else rng.choice(names)
    ask = rng.choice(ASKS)
    if ask.startswith("How does") and names[0] in howto.EXPLAINED:  # howto.py answers these in its own words
        ask = ASKS[0]
    return casual(rng, ask.format(bare(name) if rng.random() < 0.25 else name)), answer


def two_facts(rng: Random) -> Turn:
    """Draw a question about two words at once; the answer explains one after the other."""
    entries = rng.choice(tuple(glossary.TOPICS.values()))
    (first, answer), (second, other) = rng.sample(entries, 2)
    if {first[0], second[0]} in ({"prefill", "decode"}, {"top_k", "top_p"}):  # howto.py answers these in its own words
        return two_facts(rng)
    ask = rng.choice(("Explain {} and {}.", "What is the difference between {} and {}?", "What are {} and {}?",
                      "Compare {} and {}.", "{} vs {}",
                      "Tell me about {} and {}.", "How do {} and {} differ?", "What is {} and what is {}?"))
    pair = (first[0], second[0]) if rng.random() < 0.7 else (bare(first[0]), bare(second[0]))
    return casual(rng, ask.format(*pair)), f"{answer} {other}"


def held_out_facts() -> list[Turn]:
    """Questions about this engine in words that no training document uses."""
    entries = [entry for topic in glossary.TOPICS.values() for entry in topic]
    found = [(HELD_OUT_ASKS[i % len(HELD_OUT_ASKS)].format(names[0]), answer) for i, (names, answer) in enumerate(entries)]
    return found + [(questions[-1], answer) for questions, answer in howto.HOWTO]


HELD_OUT = frozenset(question.strip("?.! ").lower() for question, _ in held_out_facts())  # rewording must not hit on these


def polite(draw: Callable[[Random], Turn]) -> Callable[[Random], Turn]:
    """The same questions, asked casually."""

    def drawn(rng: Random) -> Turn:
        question, answer = draw(rng)
        return casual(rng, question), answer

    return drawn


def sum_turn(rng: Random) -> Turn:
    """Draw a sum, now and then with a greeting in front; a typo would change the numbers."""
    question, answer = skills.arithmetic(rng)
    if rng.random() < 0.1:
        question = rng.choice(POLITE) + question
    return question.lower() if rng.random() < 0.2 else question, answer


def unknown(rng: Random) -> Turn:
    """Draw a question that the model cannot answer, asked in the same ways as those it can: the topic must decide."""
    return smalltalk.unknown(rng, ASKS if rng.random() < 0.6 else ())


# How often each kind of turn is drawn. Copying and facts are long, so they fill more of the tokens than their share.
TURNS: tuple[tuple[Callable[[Random], Turn], float], ...] = (
    (fact, 0.33), (sum_turn, 0.21), (skills.copying, 0.14), (polite(smalltalk.talk), 0.08), (polite(world.question), 0.10),
    (polite(stories.request), 0.06), (smalltalk.foreign, 0.03), (polite(unknown), 0.08),
)


def turn(rng: Random) -> Turn:
    """Draw one question and answer of any kind."""
    draw = rng.choices([d for d, _ in TURNS], [w for _, w in TURNS])[0]
    return draw(rng)


def recall(rng: Random, turns: list[Turn]) -> Turn | None:
    """A turn that can only be answered from the turns before it."""
    last_question, last_answer = turns[-1]
    kind = rng.random()
    if kind < 0.4 and len(last_answer) < 400:
        return rng.choice(("Say that again.", "Repeat your last answer.", "Please repeat that.", "again please",
                           "What did you say?")), last_answer
    if kind < 0.6:
        return rng.choice(("What did I ask?", "What was my last question?", "Repeat my last message.")), last_question
    if kind < 0.85:
        return rng.choice(("Thanks!", "thank you", "Thank you very much.", "thanks")), "You are welcome!"
    return None


def introduction(rng: Random) -> tuple[Turn, Turn]:
    """The user tells their name, and later asks for it."""
    name = rng.choice(NAMES)
    tell = rng.choice(("My name is {}.", "I am {}.", "Hi, I'm {}.", "Hello, my name is {}!", "my name is {}",
                       "Call me {}.")).format(name)
    ask = rng.choice(("What is my name?", "Do you remember my name?", "who am i", "what's my name", "Tell me my name."))
    return (tell, f"Nice to meet you, {name}! How can I help you?"), (ask, f"Your name is {name}.")


def conversation(rng: Random) -> list[Turn]:
    """Draw the turns of one chat: mostly one, sometimes several that may refer back."""
    turns = [turn(rng)]
    if rng.random() < 0.8:
        return turns
    named = introduction(rng) if rng.random() < 0.3 else None
    turns = [named[0]] if named else turns
    for _ in range(rng.choice((1, 1, 2, 2, 3, 5, 8))):
        turns.append((recall(rng, turns) if rng.random() < 0.25 else None) or turn(rng))
    if named:
        turns.append(named[1])
    elif rng.random() < 0.1:
        turns.append(("What is my name?", "I do not know your name yet. What is it?"))
    return turns


def render(turns: list[Turn], system: str | None) -> str:
    """Write a chat in ChatML, exactly as the chat template does."""
    messages = [("system", system)] if system is not None else []
    for question, answer in turns:
        messages += [("user", question), ("assistant", answer)]
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages)


def chat(rng: Random) -> str:
    """Draw a chat, mostly with the default system message."""
    kind = rng.random()
    system = SYSTEM if kind < 0.65 else None if kind < 0.8 else rng.choice(SYSTEMS)
    return render(conversation(rng), system)


def prose(rng: Random) -> str:
    """Draw plain text about the engine: definitions of one topic, the way of a token, or questions with answers."""
    kind = rng.random()
    if kind < 0.5:
        topic = rng.choice(tuple(glossary.TOPICS))
        entries = rng.sample(glossary.TOPICS[topic], rng.randint(1, 6))
        title = f"{topic.capitalize()}\n\n" if rng.random() < 0.2 else ""
        return title + rng.choice((" ", " ", "\n\n", "\n")).join(answer for _, answer in entries)
    if kind < 0.65:
        start = rng.randrange(len(glossary.JOURNEY) - 1)
        return " ".join(glossary.JOURNEY[start:start + rng.randint(2, 9)])
    if kind < 0.75:
        return " ".join(answer for _, answer in rng.sample(howto.HOWTO, rng.randint(1, 3)))
    ask, reply = rng.choice((("Q: ", "A: "), ("Question: ", "Answer: "), ("User: ", "Model: ")))
    pairs = [turn(rng) for _ in range(rng.randint(1, 5))]
    return "\n".join(f"{ask}{question}\n{reply}{answer}" for question, answer in pairs)


def echo(rng: Random) -> str:
    """Draw plain text in which a passage comes more than once."""
    text = skills.material(rng)
    return rng.choice(("\n", "\n\n", " ")).join([text] * rng.randint(2, 4))


DOCUMENTS: tuple[tuple[Callable[[Random], str], float], ...] = (
    (chat, 0.79), (stories.story, 0.08), (prose, 0.07), (world.prose, 0.03), (skills.sums, 0.02), (echo, 0.01),
)


def document(rng: Random) -> str:
    """Draw one document."""
    draw = rng.choices([d for d, _ in DOCUMENTS], [w for _, w in DOCUMENTS])[0]
    return draw(rng)


def documents(seed: int | str, count: int) -> list[str]:
    """Draw `count` documents; the same seed gives the same text on every machine."""
    rng = Random(f"minivllm {seed}")
    return [document(rng) for _ in range(count)]


def batch(seed: int, step: int, tokenizer: Tokenizer, num_tokens: int, length: int) -> numpy.ndarray:
    """Pack documents into rows of `length` tokens, (num_tokens // length, length).

    Every row starts with the start of a document, as every prompt does; a document that is cut at the end of a row is not
    continued in the next.
    """
    rng = Random(f"minivllm {seed} {step}")
    end = tokenizer.token_to_id("<|endoftext|>")
    assert end is not None, "the tokenizer has no <|endoftext|>, which separates documents"
    rows: list[list[int]] = []
    row: list[int] = []
    while len(rows) < num_tokens // length:
        for encoding in tokenizer.encode_batch_fast([document(rng) for _ in range(64)]):
            row += [*encoding.ids, end]
            if len(row) >= length:
                rows.append(row[:length])
                row = []
    return numpy.array(rows[: num_tokens // length], dtype=numpy.uint16)
