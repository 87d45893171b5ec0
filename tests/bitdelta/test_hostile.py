"""Files that are damaged, made up or meant to do harm: refused by name, with nothing written and nothing run."""

from __future__ import annotations

import io
import os
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from tests.bitdelta.conftest import diff_of
from tests.fixtures_models import llama_config
from tests.models.architectures import build
from transformers_meswitch import import_bitdelta
from transformers_meswitch.bitdelta.diff_file import read_diff
from transformers_meswitch.errors import BitDeltaError, CompressionError, UnsupportedModelError

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def diff(tiny_family):
    return diff_of(tiny_family.base, tiny_family.experts["math"])


def refused(base, folder, match, error=BitDeltaError):
    before = sorted(folder.rglob("*"))
    with pytest.raises(error, match=match):
        import_bitdelta(base, folder / "diff.pt", folder / "delta", progress=False)
    assert sorted(folder.rglob("*")) == before


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_is_refused_and_not_run(diff, tiny_family, tmp_path):
    torch.save(diff | {"harm": Harm(tmp_path / "harmed")}, tmp_path / "diff.pt")
    refused(tiny_family.base, tmp_path, r"diff\.pt cannot be read as tensors alone.*: it asks for \w+\.mkdir\. Give")
    torch.load(tmp_path / "diff.pt", weights_only=False)
    assert (tmp_path / "harmed").exists(), "the file does no harm to anybody"


def test_a_file_that_only_the_environment_would_trust(diff, tiny_family, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(diff | {"harm": Harm(tmp_path / "harmed")}, tmp_path / "diff.pt")
    refused(tiny_family.base, tmp_path, "cannot be read as tensors alone")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: [*d.values()], "holds a list, expected a dictionary of tensors"),
        (lambda d: d | {7: torch.ones(1)}, "has 7 among its names, expected texts"),
        (lambda d: d | {NORM: 1.5}, "'model.norm.weight' in .* is a float, expected a tensor"),
        (lambda d: d | {NORM: {"a": torch.ones(1)}}, "'model.norm.weight' in .* is a dict, expected a tensor"),
        (lambda d: d | {NORM: torch.eye(64).to_sparse()}, "layout torch.sparse_coo .* expected a dense one"),
        (lambda d: d | {NORM: torch.ones(64, device="meta")}, "on meta, expected a dense one with data"),
        (lambda d: d | {EMBEDDING: torch.ones(1, 1).expand(10**10, 64)}, r"2,560,000,000,000 bytes, .* holds 4\b"),
        (lambda d: {}, r"it has no mask of a linear \(0 tensors, expected names such as model.*\.mask\)"),
        (lambda d: {NORM: d[NORM]}, r"it has no mask of a linear \(1 tensors"),
        (lambda d: d | {f"{UP}.mask": d[f"{UP}.mask"][:1]}, r"\(1, 128\), expected torch.int32 of shape \(2, 128\)"),
        (lambda d: d | {f"{UP}.mask": d[f"{DOWN}.mask"]}, r"up_proj.mask is torch.int32 of shape \(4, 64\), expected"),
        (lambda d: d | {f"{UP}.mask": d[f"{UP}.mask"].T}, r"shape \(128, 2\), expected torch.int32 of shape \(2, 128"),
        (lambda d: d | {f"{UP}.mask": d[f"{UP}.mask"].long()}, "is torch.int64 of shape .* expected torch.int32"),
        (lambda d: d | {f"{UP}.coeff": torch.tensor(torch.nan)}, r"up_proj.coeff is nan, in torch.float32 not a fin"),
        (lambda d: d | {f"{UP}.coeff": torch.tensor(3e38)}, r"coeff is 3\.\d*e\+38, in torch.float32 not a fin"),
        (lambda d: d | {f"{UP}.coeff": torch.ones(2)}, r"coeff is torch.float32 of shape \(2,\), expected one float"),
        (lambda d: d | {f"{UP}.coeff": torch.tensor(1)}, r"coeff is torch.int64 of shape \(\), expected one floating"),
        (lambda d: {k: v for k, v in d.items() if k != f"{UP}.coeff"}, r"up_proj.mask has no .*up_proj.coeff beside"),
        (lambda d: {k: v for k, v in d.items() if k != f"{UP}.mask"}, r"up_proj.coeff' has no '.*up_proj.mask' besi"),
        (lambda d: d | {f"{UP}.weight": torch.ones(128, 64)}, "up_proj has both a mask and a whole weight"),
        (lambda d: d | {"model.norm.mask": d[f"{UP}.mask"]}, "model.norm.mask is of a module that is not a linear"),
        (lambda d: d | {"model.layers.9.mlp.up_proj.mask": d[f"{UP}.mask"]}, r"the base has not; the closest is"),
        (lambda d: d | {f"{UP}.A": torch.ones(1)}, r"it holds 'model.layers.0.mlp.up_proj.A', which the base has not"),
        (lambda d: d | {NORM: torch.ones(65)}, r"norm.weight is torch.float32 of shape \(65,\), expected .* \(64\)"),
        (lambda d: d | {NORM: torch.ones(64).int()}, r"norm.weight is torch.int32 of shape \(64,\), expected"),
        (lambda d: d | {EMBEDDING: torch.ones(128, 65)}, r"shape \(128, 65\), expected a floating one of \(any, 64\)"),
        (lambda d: d | {EMBEDDING: torch.ones(0, 64)}, r"shape \(0, 64\), expected a floating one of \(any, 64\)"),
        (lambda d: d | {"lm_head.weight": torch.ones(130, 64)}, "embed_tokens.weight 128 and lm_head.weight 130 rows"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change, message, diff, tiny_family, tmp_path):
    torch.save(change(dict(diff)), tmp_path / "diff.pt")
    refused(tiny_family.base, tmp_path, message)


def test_numbers_that_are_not_finite(diff, tiny_family, tmp_path):
    damaged = diff[EMBEDDING].detach().clone()
    damaged[3, 3] = torch.inf
    torch.save(diff | {EMBEDDING: damaged}, tmp_path / "diff.pt")
    refused(tiny_family.base, tmp_path, r"embed_tokens.weight of the expert holds NaN or infinite", CompressionError)


def test_a_linear_that_is_there_whole(diff, tiny_family, tmp_path):
    whole = {name: tensor for name, tensor in diff.items() if not name.startswith(f"{UP}.")}
    torch.save(whole | {f"{UP}.weight": torch.ones(128, 64)}, tmp_path / "diff.pt")
    refused(tiny_family.base, tmp_path, rf"{UP}.weight whole, and it differs from the base's", UnsupportedModelError)


def test_biases_that_load_diff_would_drop(tmp_path):
    model = LlamaForCausalLM(llama_config(attention_bias=True))
    model.save_pretrained(tmp_path / "base")
    name = "model.layers.0.self_attn.q_proj.bias"
    with torch.no_grad():
        model.model.norm.weight.add_(1)
        model.model.layers[0].self_attn.q_proj.weight.add_(1)
    model.save_pretrained(tmp_path / "expert")
    diff = diff_of(tmp_path / "base", tmp_path / "expert")
    assert name in diff
    torch.save(diff | {name: diff[name] + 1}, tmp_path / "diff.pt")
    refused(tmp_path / "base", tmp_path, rf"{name} differs from the base's, and BitDelta's own load_diff puts weights")
    torch.save(diff, tmp_path / "diff.pt")
    import_bitdelta(tmp_path / "base", tmp_path / "diff.pt", tmp_path / "delta", progress=False)


def test_linears_that_masks_cannot_be_of(tmp_path):
    build("gpt2", True).save_pretrained(tmp_path / "gpt2")
    module = "transformer.h.0.attn.c_proj"
    mask = {f"{module}.mask": torch.ones(1, 32, dtype=torch.int32), f"{module}.coeff": torch.tensor(0.5)}
    torch.save(mask, tmp_path / "diff.pt")
    refused(tmp_path / "gpt2", tmp_path, rf"{module} is a Conv1D", UnsupportedModelError)
    build("qwen2", True).save_pretrained(tmp_path / "qwen2")
    torch.save({f"{DOWN}.mask": torch.ones(2, 32, dtype=torch.int32)}, tmp_path / "diff.pt")
    refused(tmp_path / "qwen2", tmp_path, "down_proj has 48 inputs, and masks hold 32 signs an element")


def repacked(path, compression, change=lambda pickled: pickled):
    """Write the archive anew, with its pickle changed."""
    members = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in members.namelist():
            content = members.read(name)
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)


def test_an_archive_that_unpacks_to_more(tiny_family, tmp_path):
    torch.save({NORM: torch.zeros(10**6)}, tmp_path / "diff.pt")
    repacked(tmp_path / "diff.pt", zipfile.ZIP_DEFLATED)
    assert (tmp_path / "diff.pt").stat().st_size < 10**4
    refused(tiny_family.base, tmp_path, "compressed .* which torch.save never writes")


def test_sizes_beyond_the_file(tiny_family, tmp_path):
    torch.save({NORM: torch.zeros(300)}, tmp_path / "diff.pt")
    stated, huge = b"M\x2c\x01", b"J\x00\x00\x00\x40"  # 300 and 2^30, as a pickle has them
    repacked(tmp_path / "diff.pt", zipfile.ZIP_STORED, lambda pickled: pickled.replace(stated, huge))
    refused(tiny_family.base, tmp_path, "cannot be read as tensors alone")


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, 0.99])
def test_a_file_that_is_cut_short(kept, diff, tiny_family, tmp_path):
    torch.save(diff, tmp_path / "diff.pt")
    whole = (tmp_path / "diff.pt").read_bytes()
    (tmp_path / "diff.pt").write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    refused(tiny_family.base, tmp_path, r"diff\.pt is no whole archive .*: cut short, or another format")


def test_wherever_a_file_is_damaged_it_is_refused_or_read_as_it_was(diff, tmp_path):
    held = {name: diff[name] for name in (f"{UP}.mask", f"{UP}.coeff")}
    torch.save(held, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    refusals = 0
    for place in range(0, len(whole), 23):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        (tmp_path / "diff.pt").write_bytes(damaged)
        try:
            found = read_diff(tmp_path / "diff.pt")
        except BitDeltaError:
            refusals += 1
            continue
        assert found.keys() == held.keys()
        assert all(torch.equal(found[name], held[name]) for name in held)
    assert refusals > 40


@pytest.mark.parametrize("kind", ["safetensors", "legacy", "folder", "none"])
def test_other_files(kind, diff, tiny_family, tmp_path):
    path = tmp_path / "diff.pt"
    if kind == "safetensors":
        save_file({NORM: torch.ones(64)}, path)
    elif kind == "legacy":
        torch.save(diff, path, _use_new_zipfile_serialization=False)
    elif kind == "folder":
        path.mkdir()
    refused(
        tiny_family.base,
        tmp_path,
        "such as safetensors" if kind in ("safetensors", "legacy") else "is not a file. Give",
    )


def test_the_bases_own_folder_is_no_output(diff, tiny_family, tmp_path):
    torch.save(diff, tmp_path / "diff.pt")
    with pytest.raises(CompressionError, match="is the base's own folder"):
        import_bitdelta(tiny_family.base, tmp_path / "diff.pt", tiny_family.base, progress=False)
