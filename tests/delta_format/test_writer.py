from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.delta_format.faults import before_each_change
from transformers_meswitch.delta_format.header import read_header
from transformers_meswitch.delta_format.reader import check_delta, open_delta
from transformers_meswitch.delta_format.spec import tensor_key
from transformers_meswitch.delta_format.writer import write_delta
from transformers_meswitch.errors import DeltaFormatError


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def number_of(folder):
    """Which delta of ``make_delta`` the folder holds, all of it; `None` if it does not load."""
    try:
        delta = open_delta(folder)
        check_delta(delta)
    except DeltaFormatError:
        return None
    numbers = {int(tensor.flatten()[0]) for key, tensor in delta.tensors().items() if not key.endswith("index")}
    assert len(numbers) == 1, "tensors of two saves are mixed"
    assert numbers == {delta.config.bits}
    return delta.config.bits


@pytest.mark.parametrize("shard", [None, 40])
def test_same_input_same_bytes(make_delta, tmp_path, shard):
    for name in ("a", "b"):
        config, tensors = make_delta(1)
        tensors = dict(sorted(tensors.items(), reverse=name == "b"))
        write_delta(tmp_path / name, config, tensors, texts={"README.md": "card"}, max_shard_size=shard)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert written["peft_type"] == "MESWITCH"
    assert list(written) == sorted(written)


def test_fewer_shards_leave_no_old_ones_and_other_files_stay(make_delta, tmp_path):
    config, tensors = make_delta(1, layers=4)
    write_delta(tmp_path, config, tensors, max_shard_size=20)
    assert (tmp_path / "adapter_model.safetensors.index.json").is_file()
    (tmp_path / "README.md").write_text("by hand")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-00001-of-00002.safetensors"}}')
    write_delta(tmp_path, *make_delta(2))
    assert sorted(files_of(tmp_path)) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "model.safetensors.index.json",
    ]
    assert (tmp_path / "README.md").read_text() == "by hand"
    write_delta(tmp_path, *make_delta(1, layers=4), max_shard_size=20, texts={"README.md": "new"})
    assert not read_header(tmp_path / "adapter_model.safetensors"), "a name for stock loaders, without tensors"
    assert (tmp_path / "README.md").read_text() == "new"
    assert len(open_delta(tmp_path).tensors()) == len(tensors)


def test_index_that_transformers_writes_for_a_sharded_adapter_is_replaced(make_delta, tmp_path):
    config, tensors = make_delta(3, layers=3, bits=3)
    write_delta(tmp_path, config, tensors, max_shard_size=20)
    (tmp_path / "adapter_model.safetensors.index.json").rename(tmp_path / "model.safetensors.index.json")
    assert number_of(tmp_path) == 3
    write_delta(tmp_path, *make_delta(2, bits=2))
    assert sorted(files_of(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(("size", "shards"), [(10**6, 1), ("1KB", 1), ("1KiB", 1), (1, 6)])
def test_shard_sizes(make_delta, tmp_path, size, shards):
    write_delta(tmp_path, *make_delta(1), max_shard_size=size)
    assert len(list(tmp_path.glob("adapter_model-*.safetensors"))) == (0 if shards == 1 else shards)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_tensors_that_share_memory_or_are_views(make_delta, tmp_path):
    config, tensors = make_delta(1)
    step = torch.ones(3, 2)[:, 0]
    for layer in range(2):
        tensors[tensor_key(f"model.layers.{layer}.mlp.up_proj", "step")] = step
    write_delta(tmp_path, config, tensors)
    assert torch.equal(open_delta(tmp_path).tensor(tensor_key("model.layers.1.mlp.up_proj", "step")), torch.ones(3))


def test_saving_over_the_delta_it_was_read_from(make_delta, tmp_path):
    write_delta(tmp_path, *make_delta(2, bits=2))
    before = files_of(tmp_path)
    delta = open_delta(tmp_path)
    write_delta(tmp_path, delta.config, delta.tensors())
    assert files_of(tmp_path) == before


def test_assets_are_copied(make_delta, tmp_path):
    asset = tmp_path / "tokenizer.json"
    asset.write_text("{}")
    out = write_delta(tmp_path / "out", *make_delta(1), assets=[asset])
    assert (out / "tokenizer.json").read_text() == "{}"
    write_delta(out, *make_delta(1), assets=[out / "tokenizer.json"])
    assert (out / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(
    "name",
    [
        "adapter_config.json",
        "adapter_model-00001-of-00002.safetensors",
        "../x",
        "a/b",
        "",
        "additional_chat_templates/x.txt",
        "additional_chat_templates/../x.jinja",
        "additional_chat_templates/a/x.jinja",
    ],
)
def test_reserved_or_escaping_names_are_refused(make_delta, tmp_path, name):
    with pytest.raises(DeltaFormatError, match="cannot be an extra file"):
        write_delta(tmp_path / "out", *make_delta(1), texts={name: ""})
    assert not (tmp_path / "out").exists()


def test_missing_and_repeated_assets_are_refused(make_delta, tmp_path):
    with pytest.raises(DeltaFormatError, match=r"missing\.json is not a file"):
        write_delta(tmp_path / "out", *make_delta(1), assets=[tmp_path / "missing.json"])
    (tmp_path / "a").write_text("")
    with pytest.raises(DeltaFormatError, match="Two assets are called 'a'"):
        write_delta(tmp_path / "out", *make_delta(1), assets=[tmp_path / "a", tmp_path / "a"])


def test_nothing_is_written_that_could_not_be_read(make_delta, tmp_path):
    write_delta(tmp_path, *make_delta(1, bits=1))
    before = files_of(tmp_path)
    config, tensors = make_delta(2, bits=2)
    step = tensor_key("model.layers.0.mlp.up_proj", "step")
    bad: list[tuple[dict, str]] = [
        ({step: torch.tensor([1.0, float("nan"), 1.0])}, r"step is nan at \[1\]"),
        ({step: torch.ones(3, dtype=torch.float64)}, "dtype F64, expected F32"),
        ({"other": torch.ones(1)}, "other is not announced"),
    ]
    for change, message in bad:
        with pytest.raises(DeltaFormatError, match=message):
            write_delta(tmp_path, config, tensors | change)
    with pytest.raises(DeltaFormatError, match="base_model_name_or_path"):
        write_delta(tmp_path, make_delta(2, base_model_name_or_path=None)[0], tensors)
    with pytest.raises(DeltaFormatError, match="cannot be written as JSON"):
        write_delta(tmp_path, make_delta(2, base_fingerprint={"digest": float("nan")})[0], tensors)
    with pytest.raises(DeltaFormatError, match="'5 parsecs'"):
        write_delta(tmp_path, config, tensors, max_shard_size="5 parsecs")
    assert files_of(tmp_path) == before


def assert_old_nothing_new(outcomes):
    """First the old delta (1), then folders that do not load, then the new delta (2).

    Old and new have the same modules, so that a mixture of the two would load.
    """
    order = [{1: 0, None: 1, 2: 2}[outcome] for outcome in outcomes]
    assert order == sorted(order)
    assert set(order) == {0, 1, 2}


@pytest.mark.parametrize("shard", [None, 60])
def test_exception_at_any_moment(make_delta, tmp_path, shard):
    outcomes = []
    for at in range(1, 100):
        folder = tmp_path / str(at)
        write_delta(folder, *make_delta(1, bits=1), max_shard_size=shard)

        def strike(n, at=at):
            if n == at:
                raise OSError("no space left on device")

        try:
            with before_each_change(strike):
                write_delta(folder, *make_delta(2, bits=2), texts={"README.md": "new"})
            failed = False
        except OSError:
            failed = True
        outcomes.append(number_of(folder))
        assert not list(folder.glob(".*")), "temporary files are left"
        if not failed:
            break
    assert not failed
    assert_old_nothing_new(outcomes)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed processes are forked")
def test_kill_at_any_moment(make_delta, tmp_path):
    for at in range(1, 40):
        write_delta(tmp_path / str(at), *make_delta(1, bits=1))
    new = write_delta(tmp_path / "new", *make_delta(2, bits=2))
    command = [sys.executable, "-m", "tests.delta_format.faults", str(new), str(tmp_path)]
    root = Path(__file__).parent.parent.parent
    process = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    killed = int(process.stdout)
    assert 10 < killed < 39, "every folder was made beforehand"
    assert_old_nothing_new([number_of(tmp_path / str(at)) for at in range(1, killed + 2)])
    for at in range(1, killed + 1):
        folder = write_delta(tmp_path / str(at), *make_delta(1, bits=1), texts={"README.md": "new"})
        assert sorted(files_of(folder)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        assert number_of(folder) == 1
