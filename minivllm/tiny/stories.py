"""Short stories from a grammar: a hero, a place, a plot with a problem and an end.

The phrases of a pool are drawn with a preference for the first ones (see `pick`). A model that is asked for its single most
likely continuation then has a clear favorite at every turn, instead of a coin toss between equal phrases.
"""

from __future__ import annotations

from random import Random

ANIMALS = ("fox", "rabbit", "bear", "mouse", "cat", "dog", "owl", "frog", "duck", "wolf", "lion", "turtle", "horse",
           "hedgehog", "squirrel",
           "penguin", "elephant", "dragon", "bird", "pig", "goat", "sheep", "tiger", "bee", "fish", "monkey", "crow", "robot",
           "snail", "deer")
PEOPLE = ("girl", "boy", "farmer", "baker", "king", "queen", "sailor", "teacher", "gardener", "painter", "knight", "wizard")
SHE = ("Mia", "Anna", "Lucy", "Ella", "Rosa", "Nina", "Lily", "Clara", "Emma", "Sara", "Ruby", "Ida")
HE = ("Tom", "Max", "Ben", "Leo", "Finn", "Sam", "Oscar", "Paul", "Hugo", "Jack", "Otto", "Tim")
TRAITS = ("little", "brave", "kind", "clever", "shy", "curious", "quiet", "cheerful", "lazy", "young", "old", "funny",
          "careful", "hungry")
PLACES = ("near the river", "in a small house", "at the edge of the forest", "on a green hill", "by the sea",
          "in a quiet village",
          "under a big tree", "in a garden full of flowers", "in the mountains", "on a farm", "near a lake", "in an old castle",
          "in a cave", "on a small island", "behind the mill")
THINGS = ("a red ball", "a golden key", "a blue hat", "a small lamp", "a silver bell", "an old book", "a wooden boat",
          "a warm scarf",
          "a shiny stone", "a map", "a green umbrella", "a paper kite", "a music box", "a jar of honey", "a round mirror",
          "a tiny drum")
FOODS = ("apples", "berries", "bread", "honey", "nuts", "carrots", "soup", "cakes", "cherries", "pears")
SKILLS = ("swim", "sing", "climb trees", "bake bread", "read", "paint", "fly a kite", "skip stones", "count to one hundred",
          "play the drum")
WEATHER = ("the sun was shining", "it was raining", "the wind was strong", "snow was falling", "the sky was clear",
           "there was a thick fog")
TIMES = ("One day", "One morning", "One evening", "One summer day", "One winter night", "Early one day", "On a cold day",
         "After lunch")
FEELINGS = ("happy", "proud", "glad", "very happy", "full of joy")
MORALS = ("A good friend is worth more than gold.", "It is never too late to ask for help.", "Small steps can take you far.",
          "Those who share are never alone.", "Being brave means to try although you are afraid.",
          "Kindness always comes back.",
          "Patience is a good teacher.", "What is lost can be found again.")
ENDINGS = ("From that day on, {hero} and {friend} were the best of friends.",
           "That night {hero} slept well and dreamed of {place_noun}.",
           "{hero} never forgot that day.", "And they all lived happily ever after.",
           "Everyone in the village told the story for years.",
           "And since then {hero} has always had time for a friend.", "The next day {hero} and {friend} did it all again.")
NOUNS = {"near the river": "the river", "in a small house": "home", "at the edge of the forest": "the forest",
         "on a green hill": "the hill",
         "by the sea": "the sea", "in a quiet village": "the village", "under a big tree": "the big tree",
         "in a garden full of flowers": "the garden", "in the mountains": "the mountains", "on a farm": "the farm",
         "near a lake": "the lake",
         "in an old castle": "the castle", "in a cave": "the cave", "on a small island": "the island",
         "behind the mill": "the mill"}

OPENINGS = ("Once upon a time, there was {a_trait} {kind} named {hero} who lived {place}.",
            "Once upon a time, {a_trait} {kind} named {hero} lived {place}.",
            "There once was {a_trait} {kind} called {hero}. {He} lived {place}.",
            "Long ago, {a_trait} {kind} named {hero} lived {place}.",
            "{hero} was {a_trait} {kind}. {He} lived {place}.",
            "Far away, {place}, there lived {a_trait} {kind} named {hero}.")
HABITS = ("Every day {he} looked for {food}.", "{hero} loved {food} more than anything else.",
          "{He} liked to sit outside and watch the clouds.",
          "{He} was always ready for an adventure.", "{hero} had many friends, but {he} was often alone.",
          "In the morning {he} went for a walk, and in the evening {he} told stories.",
          "{He} always wanted to learn something new.")
OWNING = "{hero} had {thing}, and {he} took it everywhere."  # what can be lost must be owned

LOST = ("{time}, {hero} could not find {thing_the}. {He} looked everywhere, but it was gone.",
        "{friend}, {a_friend_kind}, came by and asked, \"Why are you so sad?\"",
        "\"I have lost my {thing_noun},\" said {hero}.",
        "\"Do not worry,\" said {friend}. \"We will look for it together.\"",
        "They searched {search}, and at last they saw something in the grass. It was the {thing_noun}!",
        "{hero} was {feeling} and said, \"Thank you, {friend}!\"")
LEARN = ("{time}, {hero} saw how {friend}, {a_friend_kind}, could {skill}.",
         "\"I want to {skill} too,\" said {hero}, \"but I do not know how.\"",
         "\"It is not hard,\" said {friend}. \"Come with me, and I will show you.\"",
         "At first {hero} made many mistakes, but {he} did not give up.",
         "After {days} days of practice, {hero} could {skill} all by {himself}.",
         "{friend} clapped and said, \"Well done!\" {hero} was {feeling}.")
STORM = ("{time}, while {weather}, {hero} heard a strange sound.",
         "{He} was afraid, but {he} went outside to see what it was.",
         "It was {friend}, {a_friend_kind}, who had lost the way.",
         "\"Please help me,\" said {friend}. \"I am cold and hungry.\"",
         "{hero} took {friend} home and made some hot soup. They sat by the fire and talked all night.",
         "In the morning, {friend} gave {hero} {thing} as a gift. {hero} was {feeling}.")
SHARE = ("{time}, {hero} found a basket full of {food}. \"How lucky I am!\" {he} said.",
         "On the way home {he} met {friend}, {a_friend_kind}, who had nothing to eat.",
         "{hero} thought for a while. Then {he} said, \"There is enough for both of us.\"",
         "They sat down and ate the {food} together, and they laughed a lot.",
         "The next week {hero} had no food left, but {friend} came with a big bag of {food2}.",
         "\"You shared with me,\" said {friend}, \"and now I share with you.\" {hero} was {feeling}.")
FIND = ("{time}, while {weather}, {hero} found {thing} {found_at}.",
        "\"Whose is this?\" {he} asked. Nobody knew.",
        "So {hero} walked from house to house and asked everyone.",
        "At last {he} met {friend}, {a_friend_kind}, who began to smile. \"That is mine! I lost it {days} days ago.\"",
        "{hero} gave the {thing_noun} back at once.",
        "\"You are honest,\" said {friend}. \"Let us have some {food} together.\" {hero} was {feeling}.")
RACE = ("{time}, {friend}, {a_friend_kind}, said, \"I am the fastest of all!\"",
        "\"Let us have a race to {place_noun} and back,\" said {hero}.",
        "{friend} ran very fast, and soon {hero} was far behind.",
        "But {friend} stopped to eat some {food} and fell asleep in the grass.",
        "{hero} went on, step by step, and did not stop. So {hero} won the race.",
        "{friend} laughed and said, \"You were better today.\" {hero} was {feeling}.")
PLOTS = {"lost": LOST, "learn": LEARN, "storm": STORM, "share": SHARE, "find": FIND, "race": RACE}
SEARCH = ("under the bed and behind the trees", "in the garden and along the river", "all over the hill",
          "in every corner of the house")
FOUND_AT = ("in the grass", "under a stone", "by the road", "behind a tree", "in the snow", "on the beach")
DAYS = ("three", "two", "five", "seven", "ten")
TITLES = ("The {trait} {kind}", "{hero} and {friend}", "A day with {hero}", "The story of {hero}", "{hero} the {kind}")

ASKS = ("Tell me a story.", "tell me a story", "Tell me a short story.", "story", "Write a short story.",
        "I want to hear a story.",
        "Can you tell me a story?", "Do you know a story?", "Tell me another story.", "Please tell a bedtime story.",
        "Once upon a time",
        "Tell me a story about two friends.", "a story please", "Tell me a fairy tale.", "Make up a story.", "one more story")
ASKS_ABOUT = ("Tell me a story about {}.", "tell me a story about {}", "Tell me a short story about {}.",
              "Write a story about {}.", "a story about {}",
              "Can you tell me a story about {}?", "I want a story about {}.", "Do you know a story about {}?",
              "story about {}",
              "Write a short story about {}.", "Give me a tale about {}.", "Tell me another story, about {}.")


def pick(rng: Random, options: tuple[str, ...], first: int = 0) -> str:
    """Draw one option: number `first` most often, and those after it more often than those far behind it."""
    return options[(int(len(options) * rng.random() ** 2) + first) % len(options)]


def taste(word: str) -> int:
    """A number that belongs to a word, so that a story about a fox prefers other things than a story about a king."""
    return sum(map(ord, word))


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def person(rng: Random, kinds: tuple[str, ...], liking: int = 0) -> tuple[str, str, bool]:
    """A kind, a name that suits it, and whether to say "she"."""
    kind = pick(rng, kinds, liking) if liking else rng.choice(kinds)
    she = kind in ("girl", "queen") or (kind not in ("boy", "king") and rng.random() < (0.8 if taste(kind) % 2 else 0.2))
    return kind, pick(rng, SHE if she else HE, taste(kind) + liking), she


def fill(rng: Random, kind: str | None = None, thing: str | None = None, other: str | None = None) -> dict[str, str]:
    """Draw everything that the phrases of one story refer to: the hero, a friend, places and things."""
    hero_kind, hero, she = person(rng, (kind,) if kind else ANIMALS + ANIMALS + PEOPLE)
    liking = taste(hero_kind)
    friend_kind, friend = hero_kind, hero
    while friend == hero or friend_kind == hero_kind:
        friend_kind, friend, _ = person(rng, (other,) if other else ANIMALS, liking)
    trait, place, food = pick(rng, TRAITS, liking), pick(rng, PLACES, liking), pick(rng, FOODS, liking)
    food2 = rng.choice([f for f in FOODS if f != food])
    thing = thing or pick(rng, THINGS, liking)
    noun = thing.split(" ", 1)[1]
    he = "she" if she else "he"
    return {
        "kind": hero_kind, "hero": hero, "he": he, "He": he.capitalize(), "himself": "herself" if she else "himself",
        "trait": trait, "a_trait": article(trait), "place": place, "place_noun": NOUNS[place], "friend": friend,
        "a_friend_kind": article(pick(rng, TRAITS, liking + 5) + " " + friend_kind), "thing": thing, "thing_noun": noun,
        "thing_the": ("her " if she else "his ") + noun, "food": food, "food2": food2, "skill": pick(rng, SKILLS, liking),
        "weather": pick(rng, WEATHER, liking), "time": pick(rng, TIMES, liking), "feeling": pick(rng, FEELINGS, liking),
        "search": pick(rng, SEARCH, liking), "found_at": pick(rng, FOUND_AT, liking), "days": pick(rng, DAYS, liking),
    }


def tell(rng: Random, words: dict[str, str]) -> str:
    """Write the story that `words` describe, in three short paragraphs or in one."""
    liking = taste(words["kind"])
    plot = pick(rng, tuple(PLOTS), liking)
    habit = pick(rng, HABITS, liking) if plot != "lost" else OWNING
    start = pick(rng, OPENINGS, liking) + " " + habit
    end = pick(rng, ENDINGS, liking) + (" " + pick(rng, MORALS, liking) if rng.random() < 0.4 else "")
    gap = "\n\n" if rng.random() < 0.8 else " "
    return (start + gap + " ".join(PLOTS[plot]) + gap + end).format(**words)


def story(rng: Random) -> str:
    """Draw a story as plain text, sometimes with a title."""
    words = fill(rng)
    title = pick(rng, TITLES).format(**words) + "\n\n" if rng.random() < 0.15 else ""
    return title + tell(rng, words)


def request(rng: Random) -> tuple[str, str]:
    """Draw a wish for a story, and a story that fulfills it."""
    if rng.random() < 0.2:
        return rng.choice(ASKS), tell(rng, fill(rng))
    about, kind = rng.choice(ASKS_ABOUT), rng.choice(ANIMALS + PEOPLE)
    wish = rng.random()
    if wish < 0.15:
        thing = rng.choice(THINGS)
        return about.format(thing), tell(rng, fill(rng, thing=thing))
    if wish < 0.3:
        other = rng.choice([animal for animal in ANIMALS if animal != kind])
        return about.format(f"{article(kind)} and {article(other)}"), tell(rng, fill(rng, kind, other=other))
    words = fill(rng, kind)
    if wish < 0.45:
        trait = rng.choice(TRAITS)
        words |= {"trait": trait, "a_trait": article(trait)}
        kind = f"{trait} {kind}"
    wanted = rng.choice((article(kind), article(kind), article(kind), kind, "the " + kind))
    return about.format(wanted + (f" named {words['hero']}" if wish > 0.85 else "")), tell(rng, words)
