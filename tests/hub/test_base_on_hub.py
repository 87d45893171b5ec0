"""The right base on the Hub: its commit is recorded and honoured, and a base that was changed is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM
from transformers.models.auto import auto_factory

from tests.hub.conftest import Client, Published
from tests.hub.test_pull import logits
from tests.hub_server import HubServer
from tests.test_bad_input import UP
from transformers_meswitch import MESwitchConfig, MESwitchModelForCausalLM, compress
from transformers_meswitch.cli import main
from transformers_meswitch.errors import BaseMismatchError

pytestmark = pytest.mark.integration


@pytest.fixture
def moved(hub: HubServer, published: Published, tmp_path: Path) -> str:
    """A base that was changed after a delta, ``alice/delta``, was formed against it; the commit of then."""
    repo = hub.repos["alice/base"]
    commit = repo.branches["main"]
    expert = published.family.experts["math"]
    delta = compress(
        "alice/base", expert, tmp_path / "delta", MESwitchConfig(bits=4), calibration=None, progress=False
    )
    hub.add_repo("alice/delta", {path.name: path.read_bytes() for path in delta.iterdir()})
    weights = load(repo.files()["model.safetensors"])
    weights[f"{UP}.weight"][5, 6] += 1e-2
    repo.edit("main", {"model.safetensors": save(weights, metadata={"format": "pt"})}, "Better")
    return commit


def test_a_base_that_moved_is_named_and_the_commit_that_is_needed(hub: HubServer, client: Client, moved: str) -> None:
    now = hub.repos["alice/base"].branches["main"]
    assert json.loads(hub.repos["alice/delta"].files()["adapter_config.json"])["revision"] == moved

    def onto_main() -> None:
        AutoModelForCausalLM.from_pretrained("alice/base").load_adapter("alice/delta")

    def family() -> None:
        MESwitchModelForCausalLM.from_pretrained("alice/base", experts={"math": "alice/delta"})

    loads: list[Any] = [lambda: AutoModelForCausalLM.from_pretrained("alice/delta"), onto_main, family]
    for cache in ("of both commits", "of the new one"):
        for load_ in loads:
            with pytest.raises(BaseMismatchError, match=rf"than alice/base at revision {now}: .*{UP}") as caught:
                load_()
            assert f"alice/base was changed since: the delta was formed against its revision {moved}" in str(
                caught.value
            ), cache
        client.forget()


def test_the_recorded_commit_is_honoured(hub: HubServer, client: Client, moved: str) -> None:
    base = AutoModelForCausalLM.from_pretrained("alice/base", revision=moved)
    base.load_adapter("alice/delta")
    wanted = logits(base)
    if hasattr(auto_factory, "resolve_revision"):  # transformers 5.17 looks for the base's commit in the delta's repo
        model = AutoModelForCausalLM.from_pretrained(
            "alice/delta", revision=moved, adapter_kwargs={"revision": "main"}
        )
        assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("alice/delta")), wanted)
    family = MESwitchModelForCausalLM.from_pretrained("alice/base", experts={"math": "alice/delta"}, revision=moved)
    family.push_to_hub("alice/family")
    assert json.loads(hub.repos["alice/family"].files()["config.json"])["base_revision"] == moved
    client.forget()
    for load_ in (MESwitchModelForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        family = load_("alice/family")
        family.set_expert("math")
        assert torch.equal(logits(family), wanted)


def test_a_base_whose_weights_are_the_same_is_the_right_one(hub: HubServer, published: Published) -> None:
    before = logits(AutoModelForCausalLM.from_pretrained("alice/math"))
    hub.repos["alice/base"].edit("main", {"README.md": b"New card."})
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("alice/math")), before)


def test_errors_are_measured_against_the_recorded_commit(
    hub: HubServer, published: Published, moved: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expert = str(published.family.experts["math"])
    capsys.readouterr()
    assert main(["inspect", "alice/delta", "--base", "alice/base", "--expert", expert, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["modules"]
    errors = [row["relative_error"] for row in rows if row["kind"] == "linear"]
    assert errors
    assert max(errors) < 0.2  # of 4 bits
