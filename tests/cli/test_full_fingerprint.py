"""``--full``: of the base's tensors every byte is compared, not samples."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from transformers_meswitch.cli import main
from transformers_meswitch.delta_format.reader import open_delta

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, a fine-tune, and a base that differs from the first in a number that no sample has."""
    folder = tmp_path_factory.mktemp("checkpoints")
    config = LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder / "expert")
    other = shutil.copytree(folder / "base", folder / "other")
    tensors = load_file(other / "model.safetensors")
    tensors[EMBEDDING].view(-1)[4096 // 4 + 100] += 1  # past the first block of 4,096 bytes, before the second
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return folder / "base", folder / "expert", other


def run(*arguments: str | Path) -> int:
    return main([*map(str, arguments)])


def test_a_number_that_samples_miss_is_found(
    checkpoints: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, expert, other = checkpoints
    delta = tmp_path / "delta"
    assert run("compress", base, expert, "-o", delta, "--calibration", "none", "--full") == 0
    fingerprint = open_delta(delta).config.base_fingerprint
    assert fingerprint is not None
    assert fingerprint["full"]["algorithm"] == "sha256-all-v1"
    assert (
        fingerprint["full"]["tensors"].keys()
        == fingerprint["tensors"].keys()
        == load_file(base / "model.safetensors").keys()
    )
    assert run("verify", base, expert, delta, "--full") == 0
    assert run("verify", other, expert, delta) == 0, "samples do not tell them apart"
    capsys.readouterr()
    assert run("verify", other, expert, delta, "--full") == 1
    output = capsys.readouterr()
    assert f"formed against another base than {other}: tensor '{EMBEDDING}'" in output.err
    assert "1 of 12 tensors differ" in output.err
    assert output.out == ""


def test_a_delta_without_it_says_how_to_get_one(
    checkpoints: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, expert, _ = checkpoints
    delta = tmp_path / "delta"
    assert run("compress", base, expert, "-o", delta, "--calibration", "none") == 0
    assert "full" not in (open_delta(delta).config.base_fingerprint or {})
    capsys.readouterr()
    assert run("verify", base, expert, delta, "--full") == 1
    assert "compress the expert again with full_fingerprint=True (--full)" in capsys.readouterr().err
