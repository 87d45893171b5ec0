"""The multiple-choice question that a language model is asked about a prompt, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from ..errors import RouterError

__all__ = ["MOST_OPTIONS", "Question"]

MOST_OPTIONS = len(ascii_uppercase)
_BEGINNING = "Which domain does the query belong to?\n{options}\n\nQuery: "
_ENDING = "\n\nThe letter of the domain is:"


@dataclass(frozen=True)
class Question:
    """Everything but the query, tokenised once.

    The query's own tokens are put in between as they are, so that nothing in it is taken for part of the question.

    Attributes:
        before: token ids that come before the query.
        after: token ids that come after it.
        letters: the token id of each option's letter, in the order of the options.

    >>> from transformers import AutoTokenizer
    >>> from transformers_meswitch.demo.runner import FAMILY
    >>> tokenizer = AutoTokenizer.from_pretrained(FAMILY)
    >>> question = Question.of(tokenizer, ["sums", "letters"])
    >>> text = tokenizer.decode(question.ids(tokenizer("1+1=")["input_ids"])).replace("<|unk|>", "|")
    >>> print(text.rstrip())
    Which domain does the query belong to?|A. sums|B. letters||Query: 1+1=||The letter of the domain is:
    >>> tokenizer.decode(question.letters)
    'AB'
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    letters: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, domains: Sequence[str]) -> Question:
        """The question with these options, at most 26.

        Args:
            tokenizer: that of the model to be asked.
            domains: what each option says, in order.

        Raises:
            RouterError: the tokenizer does not tell the options' letters apart.
        """
        letters = ascii_uppercase[: len(domains)]
        options = "\n".join(f"{letter}. {domain}" for letter, domain in zip(letters, domains, strict=True))
        before = tokenizer(_BEGINNING.format(options=options))["input_ids"]
        while before and before[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
            before = before[:-1]
        # How a letter is tokenised depends on what comes before it, so what all of them share belongs to the question.
        endings = [tokenizer(f"{_ENDING} {a}", add_special_tokens=False)["input_ids"] for a in ascii_uppercase]
        shared = next((i for i, ids in enumerate(zip(*endings, strict=False)) if len(set(ids)) > 1), 0)
        answers = tuple(ids[shared] for ids in endings[: len(letters)])
        if len(set(answers)) < len(answers):
            raise RouterError(
                f"The tokenizer has no token of its own for each of the letters {', '.join(letters)}, so the model "
                "cannot be asked a multiple-choice question. Name another causal LM, "
                "MultipleChoiceRouter(..., repo=...), or use a HeadRouter."
            )
        return cls(tuple(before), tuple(endings[0][:shared]), answers)

    def ids(self, query: Sequence[int]) -> list[int]:
        """The question about a query, given as token ids of the same tokenizer."""
        return [*self.before, *query, *self.after]
