"""compress(): base + delta is the expert, whatever the checkpoints look like; and what is refused, by name."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from transformers_meswitch.compression import driver
from transformers_meswitch.compression.linear import reconstruct_linear
from transformers_meswitch.compression.recipe import compress
from transformers_meswitch.configuration import MESwitchConfig
from transformers_meswitch.delta_format.reader import open_delta, resolve_delta
from transformers_meswitch.delta_format.spec import tensor_key
from transformers_meswitch.errors import CheckpointError, CompressionError, UnsupportedModelError
from transformers_meswitch.inspection import inspect_delta

CONFIG = MESwitchConfig(bits=2, salient_channels=4)


def run(base, expert, out, config=CONFIG, **more):
    return open_delta(
        resolve_delta(str(compress(base, expert, out, config, progress=False, **{"calibration": None, **more})))
    )


def leaves(delta, module):
    return {leaf: delta.tensor(tensor_key(module, leaf)) for leaf in delta.records[module].leaves()}


def crude_error(delta, bits):
    """Squared error of each row with a step of the row's spread, which is close to best for a bell curve, in numpy."""
    step = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.335}[bits] * delta.std(1, keepdims=True)
    level = np.clip(np.floor(delta / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5
    return ((delta - level * step) ** 2).sum(1)


def tied(model):
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def check_is_expert(delta, base, expert, by_hand):
    """Each parameter of base + delta against the expert's; returns the linears that were checked."""
    checked = []
    for name, module in expert.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        theirs = {key: base.get_parameter(f"{name}.{key}").detach() for key in own}
        record = delta.records.get(name)
        if module is expert.get_output_embeddings() and tied(base) and tied(expert):
            assert record is None
            continue
        if record is None:
            assert all(torch.equal(own[key], theirs[key]) for key in own), name
            continue
        stored = leaves(delta, name)
        if record.kind == "rows":
            rows = torch.zeros(record.num_rows, record.width)
            shared = min(record.num_rows, len(theirs["weight"]))
            rows[:shared] = theirs["weight"][:shared]
            rows[stored["row_index"].long()] = stored["rows"]
            assert torch.equal(rows, own["weight"]), name
        elif record.kind == "quantized_rows":
            check_rows(record, stored, theirs["weight"], own["weight"].detach(), by_hand)
        elif record.kind == "values":
            for key in own:
                assert torch.equal(stored.get(f"values.{key}", theirs[key]), own[key]), name
        else:
            weight, base_weight = own["weight"].detach(), theirs["weight"]
            if type(module).__name__ == "Conv1D":
                weight, base_weight = weight.T, base_weight.T
            if "bias" in own:
                assert torch.equal(stored.get("bias", theirs["bias"]), own["bias"]), name
            found = reconstruct_linear(record, stored).numpy()
            np.testing.assert_allclose(found, by_hand(record, stored), rtol=1e-5, atol=1e-9)
            true = (weight - base_weight).numpy().astype(np.float64)
            assert ((found - true) ** 2).sum() < 1.02 * crude_error(true, record.bits).sum(), name
            checked.append(name)
    return checked


def check_rows(record, stored, base, expert, by_hand):
    """Exact rows are the expert's, coded ones nearly, all others the base's."""
    exact = stored["exact_index"].tolist() if record.exact_rows else []
    rest = [row for row in range(record.num_rows) if row not in exact]
    coded = stored["row_index"].tolist() if "row_index" in stored else rest
    assert len(coded) == record.coded_rows
    assert max(coded, default=-1) < len(base)
    for place, row in enumerate(exact):
        assert torch.equal(stored["rows"][place], expert[row])
    assert all(torch.equal(base[row], expert[row]) for row in rest if row not in coded)
    true = (expert[coded] - base[coded]).numpy().astype(np.float64)
    found = by_hand(record.as_linear(record.coded_rows), stored)
    assert ((found - true) ** 2).sum() < 1.02 * crude_error(true, record.bits).sum()


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("architecture", "vocabulary", "changes", "linears"),
    [
        ("llama", None, {"tie_word_embeddings": False, "attention_bias": True}, 14),
        ("llama", 88, {"tie_word_embeddings": True}, 14),
        ("llama", 72, {"tie_word_embeddings": False}, 14),
        ("gpt2", 83, {}, 8),
        ("qwen2", None, {}, 14),
        ("gemma3", None, {}, 14),
        ("phi3", None, {}, 8),
        ("gpt_neox", None, {}, 8),
    ],
)
def test_base_and_delta_are_the_expert(make_pair, tmp_path, by_hand, architecture, vocabulary, changes, linears):
    base, expert = make_pair(architecture, vocabulary, **changes)
    delta = run(base, expert, tmp_path / "delta")
    models = load(base), load(expert)
    assert len(check_is_expert(delta, *models, by_hand)) == linears
    assert delta.config.vocab_size == (vocabulary or 80)
    assert delta.config.tie_word_embeddings is models[1].config.tie_word_embeddings
    assert delta.config.base_model_type == models[0].config.model_type
    assert not list((tmp_path / "delta").glob(".*"))


def test_the_check_notices_a_wrong_delta(make_pair, tmp_path, by_hand, fine_tune):
    base, expert = make_pair()
    delta = run(base, expert, tmp_path / "delta")
    with pytest.raises(AssertionError):
        check_is_expert(delta, load(base), fine_tune(load(expert), seed=3, scale=0.005), by_hand)


def test_gpt2_as_on_the_hub(make_pair, tmp_path, by_hand, edit_checkpoint):
    base, expert = make_pair("gpt2")
    models = load(base), load(expert)

    def as_on_the_hub(tensors):
        renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        return renamed | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}

    edit_checkpoint(base, as_on_the_hub)
    delta = run(base, expert, tmp_path / "delta")
    assert "transformer.h.0.attn.c_attn" in delta.records
    assert len(check_is_expert(delta, *models, by_hand)) == 8


@pytest.mark.parametrize("base_tied", [False, True])
def test_weight_tying_may_differ(tmp_path, make_model, fine_tune, by_hand, base_tied):
    base = make_model(tie_word_embeddings=base_tied)
    expert = fine_tune(make_model(tie_word_embeddings=not base_tied))
    base.save_pretrained(tmp_path / "base")
    expert.save_pretrained(tmp_path / "expert")
    delta = run(tmp_path / "base", tmp_path / "expert", tmp_path / "delta")
    assert delta.config.tie_word_embeddings is not base_tied
    if base_tied:
        assert delta.records["lm_head"].coded_rows == delta.records["model.embed_tokens"].coded_rows == 80
    else:  # one matrix, which two quantised deltas against two bases would take apart
        assert delta.records["lm_head"].rows == delta.records["model.embed_tokens"].rows == 80
    check_is_expert(delta, load(tmp_path / "base"), load(tmp_path / "expert"), by_hand)


def test_a_tied_config_with_a_head_of_its_own_is_untied_as_in_transformers(
    make_pair, tmp_path, by_hand, edit_checkpoint
):
    base, expert = make_pair(tie_word_embeddings=True)
    edit_checkpoint(expert, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2})
    edit_checkpoint(base, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    delta = run(base, expert, tmp_path / "delta")
    assert delta.config.tie_word_embeddings is False
    assert delta.records["lm_head"].coded_rows == 80
    check_is_expert(delta, load(base), load(expert), by_hand)


def test_sharded_and_half_precision(make_model, fine_tune, tmp_path):
    base, expert = make_model(), fine_tune(make_model())
    for name, model in (("base", base), ("expert", expert)):
        model.to(torch.bfloat16).save_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / f"{name}-sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "base-sharded").glob("*.safetensors"))) > 2
    whole = run(tmp_path / "base", tmp_path / "expert", tmp_path / "one")
    sharded = run(tmp_path / "base-sharded", tmp_path / "expert-sharded", tmp_path / "two")
    assert sorted(whole.keys()) == sorted(sharded.keys())
    assert all(torch.equal(whole.tensor(key), sharded.tensor(key)) for key in whole.keys())  # noqa: SIM118
    assert whole.config.base_fingerprint == sharded.config.base_fingerprint
    assert whole.tensor(tensor_key("model.norm", "values.weight")).dtype == torch.bfloat16


def test_unchanged_modules_are_not_stored(make_pair, tmp_path, edit_checkpoint):
    base, expert = make_pair()
    load(base).save_pretrained(expert)

    def nudge(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] += 0.01

    edit_checkpoint(expert, nudge)
    assert list(run(base, expert, tmp_path / "delta").records) == ["model.layers.1.mlp.up_proj"]


def test_configuration_and_assets(make_pair, tmp_path, tokenizer, monkeypatch):
    base, expert = make_pair()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(expert)
    (expert / "README.md").write_text("---\nlicense: apache-2.0\n---\nAn expert.\n")
    (expert / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "temperature": 0.5}))
    monkeypatch.chdir(tmp_path)
    config = MESwitchConfig(bits=3, salient_channels=0, layer_bits={"q_proj": 1})
    delta = run("base", "expert", "delta", config)
    assert delta.config.base_model_name_or_path == str(base)
    assert delta.config.expert_model_name_or_path is None, "a path of this machine would be published"
    assert delta.config.eos_token_id == [2, 5]
    assert delta.config.pad_token_id == 0
    assert (delta.config.task_type, delta.config.inference_mode) == ("CAUSAL_LM", True)
    assert (delta.config.saliency, delta.config.bits, delta.config.salient_channels) == ("weight", 3, 0)
    assert delta.records["model.layers.0.self_attn.q_proj"].bits == 1
    assert delta.records["model.layers.0.self_attn.k_proj"].bits == 3
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "delta" / name).read_bytes() == (expert / name).read_bytes()
    card = (tmp_path / "delta" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert str(tmp_path) not in card


def test_generation_config_is_made_where_there_is_none(make_pair, tmp_path):
    base, expert = make_pair()
    (expert / "generation_config.json").unlink()
    delta = run(base, expert, tmp_path / "delta")
    assert delta.config.eos_token_id == [2]
    assert json.loads((tmp_path / "delta" / "generation_config.json").read_text())["eos_token_id"] == 2


def test_what_people_wrote_into_the_card_stays(make_pair, tmp_path):
    base, expert = make_pair()
    out = compress(base, expert, tmp_path / "delta", CONFIG, calibration=None, progress=False)
    card = (out / "README.md").read_text()
    (out / "README.md").write_text(card + "\nWritten by hand.\n")
    compress(base, expert, out, MESwitchConfig(bits=4), calibration=None, progress=False)
    card = (out / "README.md").read_text()
    assert "Written by hand." in card
    assert "4-bit" in card


def test_calibration_changes_the_choice_and_is_recorded(make_pair, tmp_path, tokenizer):
    base, expert = make_pair()
    tokenizer.save_pretrained(expert)
    texts = ["abcdefgh" * 8, "the quick brown fox"]
    delta = run(base, expert, tmp_path / "delta", calibration=texts)
    plain = run(base, expert, tmp_path / "plain")
    assert delta.config.saliency == "reconstruction"
    name = "model.layers.1.mlp.down_proj"
    assert not torch.equal(leaves(delta, name)["salient_index"], leaves(plain, name)["salient_index"])
    with pytest.raises(CompressionError, match="has 3 tokens, expected at least 32"):
        compress(base, expert, tmp_path / "short", CONFIG, ["abc"], progress=False)
    assert not (tmp_path / "short").exists()


def test_calibration_without_a_tokenizer_is_refused(make_pair, tmp_path):
    base, expert = make_pair()
    with pytest.raises(CompressionError, match="Calibration needs the tokenizer"):
        compress(base, expert, tmp_path / "delta", CONFIG, ["abc"], progress=False)


def test_nothing_is_written_when_it_fails_midway(make_pair, tmp_path, monkeypatch):
    base, expert = make_pair()
    out = tmp_path / "delta"
    whole = driver.compress_modules

    def breaks(*args, **kwargs):
        yield next(whole(*args, **kwargs))
        raise RuntimeError("the machine went away")

    monkeypatch.setattr(driver, "compress_modules", breaks)
    with pytest.raises(RuntimeError, match="went away"):
        compress(base, expert, out, CONFIG, calibration=None, progress=False)
    assert not out.exists()
    monkeypatch.undo()
    compress(base, expert, out, CONFIG, calibration=None, progress=False)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(driver, "compress_modules", breaks)
    with pytest.raises(RuntimeError, match="went away"):
        compress(base, expert, out, MESwitchConfig(bits=4), calibration=None, progress=False)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_one_pair_of_modules_is_open_at_a_time(make_pair, tmp_path, monkeypatch):
    """What is read of a checkpoint is dropped before the next module is read."""
    import weakref

    from transformers_meswitch.compression.sources import CheckpointParameters

    base, expert = make_pair()
    seen, most = [], 0
    original = CheckpointParameters.of

    def of(self, module):
        nonlocal most
        found = original(self, module)
        seen.extend(weakref.ref(tensor) for tensor in found.values() if tensor.ndim == 2)
        most = max(most, sum(ref() is not None for ref in seen))
        return found

    monkeypatch.setattr(CheckpointParameters, "of", of)
    compress(base, expert, tmp_path / "delta", CONFIG, calibration=None, progress=False)
    assert len(seen) > 20
    # the pair at work, and the pair before it until its names are bound anew
    assert most <= 4


@pytest.mark.parametrize("whose", ["base", "expert"])
def test_nan_names_the_tensor(make_pair, tmp_path, edit_checkpoint, whose):
    pair = dict(zip(("base", "expert"), make_pair(), strict=True))

    def poison(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")

    edit_checkpoint(pair[whose], poison)
    with pytest.raises(CompressionError, match=rf"layers\.1\.mlp\.up_proj\.weight of the {whose} holds NaN"):
        run(pair["base"], pair["expert"], tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_other_architectures_are_refused(tmp_path, make_model):
    make_model().save_pretrained(tmp_path / "base")
    others = {
        "gpt2": (make_model("gpt2"), "model_type 'gpt2'"),
        "wide": (
            make_model(intermediate_size=100),
            r"intermediate_size is 100 in the expert but 96 in the base",
        ),
        "deep": (make_model(num_hidden_layers=3), r"num_hidden_layers is 3 in the expert but 2 in the base"),
        "bias": (make_model(attention_bias=True), r"attention_bias is True in the expert but False in the base"),
    }
    for name, (model, message) in others.items():
        model.save_pretrained(tmp_path / name)
        with pytest.raises(CompressionError, match=message):
            run(tmp_path / "base", tmp_path / name, tmp_path / "delta")
        assert not (tmp_path / "delta").exists()


def test_equal_weights_and_bad_folders_are_refused(make_pair, tmp_path):
    base, expert = make_pair()
    load(base).save_pretrained(tmp_path / "copy")
    with pytest.raises(CompressionError, match="equal weights"):
        run(base, tmp_path / "copy", tmp_path / "delta")
    for folder in (base, expert):
        with pytest.raises(CompressionError, match="own folder"):
            run(base, expert, folder)
    with pytest.raises(CompressionError, match=r"holds a config\.json"):
        run(base, expert, tmp_path / "copy")
    with pytest.raises(CompressionError, match="the config names 'other/base'"):
        run(base, expert, tmp_path / "delta", MESwitchConfig("other/base"))
    with pytest.raises(CheckpointError, match="nowhere"):
        run(base, tmp_path / "nowhere", tmp_path / "delta")


def test_incomplete_and_overfull_checkpoints_are_refused(make_pair, tmp_path, edit_checkpoint):
    base, expert = make_pair(tie_word_embeddings=False)
    edit_checkpoint(expert, lambda tensors: tensors | {"score.weight": torch.ones(2)})
    with pytest.raises(UnsupportedModelError, match=r"has a tensor score\.weight"):
        run(base, expert, tmp_path / "delta")
    edit_checkpoint(base, lambda tensors: tensors | {"score.weight": torch.ones(2)})
    run(base, expert, tmp_path / "same")

    edit_checkpoint(
        expert, lambda tensors: {k: v for k, v in tensors.items() if k != "model.layers.0.mlp.up_proj.weight"}
    )
    with pytest.raises(CompressionError, match=r"no tensor for model\.layers\.0\.mlp\.up_proj\.weight"):
        run(base, expert, tmp_path / "delta")


def test_quantised_and_unreadable_configs_are_refused(make_pair, tmp_path):
    base, expert = make_pair()
    path = expert / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(CompressionError, match="quantised checkpoint"):
        run(base, expert, tmp_path / "delta")
    path.write_text(json.dumps(content | {"model_type": "no-such-model"}))
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        run(base, expert, tmp_path / "delta")


def test_files_hold_exactly_what_the_table_announces(make_pair, tmp_path):
    base, expert = make_pair(vocabulary=90)
    delta = run(base, expert, tmp_path / "delta", MESwitchConfig(bits=3, salient_channels=5, column_steps=True))
    stored = load_file(tmp_path / "delta" / "adapter_model.safetensors")
    announced = {
        tensor_key(name, leaf): shape for name, r in delta.records.items() for leaf, (_, shape) in r.leaves().items()
    }
    assert {key: tuple(tensor.shape) for key, tensor in stored.items()} == announced


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_card_inspection_and_a_resave_state_the_same_full_copy(make_pair, tmp_path, dtype):
    """The size in 16 bit, whatever dtype the fine-tune's files have."""
    base, expert = make_pair(vocabulary=88)
    model = load(expert)
    model.to(dtype).save_pretrained(expert)
    compress(base, expert, tmp_path / "delta", CONFIG, calibration=None, progress=False)
    stated = inspect_delta(tmp_path / "delta").dense_bytes
    assert stated == 2 * sum(parameter.numel() for parameter in model.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
    loaded.save_pretrained(tmp_path / "again")
    for folder in (tmp_path / "delta", tmp_path / "again"):
        assert f"| the fine-tuned model in full, 16 bit | {stated:,} |" in (folder / "README.md").read_text()
