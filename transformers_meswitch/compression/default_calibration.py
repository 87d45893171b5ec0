"""The built-in calibration set: a few hundred short chats of many kinds, the same in every run.

Written and generated here, so that compression works calibrated without any data. Text that the expert really meets
is better: a domain's own channels are loudest on the domain's own text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

__all__ = ["default_chats"]

_SEED = 0
_CHATS_PER_KIND = 40
_TURN = dict[str, str]

_NAMES = ["Amara", "Jonas", "Mei", "Luca", "Priya", "Tomás", "Ingrid", "Yusuf", "Hana", "Olga", "Kwame", "Sofia"]
_THINGS = ["apples", "notebooks", "lamps", "tickets", "bricks", "eggs", "stamps", "chairs", "bottles", "screws"]
_PLACES = ["Lisbon", "Nairobi", "Kyoto", "Toronto", "Cracow", "Lima", "Hanoi", "Oslo", "Marrakesh", "Auckland"]
_WORDS = [
    "river",
    "copper",
    "lantern",
    "velvet",
    "orbit",
    "meadow",
    "signal",
    "harbour",
    "ladder",
    "quartz",
    "thimble",
]

#: Language, a passage in it, and the passage in English.
_PASSAGES = [
    (
        "German",
        "Der Zug nach Hamburg fährt heute vom Gleis sieben. Wegen Bauarbeiten dauert die Reise eine halbe "
        "Stunde länger, und im Speisewagen gibt es nur kalte Getränke.",
        "The train to Hamburg leaves from platform seven today. Because of construction the journey takes half "
        "an hour longer, and the dining car only has cold drinks.",
    ),
    (
        "French",
        "Ma grand-mère cultivait des tomates derrière la maison. Chaque été, elle nous apprenait à reconnaître "
        "celles qui étaient mûres, non pas à la couleur, mais au parfum.",
        "My grandmother grew tomatoes behind the house. Every summer she taught us to recognise the ripe ones, "
        "not by their colour but by their scent.",
    ),
    (
        "Spanish",
        "La biblioteca del barrio abre a las nueve y cierra cuando se va el último lector. Nadie recuerda "
        "quién puso esa regla, pero todos la respetan.",
        "The neighbourhood library opens at nine and closes when the last reader leaves. Nobody remembers who "
        "made that rule, but everyone respects it.",
    ),
    (
        "Italian",
        "Prima di partire controlla l'olio, la pressione delle gomme e le luci. Se la spia resta accesa, "
        "fermati e chiama l'officina.",
        "Before you leave, check the oil, the tyre pressure and the lights. If the warning light stays on, "
        "stop and call the garage.",
    ),
    (
        "Portuguese",
        "O barco saiu antes do amanhecer, com o mar calmo e o céu sem nuvens. Ao meio-dia já tínhamos pescado "
        "o suficiente para a aldeia inteira.",
        "The boat left before dawn, with a calm sea and a cloudless sky. By noon we had caught enough for the "
        "whole village.",
    ),
    (
        "Dutch",
        "Op zaterdag is er markt op het plein. Wie vroeg komt, vindt de beste kaas; wie laat komt, betaalt de "
        "helft.",
        "On Saturday there is a market on the square. Those who come early find the best cheese; those who "
        "come late pay half.",
    ),
    (
        "Polish",
        "W zimie rzeka zamarza i dzieci jeżdżą po niej na łyżwach. Starsi patrzą z mostu i liczą, ile dni "
        "zostało do wiosny.",
        "In winter the river freezes and children skate on it. The older people watch from the bridge and "
        "count the days until spring.",
    ),
    (
        "Russian",
        "Учительница открыла окно, и в класс вошёл запах дождя. Урок продолжался, но все слушали улицу.",
        "The teacher opened the window, and the smell of rain came into the classroom. The lesson went on, but "
        "everyone was listening to the street.",
    ),
    (
        "Turkish",
        "Çay demlenirken komşular birer birer geldi. Herkes bir haber getirdi, ama en güzel haberi en son "
        "gelen söyledi.",
        "While the tea was brewing the neighbours came one by one. Everyone brought some news, but the last to "
        "arrive told the best.",
    ),
    (
        "Chinese",
        "图书馆三楼有一个安静的角落,窗外是一棵很老的银杏树。秋天的时候,叶子会落到书页上,像是有人留下的书签。",
        "On the third floor of the library there is a quiet corner, with a very old ginkgo outside the window. "
        "In autumn its leaves fall onto the pages like bookmarks that somebody left.",
    ),
    (
        "Japanese",
        "駅前の小さなパン屋は、毎朝六時に店を開けます。焼きたてのパンの匂いで、町は少しずつ目を覚まします。",
        "The little bakery in front of the station opens at six every morning. The smell of fresh bread slowly "
        "wakes the town.",
    ),
    (
        "Korean",
        "비가 그치자 아이들이 골목으로 뛰어나왔다. 물웅덩이마다 하늘이 하나씩 들어 있었다.",
        "When the rain stopped the children ran out into the alley. In every puddle there was a sky.",
    ),
    (
        "Arabic",
        "في الصباح الباكر يفتح الخباز دكانه قبل أن تستيقظ المدينة. يعرف كل زبون باسمه، ويعرف أي خبز يحب.",
        "Early in the morning the baker opens his shop before the city wakes. He knows every customer by name, "
        "and knows which bread they like.",
    ),
    (
        "Hindi",
        "गाँव के बीच में एक पुराना कुआँ है। गर्मियों में लोग शाम को वहीं बैठते हैं और दिन भर की बातें करते हैं।",
        "In the middle of the village there is an old well. In summer people sit there in the evening and talk "
        "about their day.",
    ),
]  # fmt: skip

_EXPLANATIONS = [
    (
        "Why is the sky blue?",
        "Sunlight holds all colours. Molecules of air scatter short wavelengths far more than long ones, "
        "roughly with the fourth power of the frequency, so blue light reaches us from every direction while "
        "red light mostly passes straight through. At sunset the path through the air is long, the blue is "
        "scattered away, and what remains is orange and red.",
    ),
    (
        "What does a compiler do?",
        "A compiler translates a program into a form that a machine can run. It splits the text into tokens, "
        "builds a tree from them, checks types and names, turns the tree into simpler instructions, improves "
        "those, and finally emits machine code. Each step rejects what it cannot understand, which is why a "
        "missing bracket can cause a message about a line far below it.",
    ),
    (
        "How do vaccines work?",
        "A vaccine shows the immune system a harmless part of a pathogen. Cells that recognise it multiply, "
        "some make antibodies, and a few live on for years as memory cells. When the real pathogen arrives, "
        "these respond within days instead of weeks, often before any symptoms.",
    ),
    (
        "What is inflation?",
        "Inflation is a general rise in prices, so that the same money buys less. It can come from demand that "
        "outgrows supply, from rising costs, or from expectations: if everyone thinks prices will rise, wages "
        "and prices are set accordingly. Central banks usually answer with higher interest rates.",
    ),
    (
        "Explain photosynthesis briefly.",
        "Plants take in carbon dioxide and water and, with the energy of light, build sugar and release "
        "oxygen. Chlorophyll in the leaves absorbs mostly red and blue light; a chain of proteins turns the "
        "energy into ATP and NADPH, which then drive the Calvin cycle.",
    ),
    (
        "What is the difference between a list and a tuple in Python?",
        "Both are ordered sequences. A list can be changed after it was made: items may be appended, removed "
        "or replaced. A tuple cannot, so it may be a key of a dictionary, and it says to the reader that its "
        "length and meaning are fixed.",
    ),
    (
        "How should I store bread?",
        "At room temperature in a paper or cloth bag, cut side down, for two or three days. The refrigerator "
        "makes it stale faster, because starch recrystallises quickest just above freezing. For longer, slice "
        "and freeze it, and toast the slices straight from the freezer.",
    ),
    (
        "Who was Ada Lovelace?",
        "Ada Lovelace was an English mathematician who, in 1843, published notes on Babbage's Analytical "
        "Engine. They contain a method to compute Bernoulli numbers with it, often called the first program, "
        "and the remark that such a machine could work on any symbols, music among them, and not on numbers "
        "alone.",
    ),
]  # fmt: skip

_CODE = [
    (
        "Write a Python function that {verb}s the {noun} of a list of numbers without using libraries.",
        "```python\ndef {name}(values: list[float]) -> float:\n    \"\"\"The {noun} of the values.\"\"\"\n    "
        "if not values:\n        raise ValueError(\"{noun} of nothing\")\n    total = 0.0\n    for value in "
        "values:\n        total += value * {factor}\n    return total / len(values)\n```\nIt takes time linear "
        "in the length.",
    ),
    (
        "Give me an SQL query for the {noun} by city, only cities with more than {factor} rows.",
        "```sql\nSELECT city, COUNT(*) AS n, AVG({name}) AS {noun}\nFROM orders\nWHERE created_at >= "
        "'2024-0{digit}-01'\nGROUP BY city\nHAVING COUNT(*) > {factor}\nORDER BY {noun} DESC;\n```",
    ),
    (
        "How do I {verb} the {noun} in JavaScript?",
        "```javascript\nconst {name} = (items) =>\n  items.filter((item) => item.value > {factor})\n    "
        ".map(({{ id, value }}) => ({{ id, {noun}: value * {digit} }}));\n\nconsole.log({name}(await "
        "load(\"{noun}.json\")));\n```\nThe arrow function returns a new array and leaves `items` as it was.",
    ),
    (
        "What is wrong with this C code?\n```c\nint *{name}(int n) {{ int a[{factor}]; a[n] = {digit}; return "
        "a; }}\n```",
        "Two things. `a` lives on the stack of `{name}`, so the pointer that is returned dangles as soon as "
        "the function ends; and `n` is not checked, so `n >= {factor}` writes out of bounds. Let the caller "
        "pass a buffer and its size.",
    ),
    (
        "Show a bash one-liner that counts the {noun} in all log files.",
        "```bash\ngrep -ho '{noun}=[0-9]*' logs/*.log | cut -d= -f2 | sort -n | uniq -c | tail -n {digit}\n```",
    ),
    (
        "Implement a stack in Rust that I can {verb}.",
        "```rust\n#[derive(Default)]\npub struct {title}<T> {{ items: Vec<T> }}\n\nimpl<T> {title}<T> {{\n    "
        "pub fn push(&mut self, item: T) {{ self.items.push(item); }}\n    pub fn pop(&mut self) -> Option<T> "
        "{{ self.items.pop() }}\n    pub fn len(&self) -> usize {{ self.items.len() }}\n}}\n```",
    ),
]  # fmt: skip
_VERBS = ["compute", "update", "check", "sort", "merge", "print"]
_NOUNS = ["mean", "balance", "latency", "weight", "score", "distance", "price"]

_SMALL_TALK = [
    (
        "I slept badly and have a long day ahead. Any advice?",
        "Keep caffeine to the morning, take a short walk in daylight, and do the hardest task first while you "
        "are fresh.",
    ),
    (
        "Can you recommend a book?",
        "Gladly. Do you prefer something true or something invented, and do you have an afternoon or a month?",
    ),
    (
        "My flight was cancelled. What now?",
        "Stay calm and go to the airline's desk or app at once: you may choose a refund or another flight, and "
        "for long delays they owe you meals and a hotel.",
    ),
    (
        "What shall I cook with rice, spinach and two eggs?",
        "Fried rice: cook the rice and let it cool, wilt the spinach with garlic, scramble the eggs, then toss "
        "it all on high heat with soy sauce.",
    ),
    (
        "How do I tell my colleague that her plan won't work?",
        "In private, and begin with what is good about it. Then name the one assumption that worries you and "
        "ask how she sees it.",
    ),
    (
        "I'm nervous about my talk.",
        "That is normal. Practise the first two minutes until they need no thought; the rest follows once you "
        "are speaking.",
    ),
    (
        "Thank you, that helped.",
        "You're welcome! Come back and tell me how it went.",
    ),
    (
        "Could you say that more simply?",
        "Of course: start small, do it every day, and don't count the days you miss.",
    ),
]  # fmt: skip


def _chat(*turns: str) -> list[_TURN]:
    """Turns of the user and the assistant, one after the other."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def _arithmetic(draw: random.Random) -> list[_TURN]:
    name, other = draw.sample(_NAMES, 2)
    thing = draw.choice(_THINGS)
    boxes, each, given = draw.randint(3, 24), draw.randint(4, 36), draw.randint(2, 9)
    total = boxes * each
    return _chat(
        f"{name} buys {boxes} boxes with {each} {thing} in each and gives {given} of them to {other}. "
        f"How many {thing} does {name} have left?",
        f"{boxes} boxes of {each} are {boxes} × {each} = {total} {thing}. After giving away {given}, {name} has "
        f"{total} - {given} = {total - given} left.\n#### {total - given}",
    )


def _equation(draw: random.Random) -> list[_TURN]:
    a, x, b = draw.randint(2, 12), draw.randint(-9, 15), draw.randint(1, 40)
    return _chat(
        f"Solve for x: {a}x + {b} = {a * x + b}",
        f"Subtract {b} on both sides: {a}x = {a * x}. Divide by {a}: x = {x}. Check: {a}·{x} + {b} = {a * x + b}. ✓",
    )


def _code(draw: random.Random) -> list[_TURN]:
    question, answer = draw.choice(_CODE)
    noun, word = draw.choice(_NOUNS), draw.choice(_WORDS)
    values = {
        "verb": draw.choice(_VERBS),
        "noun": noun,
        "name": f"{word}_{noun}",
        "title": word.title(),
        "factor": draw.randint(2, 64),
        "digit": draw.randint(1, 9),
    }
    return _chat(question.format(**values), answer.format(**values))


def _extraction(draw: random.Random) -> list[_TURN]:
    name, place, thing = draw.choice(_NAMES), draw.choice(_PLACES), draw.choice(_THINGS)
    count, price, day = draw.randint(2, 90), draw.randint(100, 9999) / 100, draw.randint(1, 28)
    record = {
        "customer": name,
        "city": place,
        "items": [{"product": thing, "quantity": count, "unit_price": price}],
        "date": f"2024-{draw.randint(1, 12):02}-{day:02}",
        "paid": draw.random() < 0.5,
        "note": None,
    }
    paid = "has paid" if record["paid"] else "has not paid yet"
    return _chat(
        f"Extract the order as JSON: On {record['date']} {name} from {place} ordered {count} {thing} at {price} "
        f"euros each and {paid}.",
        json.dumps(record, indent=draw.choice([None, 2]), ensure_ascii=False),
    )


def _translation(draw: random.Random) -> list[_TURN]:
    language, passage, english = draw.choice(_PASSAGES)
    if draw.random() < 0.5:
        return _chat(f"Translate into English:\n{passage}", english)
    return _chat(f"Translate into {language}: {english}", passage)


def _prose(draw: random.Random) -> list[_TURN]:
    (one, first, _), (other, second, _) = draw.sample(_PASSAGES, 2)
    return _chat(f"{first}\n\n{second}", f"1. {one}\n2. {other}")


def _explanation(draw: random.Random) -> list[_TURN]:
    (question, answer), (again, answer_again) = draw.sample(_EXPLANATIONS, 2)
    return _chat(question, answer, again, answer_again)


def _dialogue(draw: random.Random) -> list[_TURN]:
    name, place = draw.choice(_NAMES), draw.choice(_PLACES)
    turns = [turn for pair in draw.sample(_SMALL_TALK, draw.randint(2, 4)) for turn in pair]
    return _chat(f"Hi, I'm {name}, writing from {place}.", f"Hello {name}! How can I help?", *turns)


def _list(draw: random.Random) -> list[_TURN]:
    words = draw.sample(_WORDS, draw.randint(4, 8))
    table = "\n".join(f"| {i} | {word} | {len(word)} |" for i, word in enumerate(sorted(words), 1))
    return _chat(
        f"Sort these words and give a Markdown table with their lengths: {', '.join(words)}.",
        f"| # | word | letters |\n|---|---|---|\n{table}",
    )


_KINDS: tuple[Callable[[random.Random], list[_TURN]], ...] = (
    _arithmetic,
    _equation,
    _code,
    _extraction,
    _translation,
    _prose,
    _explanation,
    _dialogue,
    _list,
)


def default_chats() -> Iterator[list[_TURN]]:
    """The chats of the built-in set: lists of ``{"role": "user" or "assistant", "content": text}``.

    The kinds take turns, so that any beginning of the set has all of them.

    >>> chats = list(default_chats())
    >>> len(chats), chats == list(default_chats())
    (360, True)
    >>> chats[1][0]["content"].startswith("Solve for x")
    True
    """
    draw = random.Random(_SEED)
    for _ in range(_CHATS_PER_KIND):
        for kind in _KINDS:
            yield kind(draw)
