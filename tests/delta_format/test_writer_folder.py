"""Where a delta may be written, what of an earlier one goes, and two writers at once."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from tests.delta_format.test_writer import files_of, number_of
from transformers_meswitch.delta_format import folder_lock
from transformers_meswitch.delta_format.asset_files import ASSETS
from transformers_meswitch.delta_format.folder_lock import FolderLock
from transformers_meswitch.delta_format.writer import write_delta
from transformers_meswitch.errors import OutputFolderError

TEMPLATES = "additional_chat_templates"


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_assets_that_the_new_delta_does_not_bring_are_removed(make_delta, tmp_path):
    texts = dict.fromkeys(ASSETS, "old") | {f"{TEMPLATES}/tool_use.jinja": "old", "README.md": "card"}
    write_delta(tmp_path, *make_delta(1, bits=1), texts=texts)
    assert (tmp_path / TEMPLATES / "tool_use.jinja").read_text() == "old"
    (tmp_path / TEMPLATES / "notes.txt").write_text("mine")
    (tmp_path / "evaluation.json").write_text("mine")
    new = {"tokenizer.json": "new", f"{TEMPLATES}/rag.jinja": "new"}
    write_delta(tmp_path, *make_delta(2, bits=2), texts=new)
    left = {name: content.decode() for name, content in tree(tmp_path).items() if "adapter" not in name}
    mine = {"evaluation.json": "mine", f"{TEMPLATES}/notes.txt": "mine", "README.md": "card"}
    assert left == mine | new
    (tmp_path / TEMPLATES / "notes.txt").unlink()
    write_delta(tmp_path, *make_delta(1, bits=1))
    assert not (tmp_path / TEMPLATES).exists()


def test_templates_are_copied_with_their_folder(make_delta, tmp_path):
    (tmp_path / "expert" / TEMPLATES).mkdir(parents=True)
    default, tool_use = tmp_path / "expert" / "x.jinja", tmp_path / "expert" / TEMPLATES / "x.jinja"
    default.write_text("default")
    tool_use.write_text("tool use")
    out = write_delta(tmp_path / "out", *make_delta(1), assets=[default, tool_use])
    assert (out / "x.jinja").read_text() == "default"
    assert (out / TEMPLATES / "x.jinja").read_text() == "tool use"


@pytest.mark.parametrize("name", ["tokenizer.json", "adapter_config.json", "adapter_model.safetensors", TEMPLATES])
def test_what_stands_in_the_way_is_found_before_the_old_delta_is_touched(make_delta, tmp_path, name):
    write_delta(tmp_path, *make_delta(1, bits=1))
    if name.startswith("adapter"):
        (tmp_path / name).unlink()
    (tmp_path / name).write_text("") if name == TEMPLATES else (tmp_path / name).mkdir()
    before = tree(tmp_path)
    with pytest.raises(OutputFolderError, match=rf"{name} is a (folder|file).*Move it away"):
        write_delta(
            tmp_path, *make_delta(2, bits=2), texts={"tokenizer.json": "", f"{TEMPLATES}/a.jinja": "", "a": ""}
        )
    assert tree(tmp_path) == before


def test_a_folder_of_a_full_model_is_refused(make_delta, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").write_text("the model's")
    before = tree(tmp_path)
    with pytest.raises(OutputFolderError, match=r"holds a config\.json.*Give another"):
        write_delta(model, *make_delta(1), texts={"tokenizer.json": "the delta's"})
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFolderError, match=r"file is a file"):
        write_delta(tmp_path / "file", *make_delta(1))
    (tmp_path / "file").unlink()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("field", ["base_model_name_or_path", "expert_model_name_or_path"])
def test_its_own_base_or_fine_tune_is_refused_by_any_name(make_delta, tmp_path, field):
    base = tmp_path / "base"
    base.mkdir()
    (base / "weights.gguf").write_text("")
    (tmp_path / "link").symlink_to(base)
    config, tensors = make_delta(1, **{field: str(base)})
    for name in (base, tmp_path / "link", base / ".." / "base"):
        with pytest.raises(OutputFolderError, match="own folder"):
            write_delta(name, config, tensors)
    assert list(tree(base)) == ["weights.gguf"]
    write_delta(tmp_path / "other", config, tensors)


def nested(monkeypatch: pytest.MonkeyPatch, write) -> None:
    """Call ``write`` while a save is under way, once its first file is on its way to the disk."""
    sync, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            write()
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_second_writer_is_refused_and_the_first_completes(make_delta, tmp_path, monkeypatch):
    refused = []

    def second() -> None:
        with pytest.raises(OutputFolderError, match="Somebody else is saving into") as error:
            write_delta(tmp_path, *make_delta(2, bits=2))
        refused.append(error)

    nested(monkeypatch, second)
    write_delta(tmp_path, *make_delta(1, bits=1))
    assert refused
    assert number_of(tmp_path) == 1
    assert sorted(files_of(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    write_delta(tmp_path, *make_delta(2, bits=2))
    assert number_of(tmp_path) == 2


def test_where_there_are_no_locks_no_writer_takes_anothers_files(make_delta, tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    if folder_lock.fcntl is None:
        pytest.skip("folders are locked by a file")
    monkeypatch.setattr(folder_lock.fcntl, "flock", flock)
    nested(monkeypatch, lambda: write_delta(tmp_path, *make_delta(2, bits=2)))
    write_delta(tmp_path, *make_delta(1, bits=1))
    assert number_of(tmp_path) == 1
    assert sorted(files_of(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("system", ["folders", "files"])
def test_a_lock_has_one_holder(tmp_path, monkeypatch, system):
    if system == "files":
        monkeypatch.setattr(folder_lock, "fcntl", None)
    first = FolderLock(tmp_path)
    assert first.held
    with pytest.raises(OutputFolderError):
        FolderLock(tmp_path)
    first.release()
    second = FolderLock(tmp_path)
    assert second.held
    second.release()
    second.release()


def test_writers_in_a_race_end_in_one_whole_delta(make_delta, tmp_path):
    outcomes: list[str] = []
    start = threading.Barrier(3)

    def writer(number: int) -> None:
        config, tensors = make_delta(number, bits=number)
        start.wait()
        for _ in range(8):
            try:
                write_delta(tmp_path, config, tensors)
                outcomes.append("written")
            except OutputFolderError:
                outcomes.append("refused")

    threads = [threading.Thread(target=writer, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 24
    assert "written" in outcomes
    assert number_of(tmp_path) in (1, 2, 3)
    assert sorted(files_of(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
