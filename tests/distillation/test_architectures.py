"""Every supported architecture as a student: biases, soft caps, transposed weights, tied heads."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.fixtures_models import dense_model
from tests.models.architectures import ARCHITECTURES, build, fine_tune
from transformers_meswitch import MESwitchConfig, compress
from transformers_meswitch.distillation.recipe import _student
from transformers_meswitch.distillation.split_model import OutputHead, hidden_states
from transformers_meswitch.distillation.training import Distillation, DistillationBatch
from transformers_meswitch.verification.inputs import open_inputs


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_the_student_is_base_and_delta_and_can_be_trained(model_type, tmp_path):
    build(model_type, tied=True).save_pretrained(tmp_path / "base")
    expert = fine_tune(tmp_path / "base", seed=5).eval()
    expert.save_pretrained(tmp_path / "expert")
    how = MESwitchConfig(bits=2, salient_channels=2, column_steps=True)
    compress(tmp_path / "base", tmp_path / "expert", tmp_path / "delta", how, calibration=None, progress=False)
    inputs = open_inputs(tmp_path / "base", tmp_path / "expert", tmp_path / "delta")
    model, deltas = _student(inputs.base, inputs.delta, torch.device("cpu"), torch.float32)
    assert {type(model.get_submodule(name)).__name__ for name in deltas} == {"LinearLayer"}

    ids = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(0))
    positions = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        batch = DistillationBatch(ids, positions, hidden_states(expert, ids, positions))
        logits, dense = model(ids).logits, dense_model(tmp_path / "base", tmp_path / "delta")(ids).logits
        torch.testing.assert_close(logits, dense, rtol=1e-3, atol=1e-3)
        p, q = (given.double().log_softmax(dim=-1) for given in (expert(ids).logits, dense))
        kl = float((p.exp() * (p - q)).sum(dim=-1).mean())

    training = Distillation(model, deltas, OutputHead(copy.deepcopy(expert)), steps=15, learning_rate=1e-2)
    assert training.evaluate([batch]) == pytest.approx(kl, rel=1e-3)
    for _ in range(15):
        training.step([batch])
    assert training.evaluate([batch]) < 0.8 * kl
