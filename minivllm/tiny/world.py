"""Small facts about the world: tables, and the questions that can be asked of them."""

from __future__ import annotations

from random import Random

CAPITALS = dict(pair.split(":") for pair in (
    "France:Paris,Germany:Berlin,Italy:Rome,Spain:Madrid,Portugal:Lisbon,England:London,Ireland:Dublin,Scotland:Edinburgh,"
    "Wales:Cardiff,Poland:Warsaw,Austria:Vienna,Switzerland:Bern,Belgium:Brussels,Denmark:Copenhagen,Sweden:Stockholm,"
    "Norway:Oslo,Finland:Helsinki,Iceland:Reykjavik,Greece:Athens,Turkey:Ankara,Russia:Moscow,Ukraine:Kyiv,Hungary:Budapest,"
    "Romania:Bucharest,Bulgaria:Sofia,Croatia:Zagreb,Serbia:Belgrade,Estonia:Tallinn,Latvia:Riga,Lithuania:Vilnius,"
    "Japan:Tokyo,China:Beijing,India:New Delhi,South Korea:Seoul,Thailand:Bangkok,Vietnam:Hanoi,Indonesia:Jakarta,"
    "Malaysia:Kuala Lumpur,Nepal:Kathmandu,Mongolia:Ulaanbaatar,Egypt:Cairo,Morocco:Rabat,Kenya:Nairobi,Ethiopia:Addis Ababa,"
    "Nigeria:Abuja,Ghana:Accra,Senegal:Dakar,Canada:Ottawa,Mexico:Mexico City,Cuba:Havana,Brazil:Brasilia,Argentina:Buenos "
    "Aires,"
    "Chile:Santiago,Peru:Lima,Colombia:Bogota,Australia:Canberra,New Zealand:Wellington,Iran:Tehran,Iraq:Baghdad,Jordan:Amman"
).split(","))

OPPOSITES = tuple(tuple(pair.split(":")) for pair in (
    "hot:cold,big:small,tall:short,fast:slow,happy:sad,old:young,rich:poor,light:dark,heavy:light,hard:soft,wet:dry,clean:dirty,"
    "early:late,full:empty,open:closed,high:low,loud:quiet,strong:weak,near:far,right:wrong,true:false,up:down,left:right,"
    "day:night,summer:winter,start:end,first:last,push:pull,give:take,win:lose,buy:sell,love:hate,laugh:cry,inside:outside,"
    "above:below,before:after,always:never,easy:difficult,cheap:expensive,brave:afraid,thick:thin,wide:narrow,deep:shallow,"
    "good:bad,new:old,black:white,yes:no,north:south,east:west,sharp:blunt,smooth:rough,sweet:bitter,asleep:awake,alive:dead,"
    "begin:finish,remember:forget,arrive:leave,rise:fall,save:spend,question:answer,friend:enemy,front:back,more:less,many:few"
).split(","))

PLURALS = dict(pair.split(":") for pair in (
    "cat:cats,dog:dogs,fox:foxes,box:boxes,bus:buses,child:children,man:men,woman:women,mouse:mice,foot:feet,tooth:teeth,"
    "goose:geese,leaf:leaves,wolf:wolves,knife:knives,city:cities,baby:babies,story:stories,party:parties,sheep:sheep,fish:fish,"
    "person:people,house:houses,tree:trees,book:books,block:blocks,token:tokens,queue:queues,key:keys,day:days,apple:apples,"
    "cherry:cherries,potato:potatoes,tomato:tomatoes,hero:heroes,watch:watches,dish:dishes,glass:glasses,star:stars,cache:caches,"
    "half:halves,shelf:shelves,life:lives,ox:oxen,deer:deer,index:indexes,branch:branches,country:countries,step:steps,hash:hashes"
).split(","))

SOUNDS = dict(pair.split(":") for pair in (
    "dog:woof,cat:meow,cow:moo,sheep:baa,duck:quack,pig:oink,horse:neigh,lion:roar,owl:hoot,frog:ribbit,bee:buzz,snake:hiss,"
    "rooster:cock-a-doodle-doo,mouse:squeak,wolf:howl,crow:caw").split(","))

BABIES = dict(pair.split(":") for pair in (
    "dog:puppy,cat:kitten,cow:calf,sheep:lamb,duck:duckling,pig:piglet,horse:foal,lion:cub,bear:cub,owl:owlet,frog:tadpole,"
    "goat:kid,swan:cygnet,kangaroo:joey,fox:kit,deer:fawn").split(","))

THINGS = dict(pair.split(":") for pair in (
    "the sky:blue,grass:green,snow:white,a banana:yellow,a tomato:red,coal:black,an orange:orange,a lemon:yellow,blood:red,"
    "a carrot:orange,milk:white,the sun:yellow,a frog:green,chocolate:brown,an elephant:gray,a flamingo:pink,a plum:purple").split(","))

LISTS = {
    "colors": "red orange yellow green blue purple pink brown black white gray".split(),
    "days of the week": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "months of the year": "January February March April May June July August September October November December".split(),
    "seasons": "spring summer autumn winter".split(),
    "animals": "dog cat horse fox rabbit bear wolf owl lion tiger frog elephant".split(),
    "birds": "robin owl eagle duck swan crow sparrow parrot pigeon hawk".split(),
    "fruits": "apple banana cherry orange pear plum grape lemon peach mango".split(),
    "vegetables": "carrot potato tomato onion cabbage pea bean leek spinach corn".split(),
    "planets": "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split(),
    "continents": ["Africa", "Antarctica", "Asia", "Australia", "Europe", "North America", "South America"],
    "oceans": ["the Pacific", "the Atlantic", "the Indian Ocean", "the Arctic", "the Southern Ocean"],
    "vowels": "a e i o u".split(),
    "shapes": "circle square triangle rectangle star oval".split(),
    "musical instruments": "piano violin guitar flute drum trumpet cello harp".split(),
    "countries": "France Germany Italy Spain Japan China India Brazil Canada Egypt".split(),
    "sampling parameters": ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"],
    "parts of the engine": ["the scheduler", "the block pool", "the model runner", "the sampler", "the detokenizer"],
}
SHORT = {"days": "days of the week", "months": "months of the year"}
COUNT_WORDS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
               "seventeen "
               "eighteen nineteen twenty").split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def article(word: str) -> str:
    """Put "a" or "an" in front of a word."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def join(items: list[str]) -> str:
    """Join words as English does: a, b and c."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def capital(rng: Random) -> tuple[str, str]:
    country, city = rng.choice(sorted(CAPITALS.items()))
    if rng.random() < 0.15:
        ask = rng.choice(("{} is the capital of which country?", "Which country has the capital {}?",
                          "Which country is {} the capital of?"))
        return ask.format(city), f"{city} is the capital of {country}."
    ask = rng.choice(("What is the capital of {}?", "what's the capital of {}", "Which city is the capital of {}?",
                      "capital of {}",
                      "Name the capital of {}.", "Tell me the capital of {}.", "Do you know the capital of {}?", "{} capital?"))
    return ask.format(country), f"The capital of {country} is {city}."


def opposite(rng: Random) -> tuple[str, str]:
    ask = rng.choice(("What is the opposite of {}?", "opposite of {}", "What's the opposite of {}?",
                      "Tell me the opposite of {}.",
                      "Which word is the opposite of {}?"))
    pair = rng.choice(OPPOSITES)
    known: dict[str, str] = {}
    for left, right in OPPOSITES:  # each word has one answer, the first that the table gives
        known.setdefault(left, right)
        known.setdefault(right, left)
    word = rng.choice(pair)
    return ask.format(word), f"The opposite of {word} is {known[word]}."


def plural(rng: Random) -> tuple[str, str]:
    word, answer = rng.choice(sorted(PLURALS.items()))
    ask = rng.choice(("What is the plural of {}?", "plural of {}", "Give me the plural of {}.",
                      "What's the plural of the word {}?"))
    return ask.format(word), f"The plural of {word} is {answer}."


def animal(rng: Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        word, answer = rng.choice(sorted(SOUNDS.items()))
        ask = rng.choice(("What sound does {} make?", "What does {} say?", "what noise does {} make"))
        return ask.format(article(word)), f"{article(word).capitalize()} says {answer}."
    word, answer = rng.choice(sorted(BABIES.items()))
    ask = rng.choice(("What is a baby {} called?", "What do you call a baby {}?", "what is the name for a baby {}"))
    return ask.format(word), f"A baby {word} is called {article(answer)}."


def color(rng: Random) -> tuple[str, str]:
    thing, answer = rng.choice(sorted(THINGS.items()))
    ask = rng.choice(("What color is {}?", "what color does {} have", "Which color is {}?", "Tell me the color of {}."))
    return ask.format(thing), f"{thing[0].upper()}{thing[1:]} is {answer}."


def listing(rng: Random) -> tuple[str, str]:
    short = rng.choice(sorted(SHORT)) if rng.random() < 0.1 else None
    name = SHORT[short] if short else rng.choice(sorted(LISTS))
    asked, items = short or name, LISTS[name]
    if rng.random() < 0.5:
        number = rng.randint(2, min(8, len(items)))
        said = COUNT_WORDS[number] if rng.random() < 0.6 else str(number)
        ask = rng.choice(("Name {} {}.", "List {} {}.", "Give me {} {}.", "Tell me {} {}.", "Can you name {} {}?"))
        named = join(items[:number])
        return ask.format(said, asked), named[0].upper() + named[1:] + "."
    ask = rng.choice(("Name some {}.", "List the {}.", "List all {}.", "Name all {}.", "list all the {}",
                      "Which {} are there?", "What are the {}?", "Give me a list of {}.", "Tell me the {}.", "list {}",
                      "Which {} do you know?", "Can you list the {}?"))
    return ask.format(asked), f"The {name} I know are {join(items)}." if len(items) > 8 and name not in SHORT.values() else \
        f"The {name} are {join(items)}."


def neighbor(rng: Random) -> tuple[str, str]:
    kind = rng.choice(("day", "month", "letter", "number"))
    items = {"day": LISTS["days of the week"], "month": LISTS["months of the year"], "letter": list(LETTERS),
             "number": [str(n) for n in range(100)]}[kind]
    after = rng.random() < 0.65
    index = rng.randrange(len(items))
    if kind in ("letter", "number"):
        index = rng.randrange(0 if after else 1, len(items) - (1 if after else 0))
    word, answer = items[index], items[(index + (1 if after else -1)) % len(items)]
    place = "after" if after else "before"
    ask = rng.choice(("What {0} comes {2} {1}?", "Which {0} comes {2} {1}?", "What comes {2} {1}?", "Tell me the {0} {2} {1}."))
    said = {"letter": "letter ", "number": ""}.get(kind, "")
    return ask.format(kind, word, place), f"{answer} comes {place} {word}." if kind != "letter" else \
        f"The {said}{answer} comes {place} {word}."


def counting(rng: Random) -> tuple[str, str]:
    start = 1 if rng.random() < 0.6 else rng.randint(1, 80)
    end = start + rng.randint(2, 19)
    numbers = [str(n) for n in range(start, end + 1)]
    if start == 1 and end <= 20 and rng.random() < 0.3:
        return rng.choice(("Count to {}.", "count to {}",
                           "Can you count to {}?")).format(COUNT_WORDS[end]), ", ".join(numbers) + "."
    if rng.random() < 0.2:
        ask = rng.choice(("Count down from {1} to {0}.", "Count backwards from {1} to {0}."))
        return ask.format(start, end), ", ".join(reversed(numbers)) + "."
    asks = ["Count from {0} to {1}.", "count from {0} to {1}", "Please count from {0} to {1}.",
            "Say the numbers from {0} to {1}."]
    asks += ["Count to {1}.", "Can you count to {1}?", "count to {1}"] if start == 1 else []
    return rng.choice(asks).format(start, end), ", ".join(numbers) + "."


def alphabet(rng: Random) -> tuple[str, str]:
    ask = rng.choice(("Say the alphabet.", "What is the alphabet?", "List the letters of the alphabet.",
                      "Recite the alphabet.", "alphabet",
                      "Tell me the alphabet."))
    return ask, " ".join(LETTERS)


KINDS = (capital, capital, capital, opposite, opposite, plural, animal, color, listing, listing, neighbor, counting, alphabet)


def question(rng: Random) -> tuple[str, str]:
    """Draw one question about the world and its answer."""
    return rng.choice(KINDS)(rng)


def prose(rng: Random) -> str:
    """Draw a short plain text of facts of one kind, none of them twice, so that raw completions continue fluently."""
    kind = rng.choice(KINDS[:-1])
    return " ".join(dict.fromkeys(kind(rng)[1] for _ in range(rng.randint(1, 6))))
