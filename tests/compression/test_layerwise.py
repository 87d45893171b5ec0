"""Layer by layer against hooks on the whole model, on every supported architecture, sample by sample."""

import logging

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.models.architectures import ARCHITECTURES, VOCABULARY, build
from transformers_meswitch.compression import layered_model
from transformers_meswitch.compression.batches import CalibrationBatches, pack
from transformers_meswitch.compression.layered_model import LayeredModel, decoder_layers
from transformers_meswitch.compression.layerwise import LayerwiseMoments
from transformers_meswitch.compression.sources import LiveParameters, output_head

MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
CASES = [(name, {**(MIXED if name.startswith("gemma") else {})}) for name in ARCHITECTURES]
CASES += [("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}})]


def sequences():
    generator = torch.Generator().manual_seed(3)
    lengths = (3, 9, 17, 33, 40, 5, 64, 1)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def calibration():
    rows = sequences()
    # Batches of up to three rows, so that shapes repeat and differ, with padding and without.
    batches = tuple(pack(rows, max_length=64, batch_tokens=96))
    assert len(batches) > len({tuple(batch.ids.shape) for batch in batches}) > 1
    return CalibrationBatches(batches, len(rows), sum(map(len, rows)))


def by_hooks(model, rows):
    """``E[x xᵀ]`` in float64: one sample at a time, without padding, hooks that know nothing of the package."""
    inputs, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].flatten(0, -2).double())
                )
            )
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row]))
    for handle in handles:
        handle.remove()
    joined = {name: torch.cat(found) for name, found in inputs.items()}
    return {name: x.T @ x / len(x) for name, x in joined.items()}


def collector(model, **changes):
    settings = {"device": "cpu", "dtype": torch.float32, "progress": False}
    return LayerwiseMoments(model.config, LiveParameters(model), calibration(), **settings | changes)


def linears(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def check_all(moments, model, expected):
    for name in linears(model):
        found = moments.get(name)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected[name], rtol=2e-4, atol=1e-6, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("architecture", "changes"), CASES)
def test_moments_are_those_of_the_whole_model(architecture, changes, tied, caplog):
    model = build(architecture, tied, num_hidden_layers=3, **changes)
    assert len(decoder_layers(model)[1]) == 3
    expected = by_hooks(model, sequences())
    assert output_head(model) in expected
    with caplog.at_level(logging.WARNING):
        check_all(collector(model), model, expected)
    assert not caplog.records, "it was not run layer by layer"


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_moments_on_a_gpu_are_those_on_a_cpu(architecture):
    changes = MIXED if architecture.startswith("gemma") else {}
    model = build(architecture, tied=False, num_hidden_layers=3, **changes)
    expected = by_hooks(model, sequences())
    exact, half = (collector(model, device="cuda", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for name in linears(model):
        moment, rough = exact.get(name), half.get(name)
        assert moment.device.type == rough.device.type == "cuda"
        assert moment.dtype == rough.dtype == torch.float32
        reference = expected[name].float()
        torch.testing.assert_close(moment.cpu(), reference, rtol=1e-3, atol=1e-5)
        assert (rough.cpu() - reference).norm() < 0.1 * reference.norm(), name


def test_the_check_notices_wrong_moments():
    model = build("llama", tied=False)
    expected = by_hooks(model, sequences()[:-2])
    with pytest.raises(AssertionError, match="self_attn"):
        check_all(collector(model), model, expected)


def test_one_layer_is_in_memory_at_a_time(monkeypatch):
    model = build("llama", tied=True, num_hidden_layers=4)
    moments = collector(model)
    loaded = []
    original = LayerwiseMoments._run_layer

    def spy(self, *args):
        original(self, *args)
        assert all(p.is_meta for p in self._run.model.parameters())

    def load(self, name, *more, original=LayeredModel.load):
        original(self, name, *more)
        loaded.append({n.split(".")[2] for n, p in self.model.named_parameters() if "layers" in n and not p.is_meta})

    monkeypatch.setattr(LayerwiseMoments, "_run_layer", spy)
    monkeypatch.setattr(LayeredModel, "load", load)
    for name in linears(model):
        moments.get(name)
    assert len(moments._held) == 1, "the head's alone, after the last layer"
    assert {len(layers) for layers in loaded} == {0, 1}
    assert {layer for layers in loaded for layer in layers} == set("0123")


def test_what_is_outside_the_layers_is_read_once_whatever_the_number_of_batches(monkeypatch):
    read = []
    original = LiveParameters.of
    monkeypatch.setattr(LiveParameters, "of", lambda self, module: read.append(module) or original(self, module))
    model = build("llama", tied=False)
    moments = collector(model)
    moments.get("model.layers.0.self_attn.q_proj")
    assert len(calibration().batches) > 1
    assert read.count("model.embed_tokens") == 1
    moments.get("lm_head")
    # What comes before and what comes after are both run by the whole model's forward pass, once each.
    assert (read.count("model.embed_tokens"), read.count("model.norm")) == (2, 2)


def test_linears_with_one_input_share_a_matrix():
    model = build("llama", tied=True)
    moments = collector(model)
    name = "model.layers.1.self_attn.{}_proj"
    query, key, value, out = (moments.get(name.format(which)) for which in "qkvo")
    assert query is key is value
    assert out is not query
    assert moments.get("model.layers.1.mlp.gate_proj") is moments.get("model.layers.1.mlp.up_proj")


def test_layers_nobody_asks_about_are_passed_and_none_can_be_asked_about_again(monkeypatch):
    model = build("qwen2", tied=True, num_hidden_layers=3)
    expected = by_hooks(model, sequences())
    moments = collector(model)
    name = "model.layers.2.mlp.down_proj"
    torch.testing.assert_close(moments.get(name).double(), expected[name], rtol=2e-4, atol=1e-6)
    with pytest.raises(ValueError, match="after a later layer"):
        moments.get("model.layers.0.mlp.down_proj")
    assert moments.get("model.norm") is None
    assert moments.get("model.embed_tokens") is None


@pytest.mark.parametrize("rest", [(), (None,)])
def test_layers_that_return_tuples(monkeypatch, rest):
    """As those of older models do; the model takes the tuple apart."""
    model = build("llama", tied=True)
    expected = by_hooks(model, sequences())
    layer, whole = type(model.model.layers[0]), type(model.model)
    forward, call, run = layer.forward, layer.__call__, whole.forward
    in_model, returned = [], set()

    def in_whole(self, *args, **kwargs):
        in_model.append(True)
        try:
            return run(self, *args, **kwargs)
        finally:
            in_model.pop()

    def taken_apart(self, *args, **kwargs):
        output = call(self, *args, **kwargs)
        returned.add(type(output))
        return output[0] if in_model else output

    monkeypatch.setattr(layer, "forward", lambda self, *args, **kwargs: (forward(self, *args, **kwargs), *rest))
    monkeypatch.setattr(layer, "__call__", taken_apart)
    monkeypatch.setattr(whole, "forward", in_whole)
    moments = collector(model)
    check_all(moments, model, expected)
    assert returned == {tuple}
    assert not moments._whole


def breaking(kind):
    """Ways in which a model's layers depend on each other beside the hidden states."""
    if kind == "between":
        return lambda model: model.model.layers[0].register_forward_hook(lambda *args: args[-1] * 1.5)
    if kind == "cache":
        return lambda model: model.model.layers[1].register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"shared": {}}), with_kwargs=True
        )
    return lambda model: model.model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"extra": args[0].mean(2)}), with_kwargs=True
    )


@pytest.mark.parametrize("kind", ["between", "cache", "tokens"])
def test_models_that_do_more_between_layers_are_run_whole(kind, monkeypatch, caplog):
    model = build("llama", tied=False)
    moments = collector(model)
    for changed in (model, moments._run.model):
        breaking(kind)(changed)
    expected = by_hooks(model, sequences())
    with caplog.at_level(logging.WARNING):
        check_all(moments, model, expected)
    assert "is loaded whole for calibration" in caplog.text
    assert all(p.is_meta for p in moments._run.model.parameters())


def test_a_model_without_a_list_of_layers_is_run_whole(monkeypatch, caplog):
    model = build("gpt2", tied=True)
    expected = by_hooks(model, sequences())
    monkeypatch.setattr(layered_model, "decoder_layers", lambda model: None)
    with caplog.at_level(logging.WARNING):
        check_all(collector(model), model, expected)
    assert "it has no list of alike decoder layers" in caplog.text


def test_layers_are_found_only_where_they_are_certain():
    model = build("llama", tied=True)
    assert decoder_layers(model)[0] == "model.layers"
    model.other = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    assert decoder_layers(model) is None
    mixed = build("llama", tied=True)
    mixed.model.layers[1] = nn.Linear(1, 1)
    assert decoder_layers(mixed) is None
