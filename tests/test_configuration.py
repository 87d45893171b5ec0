"""What a producer's configuration takes, and what it refuses before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from transformers_meswitch import MESwitchConfig
from transformers_meswitch.compression.presets import DEFAULT_PRESET, PRESETS
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
        ({"target_bits": 0}, r"target_bits is 0, expected a number above 0 and at most 6"),
        ({"target_bits": 6.5}, r"target_bits is 6\.5, expected a number above 0 and at most 6"),
        ({"target_bits": "1.5"}, r"target_bits is '1\.5', expected a number"),
        ({"target_bits": True}, r"target_bits is True, expected a number"),
        ({"target_bits": float("nan")}, r"target_bits is nan, expected a number"),
        ({"max_kl": -0.1}, r"max_kl is -0\.1, expected a number above 0\."),
        ({"max_kl": float("inf")}, r"max_kl is inf, expected a number above 0\."),
        ({"target_size": 0}, r"target_size is 0, expected bytes as an integer above 0"),
        ({"target_size": 1.5e9}, r"target_size is 1500000000\.0, expected bytes as an integer"),
        ({"target_size": "1.2 parsecs"}, r"target_size: '1\.2 parsecs' is no size such as"),
        ({"target_size": "-1GB"}, r"target_size: '-1GB' is no size"),
        ({"target_size": "0.1B"}, r"target_size is 0, expected bytes"),
        ({"target_bits": 2, "max_kl": 0.1}, r"target_bits=2 and max_kl=0\.1 are given together"),
    ],
)
def test_other_types_are_refused_at_once(given: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        MESwitchConfig(**given)


def test_a_base_given_as_a_path_is_json_like_any_other() -> None:
    config = MESwitchConfig(Path("a") / "base", layer_bits={"q_proj": 3})
    assert json.loads(config.to_json_string())["base_model_name_or_path"] == str(Path("a") / "base")
    assert config.bits_of("layers.0.q_proj") == 3


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1.2GB", 1_200_000_000),
        ("800MB", 800_000_000),
        ("1GiB", 2**30),
        ("1.5 kib", 1536),
        (7, 7),
        ("0.3GB", 3 * 10**8),
    ],
)
def test_sizes_as_people_write_them(text: int | str, size: int) -> None:
    assert MESwitchConfig(target_size=text).target_size == size


@pytest.mark.parametrize("budget", [{"target_bits": 1.5}, {"target_size": "1.2GB"}, {"max_kl": 0.01}, {}])
def test_budgets_come_back_from_json(budget: dict[str, Any]) -> None:
    config = MESwitchConfig("me/base", salient_channels=8, **budget)
    again = MESwitchConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()
    assert again.budget == config.budget


def test_the_default_preset_is_the_default() -> None:
    assert MESwitchConfig.from_preset(DEFAULT_PRESET).to_dict() == MESwitchConfig().to_dict()
    assert DEFAULT_PRESET == "lossless"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_the_table_says_and_gives_way(name: str) -> None:
    config = MESwitchConfig.from_preset(name, "me/base", "main", layer_bits={"a": 4})
    assert PRESETS[name].items() <= config.to_dict().items()
    assert (config.base_model_name_or_path, config.base_revision, config.bits_of("a")) == ("me/base", "main", 4)
    assert MESwitchConfig.from_preset(name, salient_channels=3).salient_channels == 3
    assert MESwitchConfig.from_preset(name, bits=3).budget is None
    assert MESwitchConfig.from_preset(name, max_kl=0.5).budget == ("max_kl", 0.5)


def test_an_unknown_preset_is_refused_with_those_there_are() -> None:
    with pytest.raises(CompressionError, match="no preset 'best'; known are lossless, balanced, smallest"):
        MESwitchConfig.from_preset("best")
