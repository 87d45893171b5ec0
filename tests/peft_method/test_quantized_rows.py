"""Quantised embedding and head rows in a running model, against dense matrices worked out from the files alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM

from tests.fixtures_models import change_rows, dense_model
from tests.models.architectures import VOCABULARY, build
from tests.models.reference import distance
from transformers_meswitch import MESwitchConfig, MESwitchModelForCausalLM, compress
from transformers_meswitch.compression.packing import pack
from transformers_meswitch.delta_format.reader import open_delta
from transformers_meswitch.delta_format.spec import QuantizedRowsRecord
from transformers_meswitch.peft_method import deltas
from transformers_meswitch.peft_method.deltas import QuantizedRowsDelta

TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# -- the delta by itself ---------------------------------------------------------------------------------------------


def make(
    base: torch.Tensor, coded: set[int], exact: set[int], num_rows: int, bits: int = 2, salient: int = 0
) -> tuple[QuantizedRowsDelta, torch.Tensor]:
    """A delta of random contents, and the matrix that it makes of ``base``; added rows are always exact."""
    width, shared = base.shape[1], min(num_rows, len(base))
    exact = {row for row in exact if row < num_rows} | set(range(shared, num_rows))
    coded = {row for row in coded if row < shared} - exact
    record = QuantizedRowsRecord(num_rows, width, bits, len(coded), len(exact), salient)
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 2**bits, (len(coded), width - salient), generator=generator, dtype=torch.uint8)
    leaves = {
        "codes": pack(codes, bits),
        "step": torch.rand(len(coded), generator=generator),
        "row_index": torch.tensor(sorted(coded), dtype=torch.int32),
        "salient_index": torch.randperm(width, generator=generator)[:salient].sort().values.int(),
        "salient": torch.randn(len(coded), salient, generator=generator).bfloat16(),
        "exact_index": torch.tensor(sorted(exact), dtype=torch.int32),
        "rows": torch.randn(len(exact), width, generator=generator),
    }
    leaves = {leaf: leaves[leaf] for leaf in record.leaves()}
    delta = QuantizedRowsDelta(record, torch.float32, torch.device("cpu"))
    for leaf, tensor in leaves.items():
        delta.assign(leaf, tensor, torch.device("cpu"))
    dense = torch.zeros(num_rows, width, dtype=base.dtype)
    dense[:shared] = base[:shared]
    change_rows(dense, asdict(record), leaves)
    return delta, dense


rows = st.sets(st.integers(0, 13))
cases = st.tuples(
    rows | st.just(set(range(14))), rows, st.integers(9, 14), st.integers(1, 4), st.sampled_from([0, 3, 48])
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=60, deadline=None)
@given(case=cases)
def test_a_delta_is_its_dense_matrix(dtype: torch.dtype, case: tuple[set[int], set[int], int, int, int]) -> None:
    coded, exact, num_rows, bits, salient = case
    base = torch.randn(11, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    delta, dense = make(base, coded, exact, num_rows, bits, salient)
    assert torch.equal(delta.dense(base), dense)

    ids = torch.arange(num_rows).flip(0).repeat(2, 1)
    looked_up = F.embedding(ids.clamp_max(10), base)
    assert torch.equal(delta.embed(ids, looked_up, base, None), dense[ids])
    scale = torch.tensor(6.5)
    scaled = delta.embed(ids, looked_up * scale.to(dtype), base, scale)
    assert torch.equal(scaled, dense[ids] * scale.to(dtype))

    hidden = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    width = max(num_rows, 11)
    logits = F.pad(F.linear(hidden, base), (0, width - 11), value=float("-inf"))
    kept = logits.clone()
    found = delta.logits(hidden, logits)
    expected = F.linear(hidden.float(), dense.float())
    scale_of_rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert distance(found[..., :num_rows].float(), expected) < scale_of_rounding
    assert torch.equal(logits, kept), "the base's logits were written to"
    assert found.dtype == dtype


def test_one_wrong_code_is_noticed() -> None:
    base = torch.randn(11, 48, generator=torch.Generator().manual_seed(1))
    delta, dense = make(base, {2, 7}, {3}, 12)
    delta.codes[1, 0] ^= 1
    assert not torch.equal(delta.dense(base), dense)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_blocks_make_no_difference(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.randn(11, 48, generator=torch.Generator().manual_seed(1))
    delta, dense = make(base, set(range(11)), {4}, 13)
    hidden = torch.randn(4, 48, generator=torch.Generator().manual_seed(2))
    logits = F.pad(F.linear(hidden, base), (0, 2))
    whole = delta.logits(hidden, logits)
    monkeypatch.setattr(deltas, "_BLOCK", rows * 48)
    assert torch.equal(delta.dense(base), dense)
    assert distance(delta.logits(hidden, logits), whole) < 1e-6


def test_only_the_rows_asked_for_are_made_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.randn(500, 48, generator=torch.Generator().manual_seed(1))
    delta, dense = make(base, set(range(500)), set(), 500)
    made = []
    original = deltas.ops.dequantize_delta
    monkeypatch.setattr(
        deltas.ops, "dequantize_delta", lambda record, *a: made.append(record.out_features) or original(record, *a)
    )
    ids = torch.tensor([[7, 499, 7]])
    assert torch.equal(delta.embed(ids, F.embedding(ids, base), base, None), dense[ids])
    assert made == [3]


# -- whole models ----------------------------------------------------------------------------------------------------

Pair = tuple[Path, Path]
#: Architecture, tied, rows of the expert's vocabulary, which of them changed, salient channels, the expert's dtype.
CASES: dict[str, tuple[str, bool, int, slice, int, torch.dtype]] = {
    "llama tied, grown": ("llama", True, VOCABULARY + 5, slice(0, None, 3), 3, torch.float32),
    "llama tied, all rows, half": ("llama", True, VOCABULARY, slice(None), 0, torch.bfloat16),
    "llama untied, grown": ("llama", False, VOCABULARY + 3, slice(None), 3, torch.float32),
    "llama untied, shrunk": ("llama", False, VOCABULARY - 10, slice(1, None, 2), 0, torch.float32),
    "gemma3 tied, grown": ("gemma3_text", True, VOCABULARY + 5, slice(0, None, 2), 3, torch.float32),
    "gemma3 tied, shrunk": ("gemma3_text", True, VOCABULARY - 6, slice(None), 0, torch.float32),
    "gemma2 untied": ("gemma2", False, VOCABULARY, slice(None), 2, torch.bfloat16),
    "gpt_neox untied, grown": ("gpt_neox", False, VOCABULARY + 4, slice(None), 3, torch.float32),
    "gpt_neox tied": ("gpt_neox", True, VOCABULARY, slice(5, None), 3, torch.float32),
    "gpt2, learned positions": ("gpt2", True, VOCABULARY + 2, slice(0, None, 2), 3, torch.float32),
    "phi, a head with a bias": ("phi", False, VOCABULARY + 5, slice(0, None, 2), 3, torch.float32),
}


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """A function from the name of a case to the folders of its base and its delta, built once."""
    made: dict[str, Pair] = {}

    def pair(name: str) -> Pair:
        if name not in made:
            model_type, tied, vocabulary, changed, salient, dtype = CASES[name]
            folder = tmp_path_factory.mktemp("quantized-rows")
            build(model_type, tied).save_pretrained(folder / "base")
            expert = AutoModelForCausalLM.from_pretrained(folder / "base")
            expert.resize_token_embeddings(vocabulary, mean_resizing=False)
            generator = torch.Generator().manual_seed(1)
            rows = {id(m.weight) for m in (expert.get_input_embeddings(), expert.get_output_embeddings())}
            for parameter in expert.parameters():
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                where = changed if id(parameter) in rows else slice(None)
                parameter[where] += noise[where]
            expert.to(dtype).save_pretrained(folder / "expert")
            how = MESwitchConfig(bits=4, salient_channels=salient)
            compress(folder / "base", folder / "expert", folder / "delta", how, calibration=None, progress=False)
            made[name] = folder / "base", folder / "delta"
        return made[name]

    return pair


@pytest.fixture
def ids() -> torch.Tensor:
    """Int64 ``[2, 7]`` within every vocabulary."""
    return torch.randint(3, VOCABULARY - 10, (2, 7), generator=torch.Generator().manual_seed(5))


def quantised(delta: Path) -> dict[str, Any]:
    return {name: record for name, record in open_delta(delta).records.items() if record.kind == "quantized_rows"}


@pytest.mark.parametrize("name", CASES)
def test_a_model_equals_its_dense_twin(make_pair: Callable[[str], Pair], ids: torch.Tensor, name: str) -> None:
    base, delta = make_pair(name)
    model_type, tied, vocabulary, *_ = CASES[name]
    assert len(quantised(delta)) == (1 if tied else 2) + (model_type == "gpt2")
    twin = dense_model(base, delta)
    known = torch.cat([ids, torch.tensor([[vocabulary - 1] * 7])])  # an added token where there are any
    expected = twin(known).logits
    for model in (AutoModelForCausalLM.from_pretrained(delta, dtype=torch.float32), AutoPeft(delta)):
        logits = model(known).logits
        assert logits[..., :vocabulary].isfinite().all()
        assert distance(logits[..., :vocabulary], expected) < TOLERANCE
        assert bool((logits[..., vocabulary:] == float("-inf")).all())
    headless = AutoModel.from_pretrained(delta, dtype=torch.float32)
    assert distance(headless(known).last_hidden_state, twin.base_model(known).last_hidden_state) < TOLERANCE


def AutoPeft(delta: Path) -> Any:
    return AutoPeftModelForCausalLM.from_pretrained(delta, dtype=torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_mixed_rows_and_merging(make_pair: Callable[[str], Pair], ids: torch.Tensor, name: str) -> None:
    base, delta = make_pair(name)
    vocabulary = CASES[name][2]
    twin = dense_model(base, delta)
    stock = AutoModelForCausalLM.from_pretrained(base)
    before = {key: tensor.clone() for key, tensor in stock.state_dict().items()}
    of_expert, of_base = twin(ids).logits, stock(ids).logits
    model = MESwitchModelForCausalLM.from_pretrained(base, experts={"tuned": delta})
    with model._meswitch_switch.rows(["tuned", None]):
        mixed = model(ids).logits
    assert distance(mixed[0, :, :vocabulary], of_expert[0]) < TOLERANCE
    assert distance(mixed[1, :, :VOCABULARY], of_base[1]) < TOLERANCE
    assert distance(mixed[1, :, : min(vocabulary, VOCABULARY)], of_expert[1, :, :VOCABULARY]) > 10 * TOLERANCE

    model.set_expert("tuned")
    model.merge_adapter(safe_merge=True)
    assert distance(model(ids).logits[..., :vocabulary], of_expert) < TOLERANCE
    model.unmerge_adapter()
    after = {key.replace(".base_layer", ""): tensor for key, tensor in model.state_dict().items()}
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert distance(model(ids).logits[..., :vocabulary], of_expert) < TOLERANCE
    plain = model.merge_and_unload()
    assert torch.equal(plain.get_input_embeddings().weight, twin.get_input_embeddings().weight)
    assert torch.equal(plain.get_output_embeddings().weight, twin.get_output_embeddings().weight)
    assert distance(plain(ids).logits, of_expert) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gemma3 tied, grown", "gpt2, learned positions", "llama untied, grown"])
def test_half_precision_rounds_once(
    make_pair: Callable[[str], Pair], ids: torch.Tensor, name: str, dtype: torch.dtype
) -> None:
    base, delta = make_pair(name)
    twin = dense_model(base, delta, dtype)
    model = AutoModelForCausalLM.from_pretrained(delta, dtype=dtype)
    embedding = model.get_input_embeddings()
    assert torch.equal(embedding(ids), twin.get_input_embeddings()(ids))
    model.merge_adapter()
    assert torch.equal(embedding.base_layer.weight, twin.get_input_embeddings().weight)


@pytest.mark.parametrize("own_bias", [False, True])
@pytest.mark.parametrize("embedding_bits", [None, 3])
def test_a_head_with_a_bias(tmp_path: Path, ids: torch.Tensor, embedding_bits: int | None, own_bias: bool) -> None:
    """Exact rows bring their own logits, coded ones the base's, bias included; either way it counts once."""
    base = build("phi", tied=False)
    base.lm_head.bias.add_(torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2)))
    base.save_pretrained(tmp_path / "base")
    expert = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expert.lm_head.weight[10:50] += 0.1 * torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    expert.lm_head.bias[20:60] += own_bias
    expert.save_pretrained(tmp_path / "expert")
    how = MESwitchConfig(embedding_bits=embedding_bits)
    delta = compress(tmp_path / "base", tmp_path / "expert", tmp_path / "delta", how, calibration=None, progress=False)
    assert list(open_delta(delta).records) == ["lm_head"]
    expected = dense_model(tmp_path / "base", delta)(ids).logits
    model = AutoModelForCausalLM.from_pretrained(delta)
    assert distance(model(ids).logits, expected) < TOLERANCE
    assert distance(base(ids).logits, expected) > 10 * TOLERANCE
    model.merge_adapter()
    assert distance(model(ids).logits, expected) < TOLERANCE


def test_a_damaged_step_is_noticed_in_a_model(make_pair: Callable[[str], Pair], ids: torch.Tensor) -> None:
    base, delta = make_pair("llama tied, all rows, half")
    expected = dense_model(base, delta)(ids).logits
    model = AutoModelForCausalLM.from_pretrained(delta, dtype=torch.float32)
    model.get_input_embeddings().stored_delta("default").step[int(ids[0, 0])] *= 1.5
    assert distance(model(ids).logits, expected) > 10 * TOLERANCE


def test_a_version_1_delta_is_saved_as_today(make_pair: Callable[[str], Pair], tmp_path: Path) -> None:
    base, _ = make_pair("llama tied, grown")
    source = tmp_path / "old"
    expert = base.parent / "expert"
    compress(base, expert, source, MESwitchConfig(bits=4, embedding_bits=None), calibration=None, progress=False)
    config = source / "adapter_config.json"
    config.write_text(config.read_text().replace('"format_version": 2', '"format_version": 1'))
    model = AutoModelForCausalLM.from_pretrained(source)
    assert model.peft_config["default"].format_version == 1
    model.save_pretrained(tmp_path / "new")
    assert '"format_version": 2' in (tmp_path / "new" / "adapter_config.json").read_text()
    assert "delta format version 2" in (tmp_path / "new" / "README.md").read_text()
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (source, tmp_path / "new"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
