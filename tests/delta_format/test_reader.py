from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftConfig

from tests.hub_server import HubServer
from transformers_meswitch.delta_format import location
from transformers_meswitch.delta_format.reader import check_delta, open_delta, resolve_delta
from transformers_meswitch.delta_format.spec import FORMAT_RELEASES, tensor_key
from transformers_meswitch.delta_format.writer import write_delta
from transformers_meswitch.errors import DeltaFormatError, FormatVersionError


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes))
    return config


def test_local_folder_and_subfolder_without_network(frozen, monkeypatch):
    monkeypatch.setattr(location, "hf_hub_download", lambda *_, **__: pytest.fail("the network was asked"))
    files = resolve_delta(frozen)
    assert (files.directory, files.revision) == (frozen, None)
    assert files.weight_paths == [frozen / "adapter_model.safetensors"]
    nested = resolve_delta(str(frozen.parent), subfolder="frozen")
    assert nested.config_path == frozen / "adapter_config.json"
    assert open_delta(nested).asset("expected_values.json") == frozen / "expected_values.json"
    assert open_delta(nested).asset("tokenizer.json") is None


@pytest.mark.parametrize("name", ["../adapter_config.json", "/etc/passwd", "a/../../b", "", "."])
def test_assets_outside_the_repo_are_refused(frozen, name):
    with pytest.raises(DeltaFormatError, match="is not the name of a file inside"):
        open_delta(frozen).asset(name)


def test_tensors_are_read_lazily(frozen):
    delta = open_delta(frozen)
    keys = list(delta.keys())
    assert keys == sorted(keys)
    with pytest.raises(DeltaFormatError, match=r"no tensor 'lm_head\.rows'"):
        delta.tensor("lm_head.rows")
    path = frozen / "adapter_model.safetensors"
    path.rename(frozen / "moved")
    with pytest.raises(DeltaFormatError, match=r"adapter_model\.safetensors: tensor .* cannot be read"):
        delta.tensor(keys[0])


def test_shards_under_both_names_of_the_index(make_delta, tmp_path):
    write_delta(tmp_path, *make_delta(1), max_shard_size=20)
    first = open_delta(tmp_path).tensors()
    (tmp_path / "adapter_model.safetensors.index.json").rename(tmp_path / "model.safetensors.index.json")
    second = open_delta(tmp_path).tensors()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    missing = next(tmp_path.glob("*-00002-of-*"))
    missing.unlink()
    with pytest.raises(DeltaFormatError, match=f"has no file {missing.name}"):
        open_delta(tmp_path)


def test_shards_are_fetched_side_by_side(make_delta, tmp_path, monkeypatch):
    write_delta(tmp_path, *make_delta(1), max_shard_size=20)
    both, found = threading.Barrier(2), location.RepoLocation.require

    def require(self, name):
        if "-of-" in name and not both.broken:
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(timeout=10)
                met.append(name)
        return found(self, name)

    met: list[str] = []
    monkeypatch.setattr(location.RepoLocation, "require", require)
    files = resolve_delta(tmp_path)
    assert len(met) >= 2
    assert [path.name for path in files.weight_paths] == sorted(p.name for p in tmp_path.glob("*-of-*.safetensors"))


def test_a_tensor_in_two_shards_is_refused(make_delta, tmp_path):
    write_delta(tmp_path, *make_delta(1), max_shard_size=20)
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(DeltaFormatError, match=f"is in both .*{shards[0].name} and .*{shards[1].name}"):
        open_delta(tmp_path)


def test_unknown_fields_are_ignored(frozen):
    edit(frozen, added_in_a_later_release={"deep": [1]}, another=None)
    check_delta(open_delta(frozen))


def test_later_version_names_what_to_install(frozen):
    edit(frozen, format_version=7, modules=[])
    with pytest.raises(
        FormatVersionError,
        match=r"version 7.*up to version 2.*Upgrade transformers-meswitch to a release that reads version 7",
    ):
        open_delta(frozen)


@pytest.mark.parametrize(
    ("release", "told"),
    [("12.3.0", ": 12.3.0 or later."), ("0.2.0rc1", ": 0.2.0rc1 or later."), ("run this\n; now", "."), (9, ".")],
)
def test_later_version_names_the_release_that_reads_it(frozen, release, told):
    edit(frozen, format_version=7, format_release=release, modules=[])
    loads = (lambda: open_delta(frozen), lambda: PeftConfig.from_pretrained(frozen))
    for load in loads:
        with pytest.raises(FormatVersionError) as error:
            load()
        assert str(error.value).endswith(f"to a release that reads version 7{told}")


def test_the_release_is_written_and_follows_from_the_version(make_delta, tmp_path):
    config, tensors = make_delta(1, format_release="99.0.0")
    for folder in (tmp_path / "ours", tmp_path / "pefts"):
        write_delta(folder, config, tensors)
    config.save_pretrained(tmp_path / "pefts")
    for folder in (tmp_path / "ours", tmp_path / "pefts"):
        written = json.loads((folder / "adapter_config.json").read_text())
        assert written["format_release"] == FORMAT_RELEASES[written["format_version"]]
        assert open_delta(folder).config.format_release == written["format_release"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[1]", "holds a JSON list, expected an object"),
        (b'{"peft_type": "LORA"}', "peft_type is 'LORA'"),
    ],
)
def test_malformed_config(frozen, content, message):
    (frozen / "adapter_config.json").write_bytes(content)
    with pytest.raises(DeltaFormatError, match=message):
        open_delta(frozen)


def test_field_that_peft_refuses(frozen):
    edit(frozen, task_type="WRITE_POETRY")
    with pytest.raises(DeltaFormatError, match=r"adapter_config\.json is not a valid configuration: .*WRITE_POETRY"):
        open_delta(frozen)


def test_not_a_delta_repo(tmp_path):
    with pytest.raises(DeltaFormatError, match=r"has no adapter_config\.json, so it is not a delta repo"):
        resolve_delta(tmp_path)
    with pytest.raises(DeltaFormatError, match="is not a folder"):
        resolve_delta("./no/such/folder")


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was opened')",))


def test_pickles_are_never_opened(frozen):
    (frozen / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    open_delta(frozen)
    (frozen / "adapter_model.safetensors").unlink()
    with pytest.raises(DeltaFormatError, match=r"has adapter_model\.bin but no .*never opened here\. Convert it"):
        open_delta(frozen)
    (frozen / "adapter_model.bin").rename(frozen / "adapter_model.safetensors")
    with pytest.raises(DeltaFormatError, match="is not a complete safetensors file"):
        open_delta(frozen)


@pytest.mark.parametrize("cut", [1, 100, 3000, 3480])
def test_truncated_weights(frozen, cut):
    path = frozen / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DeltaFormatError, match=r"adapter_model\.safetensors is not a complete safetensors file"):
        open_delta(frozen)


def test_weights_that_the_table_does_not_announce(frozen):
    config = edit(frozen)
    config["modules"]["lm_head"]["rows"] = 2
    del config["modules"]["model.norm"]
    edit(frozen, modules=config["modules"])
    with pytest.raises(DeltaFormatError) as caught:
        open_delta(frozen)
    assert f"{tensor_key('lm_head', 'rows')} has shape [1, 2], expected [2, 2]" in str(caught.value)
    assert f"{tensor_key('model.norm', 'values.bias')} is not announced" in str(caught.value)


CLIENT = """
import json, sys
from transformers_meswitch.delta_format.reader import check_delta, open_delta, resolve_delta
from transformers_meswitch.delta_format.checkpoint import resolve_checkpoint
from transformers_meswitch.errors import MESwitchError
for call in json.loads(sys.argv[1]):
    function = {"delta": resolve_delta, "checkpoint": resolve_checkpoint}[call.pop("what")]
    asset = call.pop("asset", None)
    try:
        files = function(**call)
        if function is resolve_delta:
            check_delta(open_delta(files))
        print("ok", files.revision, asset and files.asset(asset).name)
    except MESwitchError as error:
        print(type(error).__name__, " ".join(str(error).split()))
"""


def call_client(hub: HubServer, cache: Path, *calls: dict, **environment: str) -> list[str]:
    variables = os.environ | hub.environment("alice", str(cache)) | environment
    command = [sys.executable, "-c", CLIENT, json.dumps(calls)]
    root = Path(__file__).parent.parent.parent
    process = subprocess.run(command, env=variables, cwd=root, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


@pytest.mark.integration
def test_hub_cache_and_offline(frozen, tmp_path):
    contents = {path.name: path.read_bytes() for path in frozen.iterdir()}
    with HubServer() as hub:
        commit = hub.add_repo("alice/delta", contents).branches["main"]
        hub.add_repo("alice/nested", {f"math/{name}": data for name, data in contents.items()})
        hub.add_repo("alice/pickle", {"pytorch_model.bin": b"x", "config.json": b"{}"})
        hub.add_repo("alice/base", {"config.json": b"{}", "model.safetensors": contents["adapter_model.safetensors"]})
        delta = {"what": "delta", "repo": "alice/delta", "asset": "expected_values.json"}
        expected = f"ok {commit} expected_values.json"
        lines = call_client(
            hub,
            tmp_path / "cache",
            delta,
            {"what": "delta", "repo": "alice/nested", "subfolder": "math"},
            {"what": "checkpoint", "repo": "alice/base"},
            {"what": "checkpoint", "repo": "alice/pickle"},
            {"what": "delta", "repo": "alice/base"},
            {"what": "delta", "repo": "alice/gone"},
            {"what": "delta", "repo": "not a repo id"},
            {"what": "delta", "repo": "alice/delta", "revision": "v9"},
        )
        assert lines[0] == expected
        assert lines[1].startswith("ok ")
        assert lines[2].startswith("ok ")
        for line, start, part in [
            (lines[3], "CheckpointError", "alice/pickle (revision "),
            (lines[3], "CheckpointError", "has pytorch_model.bin but no model.safetensors"),
            (lines[4], "DeltaFormatError", "alice/base has no adapter_config.json"),
            (lines[5], "DeltaFormatError", "adapter_config.json of alice/gone could not be fetched"),
            (lines[6], "DeltaFormatError", "adapter_config.json of not a repo id could not be fetched"),
            (lines[7], "DeltaFormatError", "v9"),
        ]:
            assert line.startswith(start), line
            assert part in line, line

        offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
        elsewhere = {**delta, "cache_dir": str(tmp_path / "empty")}
        cached, empty = call_client(hub, tmp_path / "cache", delta, elsewhere, **offline)
        assert cached == expected
        assert "has no adapter_config.json in the local cache (offline" in empty


def test_local_files_only_needs_no_network(tmp_path):
    with pytest.raises(DeltaFormatError, match=r"me/delta has no adapter_config\.json in the local cache \(offline"):
        resolve_delta("me/delta", cache_dir=tmp_path, local_files_only=True)


def test_unreachable_hub(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise LocalEntryNotFoundError("cannot connect")

    monkeypatch.setattr(location, "hf_hub_download", unreachable)
    monkeypatch.setattr(location, "is_offline_mode", lambda: False)
    with pytest.raises(DeltaFormatError, match="is not in the cache and could not be fetched: cannot connect"):
        resolve_delta("me/delta", cache_dir=tmp_path)
