"""Instructions whose constraints a program checks: what to list, how many, in what order, case and layout.

The form is that of IFEval (arXiv 2311.07911): any answer that obeys every constraint is right, so there are many. The
completion to learn from is put together from word lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from .base import Item
from .words import listed

TOPICS = {
    "animals": listed(
        "ant badger bear beaver camel cat cow deer dog dolphin donkey eagle elephant falcon fox frog giraffe goat "
        "hamster hare hawk horse jaguar kangaroo koala lion lizard monkey moose mouse otter owl panda parrot "
        "penguin pig pigeon rabbit raven salmon seal shark sheep snail snake spider swan tiger toad turtle whale "
        "wolf zebra"
    ),
    "fruits and vegetables": listed(
        "apple apricot avocado banana beetroot blackberry broccoli cabbage carrot celery cherry cucumber fig "
        "garlic grape kale kiwi leek lemon lettuce lime mango melon onion orange papaya parsley peach pear pea "
        "pepper pineapple plum potato pumpkin radish raspberry spinach strawberry tomato turnip"
    ),
    "countries": listed(
        "argentina austria belgium bolivia brazil canada chile china colombia croatia cuba denmark egypt estonia "
        "finland france germany ghana greece hungary iceland india ireland israel italy jamaica japan kenya latvia "
        "mexico morocco nepal norway panama peru poland portugal romania russia serbia spain sweden thailand "
        "turkey uganda ukraine vietnam"
    ),
    "things in a house": listed(
        "bath bed blanket bookcase broom bucket candle carpet chair clock cupboard curtain desk door fork fridge "
        "kettle knife lamp mattress mirror mug oven pan pillow plate shelf sink sofa spoon stairs stove table tap "
        "toaster towel vase wardrobe window"
    ),
    "jobs": listed(
        "actor artist baker barber builder butcher carpenter chef cleaner clerk dancer dentist designer doctor "
        "driver editor engineer farmer fisherman florist gardener judge lawyer mechanic miner musician nurse "
        "painter pilot plumber poet porter sailor singer soldier tailor teacher vet waiter writer"
    ),
}

#: Name of a case to the function and to how it is asked for.
_CASES: dict[str, tuple[Callable[[str], str], tuple[str, ...]]] = {
    "lower": (str.lower, ("all in lower case", "without any capital letters")),
    "upper": (str.upper, ("in capital letters", "all in upper case")),
    "title": (str.capitalize, ("each starting with a capital letter", "capitalised")),
}

_ORDERS: dict[str, tuple[Callable[[str], Any], bool, tuple[str, ...]]] = {
    "alphabetical": (str, False, ("in alphabetical order", "sorted from A to Z")),
    "backwards": (str, True, ("in reverse alphabetical order", "sorted from Z to A")),
    "shortest": (len, False, ("from the shortest to the longest word", "with the shortest first")),
    "longest": (len, True, ("from the longest to the shortest word", "with the longest first")),
}

#: Name of a layout to what joins the entries, what is put before each ({} is its number), and how it is asked for.
_LAYOUTS = {
    "comma": (", ", "", ("on one line, with commas between them",)),
    "semicolon": ("; ", "", ("on one line, separated by semicolons",)),
    "slash": (" / ", "", ("on one line, separated by slashes",)),
    "bullets": ("\n", "- ", ("as bullet points that start with a hyphen",)),
    "numbers": ("\n", "{}. ", ("as a numbered list",)),
    "lines": ("\n", "", ("one on each line",)),
}

_ENDINGS = ("That is all.", "The end.", "Any questions?", "I hope this helps.")


def ordered(words: list[str], order: str) -> bool:
    """Whether words are in an order; words of equal rank may stand in any.

    >>> ordered(["ox", "cat", "emu"], "shortest"), ordered(["emu", "cat"], "alphabetical")
    (True, False)
    """
    key, descending, _ = _ORDERS[order]
    ranks = [key(word) for word in words]
    return ranks == sorted(ranks, reverse=descending)


def _instruction(rng: Random) -> Item | None:
    """One item; `None` where the constraints that were drawn leave too few words."""
    topic = rng.choice(list(TOPICS))
    hidden: dict[str, Any] = {"topic": topic, "count": rng.randint(3, 7), "case": "lower", "order": None}
    words = list(TOPICS[topic])
    asked = []
    if rng.random() < 0.25:
        hidden["without"] = rng.choice("aeiorst")
        asked.append(f"none of which contains the letter {hidden['without']}")
        words = [word for word in words if hidden["without"] not in word]
    if rng.random() < 0.15:
        hidden["length"] = rng.choice((4, 5, 6))
        asked.append(f"none longer than {hidden['length']} letters")
        words = [word for word in words if len(word) <= hidden["length"]]
    if len(words) < hidden["count"] + 2:
        return None
    chosen = rng.sample(words, hidden["count"])
    if rng.random() < 0.6:
        hidden["include"] = sorted(rng.sample(chosen, min(rng.choice((1, 1, 2)), len(chosen))))
        asked.append(f"{' and '.join(rng.sample(hidden['include'], len(hidden['include'])))} among them")
    if rng.random() < 0.5:
        hidden["order"] = rng.choice(list(_ORDERS))
        key, descending, phrases = _ORDERS[hidden["order"]]
        asked.append(rng.choice(phrases))
        chosen.sort(key=key, reverse=descending)
    hidden["case"] = rng.choice(list(_CASES))
    asked.append(rng.choice(_CASES[hidden["case"]][1]))
    hidden["layout"] = rng.choice(list(_LAYOUTS))
    asked.append(rng.choice(_LAYOUTS[hidden["layout"]][2]))
    rng.shuffle(asked)
    prompt = f"{rng.choice(('List', 'Name', 'Write down'))} {hidden['count']} {topic}, {', '.join(asked)}."
    if rng.random() < 0.4:
        hidden["ending"] = rng.choice(_ENDINGS)
        prompt += f' End with a line that says "{hidden["ending"]}"'
    if rng.random() < 0.15:
        hidden["title"] = True
        prompt += (
            " Put the number of characters of the first word in square brackets on a line before everything else."
        )
    return Item(prompt, _render(chosen, hidden), hidden)


def _render(words: list[str], hidden: dict[str, Any]) -> str:
    """The answer that lists ``words`` (lower case) as asked."""
    joiner, mark, _ = _LAYOUTS[hidden["layout"]]
    case = _CASES[hidden["case"]][0]
    text = joiner.join(mark.format(number) + case(word) for number, word in enumerate(words, 1))
    lines = [f"[{len(words[0])}]"] if hidden.get("title") else []
    return "\n".join([*lines, text, *([hidden["ending"]] if "ending" in hidden else [])])


def generate_instructions(seed: int) -> Iterator[Item]:
    """Endless items; the same seed gives the same ones."""
    rng = Random(seed)
    while True:
        item = _instruction(rng)
        if item is not None:
            yield item


def score_instruction(answer: str, item: Item) -> bool:
    """Whether the answer obeys every constraint of ``item.hidden``.

    The listed words have to be of the topic's word list, all different, and the answer must hold nothing else.

    >>> hidden = {"topic": "animals", "count": 3, "case": "upper", "order": "alphabetical", "layout": "comma"}
    >>> [score_instruction(answer, Item("", "", hidden)) for answer in ("ANT, CAT, OWL", "CAT, ANT, OWL")]
    [True, False]
    """
    hidden = item.hidden
    lines = answer.strip().split("\n")
    first = 1 if hidden.get("title") else 0
    last = len(lines) - 1 if "ending" in hidden else len(lines)
    joiner, mark, _ = _LAYOUTS[hidden["layout"]]
    entries = "\n".join(lines[first:last]).split(joiner)
    words = []
    for number, entry in enumerate(entries, 1):
        prefix = mark.format(number)
        if not entry.startswith(prefix):
            return False
        words.append(entry[len(prefix) :].lower())
    return (
        # What remains is exactly the words as asked: the case, the layout, the title and the ending.
        bool(words and words[0])
        and answer.strip() == _render(words, hidden)
        and len(words) == len(set(words)) == hidden["count"]
        and set(words) <= set(TOPICS[hidden["topic"]])
        and set(hidden.get("include", ())) <= set(words)
        and all(hidden.get("without", "_") not in word for word in words)
        and all(len(word) <= hidden.get("length", 99) for word in words)
        and (hidden["order"] is None or ordered(words, hidden["order"]))
    )
