"""What an error does to a layer's output, and what is predicted, against hooks on the whole model."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.models.architectures import ARCHITECTURES, VOCABULARY, build
from transformers_meswitch.compression import layered_model
from transformers_meswitch.compression.batches import CalibrationBatches, pack, spread
from transformers_meswitch.compression.layered_model import decoder_layers
from transformers_meswitch.compression.layerwise import LayerwiseMoments
from transformers_meswitch.compression.sources import LiveParameters, output_head


def text():
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (3, 9, 17, 33, 40, 5, 64, 2)]
    return CalibrationBatches(tuple(pack(rows, max_length=64, batch_tokens=96)), len(rows), sum(map(len, rows)))


def rows_of(batches):
    return [ids[:n].tolist() for batch in batches for ids, n in zip(batch.ids, batch.lengths.tolist(), strict=True)]


def moments_of(model, probe=(), **changes):
    settings = {"device": "cpu", "dtype": torch.float32, "progress": False}
    return LayerwiseMoments(model.config, LiveParameters(model), text(), probe=probe, **settings | changes)


def layer_outputs(model, layer, rows):
    """One sample at a time, without padding: float64 ``[tokens, hidden]``."""
    seen = []
    handle = layer.register_forward_hook(
        lambda _, args, output: seen.append((output[0] if isinstance(output, tuple) else output).flatten(0, -2))
    )
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row]))
    handle.remove()
    return torch.cat(seen).double()


def by_hooks(model, layer, module, error, rows):
    before = layer_outputs(model, layer, rows)
    change = error.T if isinstance(module, Conv1D) else error
    with torch.no_grad():
        module.weight += change
        after = layer_outputs(model, layer, rows)
        module.weight -= change
    return float(((after - before).square().sum(1) / before.square().sum(1)).mean())


def errors(model, name):
    module = model.get_submodule(name)
    shape = module.weight.T.shape if isinstance(module, Conv1D) else module.weight.shape
    return 0.03 * torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_damage_is_that_in_the_whole_model(architecture):
    model = build(architecture, tied=False, num_hidden_layers=3)
    probe = spread(text().batches, 60)
    rows = rows_of(probe)
    assert 1 < len(rows) < 8
    moments = moments_of(model, probe)
    prefix, layers = decoder_layers(model)
    plain = moments_of(model)
    for i, layer in enumerate(layers):
        for name in (f"{prefix}.{i}.{n}" for n, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)):
            torch.testing.assert_close(moments.get(name), plain.get(name), rtol=0, atol=0, msg="the probe is counted")
            error = errors(model, name)
            expected = by_hooks(model, layer, model.get_submodule(name), error, rows)
            assert moments.damage(name, error) == pytest.approx(expected, rel=2e-3), name
            # Nothing is left of it.
            assert moments.damage(name, error) == pytest.approx(expected, rel=2e-3), name
    assert moments.get(output_head(model)) is not None
    assert all(p.is_meta for p in moments._run.model.parameters())


def test_the_check_notices_another_layer():
    model = build("llama", tied=False)
    probe = spread(text().batches, 60)
    moments = moments_of(model, probe)
    name = "model.layers.1.mlp.up_proj"
    moments.get(name)
    layer, error = model.model.layers[0], errors(model, name)
    wrong = by_hooks(model, layer, layer.mlp.up_proj, error, rows_of(probe))
    assert moments.damage(name, error) != pytest.approx(wrong, rel=2e-3)


def test_small_errors_do_not_drown_in_the_rounding_of_16_bits():
    model = build("llama", tied=False)
    probe = spread(text().batches, 60)
    name = "model.layers.0.mlp.down_proj"
    error = 1e-4 * errors(model, name)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        moments = moments_of(model, probe, dtype=dtype)
        moments.get(name)
        found.append(moments.damage(name, error))
    assert found[0] == pytest.approx(found[1], rel=0.05)


def test_where_there_is_no_layer_or_no_probe(monkeypatch, caplog):
    model = build("gpt2", tied=True)
    name = "transformer.h.0.mlp.c_fc"
    without = moments_of(model)
    without.get(name)
    assert without.damage(name, errors(model, name)) is None
    probed = moments_of(model, text().batches)
    probed.get(name)
    assert probed.damage("transformer.h.1.mlp.c_fc", errors(model, name)) is None
    monkeypatch.setattr(layered_model, "decoder_layers", lambda model: None)
    whole = moments_of(model, text().batches)
    assert whole.get(name) is not None
    assert whole.damage(name, errors(model, name)) is None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_predictions_are_the_models_own(architecture, tied):
    model = build(architecture, tied, num_hidden_layers=3)
    moments = moments_of(model)
    for _ in range(2):
        for batch, logits in zip(text().batches, moments.predictions(), strict=True):
            with torch.no_grad():
                expected = model(input_ids=batch.ids).logits
            torch.testing.assert_close(logits[batch.real], expected[batch.real], rtol=1e-4, atol=1e-4)
    assert all(p.is_meta for p in moments._run.model.parameters())


def test_predictions_of_a_model_that_is_run_whole(monkeypatch):
    model = build("gpt2", tied=True)
    monkeypatch.setattr(layered_model, "decoder_layers", lambda model: None)
    batch, logits = text().batches[0], next(moments_of(model).predictions())
    with torch.no_grad():
        torch.testing.assert_close(logits, model(input_ids=batch.ids).logits, rtol=1e-4, atol=1e-4)
