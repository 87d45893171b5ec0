"""Pictures show the numbers that they are given, and the numbers are those of the files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures_models import dense_delta
from transformers_meswitch.channels import ChannelRanges, channel_ranges, default_layer
from transformers_meswitch.delta_format.reader import open_delta
from transformers_meswitch.errors import DeltaFormatError
from transformers_meswitch.inspection import Inspection, ModuleRow, inspect_delta
from transformers_meswitch.plotting import bytes_by_kind, delta_figure

LAYER = "model.layers.0.mlp.down_proj"


def inspection(errors: bool = True) -> Inspection:
    def linear(name, size, error):
        return ModuleRow(name, "linear", (4, 8), 2, 2, None, size, 64, error if errors else None)

    modules = [
        linear("model.layers.2.mlp.up_proj", 300, 0.25),
        linear("model.layers.10.mlp.up_proj", 400, 0.5),
        linear("model.layers.10.mlp.down_proj", 100, 0.75),
        linear("lm_head", 2000, 0.125),
        ModuleRow("model.layers.2.input_layernorm", "values", (8,), None, None, None, 20, 16),
        ModuleRow("model.norm", "values", (8,), None, None, None, 30, 16),
        ModuleRow("model.embed_tokens", "rows", (9, 8), None, None, 3, 90, 144),
    ]
    return Inspection("delta", None, "base", 1, modules, {"all": 3000}, 2940, 3000, None)


def channels() -> ChannelRanges:
    low, high = -torch.arange(1.0, 9.0), torch.arange(2.0, 10.0)
    return ChannelRanges(LAYER, low, high, torch.tensor([6, 1]), exact=True)


def test_bytes_add_up_by_kind():
    kinds = bytes_by_kind(inspection())
    assert list(kinds.items()) == [
        ("lm_head", 2000),
        ("mlp.up_proj", 700),
        ("mlp.down_proj", 100),
        ("embed_tokens", 90),
        ("norms", 50),
        ("headers, configuration", 60),
    ]
    assert sum(kinds.values()) == inspection().total_bytes


def test_default_layer_is_in_the_middle_of_those_with_salient_channels():
    rows = [
        ModuleRow(str(i), "linear", (4, 8), 2, salient, None, 1, 1) for i, salient in enumerate((0, 2, 2, 2, 0, 0, 0))
    ]
    assert default_layer(Inspection("", None, None, 1, rows, {}, 0, 0, None)) == "2"
    assert default_layer(Inspection("", None, None, 1, rows[4:], {}, 0, 0, None)) == "5"
    assert default_layer(Inspection("", None, None, 1, [], {}, 0, 0, None)) is None


@pytest.mark.parametrize("exact", [True, False])
def test_ranges_are_those_of_the_files(tiny_family, exact):
    base, expert, delta = tiny_family.base, tiny_family.experts["math"], tiny_family.deltas["math"]
    found = channel_ranges(open_delta(delta), LAYER, *((str(base), str(expert)) if exact else ()))
    prefix = f"base_model.model.{LAYER}.meswitch_delta."
    stored = load_file(delta / "adapter_model.safetensors")
    leaves = {key[len(prefix) :]: tensor for key, tensor in stored.items() if key.startswith(prefix)}
    record = json.loads((delta / "adapter_config.json").read_text())["modules"][LAYER]
    weights = dense_delta(record, leaves)
    if exact:
        of_expert, of_base = (load_file(p / "model.safetensors")[f"{LAYER}.weight"] for p in (expert, base))
        weights = of_expert - of_base
    torch.testing.assert_close(found.minimum, weights.min(dim=0).values)
    torch.testing.assert_close(found.maximum, weights.max(dim=0).values)
    assert found.minimum.shape == (record["in_features"],)
    assert found.salient.tolist() == leaves["salient_index"].tolist()
    assert (found.module, found.exact) == (LAYER, exact)
    other = channel_ranges(open_delta(delta), "model.layers.0.mlp.up_proj")
    assert other.minimum.shape != found.minimum.shape


def test_a_layer_that_is_not_there(tiny_family):
    with pytest.raises(DeltaFormatError, match=r"'model.norm' is no linear layer"):
        channel_ranges(open_delta(tiny_family.deltas["math"]), "model.norm")


def test_channels_as_drawn():
    pytest.importorskip("matplotlib")
    axes = delta_figure(inspection(), channels()).axes[0]
    coded, salient = axes.collections
    drawn = {int(x): (float(low), float(high)) for c in (coded, salient) for (x, low), (_, high) in c.get_segments()}
    assert drawn == {i: (-1.0 - i, 2.0 + i) for i in range(8)}
    assert [int(segment[0][0]) for segment in salient.get_segments()] == [1, 6]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["6 coded channels", "2 salient channels, kept in bfloat16"]
    assert LAYER in axes.get_title("left")
    assert "expert − base" in axes.get_title("left")
    assert axes.get_xlabel()
    assert axes.get_ylabel()


def test_a_reconstruction_is_labelled_as_one():
    pytest.importorskip("matplotlib")
    ranges = ChannelRanges(LAYER, torch.zeros(3), torch.zeros(3), torch.zeros(0, dtype=torch.int64), exact=False)
    axes = delta_figure(inspection(), ranges).axes[0]
    assert "reconstruction, not expert − base" in axes.get_title("left")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["3 coded channels"]


def test_errors_as_drawn():
    pytest.importorskip("matplotlib")
    axes = delta_figure(inspection(), channels()).axes[1]
    drawn = {line.get_label(): list(zip(*map(list, line.get_data()), strict=True)) for line in axes.lines}
    # Outside of the layers there is the output head, drawn after the last of them.
    assert drawn == {"mlp.up_proj": [(2, 0.25), (10, 0.5)], "mlp.down_proj": [(10, 0.75)], "lm_head": [(11, 0.125)]}
    styles = {(line.get_color(), line.get_marker()) for line in axes.lines}
    assert len(styles) == 3, "told apart without colour too"


def test_panels_without_data_are_left_out():
    pytest.importorskip("matplotlib")
    assert len(delta_figure(inspection(), channels()).axes) == 3
    assert len(delta_figure(inspection(errors=False), channels()).axes) == 2
    (axes,) = delta_figure(inspection(errors=False), None).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(bytes_by_kind(inspection()))
    assert [bar.get_width() for bar in axes.patches] == [size / 1000 for size in bytes_by_kind(inspection()).values()]
    assert "2 kB (66.7%)" in [text.get_text() for text in axes.texts]


def test_a_real_delta_has_a_picture(tiny_family, tmp_path):
    pytest.importorskip("matplotlib")
    base, expert, delta = map(str, (tiny_family.base, tiny_family.experts["math"], tiny_family.deltas["math"]))
    counted = inspect_delta(delta, base=base, expert=expert)
    ranges = channel_ranges(open_delta(delta), default_layer(counted), base, expert)
    figure = delta_figure(counted, ranges)
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 20_000
    assert figure.get_size_inches()[0] * figure.dpi >= 1200
