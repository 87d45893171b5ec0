"""What deltas do not do is refused by name, before anything changes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.fixtures_models import TinyFamily
from tests.model_state import ModelState, prompt
from transformers_meswitch import MESwitchConfig
from transformers_meswitch.errors import (
    DeltaFormatError,
    ExpertNameError,
    UnsupportedModelError,
    UnsupportedOperationError,
)


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")


def second_method() -> Any:
    return pytest.warns(UserWarning, match="Already found a `peft_config`")


@pytest.fixture(scope="module")
def lora_repo(tiny_family: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_family.base), lora()).save_pretrained(folder)
    return folder


def test_a_config_of_compression_is_no_adapters(model: Any) -> None:
    before = ModelState(model)
    with pytest.raises(AttributeError, match=r"how a finished fine-tune is compressed.*PeftModel\.from_pretrained"):
        get_peft_model(model, MESwitchConfig())
    before.assert_unchanged(model)


def test_a_lora_is_refused_on_a_model_with_experts(model: Any, peft_model: PeftModel, lora_repo: Path) -> None:
    before = ModelState(model)
    with pytest.raises(UnsupportedOperationError, match=r"LORA.*merge_and_unload"):
        model.add_adapter(lora(), "lora")
    with pytest.raises(UnsupportedOperationError, match=r"LORA.*merge_and_unload"), second_method():
        get_peft_model(model, lora(), adapter_name="extra")
    with pytest.raises(DeltaFormatError, match="'LORA', expected 'MESWITCH'"):
        model.load_adapter(str(lora_repo), adapter_name="lora")
    before.assert_unchanged(model)
    inside = ModelState(peft_model.get_base_model())
    for call in (
        lambda: peft_model.add_adapter("extra", lora()),
        lambda: peft_model.load_adapter(lora_repo, adapter_name="extra"),
    ):
        with pytest.raises(ValueError, match=r"different peft types. Found MESWITCH and PeftType.LORA"):
            call()
    inside.assert_unchanged(peft_model.get_base_model())


def test_experts_are_refused_on_a_model_with_a_lora(tiny_family: TinyFamily, lora_repo: Path) -> None:
    delta = tiny_family.deltas["math"]
    model = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    # Not add_adapter: transformers 5.24 asks for a PEFT there that is not released yet.
    model.load_adapter(str(lora_repo), adapter_name="lora")
    before = ModelState(model)
    with pytest.raises(UnsupportedOperationError, match=r"adapters of type LORA.*load the base again"):
        model.load_adapter(str(delta), adapter_name="math")
    with pytest.raises(UnsupportedOperationError, match=r"adapters of type LORA"), second_method():
        PeftModel.from_pretrained(model, delta, adapter_name="math")
    before.assert_unchanged(model)
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_family.base), lora())
    with pytest.raises(ValueError, match=r"different peft types. Found PeftType.LORA and MESWITCH"):
        wrapped.load_adapter(delta, adapter_name="math")
    assert list(wrapped.peft_config) == ["default"]


def test_training_is_refused(tiny_family: TinyFamily, model: Any, peft_model: PeftModel) -> None:
    delta = tiny_family.deltas["math"]
    plain = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    before = [ModelState(m) for m in (plain, model, peft_model.get_base_model())]
    for call in (
        lambda: plain.load_adapter(str(delta), is_trainable=True),
        lambda: model.load_adapter(str(delta), "third", is_trainable=True),
        lambda: PeftModel.from_pretrained(plain, delta, is_trainable=True),
        lambda: peft_model.load_adapter(delta, "third", is_trainable=True),
    ):
        with pytest.raises(UnsupportedOperationError, match=r"is_trainable=True"):
            call()
    for state, changed in zip(before, (plain, model, peft_model.get_base_model()), strict=True):
        state.assert_unchanged(changed)


def test_hotswapping_is_refused(tiny_family: TinyFamily, model: Any, peft_model: PeftModel) -> None:
    from peft.utils.hotswap import hotswap_adapter

    before = ModelState(model)
    with pytest.raises(UnsupportedOperationError, match="hotswap=True"):
        model.load_adapter(str(tiny_family.deltas["code"]), "math", hotswap=True)
    with pytest.raises(UnsupportedOperationError, match="Hot-swapping"):
        model.enable_peft_hotswap()
    before.assert_unchanged(model)
    with pytest.raises(ValueError, match="only supports LORA but MESWITCH"):
        hotswap_adapter(peft_model, str(tiny_family.deltas["code"]), "math")
    plain = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    with pytest.raises(ValueError, match="hotswap"):
        plain.load_adapter(str(tiny_family.deltas["code"]), "math", hotswap=True)


def test_disk_offload_is_refused_by_module(tiny_family: TinyFamily, tmp_path: Path) -> None:
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    device_map = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    arguments: dict[str, Any] = {"device_map": device_map, "offload_folder": tmp_path}
    with pytest.raises(UnsupportedModelError, match=r"offloaded to disk.*model\.layers\.1"):
        AutoModelForCausalLM.from_pretrained(tiny_family.deltas["math"], **arguments)
    model = AutoModelForCausalLM.from_pretrained(tiny_family.base, **arguments)
    logits = model(prompt()).logits
    with pytest.raises(UnsupportedModelError, match=r"offloaded to disk.*model\.layers\.1"):
        model.load_adapter(str(tiny_family.deltas["math"]))
    assert torch.equal(model(prompt()).logits, logits)
    with pytest.raises(UnsupportedModelError, match=r"offloaded to disk.*model\.layers\.1"):
        PeftModel.from_pretrained(model, tiny_family.deltas["math"])


def test_offload_to_the_cpu_is_refused_by_module(tiny_family: TinyFamily) -> None:
    delta = tiny_family.deltas["math"]
    model = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    # What dispatching over a GPU and the CPU leaves on the model.
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "lm_head": 0}
    with pytest.raises(UnsupportedModelError, match=r"offloaded to cpu \('model\.layers\.1' first\).*without 'cpu'"):
        model.load_adapter(str(delta))
    hooked = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    cpu_offload(hooked, execution_device=torch.device("cpu"))
    logits = hooked(prompt()).logits
    for load in (lambda: hooked.load_adapter(str(delta)), lambda: PeftModel.from_pretrained(hooked, delta)):
        with pytest.raises(
            UnsupportedModelError, match=r"weights of 'model\.\S+' are on the device 'meta'.*offloaded"
        ):
            load()
    assert torch.equal(hooked(prompt()).logits, logits)


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_offloading_a_model_with_experts_is_refused_when_it_is_called(
    tiny_family: TinyFamily, tmp_path: Path, offload: Any
) -> None:
    where = {"offload_dir": tmp_path} if offload is disk_offload else {}
    model = AutoModelForCausalLM.from_pretrained(tiny_family.deltas["math"])
    offload(model, execution_device=torch.device("cpu"), **where)
    for call in (model, model.generate):
        with pytest.raises(UnsupportedModelError, match=r"experts are on the device 'meta'.*offloaded"):
            call(prompt())


def test_a_model_without_any_weights_takes_an_expert_without_any(tiny_family: TinyFamily) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_family.base))
    model.load_adapter(str(tiny_family.deltas["math"]))
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_a_device_map_without_disk_works(tiny_family: TinyFamily, dense: Any, device_map: Any) -> None:
    delta = tiny_family.deltas["math"]
    base = AutoModelForCausalLM.from_pretrained(tiny_family.base, device_map=device_map)
    models = [
        AutoModelForCausalLM.from_pretrained(delta, device_map=device_map),
        PeftModel.from_pretrained(base, delta),
    ]
    for model in models:
        torch.testing.assert_close(model(prompt()).logits, dense["math"](prompt()).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "compressed-tensors"])
def test_other_quantised_bases_are_refused_by_name(tiny_family: TinyFamily, method: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    model.hf_quantizer = SimpleNamespace(
        quantization_config=SimpleNamespace(quant_method=method), is_compileable=False
    )
    before = ModelState(model)
    with pytest.raises(UnsupportedModelError, match=rf"'{method}'.*bf16, fp16, fp32 and bitsandbytes"):
        model.load_adapter(str(tiny_family.deltas["math"]))
    with pytest.raises(UnsupportedModelError, match=rf"'{method}'.*bf16, fp16, fp32 and bitsandbytes"):
        PeftModel.from_pretrained(model, tiny_family.deltas["math"])
    before.assert_unchanged(model)


def test_an_expert_without_tensors_does_not_answer(tiny_family: TinyFamily, peft_model: PeftModel) -> None:
    config = peft_model.peft_config["math"]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_family.base), config, adapter_name="math")
    with pytest.raises(UnsupportedOperationError, match="'math' has no tensors"):
        model(prompt())
    model.load_adapter(tiny_family.deltas["math"], adapter_name="math")
    torch.testing.assert_close(model(prompt()).logits, peft_model(prompt()).logits[..., :128], atol=1e-5, rtol=0)


def test_arguments_that_nobody_knows_are_refused_on_every_load(tiny_family: TinyFamily) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    for name in ("math", "code"):
        with pytest.raises(TypeError, match="unexpected keyword argument 'frobnicate'"):
            model.load_adapter(str(tiny_family.deltas[name]), adapter_name=name, frobnicate=1)
        model.load_adapter(str(tiny_family.deltas[name]), adapter_name=name)


def test_parts_of_tensor_names_are_no_names_whether_or_not_an_expert_is_loaded(tiny_family: TinyFamily) -> None:
    """As the name of one expert they would take tensors from what ``PeftModel`` saves of another."""
    keys = load_file(tiny_family.deltas["math"] / "adapter_model.safetensors")
    parts = {part for key in keys for part in key.partition(".meswitch_delta.")[2].split(".")} | {"base_layer"}
    assert {"codes", "values", "weight", "row_index"} < parts
    model = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    for _ in range(2):
        for part in sorted(parts):
            with pytest.raises(ExpertNameError, match=f"'{part}' is part of the names of experts' tensors"):
                model.load_adapter(str(tiny_family.deltas["math"]), adapter_name=part)
        if not getattr(model, "experts", None):
            model.load_adapter(str(tiny_family.deltas["math"]), adapter_name="math")
