"""``HeadRouter`` on the demo family: fitting, adding, removing, and its files."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures_models import TinyFamily
from transformers_meswitch import HeadRouter, MESwitchModelForCausalLM
from transformers_meswitch.demo.tasks import expert_for, prompts
from transformers_meswitch.errors import ExpertNotFoundError, RouterError, UnsupportedModelError

HELD_OUT = list(islice(prompts(held_out=True, seed=7), 100))


def same(one: HeadRouter, other: HeadRouter) -> bool:
    names = ("width", "layer", "window", "shrinkage", "temperature", "threshold", "distance_limit", "default_expert")
    tensors = ("counts", "means", "scatters")
    return all(getattr(one, n) == getattr(other, n) for n in names) and one.labels == other.labels and all(
        torch.equal(getattr(one.statistics, n), getattr(other.statistics, n)) for n in tensors
    )  # fmt: skip


def accuracy(model: Any) -> float:
    return sum(a == expert_for(p) for a, p in zip(model.route(HELD_OUT).experts, HELD_OUT, strict=True)) / len(
        HELD_OUT
    )


def test_held_out_prompts_go_to_their_experts(family: Any) -> None:
    assert accuracy(family) >= 0.98
    output = family.route(HELD_OUT)
    assert output.probabilities.sum(dim=1).allclose(torch.ones(len(HELD_OUT)))
    assert family.router.layer in (1, 2)


def test_labels_that_say_nothing_give_a_router_that_abstains(family: Any) -> None:
    """The check above can fail: prompts dealt out at random cannot be told apart."""
    dealt = list(islice(prompts(held_out=False, seed=3), 300))
    family.set_router(
        HeadRouter.train(family, {name: dealt[i::3] for i, name in enumerate(family.experts)}, progress=False)
    )
    output = family.route(HELD_OUT)
    assert accuracy(family) < 0.6
    assert output.abstained.float().mean() > 0.5
    assert all(expert is None for expert, out in zip(output.experts, output.abstained.tolist(), strict=True) if out)


def test_training_is_deterministic(family: Any, router: HeadRouter, sorted_prompts: dict[str, list[str]]) -> None:
    family.set_expert("letter")  # has no influence
    assert same(HeadRouter.train(family, sorted_prompts, progress=False), router)
    assert not same(HeadRouter.train(family, sorted_prompts, window=64, progress=False), router)


def test_an_expert_is_added_without_the_others_prompts(
    family: Any, router: HeadRouter, sorted_prompts: dict[str, list[str]]
) -> None:
    without = router.without_expert("json")
    assert without.labels == ["letter", "redact"]
    again = without.with_expert(family, "json", sorted_prompts["json"])
    # Batches differ, and with them the order of sums in the base.
    torch.testing.assert_close(again.statistics.means, router.statistics.means, atol=1e-5, rtol=1e-4)
    family.set_router(again)
    assert accuracy(family) >= 0.98
    family.set_router(without)
    assert "json" not in family.route(HELD_OUT).experts
    assert family.route(HELD_OUT).labels == ["letter", "redact"]
    assert router.labels == ["json", "letter", "redact"]  # is as it was


def test_rows_given_as_they_are_are_read_no_further_than_the_window(family: Any, router: HeadRouter) -> None:
    long = list(range(40, 90)) * 600
    lengths: list[int] = []
    family.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    output = router.route_ids(family, [long], router.labels)
    assert lengths == [router.window]
    window = long[: router.window // 2] + long[-router.window // 2 :]
    assert torch.equal(output.probabilities, router.route_ids(family, [window], router.labels).probabilities)


def test_an_expert_that_is_not_loaded_is_never_picked(family: Any, router: HeadRouter) -> None:
    family.delete_adapter("json")
    output = family.route(HELD_OUT)
    family.set_router(router.without_expert("json"))
    assert output.labels == ["letter", "redact"]
    assert torch.equal(output.probabilities, family.route(HELD_OUT).probabilities)
    family.set_router(router)
    family.delete_adapter("letter")
    family.delete_adapter("redact")
    with pytest.raises(RouterError, match="none is loaded"):
        family.route("mira 2024-03-09 417")


def test_the_base_can_be_a_label(family: Any, sorted_prompts: dict[str, list[str]]) -> None:
    talk = [f"{a} {b} {c}" for a in ("where", "who", "why") for b in ("is", "was") for c in ("it", "mira", "the king")]
    family.set_router(HeadRouter.train(family, {**sorted_prompts, "base": talk}, progress=False))
    output = family.route(["why is the king", *HELD_OUT])
    assert output.experts[0] is None
    assert not output.abstained[0]
    assert accuracy(family) >= 0.98


def test_default_expert(family: Any, sorted_prompts: dict[str, list[str]]) -> None:
    family.set_router(HeadRouter.train(family, sorted_prompts, default_expert="letter", progress=False))
    assert family.route("").experts == ["letter"]
    assert family.router.without_expert("letter").default_expert is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": {"maths": ["a"] * 5}}, ExpertNotFoundError, r"'maths' is loaded. Loaded: 'json', 'letter'"),
        ({"prompts": {"json": ["a"] * 4 + ["  "]}}, RouterError, "'json' has 4 prompts that are not empty"),
        ({"prompts": {}}, RouterError, "no prompts"),
        ({"prompts": {"json": "one text"}}, RouterError, "expected a list of texts"),
        ({"default_expert": "x"}, ExpertNotFoundError, "'x'"),
        ({"threshold": 1.5}, RouterError, "threshold is 1.5, expected a number from 0 to 1"),
        ({"window": 1}, RouterError, "window is 1, expected an integer from 2"),
        ({"layers": [9]}, UnsupportedModelError, "layer 9 .* 4 layers"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    family: Any, sorted_prompts: dict[str, list[str]], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        HeadRouter.train(family, **{"prompts": sorted_prompts, "progress": False, **arguments})


def test_what_cannot_be_added_or_removed_is_refused(family: Any, router: HeadRouter) -> None:
    with pytest.raises(RouterError, match="at least 2"):
        router.with_expert(family, "json", ["one"])
    with pytest.raises(ExpertNotFoundError, match="'x'"):
        router.with_expert(family, "x", ["one", "two"])
    with pytest.raises(ExpertNotFoundError, match="does not know 'x'"):
        router.without_expert("x")
    with pytest.raises(RouterError, match="only expert"):
        router.without_expert("json").without_expert("letter").without_expert("redact")


# -- files -----------------------------------------------------------------------------------------------------------


def test_round_trip(router: HeadRouter, tmp_path: Path) -> None:
    router.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"router.safetensors", "router_config.json"}
    assert same(HeadRouter.from_pretrained(tmp_path), router)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size < 200_000  # 3 experts in 128 dimensions


@pytest.mark.parametrize("fails_at", [1, 2])
def test_an_interrupted_overwrite_leaves_no_mixture(
    router: HeadRouter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    router.save_pretrained(tmp_path)
    replace, calls = os.replace, 0

    def fail(*paths: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError("disk full")
        replace(*paths)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        router.without_expert("json").save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"router.safetensors"}
    monkeypatch.undo()
    router.save_pretrained(tmp_path)
    assert same(HeadRouter.from_pretrained(tmp_path), router)


def test_it_lives_in_the_family(saved: Path, router: HeadRouter, tmp_path: Path) -> None:
    model = MESwitchModelForCausalLM.from_pretrained(saved)
    assert json.loads((saved / "config.json").read_text())["router"] == {"router_type": "head"}
    assert same(model.router, router)
    assert accuracy(model) >= 0.98
    model.delete_adapter("json")
    model.save_pretrained(tmp_path / "fewer")
    assert HeadRouter.from_pretrained(tmp_path / "fewer").labels == ["letter", "redact"]
    model.set_router(None)
    model.save_pretrained(tmp_path / "fewer")
    assert not list((tmp_path / "fewer").glob("router*"))
    assert MESwitchModelForCausalLM.from_pretrained(tmp_path / "fewer").router is None


def test_a_router_of_another_base_of_the_same_shape_is_refused(
    family: Any, router: HeadRouter, tmp_path: Path
) -> None:
    fingerprint = family.peft_config["json"].base_fingerprint
    assert router.base_digest == fingerprint["digest"]
    other = dataclasses.replace(router, base_digest="0" * 64)
    other.save_pretrained(tmp_path)
    assert HeadRouter.from_pretrained(tmp_path).base_digest == "0" * 64
    with pytest.raises(RouterError, match="digest 0000000000000000"):
        family.set_router(other)
    family.set_router(dataclasses.replace(router, base_digest=None))


def test_it_can_come_from_elsewhere(saved: Path, tiny_family: TinyFamily, router: HeadRouter, tmp_path: Path) -> None:
    router.save_pretrained(tmp_path)
    base, experts = saved / "base", {"json": saved / "experts" / "json"}
    if not base.is_dir():
        base = Path(json.loads((saved / "config.json").read_text())["base_model_name_or_path"])
    for given in (router, tmp_path, str(tmp_path)):
        model = MESwitchModelForCausalLM.from_pretrained(base, experts=experts, router=given)
        assert same(model.router, router)
        assert model.route("mira 2024-03-09 4170").experts == ["json"]
    assert MESwitchModelForCausalLM.from_pretrained(saved, experts=experts).router is None
    with pytest.raises(RouterError, match="hidden size 128, but LlamaForCausalLM has 64"):
        MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts={}, router=router)
    with pytest.raises(RouterError, match=r"router is 3, expected a router"):
        MESwitchModelForCausalLM.from_pretrained(base, experts={}, router=3)
    with pytest.raises(RouterError, match=r"router_config\.json"):
        MESwitchModelForCausalLM.from_pretrained(base, experts={}, router=str(base))


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("format_version", 2, "format version 2 .* up to version 1"),
        ("format_version", None, "format_version is None"),
        ("router_type", "oracle", "router_type is 'oracle'"),
        ("labels", [], "labels is"),
        ("labels", ["json", "json", "letter"], "distinct"),
        ("labels", ["json", "letter"], r"tensor 'counts' is torch.int64 \(3,\), expected torch.int64 \(2,\)"),
        ("labels", ["json", "letter", "a/b"], "reserved"),
        ("labels", ["json", "letter", 3], "not an expert name"),
        ("layer", -1, "layer is -1"),
        ("layer", True, "layer is True"),
        ("window", 10**9, "window is 1000000000, expected an integer from 2 to 4096"),
        ("width", 64, "128 dimensions, more than the base's width, 64"),
        ("temperature", 0, "temperature is 0"),
        ("temperature", math.nan, "temperature is nan"),
        ("threshold", "high", "threshold is 'high'"),
        ("shrinkage", 2, "shrinkage is 2"),
        ("distance_limit", -1.0, "distance_limit"),
        ("distance_limit", math.inf, "distance_limit is inf"),
        ("default_expert", "auto", "reserved"),
        ("base_digest", 3, "base_digest is 3"),
    ],
)
def test_malformed_configs_are_refused(
    router: HeadRouter, tmp_path: Path, entry: str, value: Any, message: str
) -> None:
    router.save_pretrained(tmp_path)
    path = tmp_path / "router_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), entry: value}))
    with pytest.raises(RouterError, match=message):
        HeadRouter.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "damage",
    ["nan", "negative", "dtype", "shape", "no covariance", "overflow", "indefinite", "count", "missing", "cut"],
)
def test_damaged_tensors_are_refused(router: HeadRouter, tmp_path: Path, damage: str) -> None:
    router.save_pretrained(tmp_path)
    path = tmp_path / "router.safetensors"
    tensors = load_file(path)
    if damage == "nan":
        tensors["means"][0, 0] = math.nan
    if damage == "negative":
        tensors["counts"][0] = 0
    if damage == "dtype":
        tensors["means"] = tensors["means"].half()
    if damage == "shape":
        tensors["scatters"] = tensors["scatters"][:, :-1].contiguous()
    if damage == "no covariance":
        tensors["scatters"] = -tensors["scatters"]
    if damage == "overflow":
        tensors["scatters"][:] = 3e38
        tensors["scatters"][0, 0] = -3e38
    if damage == "indefinite":  # by too little for the eigenvalues' tolerance, and still without a Cholesky factor
        tensors["scatters"].zero_()
        tensors["scatters"][0, :2] = torch.tensor([1.0, 0.5])
    if damage == "count":
        tensors["counts"][0] = 2**62
    if damage == "missing":
        del tensors["scatters"]
    save_file(tensors, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RouterError, match=r"router\.safetensors|tensor '"):
        HeadRouter.from_pretrained(tmp_path)


def test_files_of_no_router(tmp_path: Path) -> None:
    with pytest.raises(RouterError, match=r"no file router_config\.json"):
        HeadRouter.from_pretrained(tmp_path)
    (tmp_path / "router_config.json").write_text("{")
    with pytest.raises(RouterError, match="not valid JSON"):
        HeadRouter.from_pretrained(tmp_path)
