"""Statistics of the model in the making against two whole models with hooks, and what comes of them in the end."""

import copy
import gc

import pytest
import torch

from tests.models.architectures import ARCHITECTURES, VOCABULARY, build
from transformers_meswitch.compression.batches import CalibrationBatches, pack
from transformers_meswitch.compression.driver import compress_modules
from transformers_meswitch.compression.layerwise import LayerwiseMoments
from transformers_meswitch.compression.linear import reconstruct_linear
from transformers_meswitch.compression.partly_compressed import PartlyCompressed
from transformers_meswitch.compression.sequential import SequentialStatistics
from transformers_meswitch.compression.sources import LiveParameters
from transformers_meswitch.configuration import MESwitchConfig
from transformers_meswitch.delta_format.spec import LinearRecord, QuantizedRowsRecord
from transformers_meswitch.module_kinds import is_conv1d

CORRECTED = [name for name in ARCHITECTURES if name not in ("gemma2", "gemma3_text")]
#: Where the stream is when a linear's output is added to it: the module that is given it, and one that added to that.
STREAM = {
    "self_attn.o_proj": ("input_layernorm", None),
    "mlp.down_proj": ("post_attention_layernorm", None),
    "attn.c_proj": ("ln_1", None),
    "mlp.c_proj": ("ln_2", None),
    "attention.dense": ("input_layernorm", None),
    "mlp.dense_4h_to_h": ("input_layernorm", "attention.dense"),
}
CONFIG = MESwitchConfig(bits=2, salient_channels=3)


def sequences(count=8, seed=3):
    generator = torch.Generator().manual_seed(seed)
    lengths = (3, 9, 17, 33, 40, 5, 64, 2) * (count // 8)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def calibration(rows):
    return CalibrationBatches(tuple(pack(rows, max_length=64, batch_tokens=96)), len(rows), sum(map(len, rows)))


def pair(architecture, tied, **changes):
    expert = build(architecture, tied, num_hidden_layers=3, **changes)
    base = copy.deepcopy(expert)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return base, expert


def in_turn(base, expert, rows, device="cpu"):
    parameters = LiveParameters(base), LiveParameters(expert)
    so_far = PartlyCompressed(expert, *parameters)
    settings = {"device": device, "dtype": torch.float32, "progress": False}
    return SequentialStatistics(expert.config, parameters[1], so_far, calibration(rows), **settings)


def watched(model, rows, name):
    """What a linear is given and the stream that it adds to, one sample at a time without padding, in float64.

    ``[tokens, width]`` each; `None` in the place of the stream for a linear that does not add to it.
    """
    prefix, key = next(((name.removesuffix(key), key) for key in STREAM if name.endswith(key)), ("", None))
    module, other = STREAM.get(key, (None, None))
    found, handles = {}, []

    def keep(what):
        return lambda _, args, *output: found.setdefault(what, []).append((output or args)[0].flatten(0, -2).double())

    handles.append(model.get_submodule(name).register_forward_pre_hook(keep("x")))
    if module is not None:
        handles.append(model.get_submodule(prefix + module).register_forward_pre_hook(keep("r")))
    if other is not None:
        handles.append(model.get_submodule(prefix + other).register_forward_hook(keep("added")))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row]), use_cache=False)
    for handle in handles:
        handle.remove()
    joined = {what: torch.cat(parts) for what, parts in found.items()}
    stream = joined.get("r")
    return joined["x"], stream if other is None else stream + joined["added"]


class Checked:
    """Statistics in turn, each compared with two whole models when it is asked for."""

    def __init__(self, statistics, base, expert, rows):
        self._statistics, self._base, self._expert, self._rows = statistics, base, expert, rows
        #: The whole model in the making.
        self.model = copy.deepcopy(expert)
        self.drifts = {}

    def get(self, name):
        return self._statistics.get(name)

    def order(self, names):
        return self._statistics.order(names)

    def drift(self, name):
        found = self._statistics.drift(name)
        (x, r), (own_x, own_r) = (watched(model, self._rows, name) for model in (self._expert, self.model))

        def close(one, other, scale):
            assert one.dtype == torch.float32
            assert (one.double().cpu() - other).norm() <= 2e-4 * scale, name

        size = float((own_x.T @ own_x).norm()) / len(x)
        close(self.get(name), own_x.T @ own_x / len(x), size)
        close(found.inputs, (x - own_x).T @ own_x / len(x), size)
        assert (found.residual is None) == (r is None)
        if r is not None:
            close(found.residual, (r - own_r).T @ own_x / len(x), size)
        self.drifts[name] = found
        return found

    def settle(self, name, record, leaves):
        self._statistics.settle(name, record, leaves)
        module, of_base = self.model.get_submodule(name), self._base.get_submodule(name)
        with torch.no_grad():
            if isinstance(record, LinearRecord):
                change = reconstruct_linear(record, leaves).cpu()
                module.weight.copy_(of_base.weight + (change.T if is_conv1d(module) else change))
            elif isinstance(record, QuantizedRowsRecord):
                assert record.coded_rows == record.num_rows
                module.weight.copy_(of_base.weight + reconstruct_linear(record.as_linear(record.num_rows), leaves))


def made(base, expert, statistics, drifts=None, config=CONFIG, device=None):
    """The whole model that a delta makes of the base."""
    model = copy.deepcopy(expert)
    ours = LiveParameters(base), LiveParameters(expert)
    found = compress_modules(
        expert, *ours, config, second_moments=statistics, drifts=drifts, progress=False, device=device
    )
    with torch.no_grad():
        for name, record, leaves in found:
            if isinstance(record, LinearRecord):
                module, of_base = model.get_submodule(name), base.get_submodule(name)
                change = reconstruct_linear(record, leaves).cpu()
                module.weight.copy_(of_base.weight + (change.T if is_conv1d(module) else change))
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", CORRECTED)
def test_statistics_are_those_of_two_whole_models(architecture, tied):
    base, expert = pair(architecture, tied)
    rows = sequences()
    checked = Checked(in_turn(base, expert, rows), base, expert, rows)
    made(base, expert, checked, checked)
    linears = {n for n in checked.drifts if n != "lm_head"}
    assert len({n.split(".")[2] for n in linears}) == 3
    first = next(iter(checked.drifts.values()))
    # A tied embedding is compressed last, one of positions first.
    assert bool(first.inputs.abs().max() == 0) is (tied and architecture != "gpt2")
    assert all(drift.inputs.abs().max() > 0 for drift in list(checked.drifts.values())[4:])


def test_the_check_notices_a_stream_that_is_not_followed(monkeypatch):
    base, expert = pair("llama", tied=True)
    rows = sequences()
    statistics = in_turn(base, expert, rows)
    monkeypatch.setattr(statistics, "settle", lambda *_: None)
    checked = Checked(statistics, base, expert, rows)
    with pytest.raises(AssertionError, match="o_proj"):
        made(base, expert, checked, checked)


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - set(CORRECTED)))
def test_other_streams_are_fitted_to_the_experts_own_inputs(architecture):
    base, expert = pair(architecture, tied=True)
    rows = sequences()
    statistics = in_turn(base, expert, rows)
    settings = {"device": "cpu", "dtype": torch.float32, "progress": False}
    alone = LayerwiseMoments(expert.config, LiveParameters(expert), calibration(rows), **settings)
    first, second = made(base, expert, statistics, statistics), made(base, expert, alone)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("architecture", "bits"),
    [("llama", 1), ("gpt2", 2), ("phi3", 1), ("gpt_neox", 2)]
    + [
        pytest.param(architecture, bits, marks=pytest.mark.slow)
        for architecture, bits in (("llama", 2), ("gpt2", 1), ("phi3", 2), ("gpt_neox", 1))
    ],
)
def test_the_model_ends_nearer_to_the_expert(architecture, bits):
    """On text that nothing was fitted to. Without the stream's drift it would end farther away, or hardly nearer."""
    base, expert = pair(architecture, tied=True)
    rows, held_out = sequences(160), sequences(16, seed=8)
    config = MESwitchConfig(bits=bits, salient_channels=0)
    settings = {"device": "cpu", "dtype": torch.float32, "progress": False}
    alone = LayerwiseMoments(expert.config, LiveParameters(expert), calibration(rows), **settings)
    statistics = in_turn(base, expert, rows)
    models = [made(base, expert, alone, None, config), made(base, expert, statistics, statistics, config)]

    def logits(model):
        with torch.no_grad():
            return torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in held_out]).log_softmax(-1)

    of_expert = logits(expert)
    before, after = (float((of_expert.exp() * (of_expert - logits(m))).sum(-1).mean()) for m in models)
    assert 0 < after < 0.8 * before


def test_linears_are_compressed_in_the_order_of_their_calls():
    """Phi-3 names the attention's output before its input."""
    base, expert = pair("phi3", tied=True)
    names = [name for name, _ in expert.named_modules()]
    attention = [f"model.layers.1.self_attn.{which}_proj" for which in ("o", "qkv")]
    assert [name for name in names if name in attention] == attention
    ordered = in_turn(base, expert, sequences()).order(names)
    assert [name for name in ordered if name in attention] == attention[::-1]
    assert sorted(ordered) == sorted(names)
    moved = {name for name, other in zip(names, ordered, strict=True) if name != other}
    assert moved == {f"model.layers.{i}.self_attn.{which}_proj" for i in range(3) for which in ("o", "qkv")}


def test_earlier_layers_cannot_be_asked_for():
    base, expert = pair("llama", tied=True)
    statistics = in_turn(base, expert, sequences())
    statistics.get("model.layers.1.self_attn.q_proj")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj is asked for after a later layer"):
        statistics.get("model.layers.0.mlp.up_proj")


def test_a_layer_of_each_is_in_memory_at_a_time():
    base, expert = pair("llama", tied=False)
    statistics = in_turn(base, expert, sequences())
    for name, _, _ in compress_modules(
        expert, LiveParameters(base), LiveParameters(expert), CONFIG, second_moments=statistics, drifts=statistics,
        progress=False,
    ):  # fmt: skip
        for run in (statistics._expert, statistics._compressed):
            there = {n.split(".")[2] for n, p in run.model.named_parameters() if not p.is_meta and "layers" in n}
            assert len(there) <= 1
            assert all(p.is_meta for n, p in run.model.named_parameters() if "layers" not in n), name
        records = statistics._parameters._records
        assert len({n.split(".")[2] for n in records if "layers" in n}) <= 1


def test_activations_do_not_wait_for_the_garbage_collector():
    """A forward pass is ended by an exception, whose traceback may hold all of its activations in a cycle."""
    base, expert = pair("llama", tied=True)
    statistics = in_turn(base, expert, sequences(16))
    alive = []
    gc.collect()
    gc.disable()
    try:
        for layer in (1, 2):
            statistics.get(f"model.layers.{layer}.mlp.down_proj")
            alive.append(sum(isinstance(found, torch.Tensor) for found in gc.get_objects()))
    finally:
        gc.enable()
    assert alive[1] <= alive[0]


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_gpu_ends_as_near_as_a_cpu(architecture):
    base, expert = pair(architecture, tied=True)
    rows = sequences(160)
    found = {}
    for device in ("cpu", "cuda"):
        statistics = in_turn(base, expert, rows, device)
        model = made(base, expert, statistics, statistics, device=device)
        with torch.no_grad():
            ids = torch.tensor([sequences(8, seed=9)[6]])
            found[device] = float((model(input_ids=ids).logits - expert(input_ids=ids).logits).norm())
    assert found["cuda"] < 1.2 * found["cpu"]
