"""Arithmetic and copying: the two skills in which an answer is simply right or wrong.

One in twenty pairs of numbers is never trained on (`held_out`), so that the accuracy on those pairs measures the skill and
not the memory.
"""

from __future__ import annotations

import string
from random import Random

from . import glossary, howto, phrases, smalltalk, stories, words, world

SMALL = 100  # sums and differences of numbers below this are what the model promises to get right


def _words() -> tuple[str, ...]:
    """The words to copy, in a fixed order: those of every table that the model learns from, and everyday ones."""
    texts = [text for topic in glossary.TOPICS.values() for names, definition in topic for text in (*names, definition)]
    texts += [text for questions, answer in howto.HOWTO for text in (*questions, answer)]
    texts += [text for asks, answers in smalltalk.TALK for text in (*asks, *answers)]
    texts += [*smalltalk.STRANGE, *smalltalk.REQUESTS, *smalltalk.PLACES, *phrases.ASKS, *phrases.HELD_OUT_ASKS, *glossary.JOURNEY]
    texts += [text for plot in stories.PLOTS.values() for text in plot] + [*stories.OPENINGS, *stories.HABITS, *stories.ENDINGS]
    texts += [*stories.ANIMALS, *stories.PEOPLE, *stories.SHE, *stories.HE, *stories.TRAITS, *stories.PLACES, *stories.THINGS]
    texts += [*stories.FOODS, *stories.SKILLS, *stories.WEATHER, *stories.TIMES, *stories.MORALS, *stories.SEARCH, *stories.FOUND_AT]
    texts += [text for table in (world.CAPITALS, world.PLURALS, world.SOUNDS, world.BABIES, world.THINGS) for p in table.items() for text in p]
    texts += [text for p in world.OPPOSITES for text in p] + [text for items in world.LISTS.values() for text in items]
    found = {word.strip(".,!?\":;()[]{}'") for text in texts for word in text.split() if "{" not in word}
    return tuple(sorted((found | set(words.EVERYDAY)) - {""}))


WORDS = _words()
SYMBOLS = "_-./:=+*#@&%$!?<>[](){}|~^,;"
UNICODE = tuple("äöüßéèñçåøłžščćığ你好我们大小中国模型世界日本語こんにちはカタкотдомλπΩ∑€£→✓") + tuple(smalltalk.EMOJI.values())


def held_out(a: int, b: int) -> bool:
    """Whether this pair of numbers is kept out of the training text."""
    return (a * 31 + b * 17) % 20 == 3


def pair(rng: Random, limit: int) -> tuple[int, int]:
    """Draw two numbers below `limit` that are not held out."""
    while True:
        a, b = rng.randrange(limit), rng.randrange(limit)
        if not held_out(a, b):
            return a, b


SUM_ASKS = ("What is {0} {2} {1}?", "{0} {2} {1}", "{0}{2}{1}", "{0} {2} {1} = ?", "{0} {2} {1} =", "What's {0} {2} {1}?",
            "Calculate {0} {2} {1}.",
            "Compute {0} {2} {1}.", "what is {0}{2}{1}", "How much is {0} {2} {1}?", "what is {0} {2} {1}",
            "Please compute {0} {2} {1}.",
            "{0}{2}{1}=", "Solve {0} {2} {1}.", "Can you tell me what {0} {2} {1} is?", "How much is {0} {3} {1}?",
            "What is {0} {3} {1}?",
            "{0} {3} {1}", "what's {0} {3} {1}")
SAID = {"+": ("plus", "and"), "-": ("minus",), "*": ("times", "multiplied by"), "/": ("divided by",)}
EXTRA_ASKS = {"+": ("Add {0} and {1}.", "add {0} and {1}", "What is the sum of {0} and {1}?"),
              "-": ("Subtract {1} from {0}.", "What is the difference of {0} and {1}?", "Take {1} away from {0}."),
              "*": ("Multiply {0} by {1}.", "What is the product of {0} and {1}?"), "/": ("Divide {0} by {1}.",)}
WORD_PROBLEMS = (
    ("{name} has {0} {things} and finds {1} more. How many {things} does {name} have now?", "+"),
    ("{name} has {0} {things} and gets {1} more. How many does {name} have?", "+"),
    ("There are {0} {things} in one box and {1} in another. How many {things} are there?", "+"),
    ("{name} has {0} {things} and gives {1} away. How many {things} are left?", "-"),
    ("{name} has {0} {things} and eats {1}. How many are left?", "-"),
    ("{name} has {0} {things} and sells {1} of them. How many {things} does {name} have left?", "-"),
    ("{name} has {0} {things} and buys {1} more. How many {things} does {name} have?", "+"),
    ("I have {0} {things} and get {1} more. How many {things} do I have?", "+"),
    ("I have {0} {things} and give away {1}. How many do I have left?", "-"),
    ("{0} {things} are on the table. {name} takes {1} away. How many {things} remain?", "-"),
    ("{name} had {0} {things} and lost {1}. How many {things} does {name} have now?", "-"),
)
GOODS = ("apples", "stones", "books", "coins", "cards", "stars", "blocks", "tokens", "nuts", "flowers")


def operands(rng: Random) -> tuple[str, int, int]:
    """Draw an operation and two numbers for it, most of them below SMALL."""
    op = rng.choice("++++---**/")
    if op == "/":
        b, quotient = rng.randint(1, 12), rng.randint(0, 12)
        return op, b * quotient, b
    if op == "*":
        a, b = (rng.randint(0, 12), rng.randint(0, 12)) if rng.random() < 0.6 else pair(rng, SMALL)
        return op, a, b
    a, b = pair(rng, 1000 if rng.random() < 0.12 else SMALL if rng.random() < 0.85 else 20)
    if op == "-" and b > a and rng.random() < 0.5 and not held_out(b, a):
        a, b = b, a
    return op, a, b


def solution(op: str, a: int, b: int) -> str:
    """The answer as a sentence; a large product is worked out by tens and ones."""
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[op]
    tens, ones = (b if b > 12 else a) // 10 * 10, (b if b > 12 else a) % 10
    if op != "*" or max(a, b) <= 12 or min(a, b) < 2 or ones == 0:
        return f"{a} {op} {b} = {value}."
    first, second = (f"{a} * {tens}", f"{a} * {ones}") if b > 12 else (f"{tens} * {b}", f"{ones} * {b}")
    left, right = tens * (a if b > 12 else b), ones * (a if b > 12 else b)
    return f"{first} = {left}, {second} = {right}, {left} + {right} = {value}. So {a} * {b} = {value}."


def chain(rng: Random) -> tuple[str, str]:
    """Draw a sum of three numbers, which is worked out from the left."""
    (a, b), c = pair(rng, SMALL if rng.random() < 0.6 else 20), rng.randrange(SMALL if rng.random() < 0.5 else 20)
    first, second = rng.choice("++-"), rng.choice("+-")
    middle = a + b if first == "+" else a - b
    end = middle + c if second == "+" else middle - c
    text = f"{a} {first} {b} {second} {c}"
    ask = rng.choice(("What is {}?", "{}", "Calculate {}.", "what is {}", "{} =")).format(text)
    return ask.replace(" ", "") if ask[0].isdigit() and rng.random() < 0.3 else ask, \
        f"{a} {first} {b} = {middle}, {middle} {second} {c} = {end}. So {text} = {end}."


def arithmetic(rng: Random) -> tuple[str, str]:
    """Draw a sum, a comparison or a small word problem."""
    kind = rng.random()
    if kind < 0.08:
        a, b = pair(rng, SMALL)
        if a != b:
            larger = rng.random() < 0.6
            word = rng.choice(("larger", "bigger", "greater") if larger else ("smaller", "less"))
            ask = rng.choice(("Which is {2}, {0} or {1}?", "Which number is {2}: {0} or {1}?", "what is {2}, {0} or {1}"))
            return ask.format(a, b,
                              word), f"{max(a, b) if larger else min(a, b)} is {word} than {min(a, b) if larger else max(a, b)}."
    if kind > 0.94:
        return chain(rng)
    if kind < 0.12:
        n = rng.randrange(SMALL)
        word = rng.choice(("even", "odd"))
        right = (n % 2 == 0) == (word == "even")
        return f"Is {n} {word}?", f"{'Yes' if right else 'No'}, {n} is {'even' if n % 2 == 0 else 'odd'}."
    if kind < 0.22:
        text, op = rng.choice(WORD_PROBLEMS)
        a, b = pair(rng, SMALL)
        if op == "-" and b > a:
            a, b = b, a
        name = rng.choice(stories.SHE + stories.HE)
        if not held_out(a, b):
            return text.format(a, b, name=name, things=rng.choice(GOODS)), solution(op, a, b)
    op, a, b = operands(rng)
    shown = {"*": rng.choice("**x"), "/": rng.choice("//÷")}.get(op, op)
    ask = rng.choice(EXTRA_ASKS[op]) if rng.random() < 0.2 else rng.choice(SUM_ASKS)
    return ask.format(a, b, shown, rng.choice(SAID[op])), solution(op, a, b)


def sums(rng: Random) -> str:
    """Draw a few lines of plain sums."""
    return "\n".join(solution(*operands(rng)).rstrip(".") for _ in range(rng.randint(3, 12)))


def scrap(rng: Random) -> str:
    """Draw one word-like thing: a word, a number, an invented name, something that looks like code, or foreign letters."""
    kind = rng.random()
    if kind < 0.34:
        return rng.choice(WORDS)
    if kind < 0.42:  # pieces of two words: tokens that no whole word would show
        left, right = rng.choice(WORDS), rng.choice(WORDS)
        return left[:rng.randint(1, len(left))] + right[rng.randrange(len(right)):]
    if kind < 0.52:
        return str(rng.randrange(10 ** rng.randint(1, 6)))
    if kind < 0.66:
        word = smalltalk.invented(rng)
        return rng.choice((word, word.capitalize(), word.upper()))
    if kind < 0.78:
        return "".join(rng.choice(string.ascii_letters + string.digits) for _ in range(rng.randint(1, 9)))
    if kind < 0.86:
        return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(2, 10)))
    if kind < 0.95:
        glue = rng.choice(SYMBOLS)
        return glue.join(rng.choice((rng.choice(WORDS), str(rng.randrange(100)))) for _ in range(rng.randint(2, 4)))
    return "".join(rng.choice(UNICODE) for _ in range(rng.randint(1, 5)))


def code(rng: Random) -> str:
    """Draw a short line that looks like code."""
    a, b, c = (rng.choice(WORDS).replace(" ", "_") for _ in range(3))
    n, m = rng.randrange(100), rng.randrange(1000)
    return rng.choice((
        f"{a} = {b}[{n}] + {m}", f"def {a}({b}, {c}={n}): return {b} * {m}", f"for {a} in range({n}): print({a}, {b})",
        f"{a}.{b}({c})",
        f"if {a} < {n}: {b} = {c}", f'{{"{a}": {n}, "{b}": [{m}, {n}]}}', f"<{a} {b}=\"{n}\">{c}</{a}>",
        f"https://{a}.example/{b}?{c}={n}",
        f"{a}/{b}/{c}.txt", f"git commit -m '{a} {b}'", f"SELECT {a} FROM {b} WHERE {c} = {m};", f"{n}.{m}e-{n} {a}_{b}",
        f"#{m:06x} {a}@{b}.org"))


def material(rng: Random) -> str:
    """Draw something to copy: from one word to a list of forty."""
    kind = rng.random()
    if kind < 0.15:
        return code(rng)
    if kind < 0.27:
        return rng.choice(rng.choice(tuple(glossary.TOPICS.values())))[1]
    if kind < 0.36:
        return rng.choice(stories.story(rng).split("\n\n"))
    count = rng.randint(1, 8) if rng.random() < 0.45 else rng.randint(8, 42)
    plain = rng.random()
    if plain < 0.45:
        items = [rng.choice(WORDS) for _ in range(count)]
        if rng.random() < 0.3:  # capitals and commas, as in a sentence
            items = [rng.choice((word, word, word.capitalize(), word + ",", word + rng.choice(".;:!?"))) for word in items]
        elif rng.random() < 0.1:
            items = [word.upper() for word in items]
    elif plain < 0.6:
        items = [str(rng.randrange(10 ** rng.randint(1, 4))) for _ in range(count)]
    else:
        items = [scrap(rng) for _ in range(count)]
    if rng.random() < 0.1:  # runs of equal words are where a copier loses count
        items[rng.randrange(count)] = items[0]
    text = rng.choice((" ", " ", " ", ", ", ", ", "\n", "; ")).join(items)
    return text[0].upper() + text[1:] + "." if rng.random() < 0.15 else text


COPY_ASKS = ("Repeat this: {}", "Repeat this: {}", "Repeat this: {}", "repeat this: {}", "Repeat after me: {}",
             "Copy this: {}", "Copy: {}",
             "Say this: {}", "Echo: {}", "Repeat the following: {}", "Copy the following text exactly: {}", "Repeat: {}",
             "Please repeat this: {}",
             "Write this again: {}", "Repeat these words: {}", "copy {}", "repeat {}", "echo {}", "Say exactly this: {}",
             "Repeat this text:\n{}",
             "Repeat this:\n\n{}", "Can you repeat this? {}", "Print this: {}", "Repeat \"{}\"", "Say {}")


def copying(rng: Random) -> tuple[str, str]:
    """Draw a request that is answered by its own words."""
    kind = rng.random()
    if kind < 0.05:
        text, times = material(rng)[:60].strip(), rng.randint(2, 4)
        word = {2: "two times", 3: "three times", 4: "four times"}[times]
        return f"Repeat this {word}: {text}", "\n".join([text] * times)
    if kind < 0.1:
        items = [rng.choice(WORDS) for _ in range(rng.randint(2, 12))]
        ask = rng.choice(("Write these as a JSON list: {}", "Make a JSON list of {}"))
        return ask.format(", ".join(items)), "[" + ", ".join(f'"{item}"' for item in items) + "]"
    if kind < 0.15:
        items = [rng.choice(WORDS) for _ in range(rng.randint(2, 12))]
        ask = rng.choice(("Write these as a list: {}", "Make a bullet list of {}"))
        return ask.format(", ".join(items)), "\n".join(f"- {item}" for item in items)
    if kind < 0.2:
        word = rng.choice([w for w in WORDS if w.isalpha()])
        return rng.choice(("Spell {}.", "How do you spell {}?", "Spell the word {}.", "spell {}", "spell the word {}",
                           "Can you spell {}?")).format(word), "-".join(word)
    text = material(rng)
    return rng.choice(COPY_ASKS).format(text), text
