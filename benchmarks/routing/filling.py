"""How requests of our own making are put together, and what may stand around any request."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence

__all__ = ["filled", "framed", "parts"]

Parts = Mapping[str, Sequence[str]]


def parts(listed: str) -> tuple[str, ...]:
    """Words and phrases, listed with bars between them.

    >>> parts("a lease|a will")
    ('a lease', 'a will')
    """
    return tuple(listed.split("|"))


def filled(name: str, forms: Sequence[str], words: Parts, count: int) -> Iterator[str]:
    """Forms with parts put in at random, the same on every machine; a form's turn comes as often as another's."""
    rng = random.Random(name)
    for form in itertools.islice(itertools.cycle(forms), count):
        text = form.format_map({part: rng.choice(values) for part, values in words.items()})
        yield text.lower().rstrip("?.") if rng.random() < 0.15 and name != "german" else text


_FRAMES = (
    "You are a helpful assistant.\n\n{p}",
    "Answer the following question as concisely as possible.\n{p}",
    "Question: {p}\nAnswer:",
    "Q: {p}\nA:",
    "{p}\n\nThink step by step.",
    "{p} Please answer in one sentence.",
    "Reply only with the final answer. Do not explain.\n\n{p}",
    "Hi, quick one: {p} Thanks!",
    "### Instruction:\n{p}\n\n### Response:",
    "TASK: Read the input and respond. Your answer will be checked by a program, so add nothing to it.\n{p}",
    "User: {p}\nAssistant:",
    "I need help with this.\n\n{p}",
    "You will be given an input. Follow the instructions in it carefully.\n---\n{p}\n---",
)


def framed(prompts: Sequence[str], share: float = 0.3) -> list[str]:
    """Prompts, a share of them within words that are the same whatever is asked."""
    rng = random.Random("frames")
    return [rng.choice(_FRAMES).format(p=p) if rng.random() < share else p for p in prompts]
