"""``meswitch generate``."""

from __future__ import annotations

import io
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_meswitch import MESwitchModelForCausalLM
from transformers_meswitch.cli import main


def reference(path, prompt, tokens):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def generate(capsys, *arguments):
    assert main(["generate", *map(str, arguments), "--max-new-tokens", "6", "--device", "cpu"]) == 0
    return capsys.readouterr().out


def test_each_expert_answers_each_prompt(repos, capsys):
    arguments = [repos.base, "--expert", f"math={repos.delta}", "--expert", "base", "-p", "a b c", "-p", "d e"]
    answers = json.loads(generate(capsys, *arguments, "--json"))
    assert [(a["prompt"], a["expert"]) for a in answers] == [
        ("a b c", "math"),
        ("a b c", "base"),
        ("d e", "math"),
        ("d e", "base"),
    ]
    assert [a["text"] for a in answers if a["expert"] == "base"] == [
        reference(repos.base, prompt, 6) for prompt in ("a b c", "d e")
    ]
    assert answers[0]["text"] == reference(repos.delta, "a b c", 6)


def test_text_of_one_and_of_several_answers(repos, capsys):
    alone = generate(capsys, repos.base, "-p", "a b c")
    assert alone == reference(repos.base, "a b c", 6) + "\n"
    several = generate(capsys, repos.base, "--expert", "base", "--expert", f"math={repos.delta}", "-p", "a b c")
    assert several.splitlines()[0] == f"[base] {alone.rstrip()}"
    assert several.splitlines()[1].startswith("[math] ")


def test_prompt_from_stdin(repos, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a b c\n"))
    assert generate(capsys, repos.base) == reference(repos.base, "a b c", 6) + "\n"


@pytest.mark.parametrize("text", ["", "\n", "  \n"])
def test_empty_stdin_is_wrong_usage(text, repos, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["generate", str(repos.base)]) == 2
    assert "empty prompt: what standard input holds" in capsys.readouterr().err


def test_json_is_plain_ascii_for_pipes_of_any_encoding(repos, capsys):
    printed = generate(capsys, repos.base, "-p", "a é 漢", "--json")
    assert printed.isascii()
    assert json.loads(printed)[0]["prompt"] == "a é 漢"


def test_sampling(repos, capsys):
    torch.manual_seed(0)
    texts = {generate(capsys, repos.base, "-p", "a b c", "--temperature", "5") for _ in range(3)}
    assert len(texts) > 1


def test_terminal_without_a_prompt_is_wrong_usage(repos, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert main(["generate", str(repos.base)]) == 2
    assert "no prompt" in capsys.readouterr().err


@pytest.mark.parametrize("expert", ["math", "math=/nowhere/delta"])
def test_an_unknown_expert_fails(expert, repos, capsys):
    assert main(["generate", str(repos.base), "--expert", expert, "-p", "a"]) == 1
    assert "error: " in capsys.readouterr().err


def test_a_family_answers_with_its_own_experts_and_further_ones(repos, tmp_path, capsys):
    family = MESwitchModelForCausalLM.from_pretrained(repos.base, experts={"math": repos.delta})
    family.set_expert("math")
    family.save_pretrained(tmp_path / "family")
    expected = reference(repos.delta, "a b c", 6)
    assert expected != reference(repos.base, "a b c", 6)
    assert generate(capsys, tmp_path / "family", "-p", "a b c") == expected + "\n", "the default expert"
    arguments = ["--expert", "math", "--expert", f"again={repos.delta}", "-p", "a b c"]
    output = generate(capsys, tmp_path / "family", *arguments)
    assert output == f"[math] {expected}\n[again] {expected}\n"
