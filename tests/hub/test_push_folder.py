"""Folders and models are pushed in one commit, and what people wrote on the Hub is not lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import CommitInfo, snapshot_download
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.hub_repos import StoredFile
from tests.model_state import prompt
from tests.verification.records import evidence
from transformers_meswitch import MESwitchConfig, MESwitchModelForCausalLM, verify
from transformers_meswitch.errors import DeltaFormatError, UnsupportedOperationError
from transformers_meswitch.hub import push_folder
from transformers_meswitch.verification.evidence import dump_evidence, tensors_digest, write_evidence

pytestmark = pytest.mark.integration


def push(folder: Path, **arguments: Any) -> CommitInfo:
    return push_folder(folder, "alice/delta", **arguments)


def test_round_trip_in_one_commit_and_download_by_revision(hub, client, delta_folder):
    hub.add_repo("alice/base", {"README.md": b"---\nlicense: apache-2.0\n---\n"})
    first = push(delta_folder, private=True)
    repo = hub.repos["alice/delta"]
    assert repo.private
    assert len(repo.history()) == 2
    card = repo.history()[0].files["README.md"].data.decode()
    assert "license: apache-2.0" in card, "inherited from the base"
    assert 'from_pretrained("alice/delta")' in card
    assert "your-name/this-repo" not in card
    assert not any("cache" in path for path in repo.history()[0].files)
    original = (delta_folder / "adapter_model.safetensors").read_bytes()

    (delta_folder / "adapter_model.safetensors").write_bytes(os.urandom(64))
    second = push(delta_folder)
    downloaded = {rev: Path(snapshot_download("alice/delta", revision=rev)) for rev in (first.oid, second.oid, "main")}
    for revision, path in downloaded.items():
        expected = original if revision == first.oid else (delta_folder / "adapter_model.safetensors").read_bytes()
        assert (path / "adapter_model.safetensors").read_bytes() == expected
        assert (path / "adapter_config.json").read_bytes() == (delta_folder / "adapter_config.json").read_bytes()


def test_hand_edited_card_and_a_commit_in_between_survive(hub, client, delta_folder):
    push(delta_folder)
    repo = hub.repos["alice/delta"]

    def edit(repo, before, after):
        files = dict(repo.history()[0].files)
        files["README.md"] = StoredFile(files["README.md"].data.replace(before, after), lfs=False)
        repo.commit("main", files, "edited on the site", repo.branches["main"])

    edit(repo, b"<!-- meswitch:end -->", b"<!-- meswitch:end -->\n## My evaluation\n")
    (delta_folder / "README.md").write_text((delta_folder / "README.md").read_text().replace("100", "101"))
    hub.before_commit = lambda repo: edit(repo, b"## My evaluation", b"## My evaluation, and a late edit")
    push(delta_folder)
    card = repo.history()[0].files["README.md"].data.decode()
    assert "## My evaluation, and a late edit" in card
    assert "**101**" in card
    assert "**100**" not in card


def test_a_card_that_is_no_text_stays_where_it_is_and_the_rest_is_pushed(hub, client, delta_folder):
    card = (delta_folder / "README.md").read_bytes()
    (delta_folder / "README.md").write_bytes(b"\xff\xfe h")
    push(delta_folder)
    repo = hub.repos["alice/delta"]
    assert "README.md" not in repo.history()[0].files, "the Hub takes cards in UTF-8 only"
    damaged = StoredFile(b"\xff\xfe h", lfs=False)
    repo.commit("main", repo.history()[0].files | {"README.md": damaged}, "by hand", repo.branches["main"])
    (delta_folder / "README.md").write_bytes(card)
    (delta_folder / "adapter_model.safetensors").write_bytes(os.urandom(64))
    push(delta_folder)
    files = repo.history()[0].files
    assert files["README.md"] == damaged
    assert files["adapter_model.safetensors"].data == (delta_folder / "adapter_model.safetensors").read_bytes()


def test_stale_shards_are_deleted_other_files_stay(hub, client, delta_folder):
    stale = ["adapter_model-00001-of-00002.safetensors", "adapter_model.safetensors.index.json"]
    hub.add_repo("alice/delta", dict.fromkeys([*stale, "notes.txt"], b"x"))
    push(delta_folder)
    files = hub.repos["alice/delta"].history()[0].files
    assert "notes.txt" in files
    assert "adapter_model.safetensors" in files
    assert not set(stale) & set(files)


def test_branch_and_pull_request(hub, client, delta_folder):
    push(delta_folder, revision="v1", commit_message="Version one", tags=["mine"])
    repo = hub.repos["alice/delta"]
    assert repo.history("v1")[0].title == "Version one"
    assert len(repo.history("main")) == 1
    assert b"- mine" in repo.history("v1")[0].files["README.md"].data
    answer = push(delta_folder, create_pr=True)
    assert str(answer.pr_url).endswith("/discussions/1")
    assert len(repo.history("main")) == 1
    assert "adapter_config.json" in repo.history("refs/pr/1")[0].files


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(DeltaFormatError, match="neither adapter_config"):
        push_folder(tmp_path, "alice/delta")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DeltaFormatError, match="holds a full model, neither a delta nor a family"):
        push_folder(tmp_path, "alice/delta")


def test_paths_of_this_machine_are_refused_wherever_they_stand(tmp_path):
    def write(name, **config):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config))

    for base in ("/data/secret", str(tmp_path), "./base"):
        write("adapter_config.json", base_model_name_or_path=base)
        with pytest.raises(UnsupportedOperationError, match="Push the base, load it by its Hub id"):
            push_folder(tmp_path, "alice/delta")
    (tmp_path / "adapter_config.json").unlink()
    family = {
        "model_type": "meswitch",
        "base_model_name_or_path": "alice/base",
        "experts": {"a": {"repo": "./experts/a"}},
    }
    write("config.json", **family)
    write("experts/a/adapter_config.json", base_model_name_or_path="/data/secret")
    with pytest.raises(
        UnsupportedOperationError, match=r"experts/a/adapter_config\.json names the base '/data/secret'"
    ):
        push_folder(tmp_path, "alice/family")
    write("config.json", **family | {"experts": {"a": "/data/delta"}})
    with pytest.raises(UnsupportedOperationError, match="names the expert '/data/delta'"):
        push_folder(tmp_path, "alice/family")
    write("config.json", **family | {"base_model_name_or_path": "./base"})
    with pytest.raises(UnsupportedOperationError, match=r"names the base '\./base'"):
        push_folder(tmp_path, "alice/family")


def test_where_the_fine_tune_was_is_not_published(hub, client, delta_folder):
    config = {"base_model_name_or_path": "alice/base", "expert_model_name_or_path": "/data/secret"}
    (delta_folder / "adapter_config.json").write_text(json.dumps(config))
    push(delta_folder)
    pushed = json.loads(hub.repos["alice/delta"].history()[0].files["adapter_config.json"].data)
    assert pushed == config | {"expert_model_name_or_path": None}
    assert json.loads((delta_folder / "adapter_config.json").read_text()) == config


def test_only_what_belongs_is_pushed_and_dropped_experts_are_deleted(hub, client, tmp_path):
    folder = tmp_path / "family"
    for name in ("experts/a", "experts/b", "experts/loose", "checkpoint-5", "base"):
        (folder / name).mkdir(parents=True)
        kind = "config.json" if name == "base" else "adapter_config.json"
        (folder / name / kind).write_text(
            json.dumps({"base_model_name_or_path": None if name == "base" else "a/base"})
        )
        (folder / name / "notes.txt").touch()
    (folder / "images").mkdir()
    (folder / "images" / "plot.png").touch()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "modeling_meswitch.cpython-311.pyc").touch()

    def push_family(*experts):
        references = {name: {"repo": f"./experts/{name}"} for name in experts}
        config = {"model_type": "meswitch", "base_model_name_or_path": "./base", "experts": references}
        (folder / "config.json").write_text(json.dumps(config))
        push(folder)
        return {path for path in hub.repos["alice/delta"].history()[0].files if path != ".gitattributes"}

    common = {"README.md", "config.json", "images/plot.png", "base/config.json", "base/notes.txt"}
    of_a, of_b = ({f"experts/{name}/{file}" for file in ("adapter_config.json", "notes.txt")} for name in "ab")
    assert push_family("a", "b") == common | of_a | of_b
    assert push_family("b") == common | of_b


def test_a_family_does_not_replace_a_full_model(hub, client, tiny_family, tmp_path):
    files = {path.name: path.read_bytes() for path in tiny_family.base.iterdir()}
    before = hub.add_repo("alice/base", files).files()
    family = MESwitchModelForCausalLM.from_pretrained("alice/base", experts={"math": tiny_family.deltas["math"]})
    for arguments in ({}, {"create_pr": True}):
        with pytest.raises(UnsupportedOperationError, match=r"alice/base holds the config\.json of a model.*'llama'"):
            family.push_to_hub("alice/base", **arguments)
    assert hub.repos["alice/base"].files() == before
    family.push_to_hub("alice/family")
    family.push_to_hub("alice/family")  # a family is replaced by a family


def test_a_base_is_asked_for_its_licence_once_whoever_inherits_it(hub, client, tiny_family, tmp_path):
    files = {path.name: path.read_bytes() for path in tiny_family.base.iterdir()}
    hub.add_repo("alice/base", files | {"README.md": b"---\nlicense: apache-2.0\n---\n"})
    family = MESwitchModelForCausalLM.from_pretrained("alice/base", experts=tiny_family.deltas)
    family.save_pretrained(tmp_path / "family")
    before = len(hub.requests)
    hub.before_commit = lambda repo: repo.edit("main", {"notes.txt": b"in between"})
    push_folder(tmp_path / "family", "alice/family")
    asked = [request.path for request in hub.requests[before:]]
    assert asked.count("/api/models/alice/base") == 1
    pushed = hub.repos["alice/family"].files()
    cards = [data for name, data in pushed.items() if name.endswith("README.md")]
    assert len(cards) == 3
    assert all(b"license: apache-2.0" in card for card in cards)


def produce(kind: str, source: Path, delta: Path) -> Any:
    """A model that was pushed to ``alice/made``."""
    load = AutoModelForCausalLM.from_pretrained
    if kind == "compressed":
        model = load(source, quantization_config=MESwitchConfig("alice/base", bits=3, salient_channels=4))
    elif kind == "delta":
        model = load("alice/base")
        model.load_adapter(str(delta))
    else:
        model = MESwitchModelForCausalLM.from_pretrained("alice/base", experts={"math": delta})
        model.set_expert("math")
    if kind == "saved":
        model.save_pretrained(f"{source}-saved", push_to_hub=True, repo_id="alice/made", tags=["mine"])
    else:
        model.push_to_hub("alice/made", tags=["mine"], commit_message="Made")
    return model


@pytest.mark.parametrize("kind", ["compressed", "delta", "family", "saved"])
def test_what_models_push_loads_by_its_id_and_names_no_folder(hub, client, tiny_family, tmp_path, kind):
    files = {path.name: path.read_bytes() for path in tiny_family.base.iterdir()}
    base = hub.add_repo("alice/base", files | {"README.md": b"---\nlicense: apache-2.0\n---\n"})
    expert = shutil.copytree(tiny_family.experts["math"], tmp_path / "expert")
    model = produce(kind, expert, tiny_family.deltas["math"])
    again = AutoModelForCausalLM.from_pretrained("alice/made")
    assert torch.equal(again(prompt()).logits, model(prompt()).logits)
    plain = AutoModelForCausalLM.from_pretrained("alice/base")(prompt()).logits
    assert not torch.allclose(again(prompt()).logits, plain, atol=1e-2)
    head = hub.repos["alice/made"].history()[0]
    inner = "experts/math/" if kind in ("family", "saved") else ""
    configs = [json.loads(head.files[f"{inner}adapter_config.json"].data)]
    if kind != "delta":  # the commit of a base that transformers loaded is not known in all its releases
        assert configs[0]["revision"] == base.branches["main"]
    if inner:
        configs.append(json.loads(head.files["config.json"].data))
        assert configs[1]["base_revision"] == base.branches["main"]
    assert {config["base_model_name_or_path"] for config in configs} == {"alice/base"}
    for name, file in head.files.items():
        for path in (tiny_family.base.parent, tmp_path):
            assert str(path).encode() not in file.data, name
    card = head.files["README.md"].data.decode()
    assert 'from_pretrained("alice/made")' in card
    assert "license: apache-2.0" in card
    assert "- mine" in card


def test_evidence_is_pushed_with_the_tensors_it_is_of_and_no_others(hub, client, tiny_family, tmp_path):
    delta = shutil.copytree(tiny_family.deltas["math"], tmp_path / "math")
    config = json.loads((delta / "adapter_config.json").read_text())
    (delta / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "alice/base"}))
    tensors = load_file(delta / "adapter_model.safetensors")
    write_evidence(delta, evidence(tensors_sha256=tensors_digest(tensors)))
    name = "meswitch_evidence.json"
    written = (delta / name).read_bytes()
    push(delta)
    assert hub.repos["alice/delta"].history()[0].files[name].data == written

    first = min(tensors)
    save_file({**tensors, first: torch.zeros_like(tensors[first])}, delta / "adapter_model.safetensors")
    push(delta)
    assert name not in hub.repos["alice/delta"].history()[0].files
    assert (delta / name).exists(), "the folder itself is not changed"

    save_file(tensors, delta / "adapter_model.safetensors")
    push(delta)
    assert hub.repos["alice/delta"].history()[0].files[name].data == written
    (delta / name).unlink()
    push(delta)
    assert name not in hub.repos["alice/delta"].history()[0].files


def test_what_is_on_the_hub_is_verified_at_the_commits_found(hub, client, tiny_family):
    expert, delta = tiny_family.experts["math"], tiny_family.deltas["math"]
    repos = {
        name: hub.add_repo(f"alice/{name}", {path.name: path.read_bytes() for path in folder.iterdir()})
        for name, folder in (("base", tiny_family.base), ("expert", expert), ("delta", delta))
    }
    texts = ["What is said here has no meaning at all."] * 3
    found = dump_evidence(verify("alice/base", "alice/expert", "alice/delta", texts, device="cpu", progress=False))
    expected = dump_evidence(verify(tiny_family.base, expert, delta, texts, device="cpu", progress=False))
    assert {**found, "date": expected["date"]} == {
        **expected,
        "base": "alice/base",
        "base_revision": repos["base"].branches["main"],
        "expert": "alice/expert",
        "expert_revision": repos["expert"].branches["main"],
    }
