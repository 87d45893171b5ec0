"""Embeddings and heads through the kernels, by themselves, against dense matrices: on a GPU, or in the interpreter."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.fixtures_models import CODE_VOCAB_SIZE, VOCAB_SIZE, TinyFamily, dense_model
from tests.models.architectures import VOCABULARY, build
from tests.peft_method.test_kernel_path import DEVICE, INTERPRETED, needs_kernels
from tests.triton_interpreter import BOTH_SPEEDS, SLOW, check_interpreted
from transformers_meswitch import MESwitchConfig, MESwitchModelForCausalLM, compress
from transformers_meswitch.peft_method import rows_layers

CHOICES: list[list[str | None]] = [["math"], ["code"], ["code", None, "math", "code"], [None, None]]
#: Of the largest logit.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=["tied", pytest.param("untied", marks=SLOW)])
def family(request: pytest.FixtureRequest) -> TinyFamily:
    return request.getfixturevalue("tiny_family" if request.param == "tied" else "untied_family")


def load(family: TinyFamily) -> Any:
    return MESwitchModelForCausalLM.from_pretrained(
        family.base, experts=family.deltas, dtype=torch.float32, device_map=DEVICE
    )


def twins(family: TinyFamily) -> dict[str | None, Any]:
    return {None: AutoModelForCausalLM.from_pretrained(family.base)} | {
        name: dense_model(family.base, delta) for name, delta in family.deltas.items()
    }


def check(model: Any, dense: dict[str | None, Any], names: list[str | None]) -> None:
    """Embedding to the bit, and logits, of rows of experts, as their dense matrices give them."""
    generator = torch.Generator().manual_seed(0)
    known = [dense[name].get_input_embeddings().num_embeddings for name in names]
    ids = torch.stack([torch.randint(0, limit, (40,), generator=generator) for limit in known])
    hidden = torch.randn(len(names), 1, 64, generator=generator)
    with model._meswitch_switch.rows(names):
        embedded = model.get_input_embeddings()(ids.to(DEVICE)).cpu()
        logits = model.get_output_embeddings()(hidden.to(DEVICE)).cpu()
    for row, name in enumerate(names):
        assert torch.equal(embedded[row], dense[name].get_input_embeddings()(ids[row]))
        expected = dense[name].get_output_embeddings()(hidden[row])
        difference = (logits[row, :, : known[row]] - expected).abs().max()
        assert difference <= TOLERANCE * expected.abs().max()
        assert logits[row, :, known[row] :].isneginf().all()


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What went through the kernels."""
    calls: list[str] = []
    for name in ("embed_rows", "correct_logits"):
        original = getattr(rows_layers, name)

        def noted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(rows_layers, name, noted)
    return calls


@needs_kernels
def test_rows_of_experts_are_their_dense_rows(family: TinyFamily, used: list[str]) -> None:
    model, dense = load(family), twins(family)
    for names in CHOICES:
        check(model, dense, names)
    assert used == ["embed_rows", "correct_logits"] * (len(CHOICES) - 1)


@needs_kernels
def test_a_wrong_map_is_noticed(family: TinyFamily) -> None:
    model, dense = load(family), twins(family)
    path = model.get_output_embeddings().rows_path
    row_map = path.leaves["math"].row_map
    row_map[int((row_map != -1).nonzero()[0])] = -1
    with pytest.raises(AssertionError):
        check(model, dense, ["math"])


@needs_kernels
def test_many_rows_of_a_head_are_made_dense(tiny_family: TinyFamily, used: list[str]) -> None:
    model = load(tiny_family)
    model.set_expert("code")
    model.get_output_embeddings()(torch.randn(1, 17, 64, device=DEVICE))
    assert used == []


@needs_kernels
def test_slots_moves_casts_and_copies(tiny_family: TinyFamily) -> None:
    model, dense = load(tiny_family), twins(tiny_family)
    slot = model._meswitch_switch.slots.of("code")
    model.delete_adapter("code")
    assert not model.get_output_embeddings().rows_table[slot].any()
    assert not model.get_input_embeddings().rows_table[slot].any()
    check(model, dense, ["math", None])
    model.load_adapter(tiny_family.deltas["code"], adapter_name="code")
    model.double().float().to("cpu").to(DEVICE)
    check(model, dense, ["code", "math"])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        ours, theirs = (m.get_output_embeddings().rows_table for m in (model, twin))
        assert torch.equal(ours != 0, theirs != 0)
        assert not (ours[:2, 0] == theirs[:2, 0]).any()
        check(twin, dense, ["code", "math"])
    # A tied head follows its embedding, whichever of the two is moved.
    embedding = model.get_input_embeddings()
    for delta in embedding.meswitch_delta.values():
        delta._apply(torch.clone)
    embedding._settle_all()
    check(model, dense, ["code", "math"])


@needs_kernels
def test_ids_that_no_expert_knows_are_not_looked_up(tiny_family: TinyFamily) -> None:
    model = load(tiny_family)
    model.set_expert("code")
    embedding = model.get_input_embeddings()
    embedding(torch.tensor([[CODE_VOCAB_SIZE - 1]], device=DEVICE))
    if DEVICE == "cpu":  # a GPU's assertion would end the process's use of it
        with pytest.raises(IndexError):
            embedding(torch.tensor([[CODE_VOCAB_SIZE]], device=DEVICE))
    model.delete_adapter("code")
    assert model._meswitch_switch.widest_vocabulary == CODE_VOCAB_SIZE
    assert model.get_output_embeddings()(torch.randn(1, 1, 64, device=DEVICE)).shape[-1] == VOCAB_SIZE


@needs_kernels
def test_gradients_go_past_the_kernels(tiny_family: TinyFamily, used: list[str]) -> None:
    model = load(tiny_family)
    model.set_expert("code")
    with torch.enable_grad():
        hidden = torch.randn(1, 1, 64, device=DEVICE, requires_grad=True)
        model.get_output_embeddings()(hidden)[..., :VOCAB_SIZE].sum().backward()
    assert used == []
    matrix = dense_model(tiny_family.base, tiny_family.deltas["code"]).get_output_embeddings().weight
    assert torch.allclose(hidden.grad.cpu()[0, 0], matrix[:VOCAB_SIZE].sum(0), atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("own_bias", [False, True])
def test_a_head_with_a_bias(tmp_path: Path, own_bias: bool, used: list[str]) -> None:
    """Own rows bring their own logits, coded ones the base's, bias included; either way it counts once."""
    base = build("phi", tied=False)
    base.lm_head.bias.add_(torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2)))
    base.save_pretrained(tmp_path / "base")
    expert = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expert.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    expert.lm_head.weight += 0.1 * torch.randn(expert.lm_head.weight.shape, generator=torch.Generator().manual_seed(1))
    expert.lm_head.bias[20:60] += own_bias
    expert.save_pretrained(tmp_path / "expert")
    compress(
        tmp_path / "base", tmp_path / "expert", tmp_path / "delta", MESwitchConfig(), calibration=None, progress=False
    )
    dense = dense_model(tmp_path / "base", tmp_path / "delta").lm_head
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "delta", dtype=torch.float32, device_map=DEVICE)
    hidden = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(3))
    found = model.lm_head(hidden.to(DEVICE)).cpu()
    assert used == ["correct_logits"]
    assert torch.allclose(found, dense(hidden), atol=1e-5)
    assert not torch.allclose(found[..., :VOCABULARY], base.lm_head(hidden), atol=1e-2)


@needs_kernels
def test_own_rows_of_a_dtype_that_kernels_lack(tiny_family: TinyFamily) -> None:
    model, dense = load(tiny_family), twins(tiny_family)
    embedding = model.get_input_embeddings()
    for name in ("math", "code"):
        delta = embedding.stored_delta(name)
        delta.rows = nn.Parameter(delta.rows.double(), requires_grad=False)
    embedding._settle_all()
    check(model, dense, ["code", "math"])


@BOTH_SPEEDS
@pytest.mark.skipif(INTERPRETED, reason="runs the tests above")
def test_in_the_interpreter(slow: bool) -> None:
    check_interpreted(
        __file__,
        test_rows_of_experts_are_their_dense_rows,
        test_a_wrong_map_is_noticed,
        test_many_rows_of_a_head_are_made_dense,
        test_slots_moves_casts_and_copies,
        test_ids_that_no_expert_knows_are_not_looked_up,
        test_gradients_go_past_the_kernels,
        test_a_head_with_a_bias,
        test_own_rows_of_a_dtype_that_kernels_lack,
        slow=slow,
    )
