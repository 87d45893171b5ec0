"""``distill`` from folder to folder, on the tiny family with steps that were spoiled on purpose."""

from __future__ import annotations

import json
import math
import random
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.fixtures_models import ADDED_TOKENS, dense_model
from transformers_meswitch import MESwitchConfig, compress, distill, verify
from transformers_meswitch.delta_format.reader import open_delta
from transformers_meswitch.distillation import recipe
from transformers_meswitch.distillation.recipe import DistillationSettings, distill_with_report
from transformers_meswitch.distillation.sequences import collate, schedule, split
from transformers_meswitch.distillation.training import Distillation
from transformers_meswitch.errors import BaseMismatchError, CompressionError, DistillationError

WEIGHTS = "adapter_model.safetensors"
QUICK = {"steps": 30, "batch_size": 8, "learning_rate": 3e-2, "device": "cpu", "progress": False}


def texts_of(name, count=32, seed=0):
    draw = random.Random(seed)
    texts = ["".join(chr(draw.randrange(33, 127)) for _ in range(draw.randrange(20, 60))) for _ in range(count)]
    if name == "code":
        texts = [f"{draw.choice(ADDED_TOKENS)}{text}{draw.choice(ADDED_TOKENS)}" for text in texts]
    return texts


def spoil(delta, folder):
    """A delta with each step half as large again or a third less."""
    shutil.copytree(delta, folder)
    tensors = load_file(folder / WEIGHTS)
    for key, tensor in tensors.items():
        if key.endswith("meswitch_delta.step") and "embed" not in key and "lm_head" not in key:
            factor = torch.where(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)) > 0.5, 1.5, 0.67)
            tensors[key] = tensor * factor
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def kl(expert, delta, base, texts):
    """KL(expert || base + delta) in float64 of the files' dense weights, the mean over all positions."""
    tokenizer = AutoTokenizer.from_pretrained(expert)
    models = AutoModelForCausalLM.from_pretrained(expert).eval(), dense_model(base, delta)
    total = positions = 0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            p, q = (model(ids).logits[0].double().log_softmax(dim=-1) for model in models)
            total += float((p.exp() * (p - q)).sum())
            positions += ids.shape[1]
    return total / positions


@pytest.fixture(scope="module")
def spoiled(tiny_family, untied_family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spoiled")
    return {
        (family, name): spoil(found.deltas[name], folder / f"{family}-{name}")
        for family, found in (("tiny_family", tiny_family), ("untied_family", untied_family))
        for name in ("math", "code")
    }


@pytest.mark.parametrize("name", ["math", "code"])
@pytest.mark.parametrize("fixture", ["tiny_family", "untied_family"])
def test_spoiled_steps_are_recovered_and_nothing_else_changes(fixture, name, request, spoiled, tmp_path):
    family, delta = request.getfixturevalue(fixture), spoiled[fixture, name]
    base, expert = family.base, family.experts[name]
    # Evidence is of the tensors that were measured.
    delta = shutil.copytree(delta, tmp_path / "delta")
    verify(base, expert, delta, texts_of(name, 8), device="cpu", save=True, progress=False)
    assert (delta / "meswitch_evidence.json").exists()

    settings = DistillationSettings(**{k: QUICK[k] for k in ("steps", "batch_size", "learning_rate")})
    output = tmp_path / "output"
    report = distill_with_report(base, expert, delta, output, texts_of(name), settings, device="cpu", progress=False)
    assert report.output == output
    assert report.improved

    other = texts_of(name, 8, seed=5)
    good, before, after = (kl(expert, path, base, other) for path in (family.deltas[name], delta, output))
    assert before - after > 0.7 * (before - good)

    old, new = load_file(delta / WEIGHTS), load_file(output / WEIGHTS)
    assert old.keys() == new.keys()
    changed = {key.rpartition(".")[2] for key in old if not torch.equal(old[key], new[key])}
    assert changed == {"step", "salient"}
    linears = {f"{n}.meswitch_delta" for n, r in open_delta(delta).config.modules.items() if r["kind"] == "linear"}
    for key in old:
        assert old[key].dtype == new[key].dtype
        owner = key.removeprefix("base_model.model.").rpartition(".")[0]
        assert owner in linears or torch.equal(old[key], new[key])
    assert (delta / WEIGHTS).stat().st_size == (output / WEIGHTS).stat().st_size
    assert not (output / "meswitch_evidence.json").exists()
    assert not (tmp_path / "output.partial").exists()

    before_config, config = (json.loads((path / "adapter_config.json").read_text()) for path in (delta, output))
    distilled = config.pop("distilled")
    assert config == before_config
    assert distilled == {
        "steps": 30,
        "text": report.text,
        "kl_before": report.kl_before,
        "kl_after": report.kl_after,
    }
    card = (output / "README.md").read_text()
    assert "30 steps on texts of the caller: 32 samples" in card
    assert f"{report.kl_after:.4g} after" in card
    assert "## Fidelity" not in card
    for asset in ("tokenizer.json", "generation_config.json"):
        assert (output / asset).read_bytes() == (delta / asset).read_bytes()


def test_the_report_is_its_definition(tiny_family, spoiled, tmp_path):
    base, expert, delta = tiny_family.base, tiny_family.experts["math"], spoiled["tiny_family", "math"]
    texts = texts_of("math")
    settings = DistillationSettings(steps=3, batch_size=8, learning_rate=3e-2)
    report = distill_with_report(base, expert, delta, tmp_path / "o", texts, settings, device="cpu", progress=False)
    # Sequences are in order of the length that they are padded to, 32 or 64; every fourth from the second is held out.
    ordered = [t for t in texts if len(t) <= 32] + [t for t in texts if len(t) > 32]
    held_out = ordered[1::4]
    assert report.held_out_tokens == sum(map(len, held_out))
    assert report.kl_before == pytest.approx(kl(expert, delta, base, held_out), rel=1e-3)
    assert report.kl_after == pytest.approx(kl(expert, tmp_path / "o", base, held_out), rel=1e-3)


def test_an_interrupted_run_ends_as_if_it_had_not_been(tiny_family, spoiled, tmp_path, monkeypatch):
    arguments = (tiny_family.base, tiny_family.experts["math"], spoiled["tiny_family", "math"])
    how = QUICK | {"steps": 12}
    monkeypatch.setattr(recipe, "_SAVE_EVERY", 5)
    distill(*arguments, tmp_path / "whole", texts_of("math"), **how)
    step, calls = Distillation.step, []

    def killed(self, batches):
        if len(calls) == 8:
            raise KeyboardInterrupt
        calls.append(self.done)
        return step(self, batches)

    monkeypatch.setattr(Distillation, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        distill(*arguments, tmp_path / "cut", texts_of("math"), **how)
    assert not (tmp_path / "cut").exists()
    assert {p.name for p in (tmp_path / "cut.partial").iterdir()} >= {"hidden.safetensors", "state.safetensors"}

    again = []
    monkeypatch.setattr(Distillation, "step", lambda self, batches: again.append(self.done) or step(self, batches))
    distill(*arguments, tmp_path / "cut", texts_of("math"), **how)
    assert again == [5, 6, 7, 8, 9, 10, 11]
    for file in (WEIGHTS, "adapter_config.json", "README.md"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not (tmp_path / "cut.partial").exists()


def test_another_request_begins_anew(tiny_family, spoiled, tmp_path, monkeypatch):
    arguments = (tiny_family.base, tiny_family.experts["math"], spoiled["tiny_family", "math"], tmp_path / "output")
    monkeypatch.setattr(recipe, "_SAVE_EVERY", 1)
    step, done = Distillation.step, []

    def killed(self, batches):
        if self.done == 3:
            raise KeyboardInterrupt
        return step(self, batches)

    monkeypatch.setattr(Distillation, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        distill(*arguments, texts_of("math"), **QUICK | {"steps": 5})
    monkeypatch.setattr(Distillation, "step", lambda self, batches: done.append(self.done) or step(self, batches))
    distill(*arguments, texts_of("math"), **QUICK | {"steps": 4})
    assert done == [0, 1, 2, 3]


def test_training_that_does_not_help_leaves_the_delta_as_it_was(tiny_family, tmp_path):
    delta = tiny_family.deltas["math"]
    settings = DistillationSettings(steps=3, batch_size=8, learning_rate=3.0)
    report = distill_with_report(
        tiny_family.base,
        tiny_family.experts["math"],
        delta,
        tmp_path / "output",
        texts_of("math"),
        settings,
        device="cpu",
        progress=False,
    )
    assert report.kl_after > report.kl_before
    assert not report.improved
    for file in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / "output" / file).read_bytes() == (delta / file).read_bytes()
    assert "distilled" not in (tmp_path / "output" / "README.md").read_text()


def test_column_steps_and_one_bit(tiny_family, tmp_path):
    how = MESwitchConfig(bits=1, salient_channels=0, column_steps=True)
    compress(tiny_family.base, tiny_family.experts["math"], tmp_path / "delta", how, progress=False)
    settings = DistillationSettings(steps=20, batch_size=8, learning_rate=1e-2)
    report = distill_with_report(
        tiny_family.base,
        tiny_family.experts["math"],
        tmp_path / "delta",
        tmp_path / "output",
        texts_of("math"),
        settings,
        device="cpu",
        progress=False,
    )
    assert report.improved
    old, new = (load_file(tmp_path / name / WEIGHTS) for name in ("delta", "output"))
    changed = {key.rpartition(".")[2] for key in old if not torch.equal(old[key], new[key])}
    assert changed == {"step", "column_step"}


def test_refusals(tiny_family, untied_family, spoiled, tmp_path, monkeypatch):
    base, expert, delta = tiny_family.base, tiny_family.experts["math"], spoiled["tiny_family", "math"]
    output, texts = tmp_path / "output", texts_of("math")

    def refused(error, match, *arguments, **changes):
        with pytest.raises(error, match=match):
            distill(*arguments, **QUICK | changes)
        assert list(tmp_path.iterdir()) == []

    refused(DistillationError, "steps is 0, expected", base, expert, delta, output, texts, steps=0)
    refused(DistillationError, "batch_size is 2.5", base, expert, delta, output, texts, batch_size=2.5)
    refused(DistillationError, "learning_rate is nan", base, expert, delta, output, texts, learning_rate=math.nan)
    refused(DistillationError, "the delta's own folder", base, expert, delta, delta, texts)
    refused(CompressionError, "the expert's own folder", base, expert, delta, expert, texts)
    refused(CompressionError, "0 tokens, expected at least 32", base, expert, delta, output, [])
    refused(DistillationError, "is one sample, expected at least 2", base, expert, delta, output, ["a" * 40])
    refused(BaseMismatchError, "another base", untied_family.base, untied_family.experts["math"], delta, output, texts)
    refused(
        DistillationError,
        "132 tokens, and the delta is of an expert with 128",
        base,
        tiny_family.experts["code"],
        delta,
        output,
        texts,
    )
    refused(CompressionError, "cannot be used here", base, expert, delta, output, texts, device="abacus")


def test_a_delta_of_another_expert_is_refused(tiny_family, spoiled, tmp_path):
    """A fine-tune of the same base and shapes: only the weights tell that it is another."""
    stranger = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    torch.manual_seed(8)
    with torch.no_grad():
        for parameter in stranger.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    stranger.save_pretrained(tmp_path / "stranger")
    AutoTokenizer.from_pretrained(tiny_family.base).save_pretrained(tmp_path / "stranger")
    with pytest.raises(DistillationError, match=r"The delta is not of .*stranger.* at most, expected above"):
        distill(
            tiny_family.base,
            tmp_path / "stranger",
            spoiled["tiny_family", "math"],
            tmp_path / "output",
            texts_of("math"),
            **QUICK,
        )


def test_a_full_disk_says_how_to_go_on_and_keeps_what_was_there(tiny_family, spoiled, tmp_path, monkeypatch):
    output = shutil.copytree(tiny_family.deltas["math"], tmp_path / "output")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    arguments = (tiny_family.base, tiny_family.experts["math"], spoiled["tiny_family", "math"], output)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recipe, "write_whole", full)
    with pytest.raises(DistillationError, match=r"No space left on device.*run the same command again"):
        distill(*arguments, texts_of("math"), **QUICK)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_an_overflow_names_the_step_and_keeps_what_was_there(tiny_family, spoiled, tmp_path):
    output = shutil.copytree(tiny_family.deltas["math"], tmp_path / "output")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(DistillationError, match=r"The loss of step \d+ of 30 is nan"):
        distill(
            tiny_family.base,
            tiny_family.experts["math"],
            spoiled["tiny_family", "math"],
            output,
            texts_of("math"),
            **QUICK | {"learning_rate": 1e4},
        )
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert not (tmp_path / "output.partial").exists()


def test_the_expert_is_gone_when_the_base_comes(tiny_family, spoiled, tmp_path, monkeypatch):
    layers, alive = [], []
    load_expert, load_base = AutoModelForCausalLM.from_pretrained, recipe.MESwitchModelForCausalLM.from_pretrained

    def expert(*args, **kwargs):
        model = load_expert(*args, **kwargs)
        layers.append(weakref.ref(model.model.layers[0]))
        return model

    def base(*args, **kwargs):
        alive.append([reference() is not None for reference in layers])
        return load_base(*args, **kwargs)

    monkeypatch.setattr(recipe.AutoModelForCausalLM, "from_pretrained", expert)
    monkeypatch.setattr(recipe.MESwitchModelForCausalLM, "from_pretrained", base)
    arguments = (tiny_family.base, tiny_family.experts["math"], spoiled["tiny_family", "math"])
    distill(*arguments, tmp_path / "output", texts_of("math"), **QUICK | {"steps": 1})
    assert alive == [[False]]


def test_sequences_are_split_scheduled_and_padded_without_loss(tiny_family):
    sequences = [torch.arange(1, n + 1) for n in (5, 3000, 40, 7, 1500, 1400)]
    batches = list(collate(sequences, range(6)))
    assert sorted(row for rows, _, _ in batches for row in rows) == list(range(6))
    for rows, ids, real in batches:
        assert ids.numel() <= 4096
        for row, padded, mask in zip(rows, ids, real, strict=True):
            assert torch.equal(padded[mask], sequences[row])
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)
    for count in range(2, 20):
        train, held_out = split(count)
        assert train
        assert held_out
        assert sorted(train + held_out) == list(range(count))
    plan = schedule(range(10), steps=7, batch_size=3, seed=0)
    assert [len(chosen) for chosen in plan] == [3] * 7
    drawn = [number for chosen in plan for number in chosen]
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10))


def test_what_was_done_stays_in_the_card_and_goes_along_when_a_model_is_saved(tiny_family, spoiled, tmp_path):
    base, expert, delta = tiny_family.base, tiny_family.experts["math"], spoiled["tiny_family", "math"]
    distill(base, expert, delta, tmp_path / "output", texts_of("math"), **QUICK | {"steps": 2})
    verify(base, expert, tmp_path / "output", texts_of("math", 8), device="cpu", save=True, progress=False)
    card = (tmp_path / "output" / "README.md").read_text()
    assert "## Fidelity" in card
    assert "2 steps on texts of the caller" in card
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    model.save_pretrained(tmp_path / "saved")
    found = [open_delta(tmp_path / name).config.distilled for name in ("output", "saved")]
    assert found[0] == found[1] is not None
    # A delta whose steps were not distilled says nothing of it.
    assert "distilled" not in (delta / "adapter_config.json").read_text()
