"""Compress on load: the same delta as from the checkpoints, beside the very base it was formed against."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaModel,
)

import transformers_meswitch as meswitch
from tests.fixtures_models import (
    CODE_EOS,
    CODE_VOCAB_SIZE,
    VOCAB_SIZE,
    TinyFamily,
    dense_model,
    fine_tune,
    llama_config,
)
from tests.model_state import ATOL, generated, prompt
from transformers_meswitch.errors import CheckpointError, CompressionError, MESwitchError, UnsupportedModelError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def config(base: Path | str, **options: Any) -> meswitch.MESwitchConfig:
    return meswitch.MESwitchConfig(str(base), **{"bits": 4, "salient_channels": 4, **options})


def load(expert: Path | str, how: meswitch.MESwitchConfig, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(expert, quantization_config=how, **arguments)


def assert_same_delta(written: Path, reference: Path) -> None:
    ours, theirs = load_file(written / WEIGHTS), load_file(reference / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert torch.equal(ours[key], tensor), key
    left, right = (json.loads((folder / CONFIG).read_text()) for folder in (written, reference))
    assert left.keys() == right.keys()
    assert {k: v for k, v in left.items() if v != right[k]} == {}


@pytest.mark.parametrize("family_fixture", ["tiny_family", "untied_family"])
@pytest.mark.parametrize("name", ["math", "code"])
def test_it_writes_what_compress_writes(
    name: str, family_fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    family: TinyFamily = request.getfixturevalue(family_fixture)
    quantized = (family_fixture == "tiny_family") == (name == "code")
    model = load(family.experts[name], config(family.base, embedding_bits=3 if quantized else None))
    assert isinstance(model, LlamaForCausalLM)
    twin = dense_model(family.base, family.deltas[name])
    torch.testing.assert_close(model(prompt()).logits, twin(prompt()).logits, atol=ATOL, rtol=0)
    assert generated(model) == generated(twin)
    model.save_pretrained(tmp_path)
    assert_same_delta(tmp_path, family.deltas[name])
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(prompt()).logits, model(prompt()).logits)


def test_the_comparison_would_notice_other_bits(tiny_family: TinyFamily, tmp_path: Path) -> None:
    load(tiny_family.experts["math"], config(tiny_family.base, bits=3)).save_pretrained(tmp_path)
    with pytest.raises(AssertionError):
        assert_same_delta(tmp_path, tiny_family.deltas["math"])


def test_layer_bits_and_column_steps_match_compress(tiny_family: TinyFamily, tmp_path: Path) -> None:
    options = {"bits": 2, "salient_channels": 3, "column_steps": True, "layer_bits": {r"down_proj$": 3}}
    meswitch.compress(
        tiny_family.base,
        tiny_family.experts["code"],
        tmp_path / "a",
        config(tiny_family.base, **options),
        calibration=None,
        progress=False,
    )
    load(tiny_family.experts["code"], config(tiny_family.base, **options)).save_pretrained(tmp_path / "b")
    assert_same_delta(tmp_path / "b", tmp_path / "a")


@pytest.mark.parametrize("name", ["math", "code"])
def test_the_base_is_there_bit_for_bit(tiny_family: TinyFamily, name: str) -> None:
    model = load(tiny_family.experts[name], config(tiny_family.base))
    base = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    model.disable_adapters()
    assert torch.equal(model(prompt()).logits[..., :VOCAB_SIZE], base(prompt()).logits)
    assert generated(model) == generated(base)
    model.enable_adapters()
    model.delete_adapter("default")
    assert type(model) is type(base)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in base.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.config.vocab_size, model.config.tie_word_embeddings) == (VOCAB_SIZE, True)
    assert model.lm_head.out_features == model.model.embed_tokens.num_embeddings == VOCAB_SIZE
    assert generated(model) == generated(base)


def test_a_second_expert_loads_on_top(tiny_family: TinyFamily) -> None:
    model = load(tiny_family.experts["code"], config(tiny_family.base))
    model.load_adapter(str(tiny_family.deltas["math"]), adapter_name="math")
    twins = {"default": "code", "math": "math"}
    for name, twin in twins.items():
        dense = dense_model(tiny_family.base, tiny_family.deltas[twin])
        assert generated(model, expert=name) == generated(dense)


@pytest.mark.parametrize(("base_tied", "expert_tied"), [(True, False), (False, True)])
def test_a_difference_in_tying_is_kept(base_tied: bool, expert_tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = LlamaForCausalLM(llama_config(tie_word_embeddings=base_tied))
    base.save_pretrained(tmp_path / "base")
    expert = LlamaForCausalLM(llama_config(tie_word_embeddings=expert_tied))
    own = {key: value for key, value in base.state_dict().items() if expert_tied is False or key != "lm_head.weight"}
    expert.load_state_dict(own, strict=False)
    expert.tie_weights()
    fine_tune(expert, 4, (5, 41, 90))
    expert.save_pretrained(tmp_path / "expert")
    meswitch.compress(
        tmp_path / "base",
        tmp_path / "expert",
        tmp_path / "a",
        config(tmp_path / "base"),
        calibration=None,
        progress=False,
    )
    model = load(tmp_path / "expert", config(tmp_path / "base"))
    model.save_pretrained(tmp_path / "b")
    assert_same_delta(tmp_path / "b", tmp_path / "a")
    twin = dense_model(tmp_path / "base", tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    for ours in (model, loaded):
        torch.testing.assert_close(ours(prompt()).logits, twin(prompt()).logits, atol=ATOL, rtol=0)
        ours.disable_adapters()
        assert torch.equal(ours(prompt()).logits, base.eval()(prompt()).logits)
        ours.enable_adapters()
    plain = loaded.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(plain(prompt()).logits, twin(prompt()).logits, atol=ATOL, rtol=0)
    assert plain.config.tie_word_embeddings is expert_tied
    plain.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(again(prompt()).logits, plain(prompt()).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == expert_tied


def test_loading_in_bfloat16_compresses_the_rounded_expert(tiny_family: TinyFamily, tmp_path: Path) -> None:
    rounded = LlamaForCausalLM.from_pretrained(tiny_family.experts["code"], dtype=torch.bfloat16)
    rounded.save_pretrained(tmp_path / "expert")
    meswitch.compress(
        tiny_family.base,
        tmp_path / "expert",
        tmp_path / "a",
        config(tiny_family.base),
        calibration=None,
        progress=False,
    )
    model = load(tiny_family.experts["code"], config(tiny_family.base), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "b")
    ours, theirs = load_file(tmp_path / "b" / WEIGHTS), load_file(tmp_path / "a" / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    model.disable_adapters()
    base = AutoModelForCausalLM.from_pretrained(tiny_family.base, dtype=torch.bfloat16)
    assert torch.equal(model(prompt()).logits[..., :VOCAB_SIZE], base(prompt()).logits)


def test_what_cannot_be_compressed_is_refused(tiny_family: TinyFamily, tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="base_model_name_or_path"):
        load(tiny_family.experts["math"], meswitch.MESwitchConfig())
    with pytest.raises(MESwitchError, match="nowhere"):
        load(tiny_family.experts["math"], config(tmp_path / "nowhere"))
    with pytest.raises(CompressionError, match="equal weights"):
        load(tiny_family.base, config(tiny_family.base))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_bytes((tiny_family.base / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="safetensors"):
        load(tiny_family.experts["math"], config(tmp_path / "empty"))
    with pytest.raises(CompressionError, match=r"bits is 5; supported are \(1, 2, 3, 4\)"):
        config(tiny_family.base, bits=5)
    for bits in (0, 5, True, "3"):
        with pytest.raises(CompressionError, match=r"embedding_bits is .*; supported are \(1, 2, 3, 4\) and None"):
            config(tiny_family.base, embedding_bits=bits)
    torch.manual_seed(5)
    LlamaForCausalLM(llama_config(intermediate_size=32)).save_pretrained(tmp_path / "narrow")
    with pytest.raises(CompressionError, match=r"intermediate_size is 128 in the expert but 32 in the base"):
        load(tiny_family.experts["math"], config(tmp_path / "narrow"))
    mistral = json.loads((tiny_family.base / "config.json").read_text())
    mistral.update(model_type="mistral", architectures=["MistralForCausalLM"])
    (tmp_path / "mistral").mkdir()
    (tmp_path / "mistral" / "config.json").write_text(json.dumps(mistral))
    (tmp_path / "mistral" / "model.safetensors").write_bytes((tiny_family.base / "model.safetensors").read_bytes())
    with pytest.raises(CompressionError, match=r"'llama'.*'mistral'"):
        load(tiny_family.experts["math"], config(tmp_path / "mistral"))


def in_cache(cache: Path, repo: str, folder: Path, revision: str = "main", subfolder: str = "") -> None:
    """Put a folder into a Hub cache, as if a commit of a repo had been downloaded."""
    commit = hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()
    entry = cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(folder, entry / "snapshots" / commit / subfolder)
    (entry / "refs").mkdir(exist_ok=True)
    (entry / "refs" / revision).write_text(commit)


def test_everything_comes_from_the_revision_folder_and_cache_of_the_weights(
    tiny_family: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache = tmp_path / "cache"
    in_cache(cache, "me/base", tiny_family.base)
    in_cache(cache, "me/expert", tiny_family.experts["math"])
    in_cache(cache, "me/expert", tiny_family.experts["code"], revision="v2", subfolder="tuned")
    where = {"revision": "v2", "subfolder": "tuned", "cache_dir": cache}
    model = load("me/expert", config("me/base"), **where)
    assert len(model.tokenizer_for("default")) == CODE_VOCAB_SIZE
    assert len(model.tokenizer_for(None)) == VOCAB_SIZE
    model.save_pretrained(tmp_path / "delta")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "delta")) == CODE_VOCAB_SIZE
    written, reference = (
        json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        for folder in (tmp_path / "delta", tiny_family.deltas["code"])
    )
    assert written == reference == CODE_EOS
    stored = json.loads((tmp_path / "delta" / CONFIG).read_text())
    assert stored["base_model_name_or_path"] == "me/base"
    assert stored["revision"] == hashlib.sha1(b"me/base@main").hexdigest()
    assert stored["expert_model_name_or_path"] == "me/expert"


def test_a_missing_base_is_found_missing_before_the_weights_are_loaded(
    tiny_family: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(LlamaForCausalLM, "_load_pretrained_model", never)
    with pytest.raises(CheckpointError, match="nowhere"):
        load(tiny_family.experts["math"], config(tmp_path / "nowhere"))


def changed(checkpoint: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of a checkpoint with its tensors edited in place."""
    copy = Path(shutil.copytree(checkpoint, folder))
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("on_load", [True, False])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop(Q_PROJ), CompressionError, r"no tensor for model\.layers\.1\.self_attn\.q_proj\.weight"),
        (lambda t: t.update({"score.weight": torch.ones(3)}), UnsupportedModelError, r"has a tensor score\.weight"),
        (
            lambda t: t.update({Q_PROJ: torch.ones(60, 64)}),
            CompressionError,
            r"q_proj\.weight of LlamaForCausalLM with shape \(60, 64\), but its config\.json makes it \(64, 64\)",
        ),
    ],
)
def test_incomplete_and_overfull_experts_are_refused_on_both_routes(
    change: Any, error: type, message: str, on_load: bool, tiny_family: TinyFamily, tmp_path: Path
) -> None:
    expert = changed(tiny_family.experts["math"], tmp_path / "expert", change)
    how = config(tiny_family.base)

    def produce() -> None:
        if on_load:
            load(expert, how, ignore_mismatched_sizes=True)
        else:
            meswitch.compress(tiny_family.base, expert, tmp_path / "delta", how, calibration=None, progress=False)

    with pytest.raises(error, match=message):
        produce()


def test_a_tensor_without_a_place_that_the_base_has_too_may_stay(tiny_family: TinyFamily, tmp_path: Path) -> None:
    base, expert = (
        changed(folder, tmp_path / folder.name, lambda t: t.update({"score.weight": torch.ones(3)}))
        for folder in (tiny_family.base, tiny_family.experts["math"])
    )
    load(expert, config(base, embedding_bits=None)).save_pretrained(tmp_path / "delta")
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (tmp_path / "delta", tiny_family.deltas["math"]))
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_an_expert_in_a_pickle_is_refused_before_it_is_opened(
    tiny_family: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = Path(shutil.copytree(tiny_family.experts["math"], tmp_path / "expert"))
    torch.save(load_file(expert / "model.safetensors"), expert / "pytorch_model.bin")
    (expert / "model.safetensors").unlink()
    assert AutoModelForCausalLM.from_pretrained(expert).device.type == "cpu", "transformers itself would load it"
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "_load_pretrained_model", lambda *_, **__: pytest.fail("weights were loaded"))
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, expected safetensors.*save_pretrained"):
            load(expert, config(tiny_family.base))


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_only_a_causal_lm_is_compressed(auto: Any, tiny_family: TinyFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaModel, "_load_pretrained_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(UnsupportedModelError, match=r"as Llama(Model|ForSeq\w+), expected .*AutoModelForCausalLM"):
        auto.from_pretrained(tiny_family.experts["math"], quantization_config=config(tiny_family.base))


def test_a_delta_is_no_expert(tiny_family: TinyFamily) -> None:
    with pytest.raises(CompressionError, match=r"the base's own .*equal weights.* delta without a quantiz"):
        load(tiny_family.deltas["math"], config(tiny_family.base))


def test_a_generation_config_is_made_where_there_is_none_as_compress_does(
    tiny_family: TinyFamily, tmp_path: Path
) -> None:
    name = "generation_config.json"
    expert = Path(shutil.copytree(tiny_family.experts["code"], tmp_path / "expert"))
    (expert / name).unlink()
    meswitch.compress(
        tiny_family.base, expert, tmp_path / "a", config(tiny_family.base), calibration=None, progress=False
    )
    load(expert, config(tiny_family.base)).save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "b" / name).read_text())["eos_token_id"] == CODE_EOS


@pytest.mark.parametrize("budget", [{"target_bits": 1.5}, {"target_size": "1MB"}, {"max_kl": 0.1}])
def test_budgets_are_refused_with_the_command_that_keeps_them(tiny_family: TinyFamily, budget: dict[str, Any]) -> None:
    with pytest.raises(CompressionError, match=rf"{next(iter(budget))}=.*is a budget.*`meswitch compress`"):
        load(tiny_family.experts["math"], config(tiny_family.base, **budget))
