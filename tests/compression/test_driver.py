"""The loop that producers share: live models and checkpoints give one delta; layers without a place are refused."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from transformers_meswitch.compression.driver import compress_modules
from transformers_meswitch.compression.recipe import compress
from transformers_meswitch.compression.sources import CheckpointParameters, LiveParameters, meta_model, output_head
from transformers_meswitch.configuration import MESwitchConfig
from transformers_meswitch.delta_format.checkpoint import resolve_checkpoint
from transformers_meswitch.errors import UnsupportedModelError

CONFIG = MESwitchConfig(bits=2, salient_channels=3)


def modules(model, base, expert, **more):
    found = compress_modules(model, base, expert, CONFIG, progress=False, **more)
    return {name: (record, leaves) for name, record, leaves in found}


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_live_models_and_checkpoints_give_one_delta(make_pair, architecture, tie):
    folders = make_pair(architecture, 85, tie_word_embeddings=tie)
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders]
    live = modules(models[1], *map(LiveParameters, models))
    sources = [
        CheckpointParameters(meta_model(m.config), resolve_checkpoint(f)) for m, f in zip(models, folders, strict=True)
    ]
    read = modules(meta_model(models[1].config), *sources)
    mixed = modules(models[1], sources[0], LiveParameters(models[1]))
    assert list(live) == list(read) == list(mixed)
    assert ("lm_head" in live) is not tie
    for name, (record, leaves) in live.items():
        for other_record, other in (read[name], mixed[name]):
            assert record == other_record
            assert all(torch.equal(leaves[leaf], other[leaf]) for leaf in leaves)


def test_second_moments_reach_their_linear(make_pair):
    folders = make_pair()
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders]
    name = "model.layers.0.mlp.up_proj"
    moment = torch.zeros(64)
    moment[[5, 20, 40]] = 1.0
    plain = modules(models[1], *map(LiveParameters, models))
    weighed = modules(models[1], *map(LiveParameters, models), second_moments={name: torch.diag(moment)})
    assert weighed[name][1]["salient_index"].tolist() == [5, 20, 40]
    changed = {
        key for key in plain if not torch.equal(*(m[key][1].get("codes", torch.zeros(1)) for m in (plain, weighed)))
    }
    assert changed == {name}


@pytest.mark.parametrize("tie", [False, True])
def test_the_second_moment_of_the_heads_inputs_goes_to_its_rows(make_pair, tie):
    folders = make_pair(tie_word_embeddings=tie)
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders]
    moment = torch.zeros(64)
    moment[[5, 20, 40]] = 1.0
    found = modules(models[1], *map(LiveParameters, models), second_moments={"lm_head": moment})
    plain = modules(models[1], *map(LiveParameters, models))
    # A tied matrix is stored as the embedding, and loses most as the head; an untied embedding has no inputs to weigh.
    name = "model.embed_tokens" if tie else "lm_head"
    assert found[name][1]["salient_index"].tolist() == [5, 20, 40]
    changed = {
        key for key in plain if not torch.equal(*(m[key][1].get("codes", torch.zeros(1)) for m in (plain, found)))
    }
    assert changed == {name}


@pytest.mark.parametrize(
    ("options", "embedding", "head"),
    [
        ({}, 3, 3),
        ({"embedding_bits": 2}, 2, 2),
        ({"embedding_bits": 1, "layer_bits": {"^lm_head$": 4}}, 1, 4),
        ({"embedding_bits": None, "layer_bits": {"lm_head": 4}}, None, None),
    ],
)
def test_bits_of_embedding_and_head(make_pair, options, embedding, head):
    folders = make_pair(tie_word_embeddings=False)
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders]
    how = MESwitchConfig(bits=2, salient_channels=3, **options)
    found = {name: r for name, r, _ in compress_modules(models[1], *map(LiveParameters, models), how, progress=False)}
    for name, bits in (("model.embed_tokens", embedding), ("lm_head", head)):
        assert found[name].kind == ("rows" if bits is None else "quantized_rows")
        assert getattr(found[name], "bits", None) == bits
    assert found["model.layers.0.mlp.up_proj"].bits == 2


def test_a_bias_of_a_tied_head_has_no_place(make_model):
    base, expert = make_model(tie_word_embeddings=True), make_model(tie_word_embeddings=True)
    for model, value in ((base, 0.0), (expert, 1.0)):
        model.lm_head.bias = nn.Parameter(torch.full((80,), value))
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.bias differs"):
        modules(expert, LiveParameters(base), LiveParameters(expert))
    assert modules(expert, LiveParameters(expert), LiveParameters(expert)) == {}


def test_mixture_of_experts_is_refused_by_name(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name in ("base", "expert"):
        config = MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=2, vocab_size=40)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\."):
        compress(tmp_path / "base", tmp_path / "expert", tmp_path / "delta", CONFIG, calibration=None, progress=False)
    assert not (tmp_path / "delta").exists()


def test_output_head_is_found_by_identity(make_model):
    assert output_head(make_model("gpt2")) == "lm_head"
    assert output_head(make_model("gpt_neox")) in ("lm_head", "embed_out")
