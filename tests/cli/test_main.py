"""Help, version, exit codes and how errors are shown."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from transformers_meswitch import __version__
from transformers_meswitch.cli import main
from transformers_meswitch.errors import DeltaFormatError

ROOT = Path(__file__).parents[2]


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"meswitch {__version__}\n"


@pytest.mark.parametrize(
    "command",
    [
        *("compress", "distill", "inspect", "verify", "generate", "push", "family", "merge", "extract-lora"),
        *("import-bitdelta", "demo"),
    ],
)
def test_every_command_shows_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"meswitch {command}" in capsys.readouterr().out.split("example")[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["compress", "base", "expert"],
        ["compress", "base", "expert", "-o", "x", "--bits", "5"],
        ["compress", "base", "expert", "-o", "x", "--layer-bits", "down_proj"],
        ["compress", "base", "expert", "-o", "x", "--layer-bits", "down_proj=7"],
        ["compress", "base", "expert", "-o", "x", "--salient-channels", "-1"],
        ["distill", "base", "expert", "delta"],
        ["distill", "base", "expert", "delta", "-o", "x", "--steps", "0"],
        ["distill", "base", "expert", "delta", "-o", "x", "--batch-size", "0"],
        ["distill", "base", "expert", "delta", "-o", "x", "--learning-rate", "nan"],
        ["distill", "base", "expert", "delta", "-o", "x", "--device", "abacus"],
        ["push", "delta"],
        ["family"],
        ["family", "create", "base", "math=delta"],
        ["family", "create", "base", "math=delta", "-o", "x", "--repo-id", "me/x"],
        ["family", "create", "base", "math=delta", "-o", "x", "--create-pr"],
        ["family", "create", "base", "-o", "x", "--private"],
        ["family", "add", "family"],
        ["family", "remove", "family"],
        ["inspect", "delta", "--expert", "expert"],
        ["inspect", "delta", "--layer", "model.layers.0.mlp.up_proj"],
        ["verify", "base", "expert"],
        ["verify", "base", "expert", "delta", "--max-kl", "0.1"],
        ["verify", "base", "expert", "delta", "--text", "a.txt", "--max-tokens", "1"],
        ["verify", "base", "expert", "delta", "--text", "a.txt", "--device", "abacus"],
        ["verify", "base", "expert", "delta", "--text", "a.txt", "--dtype", "int8"],
        ["extract-lora", "delta", "-o", "x", "--rank", "0"],
        ["extract-lora", "delta", "-o", "x", "--max-tokens", "1"],
        ["extract-lora", "delta", "-o", "x", "--device", "abacus"],
        ["merge", "delta"],
        ["merge", "delta", "-o", "x", "--dtype", "int8"],
        ["generate", "base", "-p", "a", "--max-new-tokens", "0"],
        ["generate", "base", "-p", "a", "--temperature", "-1"],
        ["generate", "base", "-p", "a", "--expert", "math="],
        ["generate", "base", "-p", "a", "--expert", "math", "--expert", "math=x"],
        ["generate", "base", "-p", "a", "--device", "abacus"],
        ["generate", "base", "-p", "a", "--device", "meta"],
        ["generate", "base", "-p", "a", "-p", ""],
        ["generate", "base", "-p", " ", "--plain"],
        ["compress", "base", "expert", "-o", "x", "--max-calibration-tokens", "0"],
        ["compress", "base", "expert", "-o", "x", "--device", "abacus"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    assert main(arguments) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_output_where_a_character_has_no_encoding(encoding):
    """In a process of its own, whose streams are encoded as a Windows pipe's or a bare container's are."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels" / "torch-ext")])
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "from transformers_meswitch.cli import main; raise SystemExit(main(['inspect', '-h']))",
        ],
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": path},
        capture_output=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert "The relative error ?? ? ??? / ???" in run.stdout.decode(encoding)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device that must be absent")
@pytest.mark.parametrize("command", [["generate", "base", "-p", "a"], ["compress", "base", "expert", "-o", "x"]])
def test_an_absent_device_is_refused_before_anything_is_loaded(command, capsys):
    assert main([*command, "--device", "cuda"]) == 2
    assert "argument --device: 'cuda' cannot be used here" in capsys.readouterr().err


def test_an_error_is_one_line_and_exits_with_1(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert "Traceback" not in output.err


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("MESWITCH_DEBUG", "1")
    with pytest.raises(DeltaFormatError):
        main(["inspect", str(tmp_path)])


def test_interrupted(monkeypatch, capsys):
    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers_meswitch.demo.runner.run_demo", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_demo_runs_the_bundled_family(arguments, monkeypatch):
    calls = []
    monkeypatch.setattr("transformers_meswitch.demo.runner.run_demo", lambda **options: calls.append(options))
    assert main(["demo", *arguments]) == 0
    assert calls == [{"json": bool(arguments)}]
