"""What is imported computes what BitDelta makes of base and diff, bit for bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.bitdelta.conftest import diff_of, loaded
from tests.fixtures_models import CHANGED_ROWS, CODE_EOS, CODE_VOCAB_SIZE, UNCHANGED_IN_MATH, VOCAB_SIZE
from tests.model_state import generated
from transformers_meswitch import MESwitchModelForCausalLM, import_bitdelta, merge_checkpoint
from transformers_meswitch.bitdelta import recipe
from transformers_meswitch.errors import MESwitchError

PREFIX = "base_model.model."


def imported(base, diff, folder, **arguments):
    torch.save(diff, folder / "diff.pt")
    return import_bitdelta(base, folder / "diff.pt", folder / "delta", progress=False, **arguments)


def merged(base, delta, folder):
    merge_checkpoint(delta, folder, base=base, progress=False)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def differing(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    return [name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])]


def is_tied(base):
    return json.loads((base / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("name", ["math", "code"])
def test_base_and_delta_are_what_the_diff_makes_of_the_base(family, name, dtype, tmp_path):
    diff = diff_of(family.base, family.experts[name])
    delta = imported(family.base, diff, tmp_path)
    plain = merged(family.base, delta, tmp_path / "merged")
    expected = loaded(family.base, diff, is_tied(family.base))
    assert plain.dtype == dtype
    assert not differing(plain, expected)
    assert plain.config.vocab_size == (CODE_VOCAB_SIZE if name == "code" else VOCAB_SIZE)
    assert is_tied(tmp_path / "merged") == is_tied(family.base)

    # One sign of one weight, and the check fails.
    module = "model.layers.1.self_attn.v_proj"
    wrong = diff | {f"{module}.mask": diff[f"{module}.mask"].clone()}
    wrong[f"{module}.mask"][1, 3] ^= -(2**31)
    assert differing(plain, loaded(family.base, wrong, is_tied(family.base))) == [f"{module}.weight"]
    where = plain.get_submodule(module).weight != loaded(family.base, wrong, True).get_submodule(module).weight
    assert where.nonzero().tolist() == [[3, 63]]


def test_only_what_changed_is_stored_and_as_it_is(family, tmp_path):
    delta = imported(family.base, diff_of(family.base, family.experts["math"]), tmp_path)
    config = json.loads((delta / "adapter_config.json").read_text())
    records = config["modules"]
    assert records["model.embed_tokens"] == {
        "kind": "rows", "num_rows": VOCAB_SIZE, "width": 64, "rows": len(CHANGED_ROWS["math"]), "bias": False,
    }  # fmt: skip
    assert ("lm_head" in records) is not is_tied(family.base)
    assert UNCHANGED_IN_MATH not in records
    linears = {name: record for name, record in records.items() if record["kind"] == "linear"}
    assert len(linears) == 13
    assert {(r["bits"], r["salient_channels"], r["column_step"]) for r in linears.values()} == {(1, 0, False)}
    tensors = load_file(delta / "adapter_model.safetensors")
    assert tensors[f"{PREFIX}model.embed_tokens.meswitch_delta.row_index"].tolist() == list(CHANGED_ROWS["math"])
    assert (config["imported_from"], config.get("saliency")) == ("BitDelta", None)
    card = (delta / "README.md").read_text()
    assert "Method: BitDelta ([arXiv:2402.10193]" in card
    assert "2406.09041](" not in card
    assert not (tmp_path / "delta.partial").exists()


def test_answers(tiny_family, tmp_path):
    diff = diff_of(tiny_family.base, tiny_family.experts["code"])
    delta = imported(tiny_family.base, diff, tmp_path)
    model = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts={"code": str(delta)})
    twin = loaded(tiny_family.base, diff, tied=True)
    answer = generated(model, expert="code", eos_token_id=None)
    assert answer == generated(twin, eos_token_id=None)
    assert answer != generated(AutoModelForCausalLM.from_pretrained(tiny_family.base), eos_token_id=None)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_numbers_of_another_dtype_than_the_bases(kind, family, tmp_path):
    diff = diff_of(family.base, family.experts["math"])
    diff = {name: tensor.detach().to(kind) if tensor.is_floating_point() else tensor for name, tensor in diff.items()}
    plain = merged(family.base, imported(family.base, diff, tmp_path), tmp_path / "merged")
    assert not differing(plain, loaded(family.base, diff, is_tied(family.base)))


def test_coefficients_below_zero_and_of_zero(tiny_family, tmp_path):
    diff = diff_of(tiny_family.base, tiny_family.experts["math"])
    negative, zero = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    diff |= {f"{negative}.coeff": torch.tensor(-0.125), f"{zero}.coeff": torch.tensor(-0.0)}
    delta = imported(tiny_family.base, diff, tmp_path)
    plain = merged(tiny_family.base, delta, tmp_path / "merged")
    assert not differing(plain, loaded(tiny_family.base, diff, tied=True))
    assert zero not in json.loads((delta / "adapter_config.json").read_text())["modules"]


def test_a_head_of_its_own_over_a_base_without(tiny_family, tmp_path):
    diff = diff_of(tiny_family.base, tiny_family.experts["math"])
    diff["lm_head.weight"] = diff["model.embed_tokens.weight"].detach() * 2
    plain = merged(tiny_family.base, imported(tiny_family.base, diff, tmp_path), tmp_path / "merged")
    assert not is_tied(tmp_path / "merged")
    assert not differing(plain, loaded(tiny_family.base, diff, tied=False))


def test_a_diff_without_an_embedding_leaves_the_bases(untied_family, tmp_path):
    diff = diff_of(untied_family.base, untied_family.experts["math"])
    del diff["model.embed_tokens.weight"]
    plain = merged(untied_family.base, imported(untied_family.base, diff, tmp_path), tmp_path / "merged")
    assert not differing(plain, loaded(untied_family.base, diff, tied=False))


def test_what_comes_along_with_the_expert(tiny_family, tmp_path):
    expert = tiny_family.experts["code"]
    weightless = shutil.copytree(expert, tmp_path / "expert", ignore=shutil.ignore_patterns("*.safetensors"))
    diff = diff_of(tiny_family.base, expert)
    delta = imported(tiny_family.base, diff, tmp_path, expert=weightless)
    ours, theirs = AutoTokenizer.from_pretrained(delta), AutoTokenizer.from_pretrained(expert)
    assert (ours.get_vocab(), ours.chat_template) == (theirs.get_vocab(), theirs.chat_template)
    assert json.loads((delta / "adapter_config.json").read_text())["eos_token_id"] == [CODE_EOS]
    plain = merged(tiny_family.base, delta, tmp_path / "merged")
    assert not differing(plain, loaded(tiny_family.base, diff, tied=True))
    assert plain.generation_config.eos_token_id == CODE_EOS

    with pytest.raises(MESwitchError, match=r"132 tokens, and .* has a vocabulary of 128: the diff is not this"):
        import_bitdelta(tiny_family.base, tmp_path / "diff.pt", tmp_path / "b", expert=tiny_family.experts["math"])
    config = json.loads((weightless / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5e5
    (weightless / "config.json").write_text(json.dumps(config))
    with pytest.raises(MESwitchError, match=r"rope_theta is 500000\.0 in the expert"):
        import_bitdelta(tiny_family.base, tmp_path / "diff.pt", tmp_path / "b", expert=weightless)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("b")]


def test_an_interrupted_import_goes_on(tiny_family, tmp_path, monkeypatch):
    diff = diff_of(tiny_family.base, tiny_family.experts["math"])
    whole = imported(tiny_family.base, diff, tmp_path)
    names = ("adapter_model.safetensors", "adapter_config.json", "generation_config.json", "README.md")
    before = {name: (whole / name).read_bytes() for name in names}

    def stop(*_, **__):
        raise KeyboardInterrupt

    linear_of = recipe.linear_modules.__globals__["linear_of"]
    monkeypatch.setattr(recipe, "write_repo", stop)
    with pytest.raises(KeyboardInterrupt):
        import_bitdelta(tiny_family.base, tmp_path / "diff.pt", tmp_path / "again", progress=False)
    assert (tmp_path / "again.partial").exists()
    assert not (tmp_path / "again").exists()
    monkeypatch.undo()
    done = []
    monkeypatch.setitem(
        recipe.linear_modules.__globals__, "linear_of", lambda signs: done.append(signs) or linear_of(signs)
    )
    again = import_bitdelta(tiny_family.base, tmp_path / "diff.pt", tmp_path / "again", progress=False)
    assert not done
    assert {name: (again / name).read_bytes() for name in names} == before
    assert not (tmp_path / "again.partial").exists()


def test_a_diff_that_changes_nothing(tiny_family, tmp_path):
    diff = diff_of(tiny_family.base, tiny_family.base)
    with pytest.raises(MESwitchError, match=r"diff\.pt and .* hold equal weights; there is no delta"):
        imported(tiny_family.base, diff, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["diff.pt"]
