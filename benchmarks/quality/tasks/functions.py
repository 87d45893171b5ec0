"""Short Python functions, written from a description or from examples and scored by hidden tests.

Every function is called ``f``, so that two prompts which mean the same function are the same prompt.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from random import Random
from typing import Any

from .base import Item
from .interpreter import ProgramError, run_function
from .words import number_word

_LETTERS = "abcdefghilmnoprstuw"

#: What hidden tests call a function with, by its parameter. Every element is one call.
_INPUTS: dict[str, tuple[Any, ...]] = {
    "xs": (
        [],
        [7],
        [3, -4, 12, 0, 5, 12, -9],
        list(range(-6, 25, 2)),
        [31, 5, 18, 44, 2, 9, 27, 60, 13, 8, 5],
        [-1, -2, -3, -10, -15, -24],
        [100, 50, 25, 75, 99, 48, 36, 7, 11, 64],
    ),
    "words": (
        [],
        ["tree"],
        ["Apple", "bee", "Stone", "cat", "apple", "window", "ox"],
        ["level", "moon", "a", "river", "night", "Tuesday", "sun", "rainbow"],
        ["north", "south", "east", "west", "northwest", "echo", "level", "Oslo"],
    ),
    "text": ("", "a", "level", "Hello there", "the quick brown fox jumps over it", "Rain IN Spain", "banana split 42"),
    "n": (-17, -3, 0, 1, 2, 4, 9, 10, 12, 25, 57, 100, 1234),
}


def _number(rng: Random, number: int) -> str:
    return number_word(number) if rng.random() < 0.35 else str(number)


def _condition(rng: Random) -> tuple[str, str]:
    """A relative clause on numbers, and the test on ``x`` that it means."""
    k = rng.randint(2, 30)
    said = _number(rng, k)
    small = rng.randint(2, 9)
    return rng.choice(
        (
            (rng.choice(("that are even", "divisible by two")), "x % 2 == 0"),
            (rng.choice(("that are odd", "not divisible by two")), "x % 2 == 1"),
            (f"above {said}", f"x > {k}"),
            (f"of at least {said}", f"x >= {k}"),
            (f"below {said}", f"x < {k}"),
            (f"of at most {said}", f"x <= {k}"),
            (f"other than {said}", f"x != {k}"),
            (f"that are multiples of {_number(rng, small)}", f"x % {small} == 0"),
            (f"that leave a remainder of 1 when divided by {_number(rng, small + 1)}", f"x % {small + 1} == 1"),
            ("that are negative", "x < 0"),
            ("that are positive", "x > 0"),
            (f"from {said} to {k + small}", f"{k} <= x <= {k + small}"),
            (f"farther than {said} from zero", f"abs(x) > {k}"),
        )
    )


def _mapping(rng: Random) -> tuple[str, str]:
    """What is done to each number, and the expression in ``x`` that it means."""
    k, m = rng.randint(2, 12), rng.randint(1, 20)
    said, other = _number(rng, k), _number(rng, m)
    return rng.choice(
        (
            ("squared", "x * x"),
            ("doubled", "x * 2"),
            (f"plus {other}", f"x + {m}"),
            (f"minus {other}", f"x - {m}"),
            (f"times {said}", f"x * {k}"),
            (f"times {said} plus {other}", f"x * {k} + {m}"),
            (f"increased by {other} and then multiplied by {said}", f"(x + {m}) * {k}"),
            ("without its sign", "abs(x)"),
            ("with its sign changed", "-x"),
            (f"reduced to its remainder by {said}", f"x % {k}"),
            (f"divided by {said} and rounded down", f"x // {k}"),
            (f"subtracted from {other}", f"{m} - x"),
        )
    )


def _numbers(rng: Random) -> tuple[str, str, list[str]]:
    """Description, parameter and body of a function on a list of numbers."""
    clause, test = _condition(rng)
    if rng.random() < 0.4:
        second, other = _condition(rng)
        word = rng.choice(("and", "or"))
        clause, test = f"{clause} {word} {second}", f"{test} {word} {other}"
    done, expression = ("", "x") if rng.random() < 0.3 else _mapping(rng)
    each = f", each {done}" if done else ""
    kept = f"[{expression} for x in xs if {test}]"
    k = rng.randint(2, 5)
    first = _number(rng, k)
    what, body = rng.choice(
        (
            (f"the numbers in xs {clause}{each}", [f"return {kept}"]),
            (f"the sum of the numbers in xs {clause}{each}", [f"return sum({kept})"]),
            (
                f"the largest of the numbers in xs {clause}{each}, or 0 if there is none",
                [f"return max({kept}, default=0)"],
            ),
            (
                f"the smallest of the numbers in xs {clause}{each}, or 0 if there is none",
                [f"return min({kept}, default=0)"],
            ),
            (f"how many different values the numbers in xs {clause}{each} give", [f"return len(set({kept}))"]),
            (f"the numbers in xs {clause}{each}, largest first", [f"return sorted({kept}, reverse=True)"]),
            (
                f"the {first} smallest of the numbers in xs {clause}{each}, smallest first",
                [f"return sorted({kept})[:{k}]"],
            ),
            (f"the last {first} of the numbers in xs {clause}{each}", [f"return {kept}[-{k}:]"]),
            (f"every {first}th, from the first on, of the numbers in xs {clause}{each}", [f"return {kept}[::{k}]"]),
            (
                f"the sum of the {first} largest of the numbers in xs {clause}{each}",
                [f"ys = sorted({kept}, reverse=True)", f"return sum(ys[:{k}])"],
            ),
            (
                f"the difference between the largest and the smallest of the numbers in xs {clause}{each}, 0 if none",
                [f"ys = {kept}", "return max(ys) - min(ys) if ys else 0"],
            ),
            (
                f"the running totals of the numbers in xs {clause}{each}",
                ["total = 0", "ys = []", f"for x in {kept}:", "    total += x", "    ys.append(total)", "return ys"],
            ),
        )
    )
    return what, "xs", body


def _strings(rng: Random) -> tuple[str, str, list[str]]:
    """Description, parameter and body of a function on a list of words."""
    k, letter, other = rng.randint(3, 6), *rng.sample(_LETTERS, 2)
    said = _number(rng, k)
    clause, test = rng.choice(
        (
            (f"longer than {said} letters", f"len(w) > {k}"),
            (f"with at most {said} letters", f"len(w) <= {k}"),
            (f"that start with {letter}", f"w.startswith('{letter}')"),
            (f"that end in {letter}", f"w.endswith('{letter}')"),
            (f"that contain {letter}", f"'{letter}' in w"),
            (f"without the letter {letter}", f"'{letter}' not in w"),
            (f"that contain {letter} but not {other}", f"'{letter}' in w and '{other}' not in w"),
            ("that read the same backwards", "w == w[::-1]"),
            ("of even length", "len(w) % 2 == 0"),
        )
    )
    done, expression = rng.choice(
        (
            ("", "w"),
            ("in upper case", "w.upper()"),
            ("spelled backwards", "w[::-1]"),
            ("reduced to the first letter", "w[0]"),
            ("without the last letter", "w[:-1]"),
            (f"with {letter} replaced by {other}", f"w.replace('{letter}', '{other}')"),
            ("written twice", "w * 2"),
            (f"cut to {said} letters", f"w[:{k}]"),
        )
    )
    each = f", each {done}" if done else ""
    kept = f"[{expression} for w in words if {test}]"
    sign, name = rng.choice((("-", "hyphens"), (" ", "spaces"), (",", "commas"), ("+", "plus signs")))
    what, body = rng.choice(
        (
            (f"the words {clause}{each}", [f"return {kept}"]),
            (f"the words {clause}{each}, in alphabetical order", [f"return sorted({kept})"]),
            (f"the words {clause}{each}, shortest first", [f"return sorted({kept}, key=len)"]),
            (f"the words {clause}{each}, joined by {name}", [f"return '{sign}'.join({kept})"]),
            (f"how many words there are {clause}", [f"return len([w for w in words if {test}])"]),
            (f"the total length of the words {clause}{each}", [f"return sum(len(w) for w in {kept})"]),
            (
                f"the longest of the words {clause}{each}, '' if there is none",
                [f"return max({kept}, key=len, default='')"],
            ),
            (f"the words {clause}{each}, in reverse order", [f"return {kept}[::-1]"]),
        )
    )
    return what, "words", body


def _steps(rng: Random) -> tuple[str, str, list[str]]:
    """Description, parameter and body of a function on one number, with branches or a loop."""
    a, b = sorted(rng.sample(range(2, 60), 2))
    low, middle, high = rng.sample(("low", "fair", "good", "cold", "warm", "hot", "small", "big", "huge"), 3)
    k, m = rng.sample(range(2, 10), 2)
    (first, one), (second, two) = _mapping(rng), _mapping(rng)
    clause, test = _condition(rng)
    one, two, test = (re.sub(r"\bx\b", "n", text) for text in (one, two, test))
    return rng.choice(
        (
            (
                f"'{low}' for n below {_number(rng, a)}, '{middle}' for n below {_number(rng, b)} and else '{high}'",
                "n",
                [f"if n < {a}:", f"    return '{low}'", f"if n < {b}:", f"    return '{middle}'", f"return '{high}'"],
            ),
            (
                f"n {first} if n is one of the numbers {clause}, and else n {second}",
                "n",
                [f"if {test}:", f"    return {one}", f"return {two}"],
            ),
            (
                f"the sum of the multiples of {_number(rng, k)} or {_number(rng, m)} from 1 up to and including n",
                "n",
                [f"return sum(x for x in range(1, n + 1) if x % {k} == 0 or x % {m} == 0)"],
            ),
            (
                f"the list of the numbers from 1 to n, with '{low}' in place of each multiple of {_number(rng, k)}",
                "n",
                [f"return ['{low}' if x % {k} == 0 else x for x in range(1, n + 1)]"],
            ),
            (
                f"how often n can be halved, rounding down, before it is at most {_number(rng, k)}",
                "n",
                ["count = 0", f"while n > {k}:", "    n = n // 2", "    count += 1", "return count"],
            ),
        )
    )


def _by_example(rng: Random) -> tuple[str, str, list[str]]:
    """The same from three calls and their results: the rule has to be found."""
    k, m = rng.randint(2, 12), rng.randint(-15, 15)
    constant = f" + {m}" if m > 0 else f" - {-m}" if m < 0 else ""
    letter = rng.choice("-.*")
    numbers = [rng.randint(1, 20) for _ in range(4)]
    parameter, body, calls = rng.choice(
        (
            ("n", f"return n * {k}{constant}", rng.sample(range(10), 3)),
            ("n", f"return n * {k}{constant}", [1, 2, rng.randint(3, 12)]),
            ("n", f"return n * n{constant}", rng.sample(range(10), 3)),
            ("n", f"return {abs(m) + 10} - n", rng.sample(range(30), 3)),
            ("n", f"return n % {k}", rng.sample(range(k, 40), 3)),
            ("n", f"return n // {k}", rng.sample(range(10, 90), 3)),
            ("text", "return text[::-1]", rng.sample(("tuba", "Oslo", "hat box", "cane"), 3)),
            ("text", f"return text.upper() + '{letter}'", rng.sample(("tuba", "Oslo", "hat box", "cane"), 3)),
            ("text", f"return '{letter}'.join(text)", rng.sample(("tuba", "Oslo", "hat", "cane"), 3)),
            ("text", f"return text[{k % 3 + 1}:]", rng.sample(("tubas", "Norway", "hat box", "canes"), 3)),
            ("xs", f"return [x + {abs(m) + 1} for x in xs]", [numbers, numbers[:2], numbers[1:]]),
            ("xs", f"return [x * {k} for x in xs]", [numbers, numbers[:2], numbers[1:]]),
            ("xs", "return xs[::-1]", [numbers, numbers[:2], numbers[1:]]),
            ("xs", f"return sum(xs) * {k % 4 + 1}", [numbers, numbers[:2], numbers[1:]]),
            ("xs", f"return [x for x in xs if x > {sorted(numbers)[1]}]", [numbers, numbers[:3], numbers[1:]]),
        )
    )
    source = f"def f({parameter}):\n    {body}"
    shown = "; ".join(f"f({call!r}) is {run_function(source, 'f', [call])!r}" for call in calls)
    return shown, parameter, [body]


def generate_functions(seed: int) -> Iterator[Item]:
    """Endless items; the same seed gives the same ones."""
    rng = Random(seed)
    kinds = (_numbers, _strings, _steps, _by_example, _by_example, _by_example)
    while True:
        kind = rng.choice(kinds)
        what, parameter, body = kind(rng)
        means = "such that" if kind is _by_example else "that returns"
        source = "\n    ".join([f"def f({parameter}):", *body])
        yield Item(f"Write a Python function f({parameter}) {means} {what}.", source)


@functools.lru_cache(maxsize=16_384)
def _results(source: str) -> tuple[str, ...]:
    """What a function gives for every input of its parameter's kind; of a program that fails, how it fails."""
    found = re.search(r"def (\w+)\((\w+)\)", source)
    assert found is not None
    results = []
    for value in _INPUTS[found[2]]:
        try:
            # A function that changes its argument must not change the next test's.
            result = run_function(source, found[1], [list(value) if isinstance(value, list) else value])
        except ProgramError:
            results.append("failed")
        else:
            results.append(repr(result))
    return tuple(results)


def score_function(answer: str, item: Item) -> bool:
    """Whether the function in the answer gives what the reference gives, on every input that the reference can take.

    Results are compared by type as well. The answer may stand in a code fence and among prose that follows it.

    >>> item = Item("", "def f(xs):\\n    return sum(xs)")
    >>> score_function("def f(xs):\\n    t = 0\\n    for x in xs:\\n        t += x\\n    return t", item)
    True
    >>> score_function("def f(xs):\\n    return len(xs)", item)
    False
    """
    start = answer.find("def ")
    source = answer[start:].split("```")[0].rstrip() if start >= 0 else ""
    if source == item.completion:
        return True
    header = item.completion.split("\n", 1)[0]
    if not source.startswith(header):
        return False
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    pairs = zip(_results(source), _results(item.completion), strict=True)
    return all(ours == theirs for ours, theirs in pairs if theirs != "failed")
