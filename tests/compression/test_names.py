"""Checkpoint names of the Hub find their place in the model that transformers builds; guards names.py's internals."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from transformers_meswitch.compression.names import map_names
from transformers_meswitch.errors import CompressionError, UnsupportedModelError


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma3", "phi3", "gpt_neox"])
def test_saved_names_are_all_found(make_model, architecture, tmp_path):
    from transformers_meswitch.delta_format.checkpoint import resolve_checkpoint

    model = make_model(architecture)
    model.save_pretrained(tmp_path)
    checkpoint = resolve_checkpoint(tmp_path)
    names = map_names(model, checkpoint.names)
    assert names.unknown == ()
    assert set(names.checkpoint_name) == set(dict(model.named_parameters()))
    for canonical, name in names.checkpoint_name.items():
        assert torch.equal(checkpoint.tensor(name), model.get_parameter(canonical))


def test_gpt2_of_the_hub_lacks_the_prefix_and_has_masks(make_model):
    model = make_model("gpt2")
    hub = [name.removeprefix("transformer.") for name, _ in model.named_parameters()]
    names = map_names(model, [*hub, "h.0.attn.bias", "h.0.attn.masked_bias"])
    assert names.checkpoint_name["transformer.h.1.attn.c_attn.bias"] == "h.1.attn.c_attn.bias"
    assert set(names.checkpoint_name.values()) == set(hub)
    assert names.unknown == ()


def test_gpt_neox_of_the_hub_calls_the_head_embed_out(make_model):
    names = map_names(make_model("gpt_neox"), ["embed_out.weight", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"])
    assert names.checkpoint_name == {"lm_head.weight": "embed_out.weight"}
    assert names.unknown == ()


def test_unknown_names_are_told(make_model):
    names = map_names(make_model(), ["model.norm.weight", "score.weight", "model.layers.9.mlp.up_proj.weight"])
    assert names.unknown == ("model.layers.9.mlp.up_proj.weight", "score.weight")


def test_two_names_for_one_place_are_refused(make_model):
    with pytest.raises(CompressionError, match=r"model\.norm\.weight and norm\.weight are both model\.norm\.weight"):
        map_names(make_model(), ["model.norm.weight", "norm.weight"])


def test_fused_layers_are_refused_by_name():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=2))
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.0\.block_sparse_moe\.experts\.0\.w1\.weight becomes a part"
    ):
        map_names(model, ["model.layers.0.block_sparse_moe.experts.0.w1.weight"])
