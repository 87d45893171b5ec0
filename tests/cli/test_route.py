"""``meswitch route`` on the demo family."""

from __future__ import annotations

import io
import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from transformers_meswitch import HeadRouter, MESwitchFamilyConfig, MESwitchModelForCausalLM
from transformers_meswitch.cards import family_card
from transformers_meswitch.cli import main
from transformers_meswitch.compression.calibration_record import calibration_record
from transformers_meswitch.demo.runner import FAMILY
from transformers_meswitch.demo.tasks import expert_for, prompts
from transformers_meswitch.errors import RouterError


def write(path: Path, held_out: bool, count: int) -> Path:
    rows = [{"prompt": p, "expert": expert_for(p)} for p in islice(prompts(held_out, seed=5), count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("route")
    write(folder / "train.jsonl", False, 300)
    write(folder / "test.jsonl", True, 60)
    shutil.copytree(FAMILY, folder / "family")
    for file in (folder / "family").glob("router*"):
        file.unlink()
    config = json.loads((folder / "family" / "config.json").read_text())
    (folder / "family" / "config.json").write_text(json.dumps({**config, "router": None}))
    card = family_card(MESwitchFamilyConfig.from_pretrained(folder / "family"))
    (folder / "family" / "README.md").write_text(card)
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: Any, status: int = 0) -> str:
    assert main(["route", *map(str, arguments)]) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def test_trained_into_the_family_measured_and_asked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = tmp_path / "family"
    shutil.copytree(folder / "family", family)
    before = {path: path.read_bytes() for path in family.rglob("*") if path.is_file()}
    printed = said(capsys, "train", family, "--data", folder / "train.jsonl")
    assert "letter" in printed
    assert "bytes (" in printed
    changed = {path.name for path in family.rglob("*") if path.is_file() and before.get(path) != path.read_bytes()}
    assert changed == {"router_config.json", "router.safetensors", "config.json", "README.md"}
    assert "has a router" in (family / "README.md").read_text()
    assert MESwitchModelForCausalLM.from_pretrained(family).router.labels == ["json", "letter", "redact"]

    plot = tmp_path / "router.png"
    result = json.loads(said(capsys, "eval", family, "--data", folder / "test.jsonl", "--plot", plot, "--json"))
    assert result["routed_accuracy"] >= 0.98
    assert result["prompts"] == 60
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert "60 prompts:" in said(capsys, "eval", family, "--data", folder / "test.jsonl")

    assert said(capsys, "explain", family, "mira 2024-03-09 4170").endswith("\njson (100%)\n")
    explained = json.loads(said(capsys, "explain", family, "hello", "--json"))
    assert (explained["expert"], explained["abstained"]) == ("base", True)
    monkeypatch.setattr("sys.stdin", io.StringIO("mira 2024-03-09 4\n\nwho are you\n"))
    lines = said(capsys, "try", family).splitlines()
    assert lines[0] == "redact (100%)"
    assert lines[1].startswith("base, as the router abstains: json is likeliest, at 33%")
    assert lines[2] == "base, as the router abstains: it is like no prompt that the router knows"


def test_trained_into_a_folder_of_its_own(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label in ("json", "letter"):
        own = [p for p in islice(prompts(False, seed=1), 200) if expert_for(p) == label]
        (tmp_path / f"{label}.txt").write_text("\n".join(own))
    data = [f"--data={label}={tmp_path / label}.txt" for label in ("json", "letter")]
    options = ["--layer", 2, "--window", 64, "--threshold", 0.7, "--default-expert", "letter", "--json"]
    result = json.loads(said(capsys, "train", folder / "family", *data, "-o", tmp_path / "router", *options))
    router = HeadRouter.from_pretrained(tmp_path / "router")
    assert (router.layer, router.window, router.threshold, router.default_expert) == (2, 64, 0.7, "letter")
    assert router.labels == result["labels"] == ["json", "letter"]
    assert not list((folder / "family").glob("router*"))
    asked = said(capsys, "explain", folder / "family", "--router", tmp_path / "router", "mira 2024-03-09 4170")
    assert asked.endswith("json (100%)\n")


@pytest.mark.parametrize("output", [False, True])
def test_a_damaged_router_is_replaced(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: bool
) -> None:
    family = tmp_path / "family"
    shutil.copytree(folder / "family", family)
    config = family / "config.json"
    before = json.loads(config.read_text())
    if not output:
        config.write_text(json.dumps({**before, "router": {"router_type": "multiple_choice"}}))
        (family / "router_config.json").write_text("{")
        with pytest.raises(RouterError):
            MESwitchModelForCausalLM.from_pretrained(family)
        assert MESwitchModelForCausalLM.from_pretrained(family, router=False).router is None
    said(capsys, "train", family, "--data", folder / "train.jsonl", *(["-o", f"{family}/."] if output else []))
    assert json.loads(config.read_text()) == {**before, "router": {"router_type": "head"}}
    assert MESwitchModelForCausalLM.from_pretrained(family).router.labels == ["json", "letter", "redact"]


def test_without_data_from_what_the_experts_were_calibrated_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = tmp_path / "family"
    shutil.copytree(folder / "family", family)
    monkeypatch.chdir(tmp_path)
    refused = said(capsys, "train", family, status=1)
    for name in ("json", "letter", "redact"):
        assert f"{name!r}: its delta does not say what it was calibrated on" in refused
    assert "--data json=WHERE --data letter=WHERE --data redact=WHERE" in refused

    own: dict[str, list[str]] = {}
    for prompt in islice(prompts(False, seed=1), 200):
        own.setdefault(expert_for(prompt), []).append(prompt)
    for name, records in own.items():
        Path(f"{name}.txt").write_text("\n".join(records))
        path = family / "experts" / name / "adapter_config.json"
        config = json.loads(path.read_text()) | {"calibration": calibration_record(f"{name}.txt", len(records) - 1)}
        path.write_text(json.dumps(config))
    result = json.loads(said(capsys, "train", family, "--json"))
    assert result["calibration"] == {name: f"{name}.txt" for name in ("json", "letter", "redact")}
    assert result["prompts"] == {name: len(set(records[:-1])) for name, records in own.items()}
    assert "letter.txt\n" in said(capsys, "train", family)
    assert said(capsys, "explain", family, "mira 2024-03-09 4170").endswith("\njson (100%)\n")
    Path("json.txt").write_text("other")
    assert "'json': calibrated on json.txt, but" in said(capsys, "train", family, status=1)


def test_what_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", folder / "train.jsonl"]
    assert "Give --output DIR" in said(capsys, "train", "me/family", *data, status=1)
    assert "needs a router" in said(capsys, "explain", folder / "family", "x", status=1)
    (tmp_path / "few.jsonl").write_text('{"expert": "json", "prompt": "a"}')
    assert "at least 5" in said(capsys, "train", folder / "family", "--data", tmp_path / "few.jsonl", status=1)
    said(capsys, "eval", folder / "family", status=2)
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "no prompts" in said(capsys, "eval", FAMILY, "--data", tmp_path / "empty.jsonl", status=1)


def test_lines_of_any_encoding_are_routed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = io.TextIOWrapper(io.BytesIO(b"caf\xe9\nmira 2024-03-09 4\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", lines)
    assert said(capsys, "try", FAMILY).splitlines()[1] == "redact (100%)"


def test_generate_with_auto(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(FAMILY), "--expert", "auto", "-p", "mira 2024-03-09 417", "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert (answer["expert"], answer["text"]) == ("letter", "Mira owes 417 by 9 March 2024.")
