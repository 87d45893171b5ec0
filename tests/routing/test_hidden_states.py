"""Early hidden states against a full forward pass of the stock model."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM

from tests.fixtures_models import TinyFamily, llama_config
from transformers_meswitch import MESwitchModel, MESwitchModelForCausalLM
from transformers_meswitch.compression.layered_model import decoder_layers
from transformers_meswitch.errors import UnsupportedModelError, UnsupportedOperationError
from transformers_meswitch.routing import hidden_states
from transformers_meswitch.routing.hidden_states import early_layers, pooled_hidden_states

ROWS = [[5, 6, 7], [40, 41, 42, 43, 44, 45, 46], [9], [90, 91]]


def reference(model: Any, rows: list[list[int]], layer: int) -> np.ndarray:
    """Row by row, without padding, by ``output_hidden_states``; pooled in numpy."""
    found = []
    for row in rows:
        with torch.no_grad():
            hidden = model(torch.tensor([row]), output_hidden_states=True).hidden_states[layer][0].double().numpy()
        found.append((hidden / np.sqrt((hidden**2).mean(axis=1, keepdims=True))).mean(axis=0))
    return np.stack(found)


def small_models() -> dict[str, Any]:
    torch.manual_seed(0)
    size = {"vocab_size": 128, "num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2}
    return {
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=128, n_layer=3, n_embd=32, n_head=2, n_positions=64)),
        "phi": PhiForCausalLM(PhiConfig(intermediate_size=64, max_position_embeddings=64, **size)),
    }


def test_states_are_those_of_a_full_forward(tiny_family: TinyFamily) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    found = pooled_hidden_states(model, ROWS, [0, 1]).numpy()
    for place, layer in enumerate((0, 1)):
        np.testing.assert_allclose(found[:, place], reference(model, ROWS, layer), atol=1e-5)
    assert not np.allclose(found[:, 1], reference(model, ROWS, 2), atol=1e-2)


@pytest.mark.parametrize("name", ["gpt2", "phi"])
def test_other_architectures(name: str) -> None:
    model = small_models()[name].eval()
    found = pooled_hidden_states(model, ROWS, [2])[:, 0].numpy()
    np.testing.assert_allclose(found, reference(model, ROWS, 2), atol=1e-5)
    assert early_layers(model) == [1, 2]


def test_it_is_the_base_whatever_expert_is_active(tiny_family: TinyFamily) -> None:
    stock = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    for loader in (MESwitchModelForCausalLM, MESwitchModel):
        model = loader.from_pretrained(tiny_family.base, experts=dict(tiny_family.deltas))
        model.set_expert("code")
        with model._meswitch_switch.rows([None]):
            found = pooled_hidden_states(model, ROWS, [1])[:, 0].numpy()
        np.testing.assert_allclose(found, reference(stock, ROWS, 1), atol=1e-5)
        active = pooled_hidden_states(model, ROWS, [1])[:, 0].numpy()
        assert not np.allclose(active, found, atol=1e-3)
        assert model.active_expert == "code"


def test_layers_above_are_not_run(tiny_family: TinyFamily) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_family.base)

    def fail(*_: Any) -> None:
        raise AssertionError("a layer above ran")

    model.model.layers[1].self_attn.register_forward_pre_hook(fail)
    pooled_hidden_states(model, ROWS, [1])
    with pytest.raises(AssertionError, match="above"):
        model(torch.tensor([[5]]))


def test_nothing_is_left_behind(tiny_family: TinyFamily) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_family.base).train()
    pooled_hidden_states(model, ROWS, [1])
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_calls_of_other_threads_run_through(tiny_family: TinyFamily) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(ids).logits
    wrong: list[str] = []
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            try:
                with torch.no_grad():
                    if not torch.equal(model(ids).logits, expected):
                        wrong.append("another answer")
            except BaseException as error:
                wrong.append(repr(error))

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(50):
        pooled_hidden_states(model, ROWS, [1])
    done.set()
    thread.join()
    assert not wrong


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_a_shared_model_is_left_alone(tiny_family: TinyFamily, training: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_family.base).train(training)
    modes: list[bool] = []
    model.get_input_embeddings().register_forward_hook(lambda *_: modes.append(model.training))
    pooled_hidden_states(model, ROWS, [1])
    assert set(modes) == {training}


def test_layers_are_searched_for_once_a_model_and_found_where_they_are_now(
    tiny_family: TinyFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    expected = pooled_hidden_states(model, ROWS, [1])
    searches: list[Any] = []

    def search(of: Any) -> Any:
        searches.append(of)
        return decoder_layers(of)

    monkeypatch.setattr(hidden_states, "decoder_layers", search)
    assert torch.equal(pooled_hidden_states(model, ROWS, [1]), expected)
    model.model.layers = copy.deepcopy(model.model.layers)
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    assert not torch.equal(pooled_hidden_states(model, ROWS, [1]), expected)
    assert not searches
    model.model.blocks = model.model.layers
    del model.model.layers
    assert early_layers(model) == early_layers(model) == [1]
    assert searches == [model]


def test_a_model_that_was_read_is_freed() -> None:
    model = small_models()["gpt2"].eval()
    pooled_hidden_states(model, ROWS, [1])
    found = weakref.ref(model)
    del model
    gc.collect()
    assert found() is None


def test_layers_that_are_not_there_are_refused(tiny_family: TinyFamily) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_family.base)
    with pytest.raises(UnsupportedModelError, match=r"layer 2 .* has 2 layers"):
        pooled_hidden_states(model, ROWS, [2])
    assert early_layers(model) == [1]
    assert llama_config().num_hidden_layers == 2


def test_a_merged_expert_is_in_the_way(tiny_family: TinyFamily) -> None:
    model = MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=dict(tiny_family.deltas))
    model.merge_adapter(["code"])
    with pytest.raises(UnsupportedOperationError, match="merged"), model._meswitch_switch.rows([None]):
        pooled_hidden_states(model, ROWS, [1])
