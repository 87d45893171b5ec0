"""Order e-mails to be read into one line of JSON: a procedural generator and its exact scorer."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from random import Random
from typing import Any

INSTRUCTION = (
    "Read the order below into one line of JSON with the keys customer, reference, items (each with product, quantity "
    "and unit_price), currency, deliver_by, express and coupon. Dates are YYYY-MM-DD; use null for what is not said."
)

_FIRST_NAMES = [
    "Aiko",
    "Amara",
    "Bruno",
    "Chen",
    "Dalia",
    "Elif",
    "Farid",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Kofi",
    "Lena",
    "Mateo",
    "Nadia",
    "Omar",
    "Priya",
    "Quinn",
    "Rosa",
    "Sven",
    "Tariq",
    "Uma",
    "Viktor",
    "Wanda",
    "Yusuf",
    "Zoe",
]
_LAST_NAMES = [
    "Abebe",
    "Bauer",
    "Castro",
    "Dubois",
    "Eriksen",
    "Fischer",
    "Gupta",
    "Haddad",
    "Ito",
    "Jansen",
    "Kowalski",
    "Lopez",
    "Moreau",
    "Novak",
    "Okafor",
    "Petrov",
    "Quist",
    "Rossi",
    "Silva",
    "Tanaka",
    "Urban",
    "Vargas",
    "Weber",
    "Yilmaz",
    "Zhang",
]
_PRODUCTS = [
    f"{kind} {thing}"
    for kind in ("steel", "oak", "green", "small", "large", "folding", "cotton", "ceramic")
    for thing in ("lamp", "shelf", "mug", "chair", "basket", "tray", "blanket", "clock", "bucket", "vase")
]
_CURRENCIES = {"EUR": "{} euros", "USD": "${}", "GBP": "£{}", "CHF": "{} francs", "JPY": "{} yen", "SEK": "{} kronor"}
_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_GREETINGS = ("Hello,", "Good morning,", "Dear shop,", "Hi there,", "To whom it may concern,")
_SMALL_TALK = (
    "It was raining all week here.",
    "My last order, {old}, arrived in perfect shape.",
    "We are moving to number {number} next month, but not yet.",
    "Please do not mix this up with {old}, which I cancelled.",
    "I have been a customer for {number} years.",
    "A colleague bought {number} of your doormats and loves them.",
)


def _reference(rng: Random) -> str:
    return f"{rng.choice('ABCDEFGHKLMNPRSTVWXZ')}{rng.choice('ABCDEFGHKLMNPRSTVWXZ')}-{rng.randint(10_000, 99_999)}"


def _say_quantity(rng: Random, quantity: int) -> str:
    if quantity == 12 and rng.random() < 0.6:
        return "a dozen"
    if quantity == 6 and rng.random() < 0.4:
        return "half a dozen"
    return _WORDS[quantity] if quantity <= 12 and rng.random() < 0.5 else str(quantity)


def _say_date(rng: Random, day: datetime.date) -> str:
    suffix = "th" if 11 <= day.day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    return rng.choice(
        (
            f"{day.day} {day:%B} {day.year}",
            f"{day:%B} {day.day}{suffix}, {day.year}",
            f"the {day.day}{suffix} of {day:%B} {day.year}",
            f"{day.day:02d}.{day.month:02d}.{day.year}",
            f"{day:%b} {day.day}, {day.year}",
        )
    )


def _plural(product: str) -> str:
    return product.removesuffix("f") + "ves" if product.endswith("shelf") else product + "s"


def _items(rng: Random, currency: str) -> tuple[list[dict[str, Any]], list[str]]:
    """One to three items and the sentences that order them, some of them corrected by a later one."""
    items, sentences, corrections = [], [], []
    for product in rng.sample(_PRODUCTS, rng.randint(1, 3)):
        quantity, price = rng.randint(2, 40), f"{rng.randint(1, 250)}.{rng.randint(0, 99):02d}"
        money = _CURRENCIES[currency].format(price)
        said = quantity
        if rng.random() < 0.25:
            said = rng.choice([other for other in range(2, 41) if other != quantity])
            corrections.append(
                rng.choice(
                    (
                        f"On second thought, make that {_say_quantity(rng, quantity)} {_plural(product)}.",
                        f"Correction: {_say_quantity(rng, quantity)} {_plural(product)}, not {said}.",
                    )
                )
            )
        sentences.append(
            rng.choice(
                (
                    f"I would like {_say_quantity(rng, said)} {_plural(product)} at {money} each.",
                    f"Please send {_say_quantity(rng, said)} of the {product} ({money} apiece).",
                    f"We need {_say_quantity(rng, said)} {_plural(product)}, listed at {money} per piece.",
                )
            )
        )
        items.append({"product": product, "quantity": quantity, "unit_price": price})
    return items, sentences + corrections


def _order(rng: Random) -> tuple[str, str]:
    customer = f"{rng.choice(_FIRST_NAMES)} {rng.choice(_LAST_NAMES)}"
    reference = _reference(rng)
    currency = rng.choice(list(_CURRENCIES))
    items, item_sentences = _items(rng, currency)
    day = datetime.date(2024, 1, 1) + datetime.timedelta(days=rng.randrange(1400)) if rng.random() < 0.8 else None
    express = rng.choice((True, False, None))
    coupon = f"{rng.choice(('SAVE', 'SPRING', 'HELLO', 'VIP'))}{rng.randint(5, 95)}" if rng.random() < 0.4 else None

    around = [
        rng.choice((f"The reference is {reference}.", f"Our reference: {reference}.", f"File it as {reference}."))
    ]
    if day:
        around.append(f"It has to be here by {_say_date(rng, day)}.")
    if express is not None:
        around.append(
            rng.choice(("Please ship it express.", "Express shipping, please."))
            if express
            else rng.choice(("Normal shipping is fine.", "There is no need for express."))
        )
    if coupon:
        around.append(rng.choice((f"I have the coupon {coupon}.", f"Apply code {coupon}.")))
    if rng.random() < 0.6:
        around.append(rng.choice(_SMALL_TALK).format(old=_reference(rng), number=rng.randint(3, 30)))
    rng.shuffle(around)
    where = rng.randint(0, len(around))
    body = " ".join([*around[:where], *item_sentences, *around[where:]])
    email = f"{rng.choice(_GREETINGS)} {body} {rng.choice(('Regards,', 'Thanks,', 'Best wishes,'))} {customer}"
    answer = {
        "customer": customer,
        "reference": reference,
        "items": items,
        "currency": currency,
        "deliver_by": day.isoformat() if day else None,
        "express": express,
        "coupon": coupon,
    }
    return f"{INSTRUCTION}\n\n{email}", json.dumps(answer, separators=(",", ":"))


def generate_orders(seed: int) -> Iterator[tuple[str, str]]:
    """Endless (e-mail with instruction, JSON) pairs; the same seed gives the same pairs."""
    rng = Random(seed)
    while True:
        yield _order(rng)


def first_json_object(text: str) -> Any:
    """The first JSON object inside ``text``, whatever stands around it (prose, a code fence); `None` if there is none.

    >>> first_json_object('Sure! {"a": [1, null]} Anything else?')
    {'a': [1, None]}
    """
    start = text.find("{")
    if start < 0:
        return None
    try:
        return json.JSONDecoder().raw_decode(text, start)[0]
    except (json.JSONDecodeError, RecursionError):
        return None


def score_order(answer: str, reference: str) -> bool:
    """Whether the first JSON object of ``answer`` equals the reference in every field and type (order of keys aside).

    >>> score_order('{"b": null, "a": 1}', '{"a":1,"b":null}')
    True
    >>> score_order('{"a": true, "b": null}', '{"a":1,"b":null}')
    False
    """
    found = first_json_object(answer)
    # Compared as text because Python has True == 1.
    return found is not None and json.dumps(found, sort_keys=True) == json.dumps(json.loads(reference), sort_keys=True)
