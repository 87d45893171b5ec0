"""Which linears write into the stream: on every supported architecture, and on layers made to be misread."""

import pytest
import torch
from torch import nn

from tests.models.architectures import ARCHITECTURES, build
from transformers_meswitch.compression.batches import pack
from transformers_meswitch.compression.layered_model import LayeredModel
from transformers_meswitch.compression.residual_stream import wiring_of
from transformers_meswitch.compression.sources import LiveParameters

LLAMA = (
    ["self_attn.o_proj", "mlp.down_proj"],
    [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ],
)
PHI3 = (
    ["self_attn.o_proj", "mlp.down_proj"],
    [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
)
GPT2 = (
    ["attn.c_proj", "mlp.c_proj"],
    [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
)
NEOX = (
    ["attention.dense", "mlp.dense_4h_to_h"],
    [["attention.query_key_value"], ["attention.dense"], ["mlp.dense_h_to_4h"], ["mlp.dense_4h_to_h"]],
)
#: Norms after the linears.
NONE = ("gemma2", "gemma3_text")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_supported_architectures(architecture):
    model = build(architecture, tied=False)
    batches = list(pack([[3, 4, 5, 6, 7], [8, 9]], max_length=32))
    run = LayeredModel(model.config, LiveParameters(model), batches, device="cpu", dtype=torch.float32, progress=False)
    run.embed()
    prefix = next(iter(run.linears(1))).split(".0.")[0] + ".0."
    with run.loaded(run.layers[0]):
        wiring = wiring_of(run.layers[0], run.linears(1), *run.call(1, 0))
    if architecture in NONE:
        assert wiring is None
        return
    writers, groups = {"phi3": PHI3, "gpt2": GPT2, "gpt_neox": NEOX}.get(architecture, LLAMA)
    assert wiring.writers == [prefix + name for name in writers]
    assert wiring.groups == [[prefix + name for name in group] for group in groups]
    assert wiring.written_before(wiring.writers[1]) == wiring.writers[:1]
    assert wiring.group_of(prefix + groups[0][-1])[0] == prefix + groups[0][0]


class Layer(nn.Module):
    """Two linears; ``how`` says what becomes of their outputs."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden):
        one = self.up(self.norm(hidden))
        if self.how == "one after the other":
            hidden = hidden + one
            return hidden + self.down(self.norm(hidden))
        if self.how == "the second alone":
            return hidden + self.down(one.relu())
        if self.how == "scaled":
            return hidden + 0.5 * self.down(one.relu())
        if self.how == "normed":
            return hidden + self.norm(self.down(one.relu()))
        if self.how == "side by side":
            return hidden + (one + self.down(self.norm(hidden)))
        if self.how == "side by side, the second first":
            return self.down(self.norm(hidden)) + hidden + one
        if self.how == "side by side, in place":
            other = self.down(self.norm(hidden))
            other += one
            return other + hidden
        if self.how == "into its input":
            hidden += self.down(one.relu())
            return hidden
        if self.how == "less, not more":
            return hidden - self.down(one.relu())
        if self.how == "no stream":
            return self.down(one.relu())
        if self.how == "more behind":
            return (hidden + self.down(one.relu())).tanh()
        if self.how == "twice":
            return hidden + self.down(self.up(one))
        if self.how == "on some tokens":
            return torch.cat([hidden[:, :1], hidden[:, 1:] + self.down(one[:, 1:])], dim=1)
        if self.how == "one never":
            return hidden + one
        raise AssertionError(self.how)


def watched(how):
    torch.manual_seed(0)
    layer = Layer(how).eval()
    return wiring_of(layer, {"up": layer.up, "down": layer.down}, torch.randn(2, 3, 4), (), {})


@pytest.mark.parametrize(
    ("how", "writers"),
    [
        ("one after the other", ["up", "down"]),
        ("the second alone", ["down"]),
        ("side by side", ["up", "down"]),
        ("side by side, the second first", ["up", "down"]),
        ("side by side, in place", ["up", "down"]),
    ],
)
def test_sums_are_found(how, writers):
    wiring = watched(how)
    assert wiring.writers == writers
    assert wiring.groups == [["up"], ["down"]]


@pytest.mark.parametrize(
    "how",
    [
        "scaled",
        "normed",
        "into its input",
        "less, not more",
        "no stream",
        "more behind",
        "twice",
        "on some tokens",
        "one never",
    ],
)
def test_anything_else_is_not_taken_for_a_sum(how):
    assert watched(how) is None


def test_hooks_are_gone_afterwards():
    layer = Layer("one after the other").eval()
    wiring_of(layer, {"up": layer.up, "down": layer.down}, torch.randn(1, 2, 4), (), {})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules())
