"""``verify`` against stock models whose dense weights are worked out from the files alone."""

from __future__ import annotations

import json
import math
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.fixtures_models import ADDED_TOKENS, VOCAB_SIZE, dense_delta, dense_model, fine_tune
from transformers_meswitch import MESwitchConfig, compress, verify
from transformers_meswitch.errors import BaseMismatchError, DeltaFormatError, VerificationError
from transformers_meswitch.verification import text as text_module
from transformers_meswitch.verification import verify as module
from transformers_meswitch.verification.evidence import read_evidence, tensors_digest


def texts_of(name, count=6, length=40):
    """Random characters; for ``code`` some of its own tokens among them, at the start, in pairs and at the end."""
    draw = random.Random(0)
    texts = ["".join(chr(draw.randrange(33, 127)) for _ in range(length)) for _ in range(count)]
    if name == "code":
        a, b, *_ = ADDED_TOKENS
        texts = [f"{a}{text[:10]}{b}{a}{text[10:]}{b}" if i % 2 else text for i, text in enumerate(texts)]
    return texts


def log_probabilities(model, ids, vocabulary):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, :, :vocabulary].double().log_softmax(dim=-1)


def by_definition(base, expert, delta, texts, tokenizer):
    """The figures in float64, token by token."""
    vocabulary = expert.get_input_embeddings().num_embeddings
    kl, agree, kl_base, agree_base = [], [], [], []
    nll = {"base": [], "expert": [], "delta": []}
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        of_expert, of_delta = (log_probabilities(model, ids, vocabulary) for model in (expert, delta))
        seen_by_base = []
        for place, token in enumerate(ids):
            p = of_expert[place - 1]
            if place > 0:
                q = of_delta[place - 1]
                kl.append(float((p.exp() * (p - q)).sum()))
                agree.append(int(p.argmax()) == int(q.argmax()))
            if token >= VOCAB_SIZE:
                continue
            if seen_by_base:
                # What the base says next of what it has seen, token by token and not in one pass.
                r = log_probabilities(base, seen_by_base, VOCAB_SIZE)[-1]
                p, q = (of[place - 1, :VOCAB_SIZE].log_softmax(dim=-1) for of in (of_expert, of_delta))
                kl_base.append(float((p.exp() * (p - r)).sum()))
                agree_base.append(int(p.argmax()) == int(r.argmax()))
                for who, distribution in (("base", r), ("expert", p), ("delta", q)):
                    nll[who].append(-float(distribution[token]))
            seen_by_base.append(token)

    def mean(values):
        return sum(values) / len(values)

    return {
        "tokens": len(kl),
        "shared_tokens": len(kl_base),
        "kl": mean(kl),
        "kl_base": mean(kl_base),
        "top1_agreement": mean(agree),
        "top1_agreement_base": mean(agree_base),
        **{f"perplexity_{who}": math.exp(mean(values)) for who, values in nll.items()},
    }


@pytest.mark.parametrize("name", ["math", "code"])
@pytest.mark.parametrize("fixture", ["tiny_family", "untied_family"])
def test_every_figure_is_its_definition(fixture, name, request):
    family = request.getfixturevalue(fixture)
    texts = texts_of(name)
    base, expert = (AutoModelForCausalLM.from_pretrained(p).eval() for p in (family.base, family.experts[name]))
    delta = dense_model(family.base, family.deltas[name])
    expected = by_definition(base, expert, delta, texts, AutoTokenizer.from_pretrained(family.experts[name]))
    assert (expected["shared_tokens"] < expected["tokens"]) is (name == "code")

    found = verify(family.base, family.experts[name], family.deltas[name], texts, device="cpu", progress=False)
    assert {key: getattr(found.text, key) for key in expected} == pytest.approx(expected, rel=1e-4)
    assert found.text.vocab_size == expert.get_input_embeddings().num_embeddings
    assert found.text.shared_vocab_size == VOCAB_SIZE
    assert (found.text.dtype, found.text.device) == ("float32", "cpu")


def test_weights_and_digest_come_from_the_files(tiny_family):
    found = verify(tiny_family.base, tiny_family.experts["math"], tiny_family.deltas["math"], progress=False)
    base, expert = (load_file(p / "model.safetensors") for p in (tiny_family.base, tiny_family.experts["math"]))
    stored = load_file(tiny_family.deltas["math"] / "adapter_model.safetensors")
    modules = json.loads((tiny_family.deltas["math"] / "adapter_config.json").read_text())["modules"]
    expected, coded = {}, 0
    for name, record in modules.items():
        if record["kind"] == "linear":
            prefix = f"base_model.model.{name}.meswitch_delta."
            leaves = {key[len(prefix) :]: tensor for key, tensor in stored.items() if key.startswith(prefix)}
            exact = expert[f"{name}.weight"] - base[f"{name}.weight"]
            expected[name] = float((exact - dense_delta(record, leaves)).norm() / exact.norm())
            coded += record["out_features"] * (record["in_features"] - record["salient_channels"])
    assert found.weights.relative_errors == pytest.approx(expected, rel=1e-4)
    assert found.weights.weights_by_bits == {"4": coded}
    assert found.text is None
    assert found.tensors_sha256 == tensors_digest(stored)
    assert set(found.versions) == {"transformers-meswitch", "torch", "transformers", "peft", "python"}
    assert str(tiny_family.base.parent) not in json.dumps([found.base, found.expert])


def test_a_delta_of_another_expert_shows(tiny_family, tmp_path):
    math = tiny_family.experts["math"]
    other = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    fine_tune(other, 7, (5,))
    other.save_pretrained(tmp_path / "other")
    compress(
        tiny_family.base,
        tmp_path / "other",
        tmp_path / "delta",
        MESwitchConfig(bits=4),
        calibration=None,
        progress=False,
    )
    right = verify(tiny_family.base, math, tiny_family.deltas["math"], texts_of("math"), progress=False)
    wrong = verify(tiny_family.base, math, tmp_path / "delta", texts_of("math"), progress=False)
    assert wrong.text.kl > 10 * right.text.kl
    assert wrong.text.top1_agreement < right.text.top1_agreement
    assert all(error > 1 for error in wrong.weights.relative_errors.values())
    assert "no nearer to this expert" in wrong.judgement
    assert "no nearer to this expert" not in right.judgement


def test_fewer_bits_are_further_and_one_flipped_layer_is_found(tiny_family, tmp_path):
    math, texts = tiny_family.experts["math"], texts_of("math")
    for bits in (1, 3):
        how = MESwitchConfig(bits=bits, salient_channels=0)
        compress(tiny_family.base, math, tmp_path / str(bits), how, calibration=None, progress=False)
    one, three = (verify(tiny_family.base, math, tmp_path / b, texts, progress=False) for b in ("1", "3"))
    assert one.text.kl > 2 * three.text.kl
    assert one.too_far
    assert "for 1 bit:" in one.judgement
    weights = tmp_path / "3" / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = "base_model.model.model.layers.1.mlp.up_proj.meswitch_delta.codes"
    save_file({**tensors, key: ~tensors[key]}, weights, {"format": "pt"})
    damaged = verify(tiny_family.base, math, tmp_path / "3", texts, progress=False)
    assert damaged.weights.worst == ("model.layers.1.mlp.up_proj", pytest.approx(2, abs=0.1))
    assert damaged.text.kl > 1.5 * three.text.kl
    assert damaged.tensors_sha256 != three.tensors_sha256


def test_text_is_cut_to_pieces_and_to_max_tokens(tiny_family, monkeypatch):
    arguments = (tiny_family.base, tiny_family.experts["math"], tiny_family.deltas["math"])
    texts = texts_of("math", count=3, length=100)
    monkeypatch.setattr(text_module, "_PIECE", 30)
    pieces = [text[start : start + 30] for text in texts for start in range(0, 90, 30)]
    # Of each text the last 10 tokens are a piece of their own; 230 tokens end within the third text's second piece.
    expected = [*pieces[:3], texts[0][90:], *pieces[3:6], texts[1][90:], texts[2][:30]]
    cut = verify(*arguments, texts, max_tokens=230, progress=False)
    monkeypatch.setattr(text_module, "_PIECE", 512)
    assert cut.text == verify(*arguments, expected, progress=False).text
    assert cut.text.tokens == 230 - 9
    assert cut.text.tokens_sha256 != verify(*arguments, texts, progress=False).text.tokens_sha256


def test_dtype_reaches_all_three_models(tiny_family):
    arguments = (tiny_family.base, tiny_family.experts["math"], tiny_family.deltas["math"], texts_of("math"))
    exact = verify(*arguments, progress=False).text
    half = verify(*arguments, dtype=torch.bfloat16, progress=False).text
    assert half.dtype == "bfloat16"
    assert half.kl != exact.kl
    assert half.perplexity_expert != exact.perplexity_expert
    assert half.perplexity_base != exact.perplexity_base
    assert half.perplexity_base == pytest.approx(exact.perplexity_base, rel=0.1)


def test_save_keeps_the_evidence_and_what_people_wrote(tiny_family, tmp_path):
    delta = shutil.copytree(tiny_family.deltas["code"], tmp_path / "delta")
    card = delta / "README.md"
    assert "## Fidelity" not in card.read_text()
    card.write_text(card.read_text() + "\n## Mine\n\nGSM8K: 71 %\n")
    files = {path.name: path.read_bytes() for path in delta.iterdir() if path != card}
    found = verify(tiny_family.base, tiny_family.experts["code"], delta, texts_of("code"), save=True, progress=False)
    assert read_evidence(delta) == found
    text = card.read_text()
    assert text.count("## Fidelity") == 1
    assert f"{found.text.kl:.4g}" in text
    assert found.judgement in text
    assert f"The base knows {found.text.shared_tokens} of the tokens" in text
    assert f"({VOCAB_SIZE} of {found.text.vocab_size})" in text
    assert text.endswith("\n## Mine\n\nGSM8K: 71 %\n")
    assert str(tmp_path) not in text + (delta / "meswitch_evidence.json").read_text()
    assert {name: (delta / name).read_bytes() for name in files} == files

    again = verify(tiny_family.base, tiny_family.experts["code"], delta, save=True, progress=False)
    assert read_evidence(delta) == again
    assert "KL from" not in card.read_text()
    assert card.read_text().count("## Fidelity") == 1


def test_refusals(tiny_family, untied_family, tmp_path):
    base, expert, delta = tiny_family.base, tiny_family.experts["math"], tiny_family.deltas["math"]
    with pytest.raises(VerificationError, match="'me/delta' is none"):
        verify(base, expert, "me/delta", save=True, progress=False)
    with pytest.raises(BaseMismatchError, match="another base"):
        verify(untied_family.base, expert, delta, progress=False)
    with pytest.raises(VerificationError, match="4 tokens, expected at least 32"):
        verify(base, expert, delta, ["abcd"], progress=False)
    with pytest.raises(DeltaFormatError, match=r"adapter_config\.json"):
        verify(base, expert, expert, progress=False)
    with pytest.raises(VerificationError, match="132 tokens, and the delta is of one with 128"):
        verify(base, tiny_family.experts["code"], delta, texts_of("code"), progress=False)
    bare = shutil.copytree(expert, tmp_path / "bare")
    for path in bare.glob("*token*"):
        path.unlink()
    with pytest.raises(VerificationError, match="needs the tokenizer of"):
        verify(base, bare, delta, texts_of("math"), progress=False)
    foreign = shutil.copytree(expert, tmp_path / "foreign")
    AutoTokenizer.from_pretrained(tiny_family.experts["code"]).save_pretrained(foreign)
    with pytest.raises(VerificationError, match=r"gives the id 1\d\d, but the model has 128 tokens"):
        verify(base, foreign, delta, texts_of("code"), progress=False)
    with pytest.raises(VerificationError, match="The base knows 1 of the text's 39 predicted tokens"):
        verify(
            base,
            tiny_family.experts["code"],
            tiny_family.deltas["code"],
            ["ab" + ADDED_TOKENS[0] * 38],
            progress=False,
        )


def test_an_expert_that_is_not_a_number(tiny_family, tmp_path):
    broken = shutil.copytree(tiny_family.experts["math"], tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match="The expert gives logits that are not numbers in float32"):
        verify(tiny_family.base, broken, tiny_family.deltas["math"], texts_of("math"), progress=False)


def test_one_model_at_a_time_and_no_logits_left(tiny_family, tmp_path, monkeypatch):
    """When the base is loaded the expert is gone; the temporary files are, when all is done."""
    import weakref

    loaded, alive = [], []
    load_expert, load_base = AutoModelForCausalLM.from_pretrained, module.MESwitchModelForCausalLM.from_pretrained

    def expert(*args, **kwargs):
        model = load_expert(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model

    def base(*args, **kwargs):
        alive.append([reference() is not None for reference in loaded])
        return load_base(*args, **kwargs)

    monkeypatch.setattr(module.AutoModelForCausalLM, "from_pretrained", expert)
    monkeypatch.setattr(module.MESwitchModelForCausalLM, "from_pretrained", base)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    arguments = (tiny_family.base, tiny_family.experts["math"], tiny_family.deltas["math"])
    verify(*arguments, texts_of("math"), progress=False)
    assert alive == [[False]]
    assert list(tmp_path.iterdir()) == []
