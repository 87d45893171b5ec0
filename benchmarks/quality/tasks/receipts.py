"""Structured output: a message about a purchase, read into one line of JSON whose totals have to be worked out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random

from ..family_example import score_order
from .base import Item
from .words import FIRST_NAMES, THINGS, number_word

_INSTRUCTION = "Book this as one line of JSON."
_PLACES = ("Bergen", "Cork", "Delft", "Ghent", "Lyon", "Malmo", "Porto", "Riga", "Split", "Turin")
_ASIDES = (
    "The shop has been open for {} years.",
    "It was {} degrees outside.",
    "Last time it cost {} in all, but never mind.",
    "There were {} people in the queue.",
)


def _say(rng: Random, number: int) -> str:
    return number_word(number) if number < 100 and rng.random() < 0.3 else str(number)


def _receipt(rng: Random) -> Item:
    name, place = rng.choice(FIRST_NAMES), rng.choice(_PLACES)
    bought, corrections, lines = [], [], []
    for thing in rng.sample(list(THINGS), rng.choice((1, 2, 2, 3, 3))):
        quantity, price = rng.randint(2, 12), rng.randint(2, 48)
        said = quantity
        if rng.random() < 0.2:
            said = rng.choice([other for other in range(2, 13) if other != quantity])
            corrections.append(f"No, it was {_say(rng, quantity)} {THINGS[thing]}.")
        bought.append(
            rng.choice(("{} {} at {} each", "{} {} for {} apiece")).format(
                _say(rng, said), THINGS[thing], _say(rng, price)
            )
        )
        lines.append({"item": thing, "n": quantity, "price": price, "total": quantity * price})
    rng.shuffle(corrections)
    total = sum(line["n"] * line["price"] for line in lines)
    paid = rng.choice([note for note in (20, 50, 100, 200, 500, 1000, 2000) if note >= total])
    sentences = [f"{name} was in {place} and bought {' and '.join(bought)}.", *corrections]
    if rng.random() < 0.5:
        sentences.insert(rng.randint(0, len(sentences)), rng.choice(_ASIDES).format(_say(rng, rng.randint(3, 60))))
    sentences.append(rng.choice((f"Paid with {paid}.", f"{paid} was handed over.")))
    answer = {"name": name, "place": place, "lines": lines, "sum": total, "change": paid - total}
    return Item(f"{_INSTRUCTION}\n{' '.join(sentences)}", json.dumps(answer, separators=(",", ":")))


def generate_receipts(seed: int) -> Iterator[Item]:
    """Endless items; the same seed gives the same ones."""
    rng = Random(seed)
    while True:
        yield _receipt(rng)


def score_receipt(answer: str, item: Item) -> bool:
    """Whether the first JSON object of the answer equals the reference in every field and type (order of keys aside).

    >>> score_receipt('{"sum":3,"name":"Ada"}', Item("", '{"name":"Ada","sum":3}'))
    True
    >>> score_receipt('{"sum":3.0,"name":"Ada"}', Item("", '{"name":"Ada","sum":3}'))
    False
    """
    return score_order(answer, item.completion)
