"""Experts with a larger vocabulary than their base, in every architecture: the loss, alone and merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tests.models.architectures import ARCHITECTURES, VOCABULARY, build, fine_tune
from transformers_meswitch import MESwitchConfig, compress

ADDED = 5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
@torch.no_grad()
def test_loss_of_an_expert_with_added_tokens(model_type: str, tied: bool, tmp_path: Path) -> None:
    build(model_type, tied).save_pretrained(tmp_path / "base")
    expert = fine_tune(tmp_path / "base", seed=1)
    expert.resize_token_embeddings(VOCABULARY + ADDED, mean_resizing=False)
    expert.save_pretrained(tmp_path / "expert")
    config = MESwitchConfig(bits=4, salient_channels=48)  # every channel, so that only bfloat16 rounds
    compress(tmp_path / "base", tmp_path / "expert", tmp_path / "delta", config, calibration=None, progress=False)
    ids = torch.tensor([[1, 7, VOCABULARY, 33, VOCABULARY + ADDED - 1, 12, 4]])
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "expert")(ids, labels=ids).loss

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
    output = model(ids, labels=ids)
    own = F.cross_entropy(output.logits[0, :-1].float(), ids[0, 1:])
    torch.testing.assert_close(output.loss, own)
    torch.testing.assert_close(output.loss, expected, atol=0.05, rtol=0)
    torch.testing.assert_close(model.merge_and_unload()(ids, labels=ids).loss, own, atol=1e-3, rtol=0)


def test_the_base_has_its_own_vocabulary_again_when_the_expert_is_gone(tmp_path: Path) -> None:
    build("gemma2", True).save_pretrained(tmp_path / "base")
    expert = fine_tune(tmp_path / "base", seed=1)
    expert.resize_token_embeddings(VOCABULARY + ADDED, mean_resizing=False)
    expert.save_pretrained(tmp_path / "expert")
    compress(tmp_path / "base", tmp_path / "expert", tmp_path / "delta", calibration=None, progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.load_adapter(str(tmp_path / "delta"), adapter_name="math")
    assert model.vocab_size == VOCABULARY + ADDED
    model.delete_adapter("math")
    ids = torch.tensor([[1, 7, 33]])
    assert model.vocab_size == model.config.vocab_size == VOCABULARY
    assert torch.isfinite(model(ids, labels=ids).loss)
