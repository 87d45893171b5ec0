"""Budgets, from two checkpoints to the bytes on disk: kept to the byte, spent where they buy most, measured anew."""

import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.fixtures_models import dense_model
from transformers_meswitch.compression import recipe
from transformers_meswitch.compression.batches import hold_out, sequences_of, tokenize
from transformers_meswitch.compression.calibration import read_samples
from transformers_meswitch.compression.candidates import CandidateFits, candidate_codes, output_error
from transformers_meswitch.compression.linear import compress_linear, reconstruct_linear
from transformers_meswitch.compression.recipe import compress
from transformers_meswitch.compression.sequential import SequentialStatistics
from transformers_meswitch.compression.spending import spend
from transformers_meswitch.compression.work_folder import Candidate, Codes, WorkFolder, codes_of
from transformers_meswitch.configuration import MESwitchConfig
from transformers_meswitch.delta_format.reader import open_delta, resolve_delta
from transformers_meswitch.delta_format.spec import LinearRecord, record_bytes, tensor_key
from transformers_meswitch.errors import BudgetError, CompressionError

TEXTS = [" ".join(f"{letter}{n % 7}abcdefghijk"[: 4 + n % 9] for n in range(12)) for letter in "qwertyuiop"]
N = 4


@pytest.fixture
def pair(make_pair, tokenizer):
    base, expert = make_pair(num_hidden_layers=2, initializer_range=0.2)
    tokenizer.save_pretrained(expert)
    return base, expert


@pytest.fixture
def kept(monkeypatch):
    """The candidates of the run, which are gone with the work folder, as ``[{name: {codes: Candidate}}]``."""
    found = []

    def spy(config, work, *rest):
        allocation = spend(config, work, *rest)
        found.append(dict(work.candidates))
        return allocation

    monkeypatch.setattr(recipe, "spend", spy)
    return found


def run(pair, out, calibration=TEXTS, **settings):
    allocations = []
    config = MESwitchConfig(**{"salient_channels": N} | settings)
    compress(*pair, out, config, calibration, progress=False, on_allocation=allocations.append)
    delta = open_delta(resolve_delta(str(out)))
    linears = {name: record for name, record in delta.records.items() if isinstance(record, LinearRecord)}
    return delta, linears, allocations


def size_of(folder):
    return sum((folder / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors"))


def bits_of(linears):
    weights = sum(record.out_features * record.in_features for record in linears.values())
    return 8 * sum(record_bytes(record, own_bytes=0) for record in linears.values()) / weights


@pytest.mark.parametrize(
    ("target", "calibration"),
    [
        (1.6, None),
        pytest.param(2.5, None, marks=pytest.mark.slow),
        (4.0, None),
        pytest.param(1.6, TEXTS, marks=pytest.mark.slow),
        (2.5, TEXTS),
        pytest.param(4.0, TEXTS, marks=pytest.mark.slow),
    ],
)
def test_bits_are_spent_and_not_overspent(pair, tmp_path, calibration, target):
    delta, linears, (allocation,) = run(pair, tmp_path / "delta", calibration, target_bits=target)
    assert target - 0.25 < bits_of(linears) <= target
    assert allocation.bits_per_weight == bits_of(linears)
    assert sum(allocation.counts.values()) == len(linears) == 14
    assert len(allocation.counts) > 1
    assert delta.config.bits is None
    assert "bits a weight" in str(allocation)


def test_sizes_are_kept_to_the_byte(pair, tmp_path):
    """At every target, and just below and at the sizes that come of others."""
    sizes = []
    for target in (34_000, "44kB", 56_001):
        run(pair, tmp_path / "delta", None, target_size=target)
        wanted = 44_000 if isinstance(target, str) else target
        sizes.append(size_of(tmp_path / "delta"))
        # What is left is less than a step of the smallest linears.
        assert wanted - 1_000 < sizes[-1] <= wanted
    assert all(one < other for one, other in pairwise(sizes))
    for target in (sizes[1], sizes[1] - 1):
        run(pair, tmp_path / "delta", None, target_size=target)
        assert size_of(tmp_path / "delta") <= target


def test_the_smallest_size_is_named_and_can_be_had_of_the_same_fits(pair, tmp_path, monkeypatch):
    message = r"target_size is 9,000 bytes; the delta .* takes [\d,]+ at least"
    with pytest.raises(BudgetError, match=message) as error:
        run(pair, tmp_path / "delta", None, target_size=9000)
    assert [path.name for path in tmp_path.glob("delta*")] == ["delta.partial"]
    least = int(str(error.value).split("takes ")[1].split(" at least")[0].replace(",", ""))
    fitted = []
    monkeypatch.setattr(WorkFolder, "add_candidate", lambda self, name, *rest: fitted.append(name))
    with pytest.raises(BudgetError, match=f"takes {least:,} at least"):
        run(pair, tmp_path / "delta", None, target_size=least - 1)
    _, linears, _ = run(pair, tmp_path / "delta", None, target_size=least)
    assert not fitted, "what was fitted for a budget that cannot be kept serves another"
    assert size_of(tmp_path / "delta") == least
    assert {codes_of(record) for record in linears.values()} == {Codes(1, 0)}
    assert [path.name for path in tmp_path.glob("delta*")] == ["delta"]


def test_the_fewest_bits_are_named_and_can_be_had(pair, tmp_path):
    with pytest.raises(CompressionError, match=r"target_bits is 1; .* take [\d.]+ bits a weight at least") as error:
        run(pair, tmp_path / "delta", None, target_bits=1)
    least = float(str(error.value).split("take ")[1].split(" bits")[0])
    _, linears, _ = run(pair, tmp_path / "delta", None, target_bits=least)
    assert least - 1e-4 <= bits_of(linears) <= least


def test_a_module_is_what_its_codes_would_give_throughout(pair, tmp_path):
    delta, linears, _ = run(pair, tmp_path / "delta", None, target_bits=2.5)
    for codes in set(map(codes_of, linears.values())):
        config = MESwitchConfig(
            bits=codes.bits, salient_channels=codes.salient_channels, column_steps=codes.column_steps
        )
        uniform = open_delta(resolve_delta(str(compress(*pair, tmp_path / "same", config, None, progress=False))))
        for name, record in linears.items():
            if codes_of(record) == codes:
                for leaf in record.leaves():
                    key = tensor_key(name, leaf)
                    assert torch.equal(delta.tensor(key), uniform.tensor(key)), key


@pytest.mark.parametrize("pinned", [pytest.param({}, marks=pytest.mark.slow), {r"layers\.1\.mlp": 3}])
def test_calibrated_modules_are_what_the_chosen_bits_would_give_without_a_budget(pair, tmp_path, pinned):
    """Each fitted to what is made of the layers before it, which the candidates, fitted before the choice, are not."""
    settings = {"salient_channels": 0, "column_steps": True}
    delta, linears, _ = run(pair, tmp_path / "delta", TEXTS, target_bits=3.0, layer_bits=pinned, **settings)
    chosen = {f"{re.escape(name)}$": record.bits for name, record in linears.items()}
    assert len(set(chosen.values())) > 1
    config = MESwitchConfig(layer_bits=chosen, **settings)
    stated = open_delta(resolve_delta(str(compress(*pair, tmp_path / "same", config, TEXTS, progress=False))))
    assert stated.records == delta.records
    for name, record in delta.records.items():
        for leaf in record.leaves():
            key = tensor_key(name, leaf)
            assert torch.equal(delta.tensor(key), stated.tensor(key)), key


def test_a_refit_that_ends_farther_from_the_expert_is_dropped(pair, tmp_path, monkeypatch):
    settings = {"max_kl": 0.05, "salient_channels": 0, "column_steps": True}
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "refit_chosen", lambda *_, **__: None)
        chosen, _, (before,) = run(pair, tmp_path / "chosen", **settings)
    refitted, _, (after,) = run(pair, tmp_path / "refitted", **settings)
    assert after.kl < before.kl <= 0.05

    original = SequentialStatistics.drift

    def overdone(self, name):
        drift = original(self, name)
        return drift and replace(drift, inputs=-20 * drift.inputs)

    monkeypatch.setattr(SequentialStatistics, "drift", overdone)
    spoiled, _, (kept,) = run(pair, tmp_path / "spoiled", **settings)
    assert kept.kl == before.kl
    for name in chosen.tensors():
        assert torch.equal(spoiled.tensor(name), chosen.tensor(name)), name
    assert any(not torch.equal(refitted.tensor(name), chosen.tensor(name)) for name in chosen.tensors())


def test_patterns_pin_bits_within_the_budget(pair, tmp_path):
    pins = {r"layers\.0\.mlp": 4, "q_proj": 1}
    _, linears, _ = run(pair, tmp_path / "delta", target_bits=2.8, layer_bits=pins)
    assert bits_of(linears) <= 2.8
    for name, record in linears.items():
        if "layers.0.mlp" in name:
            assert codes_of(record) == Codes(4, N)
        elif "q_proj" in name:
            assert codes_of(record) == Codes(1, N)
    _, linears, (allocation,) = run(pair, tmp_path / "all", target_bits=4.9, layer_bits={"proj": 3})
    assert allocation.counts == {Codes(3, N): 14}


def losses(candidates, records):
    return math.fsum(candidates[name][codes_of(record)].loss for name, record in records.items())


@pytest.mark.parametrize(
    "codes",
    [
        pytest.param(Codes(1, N, True), marks=pytest.mark.slow),
        Codes(2, N, True),
        pytest.param(Codes(3, N, True), marks=pytest.mark.slow),
    ],
)
def test_at_equal_bytes_it_loses_less_than_the_same_codes_everywhere(pair, tmp_path, kept, codes):
    """Some layers of the expert changed more than others, as in real fine-tunes."""
    uniform = {}
    run(pair, tmp_path / "first", target_bits=3)
    for name, of_module in kept[0].items():
        uniform[name] = of_module[codes].record
    _, linears, _ = run(pair, tmp_path / "delta", target_bits=bits_of(uniform))
    assert bits_of(linears) <= bits_of(uniform)
    assert losses(kept[0], linears) < losses(kept[0], uniform)


def test_a_deliberately_wrong_choice_would_be_noticed(pair, tmp_path, kept, monkeypatch):
    """With the losses turned upside down, the budget buys more loss than uniform codes do."""
    run(pair, tmp_path / "first", target_bits=3)
    uniform = {name: of_module[Codes(2, N, True)].record for name, of_module in kept[0].items()}
    monkeypatch.setattr(Candidate, "loss", property(lambda self: 1 / (1e-9 + self.error * self.weight)))
    _, linears, _ = run(pair, tmp_path / "delta", target_bits=bits_of(uniform))
    monkeypatch.undo()
    assert losses(kept[0], linears) > losses(kept[0], uniform)


def test_losses_follow_the_layers_that_hurt(pair, tmp_path, kept, edit_checkpoint):
    """A module whose outputs the next one multiplies by nothing costs nothing; without text that cannot be seen."""

    def mute(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"].zero_()

    for folder in pair:
        edit_checkpoint(folder, mute)
    run(pair, tmp_path / "delta", target_bits=2)
    muted = kept[0]["model.layers.1.mlp.up_proj"][Codes(1, 0)]
    heard = kept[0]["model.layers.0.mlp.up_proj"][Codes(1, 0)]
    # Where nothing can be measured, the module's own output stands in.
    assert muted.error > 0
    assert muted.weight != heard.weight
    assert "model.layers.1.mlp.down_proj" not in kept[0], "an unchanged module has no candidates"


def test_a_linear_of_which_only_the_bias_changed_has_one_candidate(tmp_path):
    weight, bias = torch.randn(8, 16), torch.randn(8)
    work = WorkFolder(tmp_path)
    fits = CandidateFits(MESwitchConfig(target_bits=2), work)
    base, expert = {"weight": weight, "bias": bias}, {"weight": weight, "bias": bias + 1}
    fits.fit(base, expert, name="a", second_moment=None, is_conv1d=False)
    (candidate,) = work.candidates["a"].values()
    assert (candidate.codes, candidate.loss, candidate.record.bias) == (Codes(1, 0), 0.0, True)
    assert "a" in fits
    fits.fit(base, base, name="b", second_moment=None, is_conv1d=False)
    assert "b" not in work.candidates


def test_errors_and_weights_by_their_definitions(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base, inputs = torch.randn(6, 20, generator=generator), torch.randn(50, 20, generator=generator)
    delta = 0.01 * torch.randn(6, 20, generator=generator)
    moment = inputs.T @ inputs / 50
    asked = []

    def damage(name, error):
        asked.append((name, error))
        return 0.25

    work = WorkFolder(tmp_path)
    config = MESwitchConfig(target_bits=2, salient_channels=3)
    fits = CandidateFits(config, work, damage)
    fits.fit({"weight": base}, {"weight": base + delta}, name="a", second_moment=moment, is_conv1d=False)
    assert list(work.candidates["a"]) == candidate_codes(config, 20)
    assert [name for name, _ in asked] == ["a"], "one forward pass a module"
    exact = (base + delta) - base
    for codes, candidate in work.candidates["a"].items():
        stored = compress_linear(exact, codes.bits, codes.salient_channels, moment, codes.column_steps)
        lost = exact.double() - reconstruct_linear(stored.record, stored.tensors).double()
        assert candidate.error == pytest.approx(float((inputs.double() @ lost.T).square().sum(1).mean()), rel=1e-4)
        assert candidate.weight == 0.25 / work.candidates["a"][Codes(1, 0)].error
    assert work.candidates["a"][Codes(1, 0)].loss == pytest.approx(0.25)
    # Without a layer to look at, the module's own output stands in.
    unmeasured = CandidateFits(config, work)
    unmeasured.fit({"weight": base}, {"weight": base + delta}, name="b", second_moment=moment, is_conv1d=False)
    energy = float((inputs.double() @ (base + delta).double().T).square().sum(1).mean())
    assert work.candidates["b"][Codes(1, 0)].weight == pytest.approx(1 / energy, rel=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1e-25])
def test_output_errors_do_not_underflow(scale):
    error = scale * torch.tensor([[3.0, 4.0]])
    assert output_error(error, None) == pytest.approx(25 * scale**2, rel=1e-6)
    assert output_error(error, torch.tensor([1.0, 0.5])) == pytest.approx(17 * scale**2, rel=1e-6)
    assert output_error(0 * error, torch.eye(2)) == 0


# KL


def expected_kl(base, expert, delta, tokenizer):
    """KL on the sequences kept apart, from stock models and the delta's files."""
    text = tokenize(tokenizer, read_samples(TEXTS, tokenizer), max_tokens=10**6, vocab_size=80)
    _, apart = hold_out(text, 4, 512)
    models = AutoModelForCausalLM.from_pretrained(expert), dense_model(base, delta)
    total = count = 0
    with torch.no_grad():
        for row in sequences_of(apart.batches):
            ours, theirs = (model(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1) for model in models)
            total += float((ours.exp() * (ours - theirs)).sum())
            count += len(row) - 1
    return total / count


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        pytest.param(0.02, {}, marks=pytest.mark.slow),
        (0.02, {"tie_word_embeddings": True}),
        (0.2, {}),
        pytest.param(0.2, {"tie_word_embeddings": True}, marks=pytest.mark.slow),
    ],
)
def test_kl_is_measured_on_text_kept_apart_and_kept_below(make_pair, tmp_path, tokenizer, changes, target):
    pair = make_pair(initializer_range=0.2, **changes)
    tokenizer.save_pretrained(pair[1])
    _, _, (allocation,) = run(pair, tmp_path / "delta", max_kl=target)
    assert allocation.kl <= target
    assert allocation.kl == pytest.approx(expected_kl(*pair, tmp_path / "delta", tokenizer), rel=1e-3, abs=1e-7)
    card = (tmp_path / "delta" / "README.md").read_text()
    assert f"kept apart: {allocation.kl:.3g} nats a token" in card
    assert "of them kept apart to measure on" in card


@pytest.mark.parametrize("limits", [(0.3, 0.01), pytest.param((0.3, 0.05, 0.01), marks=pytest.mark.slow)], ids=str)
def test_a_stricter_limit_takes_more_bits(pair, tmp_path, limits):
    bits = [bits_of(run(pair, tmp_path / "delta", max_kl=limit)[1]) for limit in limits]
    assert bits == sorted(bits)
    assert bits[0] < bits[-1]


def test_a_limit_that_4_bits_do_not_keep_says_what_they_reach(pair, tmp_path):
    with pytest.raises(CompressionError, match=r"max_kl is 1e-09; at 4 bits.*allow max_kl=") as error:
        run(pair, tmp_path / "delta", max_kl=1e-9)
    possible = float(str(error.value).split("allow max_kl=")[1].split(";")[0])
    _, _, (allocation,) = run(pair, tmp_path / "delta", max_kl=possible)
    assert allocation.kl <= possible


def test_kl_needs_text_and_enough_of_it(pair, tmp_path):
    with pytest.raises(CompressionError, match=r"max_kl=0\.1 is measured on calibration text, and there is none"):
        run(pair, tmp_path / "delta", None, max_kl=0.1)
    with pytest.raises(CompressionError, match="has 1 samples; max_kl needs two"):
        run(pair, tmp_path / "delta", ["abcdefgh" * 7], max_kl=0.1)


class Items:
    """Ten alike linears whose KL is some function of the sum of losses; counts what is measured."""

    def __init__(self, folder, kl):
        self.work, self.kl, self.measured = WorkFolder(folder), kl, []
        for i in range(10):
            for bits in (1, 2, 3, 4):
                record = LinearRecord(64, 64, bits)
                leaves = {"codes": torch.zeros(64, 8 * bits, dtype=torch.uint8), "step": torch.zeros(64)}
                self.work.add_candidate(f"m{i}", Candidate(record, (1 + i) * 4.0**-bits, 0.01), leaves)

    def loss(self):
        return losses(self.work.candidates, self.work.records)

    def divergence(self):
        self.measured.append(self.kl(self.loss()))
        return self.measured[-1]


@pytest.mark.parametrize("shape", ["proportional", "square", "offset", "steep"])
@pytest.mark.parametrize("target", [1e-1, 1e-2, 3e-3])
def test_few_measurements_come_near(tmp_path, shape, target):
    kl = {
        "proportional": lambda loss: 3 * loss,
        "square": lambda loss: 5 * loss**1.4,
        "offset": lambda loss: 1e-3 + 0.7 * loss,
        "steep": lambda loss: 40 * loss**0.6 if loss < 0.01 else 0.9 * loss**0.3,
    }[shape]
    items = Items(tmp_path, kl)
    best = kl(sum(0.01 * (1 + i) * 4.0**-4 for i in range(10)))
    if best > target:
        with pytest.raises(CompressionError, match="at 4 bits"):
            spend(MESwitchConfig(max_kl=target, salient_channels=0), items.work, None, items.divergence)
        return
    found = spend(MESwitchConfig(max_kl=target, salient_channels=0), items.work, None, items.divergence)
    assert len(items.measured) <= 6
    assert found.kl == kl(items.loss()) <= target
    assert found.kl == max(k for k in items.measured if k <= target), "the smallest that was measured"
    # No more than a third of a bit above the fewest bits that keep the limit.
    (tmp_path / "trial").mkdir()
    trial = Items(tmp_path / "trial", kl)
    fewest = next(
        bits / 100
        for bits in range(150, 500, 5)
        if kl(spend(MESwitchConfig(target_bits=bits / 100, salient_channels=0), trial.work, None).loss) <= target
    )
    assert found.bits_per_weight <= fewest + 0.34


def test_the_choice_in_the_work_folder_is_the_one_returned(tmp_path):
    items = Items(tmp_path, lambda loss: loss)
    found = spend(MESwitchConfig(max_kl=0.02, salient_channels=0), items.work, None, items.divergence)
    assert found.loss == pytest.approx(items.loss())
    assert found.kl == pytest.approx(items.loss())
