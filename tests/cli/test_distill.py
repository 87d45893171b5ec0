"""``meswitch distill``."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from transformers_meswitch.cli import main
from transformers_meswitch.delta_format.reader import open_delta

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="session")
def text(repos):
    path = repos.base.parent / "distillation.txt"
    draw = random.Random(0)
    path.write_text("".join(" ".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=30)) + "\n" for _ in range(24)))
    return path


@pytest.fixture(scope="session")
def spoiled(repos):
    """The delta with all its steps doubled."""
    folder = repos.base.parent / "spoiled"
    shutil.copytree(repos.delta, folder)
    tensors = load_file(folder / WEIGHTS)
    doubled = {key: 2 * tensor if key.endswith(".step") else tensor for key, tensor in tensors.items()}
    save_file(doubled, folder / WEIGHTS, {"format": "pt"})
    return folder


def arguments(repos, delta, output, *more):
    command = ["distill", repos.base, repos.expert, delta, "-o", output, "--device", "cpu", *more]
    return list(map(str, command))


def test_json_tells_what_came_of_it(repos, text, spoiled, tmp_path, capsys):
    output = tmp_path / "output"
    more = ("--calibration", text, "--steps", 20, "--learning-rate", 0.05, "--json")
    assert main(arguments(repos, spoiled, output, *more)) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["output"] == str(output)
    assert (found["steps"], found["held_out_tokens"], found["improved"]) == (20, 6 * 30, True)
    assert found["kl_after"] < 0.7 * found["kl_before"]
    assert found["text"] == "distillation.txt: 24 samples, 720 tokens"
    distilled = open_delta(output).config.distilled
    assert distilled == {key: found[key] for key in ("steps", "text", "kl_before", "kl_after")}
    assert "Distilling on distillation.txt" in printed.err


def test_printout(repos, text, spoiled, tmp_path, capsys):
    more = ("--calibration", text, "--steps", 1, "--batch-size", 4)
    assert main(arguments(repos, spoiled, tmp_path / "output", *more)) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("KL from the expert on 180 held-out tokens, nats a token: ")
    assert first.endswith(" after 1 step")
    assert last.startswith(f"{tmp_path / 'output'}: written in ")


def test_training_that_does_not_help_says_so(repos, text, tmp_path, capsys):
    more = ("--calibration", text, "--steps", 2, "--learning-rate", 3)
    assert main(arguments(repos, repos.delta, tmp_path / "output", *more)) == 0
    assert "its steps are as they were" in capsys.readouterr().out
    old, new = (load_file(folder / WEIGHTS) for folder in (repos.delta, tmp_path / "output"))
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_a_wrong_base_is_an_error_of_one_line(repos, text, tmp_path, capsys):
    command = ["distill", repos.expert, repos.expert, repos.delta, "-o", tmp_path / "output"]
    assert main(list(map(str, command))) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "formed against another base" in output.err
