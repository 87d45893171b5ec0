"""Word lists and number words that several generators draw from."""

from __future__ import annotations


def listed(text: str) -> list[str]:
    """The words of a text.

    >>> listed("ant bee")
    ['ant', 'bee']
    """
    return text.split()


FIRST_NAMES = listed(
    "Ada Amir Bea Boris Carla Chen Dina Emil Farah Gus Hana Ivo Jana Kofi Lena Milo Nora Omar Petra Quinn Rosa Sami "
    "Tara Uri Vera Will Xenia Yara Zane"
)

#: Countable things, singular to plural.
THINGS = {
    "apple": "apples",
    "badge": "badges",
    "brush": "brushes",
    "candle": "candles",
    "chair": "chairs",
    "coin": "coins",
    "cup": "cups",
    "egg": "eggs",
    "hat": "hats",
    "kite": "kites",
    "lamp": "lamps",
    "marble": "marbles",
    "mug": "mugs",
    "pen": "pens",
    "plate": "plates",
    "rope": "ropes",
    "seed": "seeds",
    "shell": "shells",
    "stamp": "stamps",
    "tile": "tiles",
    "towel": "towels",
    "vase": "vases",
}

_SMALL = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = listed("_ _ twenty thirty forty fifty sixty seventy eighty ninety")


def number_word(number: int) -> str:
    """A number from 0 to 99 in words.

    >>> number_word(7), number_word(40), number_word(83)
    ('seven', 'forty', 'eighty-three')
    """
    if number < 20:
        return _SMALL[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens] + (f"-{_SMALL[ones]}" if ones else "")
