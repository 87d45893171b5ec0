"""What a delta takes over from its expert, and what of an earlier delta it must not: templates, tokenizer, card."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.fixtures_models import CODE_TEMPLATE, TinyFamily
from tests.hub_server import HubServer
from transformers_meswitch import MESwitchConfig, MESwitchModelForCausalLM, compress
from transformers_meswitch.compression.assets import license_of
from transformers_meswitch.delta_format.location import RepoLocation
from transformers_meswitch.errors import DeltaFormatError, OutputFolderError
from transformers_meswitch.saving import save_expert

HOW = MESwitchConfig(bits=1, salient_channels=0)
TEMPLATES = {"default": "D{{ messages }}", "tool_use": "T{{ messages }}"}
BAD_YAML = "---\nlicense: [mit\n---\nHello.\n"


@pytest.fixture
def expert(tiny_family: TinyFamily, tmp_path: Path) -> Path:
    """A copy of the ``math`` fine-tune, to be changed at will."""
    return Path(shutil.copytree(tiny_family.experts["math"], tmp_path / "expert"))


def compressed(family: TinyFamily, expert: Path, output: Path) -> Path:
    return compress(family.base, expert, output, HOW, calibration=None, progress=False)


def with_templates(expert: Path) -> Path:
    tokenizer: Any = AutoTokenizer.from_pretrained(expert)
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(expert)
    return expert


def test_an_old_chat_template_does_not_act_as_the_new_experts(
    tiny_family: TinyFamily, expert: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(tiny_family.deltas["code"], tmp_path / "delta"))
    assert AutoTokenizer.from_pretrained(output).chat_template == CODE_TEMPLATE
    (output / "notes.txt").write_text("mine")
    (expert / "chat_template.jinja").unlink()
    compressed(tiny_family, expert, output)
    assert AutoTokenizer.from_pretrained(output).chat_template is None
    assert (output / "notes.txt").read_text() == "mine"


def test_saving_a_loaded_expert_over_another_leaves_nothing_of_it(
    tiny_family: TinyFamily, expert: Path, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (expert / name).unlink()
    output = Path(shutil.copytree(tiny_family.deltas["code"], tmp_path / "delta"))
    model = AutoModelForCausalLM.from_pretrained(compressed(tiny_family, expert, tmp_path / "new"))
    model.save_pretrained(output)
    assert not [path.name for path in output.iterdir() if "token" in path.name or "template" in path.name]


def test_all_chat_templates_come_along(tiny_family: TinyFamily, expert: Path, tmp_path: Path) -> None:
    delta = compressed(tiny_family, with_templates(expert), tmp_path / "delta")
    model = AutoModelForCausalLM.from_pretrained(delta)
    assert model.tokenizer_for("default").chat_template == TEMPLATES
    model.save_pretrained(tmp_path / "again")
    family = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts={"math": tmp_path / "again"})
    family.save_pretrained(tmp_path / "family")
    family.save_pretrained(tmp_path / "family")
    for loaded in (family, AutoModelForCausalLM.from_pretrained(tmp_path / "family")):
        assert loaded.tokenizer_for("math").chat_template == TEMPLATES


CLIENT = """
import sys
from transformers import AutoModelForCausalLM
from transformers_meswitch import MESwitchConfig, compress
from transformers_meswitch.hub import push_folder
base, output, plain, hub_cache = sys.argv[1:]
how = MESwitchConfig(bits=1, salient_channels=0)
compress(base, "alice/expert", output, how, None, cache_dir=hub_cache, progress=False)
push_folder(output, "alice/delta")
local = AutoModelForCausalLM.from_pretrained(base)
local.load_adapter("alice/delta", adapter_name="math", adapter_kwargs={"cache_dir": hub_cache})
templates = local.tokenizer_for("math").chat_template
from transformers_meswitch.delta_format.location import RepoLocation
from transformers_meswitch.compression.assets import find_assets
offline = RepoLocation("alice/delta", cache_dir=hub_cache, local_files_only=True)
print(sorted(path.name for path in find_assets(offline) if path.parent.name == "additional_chat_templates"))
print(RepoLocation("alice/expert", subfolder="none").list_folder("nothing"))
for repo in ("alice/absent", "/absent"):
    try:
        RepoLocation(repo).list_folder("additional_chat_templates")
    except ValueError as error:
        print(type(error).__name__)
push_folder(plain, "alice/delta")
print(templates)
"""


@pytest.mark.integration
def test_all_chat_templates_come_from_the_hub_and_go_there(
    tiny_family: TinyFamily, expert: Path, tmp_path: Path
) -> None:
    with_templates(expert)
    plain = Path(shutil.copytree(tiny_family.deltas["math"], tmp_path / "plain"))
    (plain / "adapter_config.json").write_text('{"base_model_name_or_path": "alice/base"}')
    with HubServer() as hub:
        for name, folder in (("alice/expert", expert), ("alice/base", tiny_family.base)):
            files = [path for path in folder.rglob("*") if path.is_file()]
            hub.add_repo(name, {path.relative_to(folder).as_posix(): path.read_bytes() for path in files})
        environment = os.environ | hub.environment("alice", str(tmp_path / "home"))
        arguments = ["alice/base", str(tmp_path / "delta"), str(plain), str(tmp_path / "cache")]
        command = [sys.executable, "-c", CLIENT, *arguments]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, process.stderr
        *first, templates = process.stdout.splitlines()[-5:]
        assert first == ["['tool_use.jinja']", "[]", "DeltaFormatError", "DeltaFormatError"]
        assert templates == str(TEMPLATES)
        last, before, *_ = (commit.files for commit in hub.repos["alice/delta"].history())
    assert "additional_chat_templates/tool_use.jinja" in before
    assert "additional_chat_templates/tool_use.jinja" not in last, "a template of an earlier push is left"
    assert "chat_template.jinja" in last


def test_an_expert_is_not_saved_over_a_full_model(tiny_family: TinyFamily, tmp_path: Path) -> None:
    base, other = (
        Path(shutil.copytree(folder, tmp_path / name))
        for name, folder in (("base", tiny_family.base), ("other", tiny_family.experts["math"]))
    )
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(tiny_family.deltas["code"]), adapter_name="code")
    family = MESwitchModelForCausalLM.from_pretrained(base, experts={"code": tiny_family.deltas["code"]})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for folder in (base, other):
        with pytest.raises(OutputFolderError, match=r"config\.json"):
            model.save_pretrained(folder)
        with pytest.raises(OutputFolderError, match="no family; saving a family here would destroy it"):
            family.save_pretrained(folder)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    with pytest.raises(DeltaFormatError, match="not valid JSON"):
        family.save_pretrained(tmp_path / "damaged")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path in before} == before
    assert [path.name for path in (tmp_path / "damaged").iterdir()] == ["config.json"]
    ids = torch.tensor([[5, 40]])
    assert AutoModelForCausalLM.from_pretrained(base)(ids).logits.shape == (1, 2, 128)


def test_a_family_is_not_saved_while_somebody_else_saves_it(
    tiny_family: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers_meswitch import saving

    family = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=dict(tiny_family.deltas))
    refused = []

    def meanwhile(*args: Any, **kwargs: Any) -> None:
        if not refused:
            with pytest.raises(OutputFolderError, match="Somebody else is saving") as error:
                family.save_pretrained(tmp_path)
            refused.append(error)
        save_expert(*args, **kwargs)

    monkeypatch.setattr(saving, "save_expert", meanwhile)
    family.save_pretrained(tmp_path)
    assert refused
    assert AutoModelForCausalLM.from_pretrained(tmp_path).experts == ["code", "math"]


def test_a_familys_old_template_does_not_act_as_its_new_bases(tiny_family: TinyFamily, tmp_path: Path) -> None:
    family = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts={})
    family.save_pretrained(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "old.jinja").write_text("old")
    (tmp_path / "spiece.model").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    family.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("old.jinja"))
    assert not (tmp_path / "spiece.model").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", [BAD_YAML.encode(), b"\xff\xfe h", b"---\n- a list\n---\n"])
def test_a_card_of_the_expert_that_cannot_be_read_costs_no_delta(
    tiny_family: TinyFamily, expert: Path, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (expert / "README.md").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        delta = compressed(tiny_family, expert, tmp_path / "delta")
    assert "licence in the card" in caplog.text
    assert (delta / "README.md").read_text().startswith("---\n")
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert license_of(RepoLocation(str(expert)), RepoLocation(str(tmp_path / "second"))) == "mit"


@pytest.mark.parametrize("content", [BAD_YAML.encode(), b"\xff\xfe h"])
def test_a_card_in_the_output_that_cannot_be_read_is_kept(
    tiny_family: TinyFamily, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_family.deltas["math"])
    family = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts={"math": tiny_family.deltas["math"]})
    writers = {
        "compressed": lambda folder: compressed(tiny_family, tiny_family.experts["math"], folder),
        "saved": model.save_pretrained,
        "family": family.save_pretrained,
    }
    for name, write in writers.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "README.md").write_bytes(content)
        caplog.clear()
        write(folder)
        assert (folder / "README.md").read_bytes() == content, name
        assert "left as it is" in caplog.text
        AutoModelForCausalLM.from_pretrained(folder)


def test_an_unreachable_licence_is_found_out_before_the_work(
    tiny_family: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = RepoLocation.find

    def failing(self: RepoLocation, filename: str) -> Path | None:
        if filename == "README.md":
            raise self.error("README.md could not be fetched")
        return find(self, filename)

    monkeypatch.setattr(RepoLocation, "find", failing)
    with pytest.raises(ValueError, match=r"README\.md could not be fetched"):
        compressed(tiny_family, tiny_family.experts["math"], tmp_path / "delta")
    assert not (tmp_path / "delta").exists()
