"""PEFT's own calls on deltas: loading, mixed batches, the base in between, and saving without losing a bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.fixtures_models import CODE_TEMPLATE, CODE_VOCAB_SIZE, VOCAB_SIZE, TinyFamily
from tests.model_state import ATOL, generated, prompt
from transformers_meswitch.delta_format import reader
from transformers_meswitch.errors import ExpertNotFoundError, UnsupportedOperationError
from transformers_meswitch.peft_method import tuner

ROWS = ["math", "code", "__base__"]


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.allclose(left, right, atol=ATOL, rtol=0)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_peft_loads_experts_and_activates_only_the_first(
    tiny_family: TinyFamily, expected: Any, low_cpu_mem_usage: bool
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    model = PeftModel.from_pretrained(
        base, tiny_family.deltas["math"], adapter_name="math", low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert close(model(prompt()).logits, expected("math", prompt())[..., :VOCAB_SIZE])
    result = model.load_adapter(tiny_family.deltas["code"], adapter_name="code", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert model.active_adapters == ["math"]
    assert close(model(prompt()).logits, expected("math", prompt()))
    model.set_adapter("code")
    assert model.active_adapters == model.get_base_model().active_adapters() == ["code"]
    assert close(model(prompt()).logits, expected("code", prompt()))
    assert not close(model(prompt()).logits, expected("math", prompt()))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_mixed_batch_gives_each_row_its_expert(peft_model: PeftModel, expected: Any) -> None:
    x = prompt(rows=3)
    logits = peft_model(x, adapter_names=ROWS).logits
    for row, name in enumerate(["math", "code", None]):
        assert close(logits[row], expected(name, x)[row])
        assert not close(logits[row], expected({"math": "code", "code": None, None: "math"}[name], x)[row])
    assert close(peft_model(x).logits, expected("math", x))


@pytest.mark.parametrize("beams", [1, 3])
def test_a_mixed_batch_generates_what_its_rows_generate_alone(
    peft_model: PeftModel, dense: dict[str | None, Any], beams: int
) -> None:
    x = prompt(rows=3)
    mixed = peft_model.generate(
        input_ids=x, adapter_names=ROWS, max_new_tokens=8, do_sample=False, num_beams=beams
    ).tolist()
    for row, name in enumerate(["math", "code", None]):
        alone = generated(dense[name], x[row : row + 1], num_beams=beams)[0]
        assert mixed[row][: len(alone)] == alone
        assert all(token == 0 for token in mixed[row][len(alone) :])
    assert mixed[0] != mixed[1]


def test_rows_that_name_no_loaded_expert_are_refused(peft_model: PeftModel, expected: Any) -> None:
    with pytest.raises(ExpertNotFoundError, match=r"'chess'.*'math', 'code'"):
        peft_model(prompt(rows=2), adapter_names=["math", "chess"])
    for rows, names in ((3, ["math", "code"]), (2, ["math"]), (1, ["math", "code"])):
        for call in (peft_model, peft_model.generate):
            with pytest.raises(UnsupportedOperationError, match=f"{len(names)} experts were named .* {rows} rows"):
                call(input_ids=prompt(rows=3)[:rows], adapter_names=names)
    # A multiple is what a batch of beams is, not what a caller gives.
    with pytest.raises(UnsupportedOperationError, match="2 experts were named for a batch of 4 rows"):
        peft_model(prompt().repeat(4, 1), adapter_names=["math", "code"])
    peft_model.train()
    with pytest.raises(UnsupportedOperationError, match="training mode"):
        peft_model(prompt(), adapter_names=["math"])
    peft_model.eval()
    assert close(peft_model(prompt()).logits, expected("math", prompt()))


def test_the_base_answers_inside_disable_adapter(peft_model: PeftModel, expected: Any) -> None:
    with peft_model.disable_adapter():
        assert close(peft_model(prompt()).logits, expected(None, prompt()))
        # PEFT itself passes adapter_names over while adapters are disabled.
        assert close(peft_model(prompt(), adapter_names=["code"]).logits, expected(None, prompt()))
    assert close(peft_model(prompt()).logits, expected("math", prompt()))


def test_peft_saves_every_expert_bit_for_bit(peft_model: PeftModel, tiny_family: TinyFamily, tmp_path: Path) -> None:
    peft_model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    for name, delta in tiny_family.deltas.items():
        written, original = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / name, delta))
        assert written.keys() == original.keys()
        assert all(torch.equal(written[key], original[key]) for key in original)
        reloaded.load_adapter(str(tmp_path / name), adapter_name=name)
    for name in tiny_family.deltas:
        reloaded.set_adapter(name)
        peft_model.set_adapter(name)
        assert torch.equal(reloaded(prompt()).logits, peft_model(prompt()).logits)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_peft_keeps_the_stored_dtypes_over_a_rounded_base(
    tiny_family: TinyFamily, tmp_path: Path, low_cpu_mem_usage: bool
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_family.base, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, tiny_family.deltas["math"], low_cpu_mem_usage=low_cpu_mem_usage)
    model.save_pretrained(tmp_path)
    written, stored = (load_file(d / "adapter_model.safetensors") for d in (tmp_path, tiny_family.deltas["math"]))
    assert written.keys() == stored.keys()
    for key, tensor in stored.items():
        assert written[key].dtype == tensor.dtype, key
        assert torch.equal(written[key], tensor), key


def test_an_expert_from_peft_brings_its_tokenizer_and_saves_as_a_whole_repo(
    peft_model: PeftModel, tiny_family: TinyFamily, tmp_path: Path
) -> None:
    assert len(peft_model.tokenizer_for("code")) == CODE_VOCAB_SIZE
    assert len(peft_model.tokenizer_for("math")) == VOCAB_SIZE
    peft_model.set_adapter("code")
    peft_model.get_base_model().save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == CODE_TEMPLATE
    assert (tmp_path / "generation_config.json").is_file()


def test_a_delta_is_read_and_checked_once(tiny_family: TinyFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    for module in (reader, tuner):
        monkeypatch.setattr(module, "check_values", lambda *_, where=module.__name__: checked.append(where))
    base = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    PeftModel.from_pretrained(base, tiny_family.deltas["math"])
    assert len(checked) == 1


def test_auto_peft_loads_base_and_expert(tiny_family: TinyFamily, expected: Any) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(tiny_family.deltas["code"])
    assert close(model(prompt()).logits, expected("code", prompt()))
    assert model.active_adapters == ["default"]


def test_peft_deletes_experts(peft_model: PeftModel, expected: Any) -> None:
    peft_model.delete_adapter("code")
    assert list(peft_model.peft_config) == peft_model.get_base_model().experts == ["math"]
    assert close(peft_model(prompt()).logits, expected("math", prompt())[..., :VOCAB_SIZE])
    assert not any("x-code" in name for name in peft_model.state_dict())


def test_peft_wraps_a_model_that_has_experts(model: Any, tiny_family: TinyFamily, expected: Any) -> None:
    wrapped = PeftModel.from_pretrained(model, tiny_family.deltas["math"], adapter_name="again")
    assert wrapped.active_adapters == model.active_adapters() == ["again"]
    assert model.experts == ["math", "code", "again"]
    assert close(wrapped(prompt()).logits, expected("math", prompt()))
    logits = wrapped(prompt(rows=2), adapter_names=["code", "again"]).logits
    assert close(logits[0], expected("code", prompt(rows=2))[0])
    assert close(logits[1], expected("math", prompt(rows=2))[1])


def test_unload_gives_the_base_back(peft_model: PeftModel, tiny_family: TinyFamily) -> None:
    plain = peft_model.unload()
    base = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    assert type(plain) is type(base)
    assert plain.config.vocab_size == VOCAB_SIZE
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(plain(prompt()).logits, base(prompt()).logits)


def test_layer_and_model_status_can_be_asked(peft_model: PeftModel) -> None:
    status = peft_model.get_model_status()
    assert status.active_adapters == ["math"]
    assert status.available_adapters == ["code", "math"]
    assert status.enabled is True
    assert status.merged_adapters == []


def test_the_wrapper_knows_what_the_model_inside_is_told(
    peft_model: PeftModel, tiny_family: TinyFamily, expected: Any, tmp_path: Path
) -> None:
    inner = peft_model.get_base_model()
    inner.set_expert("code")
    assert peft_model.active_adapter == "code"
    assert peft_model.active_peft_config.vocab_size == CODE_VOCAB_SIZE
    inner.load_adapter(str(tiny_family.deltas["code"]), adapter_name="inner")
    assert list(peft_model.peft_config) == ["math", "code", "inner"]
    peft_model.load_adapter(tiny_family.deltas["math"], adapter_name="outer")
    assert inner.get_adapter_state_dict("outer").keys() == inner.get_adapter_state_dict("math").keys()
    peft_model.set_adapter("math")
    for name in ("math", "inner"):
        inner.delete_adapter(name)
    assert list(peft_model.peft_config) == inner.experts == ["code", "outer"]
    assert peft_model.active_adapter == inner.active_expert == "code"
    assert close(peft_model(prompt()).logits, expected("code", prompt()))
    inner.set_expert(None)
    assert close(peft_model(prompt()).logits, expected(None, prompt()))
    peft_model.save_pretrained(tmp_path)
    assert sorted(folder.name for folder in tmp_path.iterdir() if folder.is_dir()) == ["code", "outer"]
    assert load_file(tmp_path / "code" / "adapter_model.safetensors")


def test_an_expert_can_be_loaded_after_the_last_was_deleted(
    peft_model: PeftModel, tiny_family: TinyFamily, expected: Any
) -> None:
    inner, base = peft_model.get_base_model(), AutoModelForCausalLM.from_pretrained(tiny_family.base)
    for name in ("math", "code"):
        peft_model.delete_adapter(name)
    assert type(inner) is type(base)
    assert inner.state_dict().keys() == base.state_dict().keys()
    peft_model.load_adapter(tiny_family.deltas["code"], adapter_name="again")
    assert peft_model.active_adapters == []  # as of a LoRA
    peft_model.set_adapter("again")
    assert close(peft_model(prompt()).logits, expected("code", prompt()))
    with pytest.raises(ValueError, match="math does not exist"):
        peft_model.delete_adapter("math")
    peft_model.merge_adapter()
    with pytest.raises(UnsupportedOperationError, match="merged"):
        peft_model.delete_adapter("again")
