"""Multi-step problems with worked solutions: half from reasoning-gym's ``gsm_symbolic``, half our own."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from ..family_example import generate_word_problems, score_word_problem
from .base import Item
from .words import FIRST_NAMES, THINGS

#: Of gsm_symbolic's solutions, those up to this many characters are taken (two thirds), so that decoding is quick.
_LONGEST_SOLUTION = 280
_CLOSING = "Give the result as your final answer. Do not include units."


def _step(rng: Random, have: int, things: str) -> tuple[str, str, int]:
    """A sentence that changes how many there are, its working, and how many there are then."""
    kinds = ["more", "boxes", "times"]
    if have > 12:
        kinds += ["fewer", "fewer"]
    shares = [k for k in range(2, 10) if have % k == 0 and have // k > 1]
    if shares:
        kinds += ["share"]
    percents = [p for p in (10, 20, 25, 40, 50, 75) if have * p % 100 == 0]
    if percents:
        kinds += ["percent"]
    kind = rng.choice(kinds)
    if kind == "times" and have > 150:
        kind = "more"
    if kind == "more":
        gain = rng.randint(3, 99)
        text = rng.choice(("Then {} more arrive.", "A friend brings {} more.", "Another {} are found in the attic."))
        return text.format(gain), f"{have} + {gain} = {have + gain}", have + gain
    if kind == "fewer":
        loss = rng.randint(2, have - 2)
        text = rng.choice(("Then {} get lost.", "{} of them are given away.", "After that, {} break."))
        return text.format(loss), f"{have} - {loss} = {have - loss}", have - loss
    if kind == "boxes":
        boxes, each = rng.randint(2, 15), rng.randint(3, 24)
        gain = boxes * each
        text = rng.choice(("{} boxes with {} {} in each are added.", "They buy {} bags of {} {} each."))
        working = f"{boxes} * {each} = {gain}\n{have} + {gain} = {have + gain}"
        return text.format(boxes, each, things), working, have + gain
    if kind == "times":
        word, factor = rng.choice((("doubles", 2), ("triples", 3), ("grows to four times what it was", 4)))
        return f"Within a month the number {word}.", f"{have} * {factor} = {have * factor}", have * factor
    if kind == "share":
        share = rng.choice(shares)
        text = f"They are split into {share} equal heaps, and only one heap is kept."
        return text, f"{have} / {share} = {have // share}", have // share
    percent = rng.choice(percents)
    loss = have * percent // 100
    text = rng.choice(("{} percent of them are sold.", "A neighbour takes {}% of them."))
    return text.format(percent), f"{have} * {percent} / 100 = {loss}\n{have} - {loss} = {have - loss}", have - loss


def _problem(rng: Random) -> Item:
    name, things = rng.choice(FIRST_NAMES), rng.choice(list(THINGS.values()))
    have = rng.randint(8, 120)
    text, working = [f"{name} has {have} {things}."], []
    for _ in range(rng.randint(2, 5)):
        sentence, calculation, have = _step(rng, have, things)
        text.append(sentence)
        working.append(calculation)
    if rng.random() < 0.35:
        price = rng.randint(2, 19)
        text.append(f"What are the {things} that are left worth at ${price} each?")
        working.append(f"{have} * {price} = {have * price}")
        have *= price
    else:
        text.append(rng.choice((f"How many {things} are there in the end?", f"How many {things} does that leave?")))
    return Item(" ".join(text), "\n".join([*working, f"#### {have}"]))


def generate_maths(seed: int) -> Iterator[Item]:
    """Endless problems, whose completions end in ``#### number``. Needs the package ``reasoning-gym``."""
    rng = Random(seed)
    symbolic = generate_word_problems(seed)
    while True:
        yield _problem(rng)
        question, solution = next(pair for pair in symbolic if len(pair[1]) <= _LONGEST_SOLUTION)
        yield Item(question.replace(_CLOSING, "").strip(), solution)


def score_maths(answer: str, item: Item) -> bool:
    """Whether the answer arrives at the reference's number."""
    return score_word_problem(answer, item.completion)
