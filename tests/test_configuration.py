"""What a producer's configuration takes, and what it refuses before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from transformers_meswitch import MESwitchConfig
from transformers_meswitch.errors import CompressionError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 2.0}, r"bits is 2\.0; supported are \(1, 2, 3, 4\)"),
        ({"bits": "2"}, r"bits is '2'; supported"),
        ({"bits": True}, r"bits is True; supported"),
        ({"layer_bits": {"q_proj": 3.0}}, r"layer_bits\['q_proj'\] is 3\.0; supported"),
        ({"layer_bits": {5: 2}}, r"layer_bits: 5 is not a regular expression"),
        ({"layer_bits": {b"a": 2}}, r"layer_bits: b'a' is not a regular expression"),
        ({"layer_bits": "abc"}, r"layer_bits is 'abc', expected a mapping"),
        ({"layer_bits": [("a", 2)]}, r"layer_bits is \[\('a', 2\)\], expected a mapping"),
        ({"column_steps": "no"}, r"column_steps is 'no', expected True or False"),
        ({"column_steps": 1}, r"column_steps is 1, expected True or False"),
        ({"salient_channels": 4.0}, r"salient_channels is 4\.0, expected an integer"),
        ({"base_revision": 5}, r"base_revision is 5, expected a text"),
        ({"base_model_name_or_path": 5}, r"base_model_name_or_path is 5, expected a text"),
    ],
)
def test_other_types_are_refused_at_once(given: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        MESwitchConfig(**given)


def test_a_base_given_as_a_path_is_json_like_any_other() -> None:
    config = MESwitchConfig(Path("a") / "base", layer_bits={"q_proj": 3})
    assert json.loads(config.to_json_string())["base_model_name_or_path"] == str(Path("a") / "base")
    assert config.bits_of("layers.0.q_proj") == 3
