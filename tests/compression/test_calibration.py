"""Second moments against a literal computation, and every way to give calibration text."""

import builtins
import json
import sys
import types

import pytest
import torch

from transformers_meswitch.compression.calibration import collect_second_moments, read_samples
from transformers_meswitch.errors import CompressionError

TEXTS = ["the quick brown fox", "jumps over the lazy dog and the cat"]


def collect(model, tokenizer, samples, max_tokens=1000):
    return collect_second_moments(model, tokenizer, samples, max_tokens=max_tokens, progress=False)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_moments_are_the_mean_squares_of_the_inputs(make_model, tokenizer, architecture):
    model = make_model(architecture)
    moments = collect(model, tokenizer, TEXTS)
    embed = model.get_input_embeddings()
    inputs = []
    for text in TEXTS:  # one at a time: no padding token counts
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            if architecture == "llama":
                inputs.append(model.model.layers[0].input_layernorm(embed(ids))[0])
            else:
                positions = model.transformer.wpe.weight[: ids.shape[1]]
                inputs.append(model.transformer.h[0].ln_1(embed(ids) + positions)[0])
    expected = torch.cat(inputs).square().mean(0)
    first = "model.layers.0.self_attn.q_proj" if architecture == "llama" else "transformer.h.0.attn.c_attn"
    torch.testing.assert_close(moments[first], expected)
    assert not torch.allclose(moments[first], torch.cat(inputs).abs().mean(0), rtol=1e-2)
    assert moments[first].dtype == torch.float32
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_every_linear_is_reached_and_text_is_cut_at_the_limit(make_model, tokenizer):
    model = make_model()
    assert len([name for name in collect(model, tokenizer, TEXTS) if name != "lm_head"]) == 14
    many = collect(model, tokenizer, ["abcd" * 16] + ["xyz" * 30] * 1000, max_tokens=64)
    few = collect(model, tokenizer, ["abcd" * 16])
    for name, moment in few.items():
        torch.testing.assert_close(many[name], moment)


def test_long_samples_are_cut_to_the_models_positions(make_model, tokenizer):
    assert collect(make_model("gpt2"), tokenizer, ["abcdefgh" * 40])  # 320 tokens, 64 positions


@pytest.mark.parametrize("samples", [[], [""], ["abc"]])
def test_too_little_text_is_refused(make_model, tokenizer, samples):
    with pytest.raises(CompressionError, match="expected at least 32"):
        collect(make_model(), tokenizer, samples)


def test_text_file(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("One line.\n\nÄnother.\n", encoding="utf-8")
    assert list(read_samples(path, tokenizer)) == ["One line.", "Änother."]
    assert list(read_samples(str(path), tokenizer)) == ["One line.", "Änother."]


def test_jsonl_file(tmp_path, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    ask, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
    rows = [
        {"text": "plain"},
        {"messages": [ask, answer]},
        {"prompt": "1+1=", "completion": "2"},
        {"prompt": [ask], "completion": [answer]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    chat = "[user]hi[assistant]ho"
    assert list(read_samples(path, tokenizer)) == ["plain", chat, "1+1=2", chat]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{broken', "line 2 is not JSON"),
        ("a.jsonl", '{"question": "a"}', "line 1 is .*expected an object"),
        ("a.jsonl", '["a"]', "line 1 is .*expected an object"),
        ("a.jsonl", '{"messages": []}', "has no chat template"),
        ("a.csv", "a", "neither .txt nor .jsonl"),
    ],
)
def test_bad_files_are_refused(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(CompressionError, match=message):
        list(read_samples(tmp_path / name, tokenizer))


def test_missing_file_and_bad_list_are_refused(tmp_path, tokenizer):
    with pytest.raises(CompressionError, match="cannot be read"):
        list(read_samples(tmp_path / "none.txt", tokenizer))
    with pytest.raises(CompressionError, match=r"calibration\[1\] is int"):
        list(read_samples(["a", 3], tokenizer))


def test_data_set(tokenizer, monkeypatch):
    def load_dataset(name, split, streaming):
        assert (name, split, streaming) == ("user/data", "train", True)
        return [{"text": "row"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert list(read_samples("user/data", tokenizer)) == ["row"]


def test_data_set_without_the_package(tokenizer, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CompressionError, match="pip install datasets"):
        list(read_samples("user/data", tokenizer))
