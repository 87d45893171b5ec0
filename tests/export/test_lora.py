"""What of a delta fits into a LoRA, and whether what it loses is told truly."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.fixtures_models import UNCHANGED_IN_MATH, dense_delta
from tests.models.architectures import build, fine_tune
from transformers_meswitch import MESwitchConfig, MESwitchModelForCausalLM, compress, extract_lora
from transformers_meswitch.cli import main
from transformers_meswitch.demo.runner import FAMILY
from transformers_meswitch.errors import MESwitchError
from transformers_meswitch.export.low_rank import low_rank

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def deltas_of(folder):
    """Module to its dense delta, from the format's definition."""
    records = json.loads((folder / "adapter_config.json").read_text())["modules"]
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, record in records.items():
        if record["kind"] == "linear":
            prefix = f"base_model.model.{name}.meswitch_delta."
            leaves = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            found[name] = dense_delta(record, leaves)
    return found


def factors_of(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}
    return {name: [tensors[f"base_model.model.{name}.lora_{which}.weight"] for which in "BA"] for name in names}


def texts_of(count, length):
    draw = random.Random(0)
    return ["".join(draw.choices("abcdefghijklmnop", k=length)) for _ in range(count)]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 14), st.integers(0, 2**16))
def test_factors_are_the_truncated_decomposition(out, width, rank, seed):
    matrix = torch.randn(out, width, generator=torch.Generator().manual_seed(seed))
    b, a = low_rank(matrix, rank)
    assert (b.shape, a.shape) == ((out, rank), (rank, width))
    lost = torch.linalg.svdvals(matrix.double())[rank:].square().sum().sqrt()
    error = (matrix.double() - b.double() @ a.double()).norm()
    assert float(error) == pytest.approx(float(lost), abs=1e-4)


@pytest.mark.parametrize("spectrum", ["flat", "steep"])
def test_a_wide_decomposition_is_all_but_the_best_and_always_the_same(spectrum):
    matrix = torch.randn(300, 420, generator=torch.Generator().manual_seed(0))
    if spectrum == "steep":
        matrix = matrix * torch.arange(1, 421).pow(-0.7)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    b, a = low_rank(matrix, 20)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    again = low_rank(matrix, 20)
    assert torch.equal(b, again[0])
    assert torch.equal(a, again[1])
    best = float(torch.linalg.svdvals(matrix)[20:].square().sum().sqrt())
    assert best <= float((matrix - b @ a).norm()) * 1.0001 < best * 1.002
    random_directions, _ = torch.linalg.qr(torch.randn(300, 20, generator=torch.Generator().manual_seed(3)))
    worse = matrix - random_directions @ (random_directions.T @ matrix)
    assert float(worse.norm()) > best * 1.02, "any directions would do"


@pytest.mark.parametrize("rank", [2, 16])
def test_what_is_lost_is_told_truly(rank, tiny_family, tmp_path):
    delta = tiny_family.deltas["math"]
    found = extract_lora(delta, tmp_path / "out", base=tiny_family.base, rank=rank, progress=False)
    exact, factors = deltas_of(delta), factors_of(tmp_path / "out")
    assert exact.keys() == factors.keys() == found.lost.keys()
    assert UNCHANGED_IN_MATH not in factors
    squares = [0.0, 0.0]
    for name, (b, a) in factors.items():
        assert b.dtype == a.dtype == torch.bfloat16
        error, norm = (exact[name] - b.float() @ a.float()).square().sum(), exact[name].square().sum()
        assert found.lost[name] == pytest.approx(float((error / norm).sqrt()), rel=1e-4)
        best = torch.linalg.svdvals(exact[name])[rank:].square().sum() / norm
        assert found.lost[name] == pytest.approx(float(best.sqrt()), rel=0.01)
        squares = [squares[0] + float(error), squares[1] + float(norm)]
    assert found.lost_overall == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-4)
    assert found.total_bytes == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert found.left_out == {"rows": 1, "values": 5}
    assert found.text is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{100 * found.lost_overall:.0f} % of the delta" in card
    assert "was not measured" in card


def test_at_full_rank_peft_computes_the_experts_linears(tiny_family, tmp_path):
    delta = tiny_family.deltas["math"]
    found = extract_lora(delta, tmp_path / "out", base=tiny_family.base, rank=64, dtype=torch.float32, progress=False)
    assert found.lost_overall < 1e-5
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)  # PEFT warns of keys that are missing
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_family.base), tmp_path / "out")
    plain = adapted.merge_and_unload().state_dict()
    base = AutoModelForCausalLM.from_pretrained(tiny_family.base).state_dict()
    exact = deltas_of(delta)
    for name, weight in base.items():
        change = exact.get(name.removesuffix(".weight"))
        expected = weight if change is None else weight + change
        torch.testing.assert_close(plain[name], expected, atol=1e-5, rtol=0)
    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    # One down projection is unchanged, so the name alone would be wrong.
    assert set(targets) == {*LINEARS} - {"down_proj"} | {"model.layers.0.mlp.down_proj"}


def test_transposed_linears_of_gpt2(tmp_path):
    base, expert, delta = (tmp_path / name for name in ("base", "expert", "delta"))
    build("gpt2", True).save_pretrained(base)
    fine_tune(base, seed=1).save_pretrained(expert)
    compress(base, expert, delta, MESwitchConfig(bits=2, salient_channels=3), calibration=None, progress=False)
    extract_lora(delta, tmp_path / "out", base=base, rank=64, dtype=torch.float32, progress=False)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out").merge_and_unload()
    twin = MESwitchModelForCausalLM.from_pretrained(base, experts={"it": str(delta)})
    twin = twin.merge_and_unload(adapter_names=["it"]).state_dict()
    for name in deltas_of(delta):
        torch.testing.assert_close(plain.state_dict()[f"{name}.weight"], twin[f"{name}.weight"], atol=1e-5, rtol=0)


def test_the_base_that_it_names_is_the_one(tiny_family, tmp_path):
    extract_lora(FAMILY, tmp_path / "family", "letter", rank=4, progress=False)
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "family")
    assert adapted.active_peft_config.base_model_name_or_path == str(FAMILY / "base")
    assert type(adapted.get_base_model()).__name__ == "LlamaForCausalLM"

    delta = Path(shutil.copytree(tiny_family.deltas["math"], tmp_path / "delta"))
    config = json.loads((delta / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "alice/base", "revision": "1234"}
    (delta / "adapter_config.json").write_text(json.dumps(config))
    extract_lora(delta, tmp_path / "hub", base=tiny_family.base, rank=4, progress=False)
    written = json.loads((tmp_path / "hub" / "adapter_config.json").read_text())
    # A local copy stood for the base on the Hub, whose fingerprint it has.
    assert (written["base_model_name_or_path"], written["revision"]) == ("alice/base", "1234")
    assert "[alice/base](https://huggingface.co/alice/base)" in (tmp_path / "hub" / "README.md").read_text()


def test_text_is_read_before_anything_is_worked_out(tiny_family, tmp_path, monkeypatch):
    from transformers_meswitch.export import lora

    monkeypatch.setattr(lora, "low_rank", lambda *_: pytest.fail("work was done"))
    with pytest.raises(MESwitchError, match=r"none\.jsonl"):
        extract_lora(
            tiny_family.deltas["math"], tmp_path / "out", base=tiny_family.base, texts=tmp_path / "none.jsonl"
        )


@torch.no_grad()
def test_what_text_tells(tiny_family, tmp_path):
    delta, texts = tiny_family.deltas["math"], texts_of(3, 60)
    kl = {}
    for rank in (1, 16):
        out = tmp_path / str(rank)
        found = extract_lora(
            delta, out, base=tiny_family.base, rank=rank, texts=texts, device="cpu", progress=False
        ).text
        expert = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts={"it": str(delta)})
        base = AutoModelForCausalLM.from_pretrained(tiny_family.base)
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_family.base), out)
        tokenizer = AutoTokenizer.from_pretrained(delta)
        expert.set_expert("it")
        sums, same, tokens = [0.0, 0.0], [0, 0], 0
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            reference, *others = (m(ids).logits[0, :-1].log_softmax(-1).double() for m in (expert, adapted, base))
            for i, other in enumerate(others):
                sums[i] += float((reference.exp() * (reference - other)).sum())
                same[i] += int((reference.argmax(-1) == other.argmax(-1)).sum())
            tokens += ids.shape[1] - 1
        assert found.tokens == tokens
        assert (found.kl, found.kl_base) == pytest.approx([total / tokens for total in sums], rel=1e-3)
        assert (found.top1_agreement, found.top1_agreement_base) == pytest.approx([count / tokens for count in same])
        assert f"{found.kl:.4g} with this LoRA" in (out / "README.md").read_text()
        kl[rank] = found.kl
    assert kl[16] < kl[1]


@pytest.mark.parametrize(
    ("expert", "arguments", "message"),
    [
        ("code", {}, "132 tokens and its base 128: a LoRA cannot add any. Use meswitch merge"),
        ("math", {"rank": 0}, "rank is 0, expected a whole number from 1"),
        ("math", {"rank": True}, "rank is True"),
        ("math", {"dtype": torch.int8}, "dtype is torch.int8, expected"),
        ("math", {"texts": ["abc"]}, "The text has 3 tokens, expected at least 32"),
    ],
)
def test_bad_input_leaves_nothing(expert, arguments, message, tiny_family, tmp_path):
    with pytest.raises((MESwitchError, ValueError), match=message):
        extract_lora(tiny_family.deltas[expert], tmp_path / "out", base=tiny_family.base, progress=False, **arguments)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(tiny_family, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(MESwitchError, match="exists and is not an empty folder"):
        extract_lora(tiny_family.deltas["math"], tmp_path, base=tiny_family.base, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_delta_without_linears(tiny_family, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(tmp_path / "expert")
    compress(tiny_family.base, tmp_path / "expert", tmp_path / "delta", calibration=None, progress=False)
    with pytest.raises(MESwitchError, match="changes no linear layer"):
        extract_lora(tmp_path / "delta", tmp_path / "out", base=tiny_family.base, progress=False)
    assert not (tmp_path / "out").exists()


def test_command(tmp_path, capsys):
    arguments = ["extract-lora", f"{FAMILY}:letter", "--rank", "4", "--device", "cpu", "-o"]
    assert main([*arguments, str(tmp_path / "json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["lost"]) == 28
    assert found["text"] is None
    assert main([*arguments, str(tmp_path / "text")]) == 0
    output = capsys.readouterr().out
    assert f"lost of the linear layers' delta: {found['lost_overall']:.1%}" in output
    assert "left out: norms, 9 modules" in output
