"""Bad input: a typed error that says what to do, and a model that is afterwards what it was, bit by bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.fixtures_models import TinyFamily
from tests.model_state import ModelState, prompt
from transformers_meswitch import MESwitchConfig, MESwitchModelForCausalLM, compress
from transformers_meswitch.errors import (
    BaseMismatchError,
    DeltaFormatError,
    ExpertNameError,
    ExpertNotFoundError,
    FormatVersionError,
    MESwitchError,
)
from transformers_meswitch.peft_method import attachment, deltas, layer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
TROUBLESHOOTING = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
UP = "model.layers.0.mlp.up_proj"

Damage = Callable[[Path], None]


def in_config(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(delta: Path) -> None:
        config = json.loads((delta / CONFIG).read_text())
        change(config)
        (delta / CONFIG).write_text(json.dumps(config))

    return damage


def in_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(delta: Path) -> None:
        tensors = load_file(delta / WEIGHTS)
        change(tensors)
        save_file(tensors, delta / WEIGHTS)

    return damage


def put(leaf: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    key = f"{PREFIX}{leaf}"
    return in_tensors(lambda tensors: tensors.__setitem__(key, change(tensors[key])))


def at(index: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor([index]), value)


def truncate(delta: Path) -> None:
    data = (delta / WEIGHTS).read_bytes()
    (delta / WEIGHTS).write_bytes(data[: len(data) - 100])


def only_a_pickle(delta: Path) -> None:
    (delta / WEIGHTS).rename(delta / "adapter_model.bin")


def narrower_norm(delta: Path) -> None:
    in_config(lambda c: c["modules"]["model.norm"].update(shapes={"weight": [32]}))(delta)
    put("model.norm.meswitch_delta.values.weight", lambda t: t[:32].clone())(delta)


def other_fingerprint(delta: Path) -> None:
    in_config(
        lambda c: c["base_fingerprint"].update(
            digest="0" * 64, tensors={**c["base_fingerprint"]["tensors"], f"{UP}.weight": "f" * 16}
        )
    )(delta)


DAMAGE: dict[str, tuple[Damage, type[MESwitchError], str]] = {
    "another base": (other_fingerprint, BaseMismatchError, rf"{UP}\.weight[\s\S]*f{{16}}"),
    "another architecture": (
        in_config(lambda c: c.update(base_model_type="mistral")),
        BaseMismatchError,
        r"'mistral'.*'llama'.*Load",
    ),
    "another size": (narrower_norm, BaseMismatchError, r"model\.norm.*32.*64"),
    "a module too many": (
        in_config(lambda c: c["modules"].update({"model.layers.9.mlp.up_proj": c["modules"][UP]})),
        MESwitchError,
        r"layers\.9\.mlp\.up_proj.*(missing|does not have)",
    ),
    "no weights": (lambda delta: (delta / WEIGHTS).unlink(), DeltaFormatError, r"adapter_model\.safetensors"),
    "only a pickle": (only_a_pickle, DeltaFormatError, r"adapter_model"),
    "truncated weights": (truncate, DeltaFormatError, r"adapter_model\.safetensors"),
    "a missing tensor": (
        in_tensors(lambda t: t.pop(f"{PREFIX}{UP}.meswitch_delta.step")),
        DeltaFormatError,
        rf"{UP}\.meswitch_delta\.step is missing, expected F32 \[128\]",
    ),
    "a wrong shape": (
        put(f"{UP}.meswitch_delta.step", lambda t: t[:-1].clone()),
        DeltaFormatError,
        rf"{UP}\.meswitch_delta\.step has shape \[127\], expected \[128\]",
    ),
    "a wrong dtype": (
        put(f"{UP}.meswitch_delta.step", lambda t: t.half()),
        DeltaFormatError,
        rf"{UP}\.meswitch_delta\.step has dtype F16, expected F32",
    ),
    "a salient index out of range": (
        put(f"{UP}.meswitch_delta.salient_index", at(3, 64)),
        DeltaFormatError,
        rf"{UP}\.meswitch_delta\.salient_index holds 64, expected indices from 0 to 63",
    ),
    "a row index out of range": (
        put("model.embed_tokens.meswitch_delta.row_index", at(2, 9999)),
        DeltaFormatError,
        r"embed_tokens\.meswitch_delta\.row_index holds 9999, expected indices from 0 to 127",
    ),
    "unsupported bits": (
        in_config(lambda c: c["modules"][UP].update(bits=5)),
        DeltaFormatError,
        rf"{UP}.*bits=5; supported are \(1, 2, 3, 4\)",
    ),
    "an infinite step size": (
        put(f"{UP}.meswitch_delta.step", at(7, float("inf"))),
        DeltaFormatError,
        rf"{UP}\.meswitch_delta\.step is inf at \[7\]",
    ),
    "a step size that is no number": (
        put(f"{UP}.meswitch_delta.step", at(0, float("nan"))),
        DeltaFormatError,
        rf"{UP}\.meswitch_delta\.step is nan at \[0\]",
    ),
    "an end token that is no list": (
        in_config(lambda c: c.update(eos_token_id=2)),
        DeltaFormatError,
        r"eos_token_id is 2, expected list",
    ),
    "a vocabulary as text": (
        in_config(lambda c: c.update(vocab_size="128")),
        DeltaFormatError,
        r"vocab_size is '128', expected int",
    ),
    "a vocabulary of another size than the embedding": (
        in_config(lambda c: c.update(vocab_size=50)),
        DeltaFormatError,
        r"vocab_size is 50, but the expert's model\.embed_tokens has 128 rows",
    ),
    "an end token beyond the vocabulary": (
        in_config(lambda c: c.update(eos_token_id=[2, 500])),
        DeltaFormatError,
        r"eos_token_id holds 500, expected ids from 0 to 127",
    ),
    "a padding token beyond the vocabulary": (
        in_config(lambda c: c.update(pad_token_id=128)),
        DeltaFormatError,
        r"pad_token_id holds 128, expected ids from 0 to 127",
    ),
    "a fingerprint of an unknown kind": (
        in_config(lambda c: c["base_fingerprint"].update(algorithm="x")),
        DeltaFormatError,
        r"base_fingerprint is of algorithm 'x'",
    ),
    "a later format version": (
        in_config(lambda c: c.update(format_version=3)),
        FormatVersionError,
        r"format version 3; this release .* Upgrade transformers-meswitch to a release that reads version 3",
    ),
}

#: What stock calls say of a damaged ``adapter_config.json``, which they read before this package can; documented.
STOCK = {
    "cut off": (json.JSONDecodeError, "json.decoder.JSONDecodeError: ..."),
    "empty": (json.JSONDecodeError, "json.decoder.JSONDecodeError: ..."),
    "a list": (TypeError, "TypeError: list indices must be integers or slices, not str"),
    "missing": (ValueError, "ValueError: Can't find 'adapter_config.json' at ..."),
    "base gone": (OSError, "OSError: Repo id must be in the form ..."),
}
STOCK_OF_ROUTE: dict[tuple[str, str], tuple[type[Exception], str]] = {
    ("missing", "AutoModelForCausalLM"): (
        ValueError,
        "ValueError: Unrecognized model in ... Should have a model_type key in its config.json",
    ),
    ("missing", "first load_adapter"): (ValueError, "ValueError: adapter model file not found in ..."),
    ("a list", "first load_adapter"): (TypeError, "TypeError: 'list' object is not a mapping"),
}
#: What this package says where it reads the file itself.
OURS = {
    "cut off": r"adapter_config\.json is not valid JSON",
    "empty": r"adapter_config\.json is not valid JSON",
    "a list": r"adapter_config\.json holds a JSON list",
    "missing": r"has no adapter_config\.json.*or saving it was interrupted",
    "base null": r"base_model_name_or_path is None, expected the id or path of the base",
}


def damage_config(delta: Path, what: str) -> None:
    path = delta / CONFIG
    if what == "missing":
        path.unlink()
    elif what.startswith("base"):
        in_config(lambda c: c.update(base_model_name_or_path=str(delta / "b") if what == "base gone" else None))(delta)
    else:
        path.write_text({"cut off": path.read_text()[:200], "empty": "", "a list": "[]"}[what])


#: Names that a module or PEFT's prefix has, and names that mean something else.
NAMES = {
    "mlp": r"module path",
    "layers": r"module path",
    "model": r"module path",
    "0": r"module path",
    "lm_head": r"module path",
    "meswitch": r"PEFT prefix",
    "meswitch_delta": r"PEFT prefix",
    "auto": r"reserved",
    "base": r"reserved",
    "__base__": r"reserved",
    "team/math": r"reserved",
    "math@2": r"reserved",
    "a:b": r"reserved",
    " math": r"printable",
    "ma\nth": r"printable",
    ".math": r"printable",
}


@pytest.fixture(scope="module")
def plain(tiny_family: TinyFamily) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_family.base)


@pytest.fixture(scope="module")
def with_expert(tiny_family: TinyFamily) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_family.deltas["code"], adapter_name="code")


@pytest.fixture(scope="module")
def with_peft(tiny_family: TinyFamily) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    return PeftModel.from_pretrained(base, tiny_family.deltas["code"], adapter_name="code")


@pytest.fixture
def routes(plain: Any, with_expert: Any, with_peft: PeftModel) -> dict[str, tuple[Any, Callable[[Path, str], Any]]]:
    """Every way to load a delta, with the model that must survive it."""
    return {
        "AutoModelForCausalLM": (plain, lambda d, n: AutoModelForCausalLM.from_pretrained(d, adapter_name=n)),
        "first load_adapter": (plain, lambda d, n: plain.load_adapter(str(d), adapter_name=n)),
        "further load_adapter": (with_expert, lambda d, n: with_expert.load_adapter(str(d), adapter_name=n)),
        "PeftModel.from_pretrained": (plain, lambda d, n: PeftModel.from_pretrained(plain, d, adapter_name=n)),
        "PeftModel.load_adapter": (
            with_peft.get_base_model(),
            lambda d, n: with_peft.load_adapter(d, adapter_name=n),
        ),
    }


ROUTES = (
    "AutoModelForCausalLM",
    "first load_adapter",
    "further load_adapter",
    "PeftModel.from_pretrained",
    "PeftModel.load_adapter",
)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_delta_is_refused_and_changes_nothing(
    what: str, route: str, routes: Any, tiny_family: TinyFamily, tmp_path: Path
) -> None:
    damage, error, message = DAMAGE[what]
    delta = Path(shutil.copytree(tiny_family.deltas["math"], tmp_path / "delta"))
    damage(delta)
    model, load = routes[route]
    before = ModelState(model)
    with pytest.raises(error, match=message):
        load(delta, "new")
    before.assert_unchanged(model)


@pytest.mark.parametrize(
    ("what", "route"),
    [
        *((what, route) for what in ("cut off", "empty", "a list", "missing") for route in ROUTES),
        # A base at hand is the right one, wherever it was; and transformers asks the network for one without a name.
        ("base gone", "AutoModelForCausalLM"),
        *(("base null", route) for route in ROUTES if route != "AutoModelForCausalLM"),
    ],
)
def test_a_damaged_configuration_is_refused_and_every_stock_message_is_documented(
    what: str, route: str, routes: Any, tiny_family: TinyFamily, tmp_path: Path
) -> None:
    delta = Path(shutil.copytree(tiny_family.deltas["math"], tmp_path / "delta"))
    damage_config(delta, what)
    model, load = routes[route]
    before = ModelState(model)
    with pytest.raises((ValueError, TypeError, OSError)) as raised:
        load(delta, "new")
    before.assert_unchanged(model)
    if route == "further load_adapter" or what == "base null":
        assert isinstance(raised.value, DeltaFormatError)
        assert re.search(OURS[what], str(raised.value))
        return
    error, message = STOCK_OF_ROUTE.get((what, route), STOCK[what])
    assert isinstance(raised.value, error)
    said = f"{error.__module__}." * (error is json.JSONDecodeError) + f"{error.__name__}: {raised.value}"
    assert re.match(".*".join(map(re.escape, message.split("..."))), said.replace("`", ""), re.DOTALL)
    assert f"| `{message}` |" in TROUBLESHOOTING


@pytest.mark.parametrize("what", OURS)
def test_a_family_names_what_is_wrong_with_a_configuration(what: str, tiny_family: TinyFamily, tmp_path: Path) -> None:
    delta = Path(shutil.copytree(tiny_family.deltas["math"], tmp_path / "delta"))
    damage_config(delta, what)
    with pytest.raises(DeltaFormatError, match=OURS[what]):
        MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts={"math": delta})


def test_pefts_own_save_can_leave_a_half_and_the_models_cannot(
    tiny_family: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exception that ``docs/delta_format.md`` states; should PEFT ever write in another order, drop it there."""
    old, new = (load_file(tiny_family.deltas[name] / WEIGHTS) for name in ("math", "code"))
    step = f"{PREFIX}{UP}.meswitch_delta.step"
    peft_model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_family.base), tiny_family.deltas["code"]
    )
    results = {}
    for name, save in (("peft", peft_model.save_pretrained), ("ours", peft_model.get_base_model().save_pretrained)):
        folder = Path(shutil.copytree(tiny_family.deltas["math"], tmp_path / name))
        with monkeypatch.context() as patch:
            patch.setattr(type(peft_model.peft_config["default"]), "save_pretrained", interrupt)
            patch.setattr(os, "replace", interrupt)
            with pytest.raises(KeyboardInterrupt):
                save(folder)
        results[name] = (folder / CONFIG).exists(), load_file(folder / WEIGHTS)[step]
    assert results["peft"][0]
    assert torch.equal(results["peft"][1], new[step])
    assert not results["ours"][0]
    assert torch.equal(results["ours"][1], old[step])


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("route", ROUTES)
def test_bad_names_are_refused_and_change_nothing(route: str, routes: Any, tiny_family: TinyFamily) -> None:
    model, load = routes[route]
    before = ModelState(model)
    for name, rule in NAMES.items():
        with pytest.raises(ExpertNameError, match=rule):
            load(tiny_family.deltas["math"], name)
    before.assert_unchanged(model)


@pytest.mark.parametrize("route", ["further load_adapter", "PeftModel.load_adapter"])
def test_a_name_in_use_is_refused_and_changes_nothing(route: str, routes: Any, tiny_family: TinyFamily) -> None:
    model, load = routes[route]
    before = ModelState(model)
    for delta in tiny_family.deltas.values():
        with pytest.raises(ExpertNameError, match="'code' is already loaded"):
            load(delta, "code")
    before.assert_unchanged(model)


def test_wrapping_a_model_with_experts_under_a_name_in_use(with_expert: Any, tiny_family: TinyFamily) -> None:
    before = ModelState(with_expert)
    with pytest.raises(ExpertNameError, match="'code' is already loaded"):
        PeftModel.from_pretrained(with_expert, tiny_family.deltas["math"], adapter_name="code")
    before.assert_unchanged(with_expert)


@pytest.mark.parametrize("route", [route for route in ROUTES if route != "AutoModelForCausalLM"])
@pytest.mark.parametrize("moment", [0, 5, 13])
def test_running_out_of_memory_on_the_way_changes_nothing(
    moment: int, route: str, routes: Any, tiny_family: TinyFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, load = routes[route]
    before = ModelState(model)
    made = [0]

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            made[0] += 1
            if made[0] > moment:
                raise MemoryError
            return original(*args, **kwargs)

        return call

    for owner, name in ((layer, "make_delta"), (deltas.StoredDelta, "assign")):
        made[0] = 0
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing(getattr(owner, name)))
            with pytest.raises(MemoryError):
                load(tiny_family.deltas["math"], "new")
        before.assert_unchanged(model)


@pytest.mark.parametrize("route", [route for route in ROUTES if route != "AutoModelForCausalLM"])
def test_failing_while_the_switch_is_made_changes_nothing(
    route: str, routes: Any, tiny_family: TinyFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, load = routes[route]
    before = ModelState(model)
    with monkeypatch.context() as patch:
        patch.setattr(attachment, "expert_info", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            load(tiny_family.deltas["math"], "new")
    before.assert_unchanged(model)


def test_after_a_refusal_the_same_model_takes_a_sound_delta(tiny_family: TinyFamily, tmp_path: Path) -> None:
    delta = Path(shutil.copytree(tiny_family.deltas["math"], tmp_path / "delta"))
    (delta / WEIGHTS).unlink()
    model = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    with pytest.raises(DeltaFormatError):
        model.load_adapter(str(delta), adapter_name="math")
    model.load_adapter(str(tiny_family.deltas["math"]), adapter_name="math")
    whole = AutoModelForCausalLM.from_pretrained(tiny_family.deltas["math"])
    assert torch.equal(model(prompt()).logits, whole(prompt()).logits)


def test_a_family_with_one_bad_expert_does_not_load(tiny_family: TinyFamily, tmp_path: Path) -> None:
    delta = Path(shutil.copytree(tiny_family.deltas["math"], tmp_path / "delta"))
    truncate(delta)
    experts = {"code": tiny_family.deltas["code"], "math": delta}
    with pytest.raises(DeltaFormatError, match="adapter_model"):
        MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=experts)
    with pytest.raises(ExpertNameError, match="reserved"):
        MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts={"auto": delta})
    with pytest.raises(ExpertNotFoundError, match=r"'chess'.*'code'"):
        MESwitchModelForCausalLM.from_pretrained(
            tiny_family.base, experts={"code": tiny_family.deltas["code"]}
        ).set_expert("chess")


STOCK_LOADS = [
    "AutoModelForCausalLM.from_pretrained(delta)",
    "AutoModelForCausalLM.from_pretrained(base).load_adapter(delta)",
    "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), delta)",
    "AutoPeftModelForCausalLM.from_pretrained(delta)",
]


@pytest.fixture(scope="module")
def stock_answers(tiny_family: TinyFamily) -> dict[str, str]:
    """What each load ends with where nobody has imported this package; in one process, since imports take long."""
    code = """
import json, sys
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
base, delta, *loads = sys.argv[1:]
answers = {}
for load in loads:
    try:
        answers[load] = f"loaded {eval(load)}"
    except Exception as error:
        answers[load] = repr(error)
assert "transformers_meswitch" not in sys.modules
print(json.dumps(answers))
"""
    paths = [str(tiny_family.base), str(tiny_family.deltas["math"])]
    command = [sys.executable, "-c", code, *paths, *STOCK_LOADS]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("load", STOCK_LOADS)
def test_without_the_import_stock_libraries_fail_closed(load: str, stock_answers: dict[str, str]) -> None:
    assert stock_answers[load] == "KeyError('MESWITCH')"


@pytest.mark.parametrize("kind", ["rows", "quantized_rows"])
def test_a_delta_that_leaves_out_an_added_row_is_refused(tiny_family: TinyFamily, kind: str, tmp_path: Path) -> None:
    how = MESwitchConfig(embedding_bits=3 if kind == "quantized_rows" else None)
    delta = compress(tiny_family.base, tiny_family.experts["code"], tmp_path, how, calibration=None, progress=False)
    config = json.loads((delta / "adapter_config.json").read_text())
    tensors = load_file(delta / "adapter_model.safetensors")
    (name,) = (module for module, record in config["modules"].items() if record["kind"] == kind)
    for leaf in ("row_index" if kind == "rows" else "exact_index", "rows"):
        key = f"base_model.model.{name}.meswitch_delta.{leaf}"
        tensors[key] = torch.cat([tensors[key][:-2], tensors[key][-1:]])
    config["modules"][name]["rows" if kind == "rows" else "exact_rows"] -= 1
    save_file(tensors, delta / "adapter_model.safetensors")
    (delta / "adapter_config.json").write_text(json.dumps(config))
    refused_unchanged(tiny_family, delta, r"does not store all rows from 128 on")


def test_a_coded_row_that_the_base_lacks_is_refused(tiny_family: TinyFamily, tmp_path: Path) -> None:
    delta = Path(shutil.copytree(tiny_family.deltas["code"], tmp_path / "delta"))
    tensors = load_file(delta / "adapter_model.safetensors")
    prefix = "base_model.model.model.embed_tokens.meswitch_delta."
    # Rows 128 to 131 are added: swap the first of them with the last coded one.
    coded, exact = tensors[f"{prefix}row_index"], tensors[f"{prefix}exact_index"]
    coded[-1], exact[0] = exact[0].item(), coded[-1].item()
    save_file(tensors, delta / "adapter_model.safetensors")
    refused_unchanged(tiny_family, delta, r"does not store all rows from 128 on as the expert's own")


def test_more_rows_than_memory_are_refused_not_made(tiny_family: TinyFamily, tmp_path: Path) -> None:
    for name in ("math", "code"):
        delta = Path(shutil.copytree(tiny_family.deltas[name], tmp_path / name))
        config = json.loads((delta / "adapter_config.json").read_text())
        config["modules"]["model.embed_tokens"]["num_rows"] = config["vocab_size"] = 2**60
        (delta / "adapter_config.json").write_text(json.dumps(config))
        refused_unchanged(tiny_family, delta, r"has 1152921504606846976 rows in the expert and 128 in the base")


def refused_unchanged(family: TinyFamily, delta: Path, message: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(family.base)
    before = ModelState(model)
    for load in (lambda: model.load_adapter(str(delta)), lambda: PeftModel.from_pretrained(model, delta)):
        with pytest.raises(DeltaFormatError, match=message):
            load()
        before.assert_unchanged(model)


@pytest.mark.parametrize("name", ["it", "a", "delta"])
def test_names_within_the_prefix_are_no_collision(tiny_family: TinyFamily, name: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    model.load_adapter(str(tiny_family.deltas["math"]), adapter_name=name)
    model.load_adapter(str(tiny_family.deltas["code"]), adapter_name="code")
    model.set_adapter(name)
    model.save_pretrained(tmp_path)
    written, stored = (load_file(d / "adapter_model.safetensors") for d in (tmp_path, tiny_family.deltas["math"]))
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[key], stored[key]) for key in stored)
