"""A compression that is killed is taken up where it stopped, and nothing else ever is."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from transformers_meswitch.compression import recipe, work_folder
from transformers_meswitch.compression.recipe import compress
from transformers_meswitch.compression.work_folder import WorkFolder
from transformers_meswitch.configuration import MESwitchConfig
from transformers_meswitch.delta_format.spec import LinearRecord, ValuesRecord, tensor_key
from transformers_meswitch.errors import CheckpointError, CompressionError

CONFIG = MESwitchConfig(bits=2, salient_channels=4)
TEXTS = ["abcdefgh" * 8, "the quick brown fox", "jumps over the lazy dog"]


class Killed(BaseException):
    """What no code of the package catches."""


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def pair(make_pair, tokenizer):
    base, expert = make_pair(num_hidden_layers=3)
    tokenizer.save_pretrained(expert)
    return base, expert


@pytest.fixture
def die_after(monkeypatch):
    """``die_after(n)``: the next run is killed once n modules are on disk; ``die_after(None)``: it is not.

    Returns the names of the modules that are compressed from then on.
    """
    original = WorkFolder.add

    def arm(count):
        added = []

        def add(self, name, record, leaves):
            if len(added) == count:
                raise Killed
            original(self, name, record, leaves)
            added.append(name)

        monkeypatch.setattr(WorkFolder, "add", add)
        return added

    return arm


@pytest.mark.parametrize(
    ("count", "calibration"),
    [(0, None), (1, None), (7, None), (25, None), (7, TEXTS)]
    + [pytest.param(count, TEXTS, marks=pytest.mark.slow) for count in (0, 1, 25)],
)
def test_a_killed_run_is_continued_to_the_same_bytes(pair, tmp_path, die_after, calibration, count):
    arguments = (CONFIG, calibration)
    whole = files_of(compress(*pair, tmp_path / "whole", *arguments, progress=False))
    out, partial = tmp_path / "delta", tmp_path / "delta.partial"
    first = die_after(count)
    with pytest.raises(Killed):
        compress(*pair, out, *arguments, progress=False)
    assert not out.exists()
    assert len(list(partial.glob("*.safetensors"))) == count
    rest = die_after(None)
    compress(*pair, out, *arguments, progress=False)
    assert files_of(out) == whole
    assert not set(first) & set(rest)
    assert not partial.exists()


def test_layers_that_are_finished_get_no_moments(pair, tmp_path, die_after, monkeypatch):
    asked = []
    original = recipe.SequentialStatistics.get
    monkeypatch.setattr(
        recipe.SequentialStatistics, "get", lambda self, name: (asked.append(name), original(self, name))[1]
    )
    die_after(20)
    with pytest.raises(Killed):
        compress(*pair, tmp_path / "delta", CONFIG, TEXTS, progress=False)
    before = list(asked)
    asked.clear()
    die_after(None)
    compress(*pair, tmp_path / "delta", CONFIG, TEXTS, progress=False)
    assert not any("layers.0." in name for name in asked)
    # The last may have been killed before it was written, and the one worked on meanwhile was lost with it.
    assert not set(asked) & set(before[:-2])


@pytest.mark.parametrize(
    ("budget", "count"),
    [
        pytest.param({"target_bits": 2.5}, 2, marks=pytest.mark.slow),
        ({"target_size": 60_000}, 30),
        pytest.param({"max_kl": 0.05}, 31, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_between_candidates_is_continued_to_the_same_bytes(pair, tmp_path, monkeypatch, budget, count):
    arguments = (MESwitchConfig(salient_channels=0, column_steps=True, **budget), TEXTS)
    whole = files_of(compress(*pair, tmp_path / "whole", *arguments, progress=False))
    original, added = WorkFolder.add_candidate, []

    def add_candidate(self, name, candidate, leaves):
        if len(added) == count:
            raise Killed
        original(self, name, candidate, leaves)
        added.append((name, candidate))

    monkeypatch.setattr(WorkFolder, "add_candidate", add_candidate)
    with pytest.raises(Killed):
        compress(*pair, tmp_path / "delta", *arguments, progress=False)
    again = WorkFolder(tmp_path / "delta.partial")
    assert {(n, c) for n, of_module in again.candidates.items() for c in of_module.values()} == set(added)
    name = added[-1][0]
    assert len(again.candidates[name]) < 4, "it was killed within a module"
    first, count = list(added), -1
    added.clear()
    compress(*pair, tmp_path / "delta", *arguments, progress=False)
    assert files_of(tmp_path / "delta") == whole
    assert not set(first) & set(added), "nothing is fitted twice"
    assert name in {n for n, _ in added}
    assert not (tmp_path / "delta.partial").exists()


@pytest.mark.parametrize(
    ("budget", "count"), [pytest.param({"target_bits": 2.5}, 1, marks=pytest.mark.slow), ({"max_kl": 0.05}, 9)]
)
def test_a_run_killed_between_refits_is_continued_to_the_same_bytes(pair, tmp_path, monkeypatch, budget, count):
    arguments = (MESwitchConfig(salient_channels=0, column_steps=True, **budget), TEXTS)
    whole = files_of(compress(*pair, tmp_path / "whole", *arguments, progress=False))
    original, added = WorkFolder.add, []

    def add(self, name, *rest):
        refit = name in self.candidates
        if refit and len(added) == count:
            raise Killed
        original(self, name, *rest)
        if refit:
            added.append(name)

    monkeypatch.setattr(WorkFolder, "add", add)
    with pytest.raises(Killed):
        compress(*pair, tmp_path / "delta", *arguments, progress=False)
    assert len(list((tmp_path / "delta.partial").glob("*@refit.safetensors"))) == count
    first, count = list(added), -1
    added.clear()
    compress(*pair, tmp_path / "delta", *arguments, progress=False)
    assert files_of(tmp_path / "delta") == whole
    assert not set(first) & set(added), "nothing is fitted twice"


def test_refits_of_another_choice_are_made_anew(pair, tmp_path, monkeypatch):
    """Each was fitted to what the choice made of the layers before it."""
    settings = {"salient_channels": 0, "column_steps": True}
    config, other = (MESwitchConfig(target_bits=bits, **settings) for bits in (3.0, 2.5))
    whole = files_of(compress(*pair, tmp_path / "whole", config, TEXTS, progress=False))

    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "write_delta", die)
        with pytest.raises(Killed):
            compress(*pair, tmp_path / "delta", other, TEXTS, progress=False)
    assert len(list((tmp_path / "delta.partial").glob("*@refit.safetensors"))) == 21
    compress(*pair, tmp_path / "delta", config, TEXTS, progress=False)
    assert files_of(tmp_path / "delta") == whole


def test_a_damaged_file_of_a_candidate_is_made_anew(pair, tmp_path, monkeypatch):
    arguments = (MESwitchConfig(salient_channels=4, target_bits=2.5), None)
    whole = files_of(compress(*pair, tmp_path / "whole", *arguments, progress=False))

    def die(*_):
        raise Killed

    monkeypatch.setattr(recipe, "spend", die)
    with pytest.raises(Killed):
        compress(*pair, tmp_path / "delta", *arguments, progress=False)
    monkeypatch.undo()
    kept = sorted((tmp_path / "delta.partial").glob("*q_proj@*.safetensors"))
    kept[0].write_bytes(kept[0].read_bytes()[:-1])
    kept[2].write_bytes(kept[3].read_bytes())  # another candidate's
    text = kept[4].read_bytes()
    assert b'"error":"' in text
    kept[4].write_bytes(text.replace(b'"error":"', b'"erorr":"'))
    found = WorkFolder(tmp_path / "delta.partial").candidates
    assert sum(map(len, found.values())) == 8 * len(found) - 3
    compress(*pair, tmp_path / "delta", *arguments, progress=False)
    assert files_of(tmp_path / "delta") == whole


@pytest.mark.parametrize(
    "change",
    ["bits", "calibration", "tokens", "base", "expert", "version"],
)
def test_another_request_never_reuses_it(pair, tmp_path, die_after, edit_checkpoint, monkeypatch, caplog, change):
    base, expert = pair
    config, more = CONFIG, {"calibration": TEXTS}
    die_after(10)
    with pytest.raises(Killed):
        compress(base, expert, tmp_path / "delta", config, **more, progress=False)
    if change == "bits":
        config = MESwitchConfig(bits=3, salient_channels=4)
    elif change == "calibration":
        more = {"calibration": [*TEXTS[:2], "jumps over the lazy cat"]}
    elif change == "tokens":
        more |= {"max_calibration_tokens": 80}
    elif change == "version":
        monkeypatch.setattr("transformers_meswitch.__version__", "9")
    else:

        def nudge(tensors):
            tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 0.5

        edit_checkpoint(base if change == "base" else expert, nudge)
    added = die_after(None)
    with caplog.at_level(logging.WARNING):
        out = compress(base, expert, tmp_path / "delta", config, **more, progress=False)
    assert "unfinished work of another request" in caplog.text
    assert len(added) > 24, "every module is compressed anew"
    fresh = compress(base, expert, tmp_path / "fresh", config, **more, progress=False)
    assert files_of(out) == files_of(fresh)
    assert not (tmp_path / "delta.partial").exists()


def test_progress_says_what_is_calibrated_on_and_what_is_taken_up(pair, tmp_path, die_after, capsys):
    die_after(5)
    with pytest.raises(Killed):
        compress(*pair, tmp_path / "delta", CONFIG, TEXTS)
    assert "Calibrating on texts of the caller: 3 samples, 106 tokens" in capsys.readouterr().err
    die_after(None)
    out = compress(*pair, tmp_path / "delta", CONFIG, TEXTS)
    assert "Resuming: 5 modules were finished before" in capsys.readouterr().err
    assert "Calibrated on texts of the caller: 3 samples, 106 tokens." in (out / "README.md").read_text()


def test_a_damaged_file_of_a_finished_module_is_made_anew(pair, tmp_path, die_after):
    whole = files_of(compress(*pair, tmp_path / "whole", CONFIG, calibration=None, progress=False))
    die_after(6)
    with pytest.raises(Killed):
        compress(*pair, tmp_path / "delta", CONFIG, calibration=None, progress=False)
    kept = sorted((tmp_path / "delta.partial").glob("*.safetensors"))
    kept[0].write_bytes(kept[0].read_bytes()[:-1])
    kept[1].write_bytes(b"")
    kept[2].write_bytes(kept[3].read_bytes())  # another module's: its record does not fit the names
    (tmp_path / "delta.partial" / "model.norm.unfinished").write_bytes(b"half")
    added = die_after(None)
    out = compress(*pair, tmp_path / "delta", CONFIG, calibration=None, progress=False)
    assert {path.name.removesuffix(".safetensors") for path in kept[:3]} <= set(added)
    assert kept[3].name.removesuffix(".safetensors") not in added
    assert files_of(out) == whole


def test_an_expert_that_cannot_be_compressed_leaves_nothing(pair, tmp_path, edit_checkpoint):
    def poison(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = float("inf")

    edit_checkpoint(pair[1], poison)
    with pytest.raises(CompressionError, match=r"layers\.2\.mlp\.up_proj\.weight of the expert holds NaN or inf"):
        compress(*pair, tmp_path / "new" / "delta", CONFIG, calibration=None, progress=False)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("tensor", ["input_layernorm.weight", "mlp.down_proj.weight"])
def test_nan_is_named_when_calibrating_too(pair, tmp_path, edit_checkpoint, tensor):
    def poison(tensors):
        tensors[f"model.layers.1.{tensor}"].view(-1)[3] = float("nan")

    edit_checkpoint(pair[1], poison)
    with pytest.raises(CompressionError, match=rf"layers\.1\.{tensor} of the expert holds NaN or inf"):
        compress(*pair, tmp_path / "new" / "delta", CONFIG, TEXTS, progress=False)
    assert not list((tmp_path / "new").iterdir())


def test_a_folder_of_somebody_else_is_left_alone(pair, tmp_path):
    partial = tmp_path / "delta.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("years of work")
    with pytest.raises(CompressionError, match=r"holds thesis\.txt and no request\.json"):
        compress(*pair, tmp_path / "delta", CONFIG, calibration=None, progress=False)
    assert files_of(partial) == {"thesis.txt": b"years of work"}


def test_an_empty_folder_or_a_half_written_request_is_taken(pair, tmp_path):
    partial = tmp_path / "delta.partial"
    partial.mkdir()
    (partial / "request.json.unfinished").write_text("{")
    (partial / ".lock").write_text("")
    compress(*pair, tmp_path / "delta", CONFIG, calibration=None, progress=False)
    assert not partial.exists()


def test_two_runs_at_once_on_one_output(pair, tmp_path, monkeypatch):
    """The second is refused while the first works, and takes nothing from it."""
    refused = []
    original = WorkFolder.add

    def add(self, name, record, leaves):
        if not refused:
            monkeypatch.setattr(WorkFolder, "add", original)
            with pytest.raises(CompressionError, match="Another process is working on") as error:
                compress(*pair, tmp_path / "delta", CONFIG, calibration=None, progress=False)
            refused.append(error)
        original(self, name, record, leaves)

    monkeypatch.setattr(WorkFolder, "add", add)
    out = compress(*pair, tmp_path / "delta", CONFIG, calibration=None, progress=False)
    assert refused
    monkeypatch.undo()
    assert files_of(out) == files_of(compress(*pair, tmp_path / "whole", CONFIG, calibration=None, progress=False))


def test_the_current_folder_may_be_the_output(pair, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert compress(*pair, ".", CONFIG, calibration=None, progress=False).samefile(here)
    assert (here / "adapter_config.json").is_file()
    assert not (tmp_path / "here.partial").exists()


def test_records_and_tensors_come_back_as_they_went_in(tmp_path):
    linear = LinearRecord(2, 8, 3, salient_channels=1, column_step=True, bias=True)
    leaves = {
        "codes": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
        "step": torch.rand(2),
        "column_step": torch.rand(7),
        "salient_index": torch.tensor([4], dtype=torch.int32),
        "salient": torch.rand(2, 1).to(torch.bfloat16),
        "bias": torch.rand(2).to(torch.float16),
    }
    work = WorkFolder(tmp_path)
    work.add("model.a", linear, leaves)
    work.add("model.norm", ValuesRecord({"weight": (3,)}), {"values.weight": torch.ones(3)})
    again = WorkFolder(tmp_path)
    assert again.records == {"model.a": linear, "model.norm": ValuesRecord({"weight": (3,)})}
    tensors = again.tensors()
    assert len(tensors) == 7
    for leaf, tensor in leaves.items():
        assert torch.equal(tensors.read(tensor_key("model.a", leaf)), tensor)


RUN = """
    import sys, json, resource
    from transformers_meswitch import MESwitchConfig, compress
    base, expert, out, limit = sys.argv[1:]
    if limit != "0":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    config = MESwitchConfig(bits=2, salient_channels=4)
    compress(base, expert, out, config, "default", progress=False, max_calibration_tokens=4000)
"""


def start(pair, out, limit=0, **more):
    command = [sys.executable, "-c", textwrap.dedent(RUN), *map(str, pair), str(out), str(limit)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=os.getcwd(), **more)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_process_killed_again_and_again_ends_with_the_same_bytes(pair, tmp_path):
    assert start(pair, tmp_path / "whole").wait() == 0
    out, partial = tmp_path / "delta", tmp_path / "delta.partial"

    def finished() -> int:
        try:
            return len(list(partial.glob("*.safetensors")))
        except FileNotFoundError:  # not there yet, or gone since it is no longer needed
            return 0

    kills = 0
    while True:
        process = start(pair, out)
        before = finished()
        while process.poll() is None and finished() < before + 5:
            pass
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        kills += 1
    assert kills >= 2
    compress(*pair, out, CONFIG, "default", progress=False, max_calibration_tokens=4000)
    assert files_of(out) == files_of(tmp_path / "whole")
    assert not partial.exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="limits on the size of files")
def test_a_full_disk_keeps_what_is_finished(pair, tmp_path):
    """The system lets no file grow past a size that modules keep and the final file does not."""
    partial = tmp_path / "delta.partial"
    process = start(pair, tmp_path / "delta", limit=30_000)
    _, err = process.communicate()
    assert process.returncode == 1
    assert "CompressionError: Writing to" in err
    assert "run the same command again" in err
    assert not (tmp_path / "delta" / "adapter_config.json").exists()
    assert not list((tmp_path / "delta").iterdir())
    kept = list(partial.glob("*.safetensors"))
    assert len(kept) > 24
    assert not list(partial.glob("*.unfinished"))
    assert start(pair, tmp_path / "delta").wait() == 0
    assert (tmp_path / "delta" / "adapter_config.json").exists()
    assert not partial.exists()


def test_a_checkpoint_that_cannot_be_read_for_a_while_keeps_what_is_finished(pair, tmp_path, monkeypatch):
    out, partial = tmp_path / "delta", tmp_path / "delta.partial"
    original, done = WorkFolder.add, []

    def add(self, name, record, leaves):
        original(self, name, record, leaves)
        done.append(name)
        if len(done) == 4:
            raise CheckpointError("the share is gone")

    whole = files_of(compress(*pair, tmp_path / "whole", CONFIG, None, progress=False))
    monkeypatch.setattr(WorkFolder, "add", add)
    with pytest.raises(CheckpointError, match="the share is gone"):
        compress(*pair, out, CONFIG, None, progress=False)
    assert len(list(partial.glob("*.safetensors"))) == 4
    compress(*pair, out, CONFIG, None, progress=False)
    assert len(done) > 4
    assert len(done) == len(set(done))  # nothing was made twice
    assert files_of(out) == whole


@pytest.mark.parametrize(
    ("at", "config"),
    [
        (3, CONFIG),
        (-1, CONFIG),
        (3, MESwitchConfig(target_bits=2.0, salient_channels=4)),
        pytest.param(-1, MESwitchConfig(target_bits=2.0, salient_channels=4), marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fills_up_behind_the_work_leaves_whole_modules_only(pair, tmp_path, monkeypatch, config, at):
    """Modules are written in a thread; an error there, even of the last one, is the run's."""
    out, partial = tmp_path / "delta", tmp_path / "delta.partial"
    original, written = work_folder.write_tensors, []

    def write(path, headers, get, metadata=None):
        written.append(path)
        if len(written) == full_after:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, headers, get, metadata)

    monkeypatch.setattr(work_folder, "write_tensors", write)
    full_after = None
    whole = files_of(compress(*pair, tmp_path / "whole", config, None, progress=False))
    full_after = at if at > 0 else len(written)
    written.clear()
    with pytest.raises(CompressionError, match="run the same command again"):
        compress(*pair, out, config, None, progress=False)
    assert not out.exists()
    assert not list(partial.glob("*.unfinished"))
    full_after = None
    compress(*pair, out, config, None, progress=False)
    assert files_of(out) == whole


def test_the_request_names_all_that_determines_the_delta(pair, tmp_path, die_after):
    die_after(1)
    with pytest.raises(Killed):
        compress(*pair, tmp_path / "delta", CONFIG, TEXTS, progress=False)
    request = json.loads((tmp_path / "delta.partial" / "request.json").read_text())
    assert set(request) == {"base", "expert", "config", "calibration", "fit", "device", "versions"}
    assert set(request["versions"]) == {"torch", "transformers", "transformers_meswitch"}
    assert request["config"]["bits"] == 2
    assert request["base"]["fingerprint"] != request["expert"]["fingerprint"]
    assert work_folder.partial_folder(tmp_path / "delta") == tmp_path / "delta.partial"
