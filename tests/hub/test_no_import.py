"""Families in programs that do not import this package: ``trust_remote_code=True`` and the stub in the repo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.hub.conftest import Published
from tests.hub.test_pull import logits
from tests.hub_server import HubServer
from transformers_meswitch import MESwitchModelForCausalLM
from transformers_meswitch.demo.runner import FAMILY

pytestmark = pytest.mark.integration

PROGRAM = """
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
assert "transformers_meswitch" not in sys.modules
for family in sys.argv[2:]:
    config = AutoConfig.from_pretrained(family, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(family, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(family, trust_remote_code=True)
    with torch.no_grad():
        torch.save(model(torch.tensor([tokenizer("5+5=")["input_ids"]])).logits, sys.argv[1])
    model.save_pretrained(sys.argv[1] + "-saved")
"""
WITHOUT_THE_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "transformers_meswitch":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Absent())
"""


def run(hub: HubServer, folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = hub.environment("alice", str(folder / "home"))
    command = [sys.executable, "-c", program, str(folder / "found.pt"), *arguments]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)


def test_a_family_loads_in_a_program_that_does_not_know_the_package(
    hub: HubServer, published: Published, tmp_path: Path
) -> None:
    family = MESwitchModelForCausalLM.from_pretrained("alice/base", experts={"math": "alice/math"})
    family.set_expert("math")
    family.push_to_hub("alice/family")
    family.save_pretrained(tmp_path / "local")
    stub = hub.repos["alice/family"].files()["modeling_meswitch.py"].decode()
    assert stub.startswith("from transformers_meswitch import ")
    assert len(stub.splitlines()) == 1
    done = run(hub, tmp_path, PROGRAM, "alice/family", str(tmp_path / "local"))
    assert done.returncode == 0, done.stderr
    tokens = torch.tensor([family.tokenizer_for(None)("5+5=")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "found.pt", weights_only=True), family(tokens).logits)
    saved = tmp_path / "found.pt-saved"
    assert [path.name for path in saved.glob("*.py")] == ["modeling_meswitch.py"], "no other code is copied along"
    assert (saved / "modeling_meswitch.py").read_text() == stub
    assert json.loads((saved / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "modeling_meswitch.MESwitchFamilyConfig",
        "AutoModel": "modeling_meswitch.MESwitchModel",
        "AutoModelForCausalLM": "modeling_meswitch.MESwitchModelForCausalLM",
    }
    assert torch.equal(logits(MESwitchModelForCausalLM.from_pretrained(saved)), logits(family))
    absent = run(hub, tmp_path, WITHOUT_THE_PACKAGE + PROGRAM, "alice/family")
    assert absent.returncode == 1
    assert "pip install transformers_meswitch" in absent.stderr


def test_the_demos_family_loads_so_too(hub: HubServer, tmp_path: Path) -> None:
    done = run(hub, tmp_path, PROGRAM, str(FAMILY))
    assert done.returncode == 0, done.stderr
    family = MESwitchModelForCausalLM.from_pretrained(FAMILY)
    tokens = torch.tensor([family.tokenizer_for(None)("5+5=")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "found.pt", weights_only=True), family(tokens).logits)
    absent = run(hub, tmp_path, WITHOUT_THE_PACKAGE + PROGRAM, str(FAMILY))
    assert absent.returncode == 1
    assert "pip install transformers_meswitch" in absent.stderr
    assert [path.name for path in FAMILY.rglob("*.py")] == ["modeling_meswitch.py"]
