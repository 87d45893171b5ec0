"""The training on models whose deltas were spoiled on purpose."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.fixtures_models import fine_tune, llama_config
from transformers_meswitch.compression.linear import compress_linear
from transformers_meswitch.distillation.split_model import OutputHead, check_split, hidden_states
from transformers_meswitch.distillation.training import Distillation, DistillationBatch
from transformers_meswitch.distillation.weights import TrainedDelta, add_to_linears
from transformers_meswitch.errors import DistillationError, UnsupportedModelError
from transformers_meswitch.module_kinds import module_kinds

STEPS, RATE = 40, 3e-2


def log_probabilities(model, ids):
    return model(input_ids=ids).logits.detach().double().log_softmax(dim=-1)


class Pair:
    """A base, an expert that differs from it in its linears, and its delta at 3 bits, steps doubled or halved."""

    def __init__(self):
        torch.manual_seed(0)
        self.base = LlamaForCausalLM(llama_config(initializer_range=0.1)).eval()
        self.expert = copy.deepcopy(self.base)
        fine_tune(self.expert, 1, ())
        self.linears = [name for name, kind in module_kinds(self.base).items() if kind == "linear"]
        for name, parameter in self.expert.named_parameters():
            if name.removesuffix(".weight") not in self.linears:
                parameter.data.copy_(self.base.get_parameter(name).data)
        self.records, self.good, self.spoiled = {}, {}, {}
        for name in self.linears:
            weight = (m.get_submodule(name).weight.detach() for m in (self.expert, self.base))
            stored = compress_linear(next(weight) - next(weight), bits=3, salient_channels=4)
            self.records[name], self.good[name] = stored.record, stored.tensors
            factor = torch.where(torch.rand(stored.record.out_features) > 0.5, 1.6, 0.6)
            self.spoiled[name] = {**stored.tensors, "step": stored.tensors["step"] * factor}

    def batches(self, seed, count=8):
        """Random text, the last six of each row's tokens padded; logits are compared on all but the first ten."""
        generator = torch.Generator().manual_seed(seed)
        found = []
        for _ in range(count):
            ids = torch.randint(3, 128, (4, 40), generator=generator)
            positions = torch.zeros(4, 40, dtype=torch.bool)
            positions[:, 10:34] = True
            ids[:, 34:] = 0
            with torch.no_grad():
                found.append(DistillationBatch(ids, positions, hidden_states(self.expert, ids, positions)))
        return found

    def student(self, leaves, train=("steps", "salient")):
        model = copy.deepcopy(self.base)
        deltas = {name: TrainedDelta(self.records[name], leaves[name], train) for name in self.linears}
        add_to_linears(model, deltas)
        return model, deltas

    def distillation(self, leaves, train=("steps", "salient"), expert=None, **arguments):
        model, deltas = self.student(leaves, train)
        how = {"steps": STEPS, "learning_rate": RATE, **arguments}
        head = OutputHead(self.expert if expert is None else expert)
        return Distillation(model, deltas, head, **how), model, deltas

    def kl(self, leaves, batches):
        """By definition, in float64, of dense weights."""
        model = copy.deepcopy(self.base)
        for name in self.linears:
            model.get_submodule(name).weight.data += TrainedDelta(self.records[name], leaves[name])(
                torch.eye(self.records[name].in_features)
            ).T.detach()
        total = positions = 0
        for batch in batches:
            p, q = (log_probabilities(m, batch.ids)[batch.positions] for m in (self.expert, model))
            total += float((p.exp() * (p - q)).sum())
            positions += len(p)
        return total / positions


@pytest.fixture(scope="module")
def pair():
    return Pair()


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_training_recovers_what_spoiled_steps_lost(pair, loss):
    held_out, batches = pair.batches(seed=9), pair.batches(seed=1)
    spoiled, good = (pair.kl(leaves, held_out) for leaves in (pair.spoiled, pair.good))
    distillation, _, deltas = pair.distillation(pair.spoiled, loss=loss)
    assert distillation.evaluate(held_out, "kl") == pytest.approx(spoiled, rel=1e-3)
    losses = [distillation.step([batches[k % len(batches)]]) for k in range(STEPS)]
    assert losses[-1] < 0.3 * losses[0]
    trained = {name: delta.leaves() for name, delta in deltas.items()}
    after = pair.kl(trained, held_out)
    assert distillation.evaluate(held_out, "kl") == pytest.approx(after, rel=1e-3)
    assert spoiled - after > 0.8 * (spoiled - good)


def test_the_codes_are_as_they_were(pair):
    distillation, _, deltas = pair.distillation(pair.spoiled)
    distillation.step(pair.batches(seed=1, count=1))
    for name, delta in deltas.items():
        trained = delta.leaves()
        for leaf in ("codes", "salient_index"):
            assert torch.equal(trained[leaf], pair.spoiled[name][leaf])
        assert not torch.equal(trained["step"], pair.spoiled[name]["step"])


def test_distilling_to_another_expert_goes_away_from_this_one(pair):
    """A target that is wrong shows: it is the logits that are followed, not something that any training would give."""
    held_out = pair.batches(seed=9)
    before = pair.kl(pair.good, held_out)
    stranger = copy.deepcopy(pair.base)
    fine_tune(stranger, 77, ())
    distillation, _, deltas = pair.distillation(pair.good, expert=stranger)
    for batch in [*pair.batches(seed=1), *pair.batches(seed=2)]:
        with torch.no_grad():
            hidden = hidden_states(stranger, batch.ids, batch.positions)
        distillation.step([DistillationBatch(batch.ids, batch.positions, hidden)])
    assert pair.kl({name: delta.leaves() for name, delta in deltas.items()}, held_out) > 1.5 * before


def test_checkpointing_parts_of_logits_and_parts_of_a_batch_change_nothing(pair, monkeypatch):
    batches = pair.batches(seed=1, count=2)
    whole = DistillationBatch(*(torch.cat([getattr(b, k) for b in batches]) for k in ("ids", "positions", "hidden")))

    def trained(batches, **arguments):
        distillation, _, _ = pair.distillation(pair.spoiled, **arguments)
        loss = distillation.step(batches)
        return loss, distillation.state()

    loss, expected = trained([whole], checkpointing=False)
    monkeypatch.setattr("transformers_meswitch.distillation.training._LOGITS", 128 * 7)
    again, found = trained(batches)
    assert again == pytest.approx(loss, rel=1e-5)
    moments = [key for key in expected if key.endswith("exp_avg")]
    assert len(moments) == 2 * len(pair.linears)
    for key in moments:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-6)


def test_going_on_from_a_state_is_bit_identical(pair):
    batches = pair.batches(seed=1, count=6)
    one, _, _ = pair.distillation(pair.spoiled, steps=6)
    for batch in batches:
        one.step([batch])
    two, _, _ = pair.distillation(pair.spoiled, steps=6)
    for batch in batches[:2]:
        two.step([batch])
    kept = {key: tensor.clone() for key, tensor in two.state().items()}
    three, _, _ = pair.distillation(pair.spoiled, steps=6)
    three.load_state(kept, 2)
    for batch in batches[2:]:
        three.step([batch])
    expected, found = one.state(), three.state()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    # Moments that are left out would be found.
    four, _, _ = pair.distillation(pair.spoiled, steps=6)
    four.load_state({key: torch.zeros_like(t) if ":" in key else t for key, t in kept.items()}, 2)
    for batch in batches[2:]:
        four.step([batch])
    assert any(not torch.equal(expected[key], tensor) for key, tensor in four.state().items())


def test_a_loss_that_is_no_number_stops_and_changes_nothing(pair):
    distillation, model, _ = pair.distillation(pair.spoiled)
    (batch,) = pair.batches(seed=1, count=1)
    distillation.step([batch])
    before = {key: tensor.clone() for key, tensor in distillation.state().items()}
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(DistillationError, match=r"loss of step 2 of 40 is nan"):
        distillation.step([batch])
    assert all(torch.equal(tensor, before[key]) for key, tensor in distillation.state().items())


def test_a_model_that_is_more_than_its_halves_is_refused(pair):
    ids = torch.arange(5, 12)[None]
    check_split(pair.base, ids)
    odd = copy.deepcopy(pair.base)
    whole = type(odd).forward

    class Odd(type(odd)):
        def forward(self, input_ids=None, **arguments):
            output = whole(self, input_ids=input_ids, **arguments)
            if input_ids is not None:
                output.logits = output.logits * input_ids[..., None]
            return output

    odd.__class__ = Odd
    with pytest.raises(UnsupportedModelError, match="Odd makes its logits of more than its last hidden states"):
        check_split(odd, ids)
