"""What was pushed comes back: by every kind of revision, with a token, from a subfolder, in shards, and offline.

The reference is the model that the same folders give without a Hub, and the bytes that the server counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, pipeline

from tests.hub.conftest import Client, Published
from tests.hub_server import HubServer
from tests.model_state import prompt
from transformers_meswitch import MESwitchModelForCausalLM
from transformers_meswitch.errors import DeltaFormatError

pytestmark = pytest.mark.integration


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt()).logits


@pytest.fixture
def expected(published: Published) -> dict[str | None, torch.Tensor]:
    """Logits of the base and of each expert, read from folders."""
    family = published.family
    found = {None: logits(AutoModelForCausalLM.from_pretrained(family.base))}
    for name, delta in family.deltas.items():
        model = AutoModelForCausalLM.from_pretrained(family.base)
        model.load_adapter(str(delta))
        found[name] = logits(model)
    assert not torch.allclose(found["math"], found["code"][..., :128], atol=1e-2)
    return found


def second_version(hub: HubServer, published: Published) -> None:
    """``alice/delta``: ``math`` at first, with a tag; then ``code`` on main and ``math`` on a branch."""
    repo = hub.add_repo("alice/delta", published.files("math"))
    api = HfApi()
    api.create_tag("alice/delta", tag="v1")
    api.create_branch("alice/delta", branch="stable/math")
    stale = dict.fromkeys(published.files("math"))
    repo.edit("main", {**dict.fromkeys(stale, b""), **published.files("code")})


@pytest.mark.parametrize("kind", ["branch", "tag", "sha", "main"])
def test_a_delta_is_loaded_by_every_kind_of_revision(
    hub: HubServer, published: Published, expected: dict[str | None, torch.Tensor], kind: str
) -> None:
    second_version(hub, published)
    first = hub.repos["alice/delta"].tags["v1"]
    revision = {"branch": "stable/math", "tag": "v1", "sha": first, "main": "main"}[kind]
    wanted = expected["code" if kind == "main" else "math"]
    model = AutoModelForCausalLM.from_pretrained("alice/delta", adapter_kwargs={"revision": revision})
    assert torch.equal(logits(model), wanted)
    base = AutoModelForCausalLM.from_pretrained("alice/base")
    assert torch.equal(logits(PeftModel.from_pretrained(base, "alice/delta", revision=revision)), wanted)
    experts = {"it": {"repo": "alice/delta", "revision": revision}}
    family = MESwitchModelForCausalLM.from_pretrained("alice/base", experts=experts)
    family.set_expert("it")
    assert torch.equal(logits(family), wanted)
    family.push_to_hub("alice/family")
    pinned = json.loads(hub.repos["alice/family"].files()["config.json"])["experts"]["it"]["revision"]
    assert pinned == hub.repos["alice/delta"].resolve(revision), "a family names what it was made of"


@pytest.mark.parametrize("kind", ["branch", "tag", "sha"])
def test_a_family_is_loaded_by_every_kind_of_revision(
    hub: HubServer, published: Published, expected: dict[str | None, torch.Tensor], kind: str
) -> None:
    family = MESwitchModelForCausalLM.from_pretrained("alice/base", experts={"math": published.family.deltas["math"]})
    family.set_expert("math")
    family.push_to_hub("alice/family")
    family.push_to_hub("alice/family", revision="old")
    HfApi().create_tag("alice/family", tag="v1")
    first = hub.repos["alice/family"].branches["main"]
    MESwitchModelForCausalLM.from_pretrained("alice/base").push_to_hub("alice/family")
    revision = {"branch": "old", "tag": "v1", "sha": first}[kind]
    for load in (MESwitchModelForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(logits(load("alice/family", revision=revision)), expected["math"])
        assert torch.equal(logits(load("alice/family")), expected[None])


def test_a_private_repo_needs_a_token(hub: HubServer, client: Client, published: Published) -> None:
    for name in ("base", "math"):
        hub.repos[f"alice/{name}"].private = True
    family = MESwitchModelForCausalLM.from_pretrained("alice/base", experts={"math": "alice/math"})
    family.push_to_hub("alice/family", private=True)
    assert hub.repos["alice/family"].private
    client.become("bob")
    client.forget()
    with pytest.raises(DeltaFormatError, match=r"(?s)alice/math could not be fetched.*hf auth login"):
        MESwitchModelForCausalLM.from_pretrained(published.family.base, experts={"math": "alice/math"})
    for repo in ("alice/math", "alice/family"):
        with pytest.raises(OSError, match=repo):
            AutoModelForCausalLM.from_pretrained(repo)
    assert not list(client.cache.rglob("*.safetensors"))
    found = [
        AutoModelForCausalLM.from_pretrained("alice/math", token="hf_alice"),
        MESwitchModelForCausalLM.from_pretrained("alice/family", token="hf_alice"),
        AutoModelForCausalLM.from_pretrained("alice/family", token="hf_alice"),
    ]
    found[1].set_expert("math")
    found[2].set_expert("math")
    assert torch.equal(logits(found[0]), logits(found[1]))
    assert torch.equal(logits(found[0]), logits(found[2]))


def test_deltas_in_subfolders(hub: HubServer, published: Published, expected: dict[str | None, torch.Tensor]) -> None:
    files = {f"{name}/{path}": data for name in ("math", "code") for path, data in published.files(name).items()}
    hub.add_repo("alice/both", files)
    for name in ("math", "code"):
        model = AutoModelForCausalLM.from_pretrained("alice/both", adapter_kwargs={"subfolder": name})
        assert torch.equal(logits(model), expected[name])
        base = AutoModelForCausalLM.from_pretrained("alice/base")
        assert torch.equal(logits(PeftModel.from_pretrained(base, "alice/both", subfolder=name)), expected[name])
    where = {name: {"repo": "alice/both", "subfolder": name} for name in ("math", "code")}
    family = MESwitchModelForCausalLM.from_pretrained("alice/base", experts=where)
    family.push_to_hub("alice/family")
    family = MESwitchModelForCausalLM.from_pretrained("alice/family")
    for name in ("math", "code"):
        family.set_expert(name)
        assert torch.equal(logits(family)[..., : expected[name].shape[-1]], expected[name])


@pytest.mark.parametrize("kind", ["delta", "family"])
def test_shards_come_back_whole_by_every_stock_call(
    hub: HubServer, client: Client, published: Published, expected: dict[str | None, torch.Tensor], kind: str
) -> None:
    delta = published.family.deltas["math"]
    if kind == "delta":
        model = AutoModelForCausalLM.from_pretrained("alice/base")
        model.load_adapter(str(delta))
    else:
        model = MESwitchModelForCausalLM.from_pretrained("alice/base", experts={"math": delta})
        model.set_expert("math")
    model.push_to_hub("alice/sharded", max_shard_size="10KB")
    inner = "" if kind == "delta" else "experts/math/"
    files = hub.repos["alice/sharded"].files()
    shards = {path: data for path, data in files.items() if path.startswith(f"{inner}adapter_model-")}
    assert len(shards) > 2
    assert len(files[f"{inner}adapter_model.safetensors"]) < 100, "without tensors, for stock loaders to find"
    largest = max(t.nbytes for t in load_file(delta / "adapter_model.safetensors").values())
    # A tensor is never split, and each file has a header.
    assert all(len(data) < max(10_000, largest) + 3000 for data in shards.values())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("alice/sharded")), expected["math"])
    if kind == "delta":
        base = AutoModelForCausalLM.from_pretrained("alice/base")
        base.load_adapter("alice/sharded")
        assert torch.equal(logits(base), expected["math"])
        base = AutoModelForCausalLM.from_pretrained("alice/base")
        assert torch.equal(logits(PeftModel.from_pretrained(base, "alice/sharded")), expected["math"])
    model.push_to_hub("alice/sharded")
    files = hub.repos["alice/sharded"].files()
    whole = (delta / "adapter_model.safetensors").stat().st_size
    assert len(files[f"{inner}adapter_model.safetensors"]) == whole
    assert not set(shards) & set(files), "shards of an earlier push are gone"


def test_a_second_expert_costs_its_delta_and_nothing_else(hub: HubServer, published: Published) -> None:
    model = MESwitchModelForCausalLM.from_pretrained("alice/base", experts={"math": "alice/math"})
    before = len(hub.requests)
    model.load_adapter("alice/code", adapter_name="code")
    files = hub.repos["alice/code"].commits[hub.repos["alice/code"].branches["main"]].files
    wanted = {"adapter_config.json", "adapter_model.safetensors"}
    expected = {files[name].sha256 if files[name].lfs else name: len(files[name].data) for name in wanted}
    assert hub.downloads(since=before) == expected
    before = len(hub.requests)
    model.delete_adapter("code")
    model.load_adapter("alice/code", adapter_name="code")
    assert not hub.downloads(since=before), "a second time it is in the cache"
    tokenizer = model.tokenizer_for("code")
    assert len(tokenizer) > 128
    assert set(hub.downloads(since=before)) <= set(files) - wanted, "the tokenizer comes when it is asked for"


OFFLINE = """
import sys, torch
import transformers_meswitch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers_meswitch import MESwitchModelForCausalLM
from tests.model_state import prompt
found = {}
with torch.no_grad():
    found["delta"] = AutoModelForCausalLM.from_pretrained("alice/math")(prompt()).logits
    family = MESwitchModelForCausalLM.from_pretrained("alice/family")
    for name in (None, "math", "code"):
        family.set_expert(name)
        found[name] = family(prompt()).logits
assert len(family.tokenizer_for("code")) > 128
torch.save(found, sys.argv[1])
"""


def test_offline_after_one_download(
    hub: HubServer,
    client: Client,
    published: Published,
    expected: dict[str | None, torch.Tensor],
    tmp_path: Path,
) -> None:
    experts = {"math": "alice/math", "code": published.family.deltas["code"]}
    MESwitchModelForCausalLM.from_pretrained("alice/base", experts=experts).push_to_hub("alice/family")
    for offline in (False, True):
        settings = hub.environment("alice", str(tmp_path / "home")) | {"HF_HUB_OFFLINE": str(int(offline))}
        before = len(hub.requests)
        subprocess.run(
            [sys.executable, "-c", OFFLINE, tmp_path / "found.pt"],
            env=os.environ | settings,
            check=True,
            capture_output=True,
        )
        assert (len(hub.requests) == before) is offline
        found = torch.load(tmp_path / "found.pt", weights_only=True)
        for name, wanted in expected.items():
            assert torch.equal(found[name][..., : wanted.shape[-1]], wanted)
        assert torch.equal(found["delta"], expected["math"])


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "local_files_only"])
def test_without_network_nothing_is_asked_and_what_is_missing_is_named(
    hub: HubServer, client: Client, published: Published, tmp_path: Path, how: str
) -> None:
    there: dict[str, Any] = {"cache_dir": str(tmp_path / "own")}
    wanted = logits(AutoModelForCausalLM.from_pretrained("alice/math", adapter_kwargs=there, **there))
    assert not client.cache.exists() or not list(client.cache.rglob("*.safetensors")), "all is in cache_dir"
    if how == "HF_HUB_OFFLINE":
        client.go_offline()
    else:
        there["local_files_only"] = True
    before = len(hub.requests)
    model = AutoModelForCausalLM.from_pretrained("alice/math", adapter_kwargs=there, **there)
    assert torch.equal(logits(model), wanted)
    family = MESwitchModelForCausalLM.from_pretrained("alice/base", experts={"math": "alice/math"}, **there)
    family.set_expert("math")
    assert torch.equal(logits(family), wanted)
    with pytest.raises(DeltaFormatError, match=r"alice/code has no adapter_config\.json in the local cache \(offline"):
        family.load_adapter("alice/code", adapter_name="code", adapter_kwargs=there)
    assert family.experts == ["math"]
    assert len(hub.requests) == before


def test_a_pipeline_takes_ids_too(published: Published, expected: dict[str | None, torch.Tensor]) -> None:
    pipe = pipeline("text-generation", model="alice/math")
    assert torch.equal(logits(pipe.model), expected["math"])


def test_damage_on_the_hub_is_found_before_the_model_changes(hub: HubServer, published: Published) -> None:
    tensors = load_file(published.family.deltas["code"] / "adapter_model.safetensors")
    first = next(name for name in sorted(tensors) if name.endswith("step"))
    path = published.family.deltas["code"].parent / "damaged.safetensors"
    save_file({**tensors, first: torch.full_like(tensors[first], float("nan"))}, path)
    hub.repos["alice/code"].edit("main", {"adapter_model.safetensors": path.read_bytes()})
    model = MESwitchModelForCausalLM.from_pretrained("alice/base", experts={"math": "alice/math"})
    with pytest.raises(DeltaFormatError, match=first.replace(".", r"\.")):
        model.load_adapter("alice/code", adapter_name="code")
    assert model.experts == ["math"]
