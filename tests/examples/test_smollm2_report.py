"""The example's report: every byte counted, every row shown."""

import json

import pytest
import report
import torch
from safetensors.torch import save_file


@pytest.fixture
def delta(tmp_path):
    """A folder with the weights file of a delta: 6 bytes of codes, 8 of steps, 12 of embedding rows."""
    prefix = "base_model.model.model.layers.{}.mlp.up_proj.meswitch_delta."
    save_file(
        {
            prefix.format(0) + "codes": torch.zeros(2, 2, dtype=torch.uint8),
            prefix.format(1) + "codes": torch.zeros(2, 1, dtype=torch.uint8),
            prefix.format(0) + "step": torch.zeros(2),
            "base_model.model.model.embed_tokens.meswitch_delta.rows": torch.zeros(2, 3, dtype=torch.bfloat16),
        },
        tmp_path / "adapter_model.safetensors",
    )
    return tmp_path


@pytest.fixture
def results(delta):
    """A result with one expert."""
    return {
        "environment": {"device": "a GPU"},
        "accuracy": [report.accuracy_row("base", "math", [True, False, False, False], 1.25)],
        "bytes": {"base": {"model.safetensors": 2000, "total": 2000}},
        "delta_tensor_bytes": {"math": report.delta_tensor_bytes(delta)},
        "mixed_batch": [
            {"expert": "math", "prompt": "2 + 2?", "answer": "#### 4", "base": "hello", "reference": "#### 4"},
            {"expert": None, "prompt": "Hi", "answer": "Hello"},
        ],
    }


def test_bytes_of_a_delta_are_summed_by_leaf_over_modules(delta):
    assert report.delta_tensor_bytes(delta) == {"codes": 6, "rows": 12, "step": 8}


def test_folder_bytes_count_every_file(delta):
    (delta / "README.md").write_text("12345")
    sizes = report.folder_bytes(delta)
    assert sizes["README.md"] == 5
    assert sizes["total"] == 5 + sizes["adapter_model.safetensors"]


def test_an_accuracy_comes_with_its_interval(results):
    row = results["accuracy"][0]
    assert (row["right"], row["of"], row["exact_match"]) == (1, 4, 0.25)
    assert row["interval_95"][0] < 0.25 < row["interval_95"][1]


def test_table_and_transcript_show_each_row(results, tmp_path):
    report.write(results, tmp_path / "a" / "r.json", tmp_path / "b" / "r.md")
    assert json.loads((tmp_path / "a" / "r.json").read_text()) == results
    text = (tmp_path / "b" / "r.md").read_text()
    assert "| base | math | 0.250 |" in text
    assert "| base | 2,000 |" in text
    assert "| `rows` | 12 |" in text
    assert "`expert=None`" in text
    assert text.count("Reference:") == 1
