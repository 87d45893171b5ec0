"""Multi-step word problems with worked solutions, from reasoning-gym's ``gsm_symbolic``, and their scorer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal

_NUMBER = r"(-?\d[\d,]*(?:\.\d+)?)"


def generate_word_problems(seed: int) -> Iterator[tuple[str, str]]:
    """Endless (problem, worked solution that ends in ``#### number``) pairs; the same seed gives the same pairs.

    Needs the package ``reasoning-gym``. It repeats itself: deduplicate what you take.
    """
    import reasoning_gym

    chunk = 1000
    while True:
        # An item's own seed is the data set's plus its index, so consecutive chunks never share one.
        for entry in reasoning_gym.create_dataset("gsm_symbolic", seed=seed, size=chunk):
            yield entry["question"], entry["metadata"]["answer_cot"].strip()
        seed += chunk


def final_number(text: str) -> Decimal | None:
    """The number a solution ends in: after the last ``####``, else after the last "answer is", else the last of all.

    The fallbacks are there for answers in another style than the fine-tuning data's, the base's above all.

    >>> final_number("3 * 4 = 12, so 12 + 1,000 = 1,012\\n#### 1012")
    Decimal('1012')
    >>> final_number("The answer is $3.50, as 7 / 2 is 3.5.")
    Decimal('3.50')
    >>> final_number("no idea") is None
    True
    """
    for pattern in (rf"####\s*\$?{_NUMBER}", rf"answer is:?\s*\$?{_NUMBER}", _NUMBER):
        found = re.findall(pattern, text, flags=re.IGNORECASE)
        if found:
            return Decimal(found[-1].replace(",", ""))
    return None


def score_word_problem(answer: str, reference: str) -> bool:
    """Whether two solutions arrive at the same number.

    >>> score_word_problem("... so 6 * 7 = 42.0", "#### 42")
    True
    """
    number = final_number(answer)
    return number is not None and number == final_number(reference)
