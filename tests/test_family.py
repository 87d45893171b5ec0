"""``MESwitchModelForCausalLM`` and family repos."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

from tests.fixtures_models import TinyFamily, build_tiny_family, dense_model
from tests.model_state import ATOL, prompt
from transformers_meswitch import MESwitchFamilyConfig, MESwitchModel, MESwitchModelForCausalLM
from transformers_meswitch.errors import (
    DeltaFormatError,
    ExpertNameError,
    ExpertNotFoundError,
    RouterError,
    UnsupportedModelError,
    UnsupportedOperationError,
)
from transformers_meswitch.peft_method.injection import wrapped_layers
from transformers_meswitch.peft_method.layer import MESwitchLayer

ODD_NAMES = ("qwen2.5-math", "日本語", "a b")


@pytest.fixture(scope="module")
def expected(tiny_family: TinyFamily) -> dict[str | None, torch.Tensor]:
    """Logits of stock models of the base and of each delta."""
    models = {name: dense_model(tiny_family.base, path) for name, path in tiny_family.deltas.items()}
    models[None] = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    with torch.no_grad():
        return {name: model(prompt()).logits for name, model in models.items()}


@pytest.fixture
def family(tiny_family: TinyFamily) -> Any:
    return MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=dict(tiny_family.deltas))


@torch.no_grad()
def answers(model: Any, expected: torch.Tensor) -> bool:
    """Whether the model's logits are the expected ones, on the ids that these cover."""
    logits = model(prompt()).logits
    return bool((logits[..., : expected.shape[-1]] - expected).abs().max() < ATOL)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_from_a_base_and_experts(family: Any, expected: dict[str | None, torch.Tensor]) -> None:
    assert isinstance(family, LlamaForCausalLM)
    assert type(family).__name__ == "LlamaForCausalLM"
    assert family.experts == ["math", "code"]
    assert family.active_adapters() == []
    assert family.active_expert is None
    for name in (None, "math", "code"):
        family.set_expert(name)
        assert family.active_expert == name
        assert answers(family, expected[name])
        assert not any(answers(family, logits) for other, logits in expected.items() if other != name)


def test_saved_and_loaded_by_every_class(
    family: Any, expected: dict[str | None, torch.Tensor], tmp_path: Path
) -> None:
    family.set_expert("code")
    family.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MESwitchFamilyConfig)
    assert sorted(config.experts) == ["code", "math"]
    assert config.default_expert == "code"
    for loader in (AutoModelForCausalLM, MESwitchModelForCausalLM):
        model = loader.from_pretrained(tmp_path)
        assert isinstance(model, LlamaForCausalLM)
        assert sorted(model.experts) == ["code", "math"]
        assert model.active_expert == "code"
        assert answers(model, expected["code"])
    for hidden in (AutoModel.from_pretrained(tmp_path), MESwitchModel.from_pretrained(tmp_path)):
        assert isinstance(hidden, LlamaModel)
        assert hidden.active_expert == "code"
        with torch.no_grad():
            states = hidden(prompt()).last_hidden_state
            assert torch.equal(states, model.model(prompt()).last_hidden_state)


def test_saving_again_is_stable_and_folders_can_move(
    family: Any, expected: dict[str | None, torch.Tensor], tmp_path: Path
) -> None:
    family.save_pretrained(tmp_path / "first")
    family.save_pretrained(tmp_path / "first")
    once = files(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    again = files(tmp_path / "second")
    assert again.keys() == once.keys()
    assert [name for name in once if once[name] != again[name]] == []
    shutil.move(tmp_path / "first", tmp_path / "elsewhere" / "moved")
    shutil.rmtree(tmp_path / "second")
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere" / "moved")
    moved.set_expert("math")
    assert answers(moved, expected["math"])
    moved.save_pretrained(tmp_path / "elsewhere" / "moved")  # into the folder it was loaded from
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere" / "moved")
    assert answers(again, expected["math"])


def test_base_inside_the_family(
    tiny_family: TinyFamily, expected: dict[str | None, torch.Tensor], tmp_path: Path
) -> None:
    """The layout of a family in one folder, with paths relative to it."""
    shutil.copytree(tiny_family.base, tmp_path / "base")
    for name, path in tiny_family.deltas.items():
        shutil.copytree(path, tmp_path / "experts" / name)
    references = {name: f"./experts/{name}" for name in tiny_family.deltas}
    MESwitchFamilyConfig("./base", experts=references, default_expert="math").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert answers(model, expected["math"])
    model.set_expert("code")
    assert answers(model, expected["code"])
    assert len(model.tokenizer_for(None)) == 128
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["base_model_name_or_path"] == "./base"
    model.save_pretrained(tmp_path / "copy")
    with pytest.raises(UnsupportedOperationError, match="local folder"):
        model.push_to_hub("me/family")
    assert answers(AutoModelForCausalLM.from_pretrained(tmp_path / "copy"), expected["code"])


def test_a_callers_relative_path(
    tiny_family: TinyFamily, expected: dict[str | None, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path is relative to where the program runs, and must mean the same after it is saved."""
    monkeypatch.chdir(tiny_family.base.parent)
    experts = {"math": f"./{tiny_family.deltas['math'].name}"}
    for base in (f"./{tiny_family.base.name}", tiny_family.base.name):
        model = MESwitchModelForCausalLM.from_pretrained(base, experts=experts)
        model.save_pretrained(tmp_path / "family")
        monkeypatch.chdir(tmp_path)
        again = AutoModelForCausalLM.from_pretrained("family")
        again.set_expert("math")
        assert answers(again, expected["math"])
        monkeypatch.chdir(tiny_family.base.parent)


@pytest.fixture
def cached(tmp_path: Path) -> Callable[[str, Path], tuple[str, dict[str, Any]]]:
    """Puts a folder into a Hub cache; gives the commit, and the arguments that find it there without a network."""

    def cache(repo: str, folder: Path) -> tuple[str, dict[str, Any]]:
        commit = hashlib.sha1(repo.encode()).hexdigest()
        entry = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        shutil.copytree(folder, entry / "snapshots" / commit)
        (entry / "refs").mkdir()
        (entry / "refs" / "main").write_text(commit)
        return commit, {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}

    return cache


def test_a_callers_relative_path_over_a_base_of_the_hub(
    tiny_family: TinyFamily,
    expected: dict[str | None, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cached: Callable[[str, Path], tuple[str, dict[str, Any]]],
) -> None:
    commit, where = cached("me/base", tiny_family.base)
    monkeypatch.chdir(tiny_family.base.parent)
    experts = {"math": f"./{tiny_family.deltas['math'].name}"}
    model = MESwitchModelForCausalLM.from_pretrained("me/base", experts=experts, **where)
    model.set_expert("math")
    assert answers(model, expected["math"])
    assert len(model.tokenizer_for(None)) == 128
    model.save_pretrained(tmp_path / "family")
    config = json.loads((tmp_path / "family" / "config.json").read_text())
    assert (config["base_model_name_or_path"], config["base_revision"]) == ("me/base", commit)
    assert answers(AutoModelForCausalLM.from_pretrained(tmp_path / "family", **where), expected["math"])


def test_a_base_or_family_in_a_subfolder(
    tiny_family: TinyFamily,
    expected: dict[str | None, torch.Tensor],
    tmp_path: Path,
    cached: Callable[[str, Path], tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # transformers asks the Hub whether the repo is an adapter, whatever local_files_only says.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo = tmp_path / "repo"
    shutil.copytree(tiny_family.base, repo / "inner" / "base")
    shutil.copytree(tiny_family.deltas["math"], repo / "inner" / "experts" / "math")
    inner = MESwitchFamilyConfig("./base", experts={"math": "./experts/math"}, default_expert="math")
    inner.save_pretrained(repo / "inner")
    _, where = cached("me/repo", repo)
    experts = {"math": tiny_family.deltas["math"]}
    for number, (source, arguments) in enumerate([(str(repo), {}), ("me/repo", where)]):
        base = MESwitchModelForCausalLM.from_pretrained(source, subfolder="inner/base", experts=experts, **arguments)
        base.set_expert("math")
        assert answers(base, expected["math"])
        assert len(base.tokenizer_for(None)) == 128
        saved = tmp_path / f"saved-{number}"
        base.save_pretrained(saved)
        assert answers(AutoModelForCausalLM.from_pretrained(saved, **arguments), expected["math"])
        for loader in (MESwitchModelForCausalLM, AutoModelForCausalLM):
            family = loader.from_pretrained(source, subfolder="inner", **arguments)
            assert family.experts == ["math"]
            assert answers(family, expected["math"])
            assert len(family.tokenizer_for("math")) == len(family.tokenizer_for(None)) == 128
    MESwitchModelForCausalLM.from_pretrained(repo, subfolder="inner").save_pretrained(tmp_path / "copy")
    assert answers(AutoModelForCausalLM.from_pretrained(tmp_path / "copy"), expected["math"])


@pytest.mark.parametrize("loader", [MESwitchModelForCausalLM, AutoModelForCausalLM])
def test_experts_replace_those_of_a_family(
    loader: Any, family: Any, tiny_family: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family.set_expert("math")
    family.save_pretrained(tmp_path)
    monkeypatch.chdir(tiny_family.base.parent)
    delta = tiny_family.deltas["math"]
    for reference in (str(delta), delta, f"./{delta.name}", {"repo": delta}):
        model = loader.from_pretrained(tmp_path, experts={"only": reference})
        assert model.experts == ["only"]
        assert model.active_expert is None
    assert loader.from_pretrained(tmp_path, experts={}).experts == []
    config = AutoConfig.from_pretrained(tmp_path, experts={"only": delta})
    assert config.experts == {"only": {"repo": str(delta), "revision": None}}
    assert config.default_expert is None


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        (
            {"experts": {"math": {"revision": None}}},
            r"experts\['math'\] is \{'revision': None\}, expected a delta repo",
        ),
        ({"experts": {"math": {"repo": "a", "branch": "b"}}}, "expected a delta repo"),
        ({"experts": {"math": {"repo": "a", "revision": 3}}}, r"'revision'\] is 3, expected a text"),
        ({"experts": {"math": 3}}, r"experts\['math'\] is 3"),
        ({"experts": ["math"]}, r"experts is \['math'\], expected a mapping"),
        ({"experts": {"math": "./../math"}}, "must stay inside the family repo"),
        ({"experts": {"math": "./experts/../../math"}}, "must stay inside the family repo"),
        ({"default_expert": ["math"]}, "default_expert is"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3, expected a text"),
        ({"base_model_name_or_path": "./../base"}, "must stay inside the family repo"),
        ({"base_revision": 3}, "base_revision is 3"),
    ],
    ids=str,
)
def test_a_config_edited_by_hand(tmp_path: Path, entry: dict[str, Any], complaint: str) -> None:
    config = {"model_type": "meswitch", "base_model_name_or_path": "me/base", "experts": {}} | entry
    (tmp_path / "config.json").write_text(json.dumps(config))
    for loader in (MESwitchModelForCausalLM, AutoModelForCausalLM):
        with pytest.raises(DeltaFormatError, match=complaint):
            loader.from_pretrained(tmp_path)


def test_a_missing_default_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    MESwitchFamilyConfig("no/base", experts={"math": "no/delta"}, default_expert="poet").save_pretrained(tmp_path)
    with pytest.raises(ExpertNotFoundError, match="'poet'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_name_that_is_used_again_gets_its_own_tokenizer(tiny_family: TinyFamily, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    before = set(model.__dict__)
    folder = tmp_path / "delta"
    for name, size in (("math", 128), ("code", 132)):
        shutil.copytree(tiny_family.deltas[name], folder)
        model.load_adapter(str(folder), adapter_name="x")
        tokenizer = model.tokenizer_for("x")
        assert len(tokenizer) == size
        assert model.tokenizer_for("x") is tokenizer
        assert model.tokenizer_for("x", padding_side="left") is not tokenizer
        model.delete_adapter("x")
        shutil.rmtree(folder)
        assert set(model.__dict__) == before


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names(tiny_family: TinyFamily, expected: dict[str | None, torch.Tensor], tmp_path: Path, name: str) -> None:
    experts = {name: tiny_family.deltas["math"], f"{name}.2": tiny_family.deltas["code"]}
    family = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=experts)
    family.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.experts == [name, f"{name}.2"]
    assert len(model.tokenizer_for(f"{name}.2")) == 132
    for expert, of in ((name, "math"), (f"{name}.2", "code")):
        model.set_expert(expert)
        assert model.active_adapters() == [expert]
        assert answers(model, expected[of])
        alone = model.generate(prompt(), expert=expert, do_sample=False, max_new_tokens=4)
        mixed = model.generate(prompt().repeat(2, 1), expert=[None, expert], do_sample=False, max_new_tokens=4)
        assert torch.equal(mixed[1, : alone.shape[1]], alone[0])
    model.delete_adapter(name)
    model.save_pretrained(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").experts == [f"{name}.2"]


def test_set_expert_touches_no_layer(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switching is an assignment: no layer is visited, no tensor made or moved, however many layers there are."""
    before = {name: (tensor.data_ptr(), tensor._version) for name, tensor in family.state_dict().items()}
    modules = [id(module) for module in family.modules()]

    def visited(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("set_expert visited a layer")

    with monkeypatch.context() as patch, _NoTensorWork():
        patch.setattr(torch.nn.Module, "named_modules", visited)
        patch.setattr(MESwitchLayer, "set_adapter", visited)
        for name in ("math", "code", None, "code"):
            family.set_expert(name)
    assert [id(module) for module in family.modules()] == modules
    assert {n: (t.data_ptr(), t._version) for n, t in family.state_dict().items()} == before
    assert all(layer.active_adapter == ["code"] for layer in wrapped_layers(family).values())


class _NoTensorWork(TorchDispatchMode):
    """Fails on any tensor operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called")


def test_arguments_reach_the_base(tiny_family: TinyFamily, tmp_path: Path) -> None:
    model = MESwitchModelForCausalLM.from_pretrained(
        tiny_family.base,
        experts=dict(tiny_family.deltas),
        dtype=torch.bfloat16,
        device_map="cpu",
        attn_implementation="eager",
    )
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16, attn_implementation="eager")
    assert again.dtype == torch.float16
    assert again.config._attn_implementation == "eager"
    steps = [p.dtype for name, p in again.named_parameters() if name.endswith(".step")]
    assert set(steps) == {torch.float32}


def test_quantised_base(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    # bitsandbytes quantises 64 weights at a time, along rows of that many.
    tiny_family = build_tiny_family(tmp_path / "tiny", intermediate_size=128)
    how = BitsAndBytesConfig(load_in_4bit=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_family.base, quantization_config=how)
    family = MESwitchModelForCausalLM.from_pretrained(
        tiny_family.base, experts=dict(tiny_family.deltas), quantization_config=how
    )
    with torch.no_grad():
        assert torch.equal(family(prompt()).logits[..., :128], base(prompt()).logits)
        layer = "model.layers.0.mlp.up_proj"
        x = torch.randn(2, 64, dtype=base.dtype)
        family.set_expert("code")
        found = family.get_submodule(layer)(x).float() - base.get_submodule(layer)(x).float()
    dense = dense_model(tiny_family.base, tiny_family.deltas["code"]).get_submodule(layer).weight
    own = AutoModelForCausalLM.from_pretrained(tiny_family.base).get_submodule(layer).weight
    torch.testing.assert_close(found, x.float() @ (dense - own).float().T, atol=0.05, rtol=0.05)
    family.save_pretrained(tmp_path / "family")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "family", quantization_config=how).active_expert == "code"


def test_refusals(tiny_family: TinyFamily, family: Any, tmp_path: Path) -> None:
    load = MESwitchModelForCausalLM.from_pretrained
    with pytest.raises(RouterError, match=r"router_config\.json"):
        load(tiny_family.base, experts={}, router=tiny_family.base)
    with pytest.raises(UnsupportedModelError, match="is itself a delta repo"):
        load(tiny_family.deltas["math"], experts={"code": tiny_family.deltas["code"]})
    with pytest.raises(ExpertNameError, match="reserved"):
        load(tiny_family.base, experts={"auto": tiny_family.deltas["math"]})
    with pytest.raises(DeltaFormatError, match="nowhere"):
        load(tiny_family.base, experts={"math": tmp_path / "nowhere"})
    with pytest.raises(UnsupportedOperationError, match="loader, not a module"):
        MESwitchModelForCausalLM(MESwitchFamilyConfig())
    with pytest.raises(ExpertNotFoundError, match=r"'poet'.*'math', 'code'"):
        family.set_expert("poet")


def test_a_family_that_names_a_missing_default(family: Any, tmp_path: Path) -> None:
    family.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "default_expert": "poet"}))
    with pytest.raises(ExpertNotFoundError, match="'poet'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(UnsupportedModelError, match="names no base"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "router": {"kind": "head"}}))
    with pytest.raises(RouterError, match=r"no file router_config\.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "router": "head"}))
    with pytest.raises(DeltaFormatError, match="router is 'head', expected an object"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_family_carries_one_line_of_code_even_if_registered_for_an_auto_class(family: Any, tmp_path: Path) -> None:
    """transformers' own method would have the source of the class copied into the repo, and named in its config."""
    for registered, auto in (
        (MESwitchModelForCausalLM, "AutoModelForCausalLM"),
        (MESwitchFamilyConfig, "AutoConfig"),
    ):
        registered.register_for_auto_class(auto)
        assert getattr(registered, "_auto_class", None) is None
    family.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.rglob("*.py")] == ["modeling_meswitch.py"]
    assert len((tmp_path / "modeling_meswitch.py").read_text().splitlines()) == 1
