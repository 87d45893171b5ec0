"""What people hand to compress() by mistake: each is a typed error that says what it is and what to do."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from transformers_meswitch.compression.recipe import compress
from transformers_meswitch.configuration import MESwitchConfig
from transformers_meswitch.errors import CheckpointError, CompressionError, UnsupportedModelError

CONFIG = MESwitchConfig(bits=2, salient_channels=4)


def run(base, expert, out, config=CONFIG, **more):
    return compress(base, expert, out, config, progress=False, **{"calibration": None, **more})


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("whose", ["base", "expert"])
@pytest.mark.parametrize("value", [None, "", 5])
def test_no_repo(tmp_path, whose, value):
    given = {"base": "me/base", "expert": "me/expert"} | {whose: value}
    with pytest.raises(CompressionError, match=rf"The {whose} is {value!r}, expected a Hub id or a folder"):
        run(given["base"], given["expert"], tmp_path / "delta")


def test_a_config_of_another_type(tmp_path):
    with pytest.raises(CompressionError, match="config is a dict, expected a MESwitchConfig"):
        run("me/base", "me/expert", tmp_path / "delta", {"bits": 2})


@pytest.mark.parametrize("device", ["abc", "cuda:99", 3.5])
def test_a_device_that_is_not_there(make_pair, tmp_path, device):
    with pytest.raises(CompressionError, match=rf"device is {device!r}, which cannot be used here"):
        run(*make_pair(), tmp_path / "delta", device=device)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"vocab_size": "abc"}, "StrictDataclassFieldValidationError"),
        ({"num_attention_heads": 0, "head_dim": None}, "ZeroDivisionError"),
        ({"rope_parameters": {"rope_type": "linear"}}, "KeyError"),
        ({"hidden_act": "nope"}, "KeyError"),
    ],
)
@pytest.mark.parametrize("whose", ["base", "expert"])
def test_configs_that_transformers_refuses(make_pair, tmp_path, changes, kind, whose):
    pair = make_pair()
    for folder in pair if "hidden_act" in changes else [pair[whose == "expert"]]:
        edit(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=rf"config.*{kind}"):
        run(*pair, tmp_path / "delta")


def test_a_config_that_is_no_object(make_pair, tmp_path):
    base, expert = make_pair()
    (expert / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json holds a JSON list"):
        run(base, expert, tmp_path / "delta")


@pytest.mark.parametrize("eos", ["</s>", [[1]], ["</s>"], True])
@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id"])
def test_tokens_that_are_no_ids(make_pair, tmp_path, eos, key):
    base, expert = make_pair()
    edit(expert / "generation_config.json", **{key: eos})
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        run(base, expert, tmp_path / "delta")


def test_a_generation_config_that_is_no_object(make_pair, tmp_path):
    base, expert = make_pair()
    (expert / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"generation_config\.json of the expert cannot be read"):
        run(base, expert, tmp_path / "delta")


@pytest.mark.parametrize("whose", ["base", "expert"])
def test_an_adapter_or_a_delta_is_called_what_it_is(make_pair, tmp_path, whose):
    base, expert = make_pair()
    delta = run(base, expert, tmp_path / "delta")
    lora = tmp_path / "lora"
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(lora)
    for folder, message in (
        (delta, "is a delta repo, expected a full.*meswitch merge"),
        (lora, r"is a PEFT adapter \(LORA\), expec.*merge_and_unload\(\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(*((folder, expert) if whose == "base" else (base, folder)), tmp_path / "out")


@pytest.mark.parametrize("with_config", [True, False])
def test_gguf_files_are_named(make_pair, tmp_path, with_config):
    base, expert = make_pair()
    folder = tmp_path / "quantised"
    folder.mkdir()
    (folder / "model-Q4.gguf").write_bytes(b"GGUF")
    if with_config:
        shutil.copy(base / "config.json", folder)
    for given in (folder, folder / "model-Q4.gguf"):
        with pytest.raises(
            CheckpointError, match=r"GGUF files hold quantised weights; give the unquantised checkpoint"
        ):
            run(given, expert, tmp_path / "delta")
    with pytest.raises(CheckpointError, match="is not a folder") as raised:
        run(base / "model.safetensors", expert, tmp_path / "delta")
    assert "GGUF" not in str(raised.value)


def test_code_in_a_repo_is_never_asked_for(make_pair, tmp_path, monkeypatch):
    base, expert = make_pair()
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    code = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"}
    edit(base / "config.json", auto_map=code)
    run(base, expert, tmp_path / "known")  # transformers has a llama of its own
    edit(base / "config.json", model_type="x-custom")
    with pytest.raises(UnsupportedModelError, match=r"model_type 'x-custom'.*the code in the repo is never run"):
        run(base, expert, tmp_path / "delta")


def test_models_that_are_no_causal_lms(tmp_path):
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    for name in ("base", "expert"):
        T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / name)
    with pytest.raises(UnsupportedModelError, match="no causal LM of model_type 't5'"):
        run(tmp_path / "base", tmp_path / "expert", tmp_path / "delta")


def test_a_copy_of_the_base_in_bfloat16_holds_equal_weights(make_pair, tmp_path):
    base, _ = make_pair()
    copy = tmp_path / "copy"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(copy)
    with pytest.raises(CompressionError, match="equal weights"):
        run(base, copy, tmp_path / "delta")


def test_weights_beyond_the_format_are_not_called_a_damaged_delta(make_pair, tmp_path):
    base, expert = make_pair()
    tensors = load_file(expert / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 3.4e38
    save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressionError, match=r"layers\.1\.mlp\.up_proj: the weight delta reaches 3\.4e\+38"):
        run(base, expert, tmp_path / "delta")
