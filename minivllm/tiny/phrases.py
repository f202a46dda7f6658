"""How people ask: ways to put a question, and ways to vary one (other words, lower case, a greeting, a typo)."""

from __future__ import annotations

from random import Random

ASKS = ("What is {}?", "What is {}?", "what is {}", "What's {}?", "Explain {}.", "explain {}", "Define {}.",
        "Tell me about {}.",
        "What does {} mean?", "Can you explain {}?", "Please explain {}.", "Describe {}.", "{}?", "{}",
        "What do you know about {}?",
        "I want to know what {} is.", "Explain {} to me.", "How would you define {}?", "What is meant by {}?", "what are {}",
        "What is {} in this engine?", "What is {} in vLLM?", "Explain the term {}.", "Give me a definition of {}.",
        "Explain what {} is.",
        "Do you know what {} is?", "tell me what {} is", "What does the term {} stand for?", "Why is {} important?",
        "Teach me {}.",
        "How does {} work?", "Explain {} in simple words.", "What exactly is {}?", "whats {}", "Could you describe {}?",
        "I don't understand {}.", "Can you tell me about {}?", "What is the meaning of {}?", "What is the purpose of {}?",
        "what does {} do",
        "What does {} do?", "Summarize {}.", "Summarize {} for me.", "I want to learn {}.", "I want to talk about {}.",
        "Talk about {}.",
        "Say something about {}.", "Give me a short explanation of {}.", "How can I understand {}?", "Who or what is {}?",
        "Let's talk about {}.",
        "I need information about {}.", "Do you know anything about {}?", "I have never heard of {}.",
        "What can you say about {}?",
        "Could you explain {}?", "Would you explain {} to me?", "I have a question about {}.", "Show me what {} is.",
        "Is {} important?",
        "{} please", "{}, what is that?", "What is {}, exactly?", "In one sentence, what is {}?", "Explain {} to a beginner.",
        "meaning of {}",
        "definition of {}", "explain {} like I am five", "pls explain {}", "Make me understand {}.",
        "My question is: what is {}?",
        "Why do people talk about {}?", "I wonder what {} is.", "Someone told me about {}. What is it?",
        "I read about {}. What does it mean?")
HELD_OUT_ASKS = ("Could you tell me what {} is?", "Help me understand {}.", "what do you mean by {}",
                 "Please describe {} for me.",
                 "I would like to learn about {}.")
POLITE = ("Please tell me: ", "Hi, ", "Hello! ", "Hey, ", "Quick question: ", "One more question: ", "Can you help me? ",
          "So, ", "Ok, ", "And ",
          "I have a question. ", "Thanks. ", "Question: ", "Now tell me: ", "please ")
CLOSING = (" Please.", " Thanks!", " please", " Thank you.", " Explain it simply.", " :)")

# Phrases that can stand for each other in a question.
SYNONYMS = (
    ("how do i", "how can i", "how to", "how should i", "how would i", "what do i do to", "how does one",
     "in what way do i", "how could i"),
    ("start", "launch", "run", "begin", "bring up", "boot"),
    ("stop", "end", "quit", "shut down", "close", "terminate"),
    ("what happens when", "what if", "what happens if", "what does the engine do when", "what is done when", "and if"),
    ("why is", "why exactly is", "for what reason is", "tell me why", "how come"),
    ("why are", "for what reason are", "tell me why", "how is it that"),
    ("why does", "for what reason does", "tell me why", "how come"),
    ("what is", "what's", "tell me", "explain", "what exactly is", "do you know"),
    ("which", "what", "which one of the"),
    ("can i", "may i", "could i", "is it possible to", "am i able to", "i want to"),
    ("is there", "do you have", "does it have", "can i find", "are there"),
    ("show me", "give me", "tell me", "i need", "print", "write"),
    ("do i need", "must i have", "is it necessary to have", "do i require", "should i have"),
    ("the server", "the service", "the api server", "minivllm", "the engine"),
    ("the engine", "minivllm", "this engine", "it", "the system"),
    ("a request", "my request", "a prompt", "one request"),
    ("requests", "prompts", "many requests"),
    ("fast", "quick", "faster", "so fast"),
    ("slow", "slower", "so slow", "not fast"),
    ("useful", "helpful", "good", "needed", "a good idea"),
    ("full", "used up", "exhausted", "completely used"),
    ("the same", "identical", "equal", "exactly the same"),
    ("output", "answer", "result", "text", "response"),
    ("model", "checkpoint", "language model"),
    ("use", "call", "work with", "try"),
    ("another", "a different", "an other", "some other"),
    ("lessons", "exercises", "tutorials", "a course"),
    ("speed", "throughput", "performance"),
    ("test", "measure", "benchmark", "check"),
)


def typo(rng: Random, text: str) -> str:
    """Swap, drop or double one letter."""
    if len(text) < 6:
        return text
    i = rng.randrange(1, len(text) - 1)
    return rng.choice((text[:i] + text[i + 1] + text[i] + text[i + 2:], text[:i] + text[i + 1:], text[:i] + text[i] + text[i:]))


def casual(rng: Random, text: str) -> str:
    """Vary a question as people do: lower case, no question mark, a greeting in front, a typo."""
    if rng.random() < 0.16:
        prefix = rng.choice(POLITE)
        text = prefix + (text if prefix[-2] in "!.:?" else text[0].lower() + text[1:])
    if rng.random() < 0.3:
        text = text.rstrip("?.!")
    if rng.random() < 0.3:
        text = text.lower()
    if rng.random() < 0.06:
        text += rng.choice(CLOSING)
    return typo(rng, text) if rng.random() < 0.1 else text


def reword(rng: Random, question: str) -> str:
    """Say a question in other words: exchange phrases that mean the same, and now and then leave a word out."""
    for group in SYNONYMS:
        for phrase in group:
            if f" {phrase} " in f" {question.lower()} " and rng.random() < 0.5:
                start = f" {question.lower()} ".index(f" {phrase} ")
                question = question[:start] + rng.choice(group) + question[start + len(phrase):]
                break
    words = question.split(" ")
    if len(words) > 4 and rng.random() < 0.15:
        words.pop(rng.randrange(len(words)))
    return " ".join(words)


def bare(name: str) -> str:
    """A name without its article."""
    for start in ("a ", "an ", "the ", "one "):
        name = name.removeprefix(start)
    return name
