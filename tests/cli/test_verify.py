"""``meswitch verify``."""

from __future__ import annotations

import json
import random
import shutil

import pytest

from transformers_meswitch import MESwitchConfig, compress, verify
from transformers_meswitch.cli import main
from transformers_meswitch.verification.evidence import dump_evidence, read_evidence


@pytest.fixture(scope="session")
def text(repos):
    path = repos.base.parent / "text.txt"
    draw = random.Random(0)
    path.write_text("".join(" ".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=30)) + "\n" for _ in range(5)))
    return path


def arguments(repos, *more):
    return ["verify", *map(str, (repos.base, repos.expert, repos.delta, *more))]


def test_json_is_the_evidence_and_what_it_means(repos, text, capsys):
    assert main(arguments(repos, "--text", text, "--device", "cpu", "--json")) == 0
    expected = verify(repos.base, repos.expert, repos.delta, text, device="cpu", progress=False)
    meaning = {"too_far": expected.too_far, "judgement": expected.judgement}
    assert json.loads(capsys.readouterr().out) == dump_evidence(expected) | meaning


def test_table(repos, text, capsys):
    assert main(arguments(repos, "--text", text, "--max-tokens", "100", "--dtype", "bfloat16")) == 0
    output = capsys.readouterr().out
    found = json.loads(json.dumps(dump_evidence(verify(repos.base, repos.expert, repos.delta, progress=False))))
    for name, error in found["weights"]["relative_errors"].items():
        assert f"{name} {error:.4f}" in " ".join(output.split())
    assert "96 tokens, bfloat16 on " in output
    assert output.splitlines()[-1].startswith(("The delta stands", "This fine-tune is too far"))


def test_weights_only(repos, capsys):
    assert main(arguments(repos)) == 0
    output = capsys.readouterr().out
    assert "perplexity" not in output
    assert "give text" in output.splitlines()[-1]


def test_exit_codes_tell_a_bad_delta_from_a_good_one(repos, text, tmp_path, capsys):
    good = ["--text", str(text), "--json"]
    assert main(arguments(repos, *good)) == 0
    kl = json.loads(capsys.readouterr().out)["text"]["kl"]
    assert main(arguments(repos, *good, "--max-kl", 1.01 * kl)) == 0
    assert capsys.readouterr().err.count("error: ") == 0
    # A well-formed delta of the same expert, with too few bits.
    coarse = tmp_path / "coarse"
    compress(
        repos.base, repos.expert, coarse, MESwitchConfig(bits=1, salient_channels=0), calibration=None, progress=False
    )
    assert main(["verify", str(repos.base), str(repos.expert), str(coarse), *good, "--max-kl", str(1.01 * kl)]) == 1
    output = capsys.readouterr()
    assert json.loads(output.out)["text"]["kl"] > 1.01 * kl, "the evidence is printed all the same"
    assert f"above the {1.01 * kl:g} allowed" in output.err


def test_save(repos, text, tmp_path, capsys):
    delta = shutil.copytree(repos.delta, tmp_path / "delta")
    command = ["verify", str(repos.base), str(repos.expert), str(delta), "--text", str(text), "--json"]
    assert main(command) == 0
    assert read_evidence(delta) is None
    capsys.readouterr()
    assert main([*command, "--save"]) == 0
    printed = json.loads(capsys.readouterr().out)
    saved = read_evidence(delta)
    assert {key: printed[key] for key in dump_evidence(saved)} == dump_evidence(saved)
    assert saved.judgement in (delta / "README.md").read_text()


def test_a_wrong_base_is_an_error_of_one_line(repos, capsys):
    assert main(["verify", str(repos.expert), str(repos.expert), str(repos.delta)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "formed against another base" in output.err
