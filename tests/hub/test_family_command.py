"""``meswitch family`` edits a family as loading it and saving it would, in a folder and on the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from tests.hub.conftest import Client, Published
from tests.hub.test_pull import logits
from tests.hub_server import HubServer
from tests.model_state import prompt
from tests.test_bad_input import in_config
from transformers_meswitch import MESwitchModelForCausalLM
from transformers_meswitch.cli import main

pytestmark = pytest.mark.integration


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    code = main(["family", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert main(["family", *map(str, arguments)]) == 1
    return capsys.readouterr().err


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def answers(family: Any, *experts: str | None) -> dict[str | None, torch.Tensor]:
    found = {}
    for name in experts:
        family.set_expert(name)
        found[name] = logits(family)
    return found


@pytest.mark.parametrize("name", ["mlp", "0", "norm", "rotary_emb", "lm_head"])
def test_a_name_that_is_part_of_a_modules_is_refused_before_anything_is_written(
    published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """That the model could not load, whether the base's files have tensors of that module or not."""
    made = tmp_path / "made"
    error = refused(capsys, "create", "alice/base", f"{name}=alice/math", "-o", made)
    assert f"{name!r} is part of the module path" in error
    assert not made.exists()
    run(capsys, "create", "alice/base", "math=alice/math", "-o", made)
    before = contents(made)
    assert f"{name!r} is part of the module path" in refused(capsys, "add", made, f"{name}=alice/math")
    assert contents(made) == before


def test_where_the_base_is_out_of_reach_names_are_those_that_the_delta_changes(
    published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"
    run(capsys, "create", "alice/base", "math=alice/math", "-o", made)
    config = json.loads((made / "config.json").read_text())
    gone = {"base_model_name_or_path": "alice/gone", "base_revision": None}
    (made / "config.json").write_text(json.dumps(config | gone))
    assert "'mlp' is part of the module path" in refused(capsys, "add", made, "mlp=alice/math")
    run(capsys, "add", made, "again=alice/math")


def test_a_family_made_by_the_command_is_the_one_that_a_model_saves(
    hub: HubServer, published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = published.family.deltas["code"]
    made = run(capsys, "create", "alice/base", "math=alice/math", f"code={code}", "-o", tmp_path / "made")
    commits = {name: hub.repos[f"alice/{name}"].branches["main"] for name in ("base", "math")}
    assert made == {
        "where": str(tmp_path / "made"),
        "base": "alice/base",
        "base_revision": commits["base"],
        "experts": {
            "code": {"repo": "./experts/code", "revision": None},
            "math": {"repo": "alice/math", "revision": commits["math"]},
        },
        "default_expert": None,
    }
    assert not [path for path in hub.downloads() if "adapter_model" in path], "no weights are needed"
    saved = MESwitchModelForCausalLM.from_pretrained("alice/base", experts={"math": "alice/math", "code": code})
    saved.set_expert(None)
    saved.save_pretrained(tmp_path / "saved")
    ours, theirs = contents(tmp_path / "made"), contents(tmp_path / "saved")
    assert set(theirs) - set(ours) <= {"generation_config.json"}  # one of the model where the base has none
    same = set(ours) & set(theirs) - {"tokenizer_config.json", "tokenizer.json", "generation_config.json"}
    assert {name for name in same if ours[name] != theirs[name]} == set()
    loaded = MESwitchModelForCausalLM.from_pretrained(tmp_path / "made")
    for name, expected in answers(saved, "math", "code", None).items():
        assert torch.equal(answers(loaded, name)[name], expected)
    assert len(loaded.tokenizer_for(None)) == 128


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_add_list_and_remove(
    where: str,
    hub: HubServer,
    client: Client,
    published: Published,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    math, code = published.family.deltas["math"], published.family.deltas["code"]
    family = str(tmp_path / "family") if where == "folder" else "alice/family"
    target = ("-o", family) if where == "folder" else ("--repo-id", family, "--private")
    run(capsys, "create", "alice/base", f"math={math}", *target)
    if where == "hub":
        assert hub.repos[family].private
        hub.repos[family].edit("main", {"README.md": hub.repos[family].files()["README.md"] + b"\nMine.\n"})
    else:
        card = Path(family, "README.md")
        card.write_text(card.read_text() + "\nMine.\n")
    before = len(hub.requests)
    added = run(capsys, "add", family, f"code={code}", "again=alice/math")
    assert list(added["experts"]) == ["again", "code", "math"]
    files = contents(Path(family)) if where == "folder" else hub.repos[family].files()
    if where == "hub":
        sent = sum(r.received for r in hub.requests[before:] if r.method == "PUT")
        assert sent == (code / "adapter_model.safetensors").stat().st_size, "nothing else is uploaded"
    assert b"\nMine.\n" in files["README.md"]
    assert b"| `code` |" in files["README.md"]
    assert json.loads(files["experts/code/adapter_config.json"])["base_model_name_or_path"] == "alice/base"
    client.forget()
    loaded = MESwitchModelForCausalLM.from_pretrained(family)
    stock = MESwitchModelForCausalLM.from_pretrained("alice/base", experts={"math": math, "code": code})
    for name, expected in answers(stock, "math", "code", None).items():
        assert torch.equal(answers(loaded, name)[name], expected)
    assert torch.equal(answers(loaded, "again")["again"], answers(loaded, "math")["math"])

    assert main(["family", "list", family]) == 0
    lines = capsys.readouterr().out.splitlines()
    commits = {name: hub.repos[f"alice/{name}"].branches["main"] for name in ("base", "math")}
    assert lines[0] == f"base alice/base, revision {commits['base']}"
    assert [line.split() for line in lines[4:7]] == [
        ["again", "alice/math", commits["math"]],
        ["code", "./experts/code", "—"],
        ["math", "./experts/math", "—"],
    ]
    assert lines[-1] == "answers by default: the base"

    run(capsys, "remove", family, "math", "again")
    files = contents(Path(family)) if where == "folder" else hub.repos[family].files()
    assert not [path for path in files if path.startswith("experts/math/")]
    assert "experts/code/adapter_model.safetensors" in files
    assert b"\nMine.\n" in files["README.md"]
    client.forget("cache-3")
    assert MESwitchModelForCausalLM.from_pretrained(family).experts == ["code"]
    if where == "hub":
        assert next(c.title for c in hub.repos[family].history()) == "Remove math, again"


def test_an_edit_that_came_in_between_is_not_lost(
    hub: HubServer, published: Published, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "create", "alice/base", "math=alice/math", "--repo-id", "alice/family")

    def meanwhile(repo: Any) -> None:
        config = json.loads(repo.files()["config.json"])
        config["experts"]["late"] = {"repo": "alice/math", "revision": None}
        repo.edit("main", {"config.json": json.dumps(config).encode()})

    hub.before_commit = meanwhile
    added = run(capsys, "add", "alice/family", "code=alice/code")
    assert list(added["experts"]) == ["code", "late", "math"]
    assert list(json.loads(hub.repos["alice/family"].files()["config.json"])["experts"]) == ["code", "late", "math"]


def test_branches_and_pull_requests(
    hub: HubServer, client: Client, published: Published, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "create", "alice/base", "math=alice/math", "--repo-id", "alice/family")
    HfApi().create_branch("alice/family", branch="next")
    run(capsys, "add", "alice/family", "code=alice/code", "--revision", "next")
    assert run(capsys, "list", "alice/family", "--revision", "next")["experts"].keys() == {"math", "code"}
    assert run(capsys, "list", "alice/family")["experts"].keys() == {"math"}
    client.become("bob")
    assert "403" in refused(capsys, "add", "alice/family", "code=alice/code")
    opened = run(capsys, "add", "alice/family", "code=alice/code", "--create-pr")
    assert opened["where"].endswith("/alice/family/discussions/1")
    assert run(capsys, "list", "alice/family")["experts"].keys() == {"math"}
    client.become("alice")
    HfApi().merge_pull_request("alice/family", 1)
    assert run(capsys, "list", "alice/family")["experts"].keys() == {"math", "code"}


def test_what_does_not_belong_is_refused_before_anything_changes(
    hub: HubServer, published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = tmp_path / "family"
    math = published.family.deltas["math"]
    run(capsys, "create", published.family.base, f"math={math}", "-o", family)
    before = contents(family)
    other = published.files("code")
    config = json.loads(other["adapter_config.json"])
    config["base_fingerprint"]["digest"] = "0" * 64
    hub.add_repo("alice/other", other | {"adapter_config.json": json.dumps(config).encode()})
    torn = tmp_path / "torn"
    torn.mkdir()
    for path, data in published.files("code").items():
        (torn / path).write_bytes(data)
    tensors = load_file(torn / "adapter_model.safetensors")
    step = next(name for name in sorted(tensors) if name.endswith("step"))
    save_file({**tensors, step: torch.full_like(tensors[step], float("nan"))}, torn / "adapter_model.safetensors")
    for arguments, message in (
        (("add", family, "code=alice/other"), "'math' and 'code' were formed against different bases"),
        (("add", family, "math=alice/math"), "'math'"),
        (("add", family, "base=alice/math"), "'base' is reserved"),
        (("add", family, "code"), "'code' names no expert; expected NAME=DELTA"),
        (("add", family, "a=alice/math", "a=alice/code"), "'a' is given twice"),
        (("add", family, f"code={torn}"), step),
        (("add", family, "code=alice/nowhere"), "alice/nowhere could not be fetched"),
        (("add", family, "code=alice/base"), "has no file adapter_config.json"),
        (("remove", family, "code"), "has no expert 'code'. It has: 'math'"),
        (("create", "alice/base", "-o", family), "holds a family already"),
        (("create", "alice/base", "-o", published.family.base), "holds the config.json of a model"),
        (("create", math, "-o", tmp_path / "new"), "is a delta repo, expected a full checkpoint"),
        (("create", published.family.base, "--repo-id", "alice/new"), "is a folder, which nobody else can load"),
        (("create", "alice/base", "--repo-id", "alice/base"), "holds a config.json already"),
        (("list", published.family.base), "is a plain model (model_type 'llama'), expected a family"),
    ):
        assert message in refused(capsys, *arguments), arguments
    assert contents(family) == before
    assert not (tmp_path / "new").exists()
    assert "alice/new" not in hub.repos


def test_an_expert_that_answers_by_default_is_not_removed(
    published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = MESwitchModelForCausalLM.from_pretrained(published.family.base, experts=published.family.deltas)
    model.set_expert("code")
    model.generation_config.expert = "math"
    model.save_pretrained(tmp_path / "family")
    assert "names 'math' as the expert that answers by default" in refused(
        capsys, "remove", tmp_path / "family", "math"
    )
    assert run(capsys, "remove", tmp_path / "family", "code")["default_expert"] is None
    model = MESwitchModelForCausalLM.from_pretrained(tmp_path / "family")
    assert model.generate(prompt(), max_new_tokens=2).shape[1] > prompt().shape[1]


def test_the_familys_own_base_is_compared_where_it_is_at_hand(
    published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(published.family.base / "model.safetensors")
    base = tmp_path / "base"
    base.mkdir()
    for path, data in published.files("base").items():
        (base / path).write_bytes(data)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    message = refused(capsys, "create", base, f"math={published.family.deltas['math']}", "-o", tmp_path / "family")
    assert "another base than" in message
    assert "model.norm.weight" in message
    assert not (tmp_path / "family").exists()
    in_config(lambda c: c.pop("base_fingerprint"))(delta := copy_of(published, tmp_path))
    run(capsys, "create", base, f"math={delta}", "-o", tmp_path / "family")  # a delta without has nothing to compare


def copy_of(published: Published, tmp_path: Path) -> Path:
    folder = tmp_path / "delta"
    folder.mkdir()
    for path, data in published.files("math").items():
        (folder / path).write_bytes(data)
    return folder
