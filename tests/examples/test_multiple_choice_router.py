"""``examples/train_multiple_choice_router.py`` on the demo family's base."""

from __future__ import annotations

import runpy
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from transformers_meswitch import MESwitchModelForCausalLM
from transformers_meswitch.demo.runner import FAMILY
from transformers_meswitch.demo.tasks import prompts

SCRIPT = Path(__file__).parents[2] / "examples" / "train_multiple_choice_router.py"


def example() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_options_are_shuffled_and_the_letter_is_what_is_learnt() -> None:
    from transformers import AutoTokenizer

    from transformers_meswitch import MultipleChoiceRouter

    script = example()
    tokenizer = AutoTokenizer.from_pretrained(FAMILY)
    router = MultipleChoiceRouter({"letter": "records", "json": "talk"})
    questions = script["Questions"](tokenizer, router, {"letter": ["mira"] * 8, "json": ["hello"] * 8}, 0)
    assert questions[3] == questions[3]
    letters = []
    for i in range(16):
        row = questions[i]
        text = tokenizer.decode(row["input_ids"])
        assert row["labels"][:-1] == [-100] * (len(row["input_ids"]) - 1)
        letters.append(text[-1])
        domain = "records" if i < 8 else "talk"
        assert f"{letters[-1]}. {domain}" in text
    assert set(letters[:8]) == set(letters[8:]) == {"A", "B"}
    batch = script["padded"]([questions[0], questions[8]])
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(questions[i]["input_ids"]) for i in (0, 8)]


@pytest.mark.slow
def test_fine_tuning_teaches_the_question(tmp_path: Path) -> None:
    records = list(islice(prompts(held_out=False, seed=0), 200))
    talk = [f"{a} {b} {c}" for a in ("where", "who", "why", "how") for b in ("is", "was") for c in "abcdefgh"]
    for name, part in (("train", slice(0, None, 2)), ("test", slice(1, None, 2))):
        (tmp_path / f"{name}-letter.txt").write_text("\n".join(records[part]))
        (tmp_path / f"{name}-json.txt").write_text("\n".join(talk[part]))
    data = {n: [f"{k}={tmp_path}/{n}-{k}.txt" for k in ("letter", "json")] for n in ("train", "test")}
    arguments = ["--model", str(FAMILY / "base"), "-o", str(tmp_path / "router"), "--steps", "150", "--lr", "1e-3"]
    arguments += ["--domain", "letter=records", "--domain", "json=talk", "--window", "32"]
    for flag, name in (("--data", "train"), ("--test", "test")):
        for source in data[name]:
            arguments += [flag, source]
    result = example()["main"](arguments)
    assert result["after"]["accuracy"] > 0.95 > result["before"]["accuracy"]
    model = MESwitchModelForCausalLM.from_pretrained(FAMILY, router=str(tmp_path / "router"))
    assert model.router.divides_prior is False
    assert model.route(["mira 2024-03-09 417", "who is it"]).experts == ["letter", "json"]
