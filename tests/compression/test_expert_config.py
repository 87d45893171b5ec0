"""What a delta's configuration says of its expert."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig

from tests.fixtures_models import llama_config
from transformers_meswitch import MESwitchConfig
from transformers_meswitch.compression.expert_config import expert_config


@pytest.mark.parametrize(
    ("stated", "kept"),
    [
        ((2, 0), ([2], 0)),
        (([2, 127], 127), ([2, 127], 127)),
        (([2, 128], 128), ([2], None)),
        ((500, -1), (None, None)),
        ((None, None), (None, None)),
    ],
)
def test_tokens_outside_the_vocabulary_are_left_out(stated: Any, kept: Any) -> None:
    eos, pad = stated
    config = expert_config(
        MESwitchConfig(),
        {},
        base="me/base",
        base_revision=None,
        base_fingerprint=None,
        expert="me/expert",
        model_config=llama_config(eos_token_id=None, pad_token_id=None),
        generation_config=GenerationConfig(eos_token_id=eos, pad_token_id=pad),
        vocab_size=128,
        tied=True,
        calibrated=False,
    )
    assert (config.eos_token_id, config.pad_token_id) == kept
