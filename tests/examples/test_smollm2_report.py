"""The example's report: every byte counted, every row shown."""

import json
from pathlib import Path

import pytest
import report
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]


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
    right = {"bf16": [True, True, False, False], "delta": [True, False, True, False]}
    return {
        **report.provenance(torch.device("cpu"), ["--work-dir", "/secret/place", "--steps", "2"]),
        "base": "A base",
        "bits": 2,
        "salient_channels": 16,
        "calibration_texts": 256,
        "training": {"math": {"steps": 2, "batch_size": 8, "learning_rate": 5e-5, "seed": 0, "seconds": 1.5}},
        "compression": {"math": {"seconds": 2.5}},
        "accuracy": [report.accuracy_row("base", "math", [True, False, False, False], 1.25)],
        "paired": [report.paired_row("math", "bf16", "delta", right)],
        "identical_texts": [report.identity_row("math", ["a", "b", "c"], ["a", "x", "c"])],
        "bytes": {"base": {"model.safetensors": 2000, "total": 2000}},
        "delta_tensor_bytes": {"math": report.delta_tensor_bytes(delta)},
        "mixed_batch": [
            {
                "expert": "math",
                "prompt": "2 + 2?",
                "answer": "#### 4",
                "base": "hello",
                "reference": "#### 4",
                "right": {"answer": True, "base": False},
            },
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


def test_lost_and_won_are_counted_item_by_item():
    before = [True] * 28 + [False] * 13 + [True] * 195 + [False] * 264
    after = [False] * 28 + [True] * 13 + [True] * 195 + [False] * 264
    row = report.paired_row("math", "bf16", "delta", {"bf16": before, "delta": after})
    assert (row["lost"], row["won"], row["of"], row["difference"]) == (28, 13, 500, -0.03)
    # The standard error of the mean of the 500 differences -1, 0 and +1, by its definition.
    differences = torch.tensor([a - b for b, a in zip(before, after, strict=True)], dtype=torch.float64)
    error = float(differences.std(correction=0)) / 500**0.5
    assert row["half_interval_95"] == pytest.approx(1.959964 * error, abs=5e-5)


def test_identical_texts_are_counted():
    assert report.identity_row("math", ["a", "b", "c"], ["a", "x", "c"])["identical"] == 2


@pytest.mark.parametrize(
    ("right", "shown"), [([True, False], [0]), ([False, False, True, True], [0, 2]), ([False, False], [0])]
)
def test_the_transcript_shows_the_first_item_and_a_solved_one(right, shown):
    assert report.shown_items(right) == shown


def test_tables_and_transcript_show_each_row_and_no_path(results, tmp_path):
    report.write(results, tmp_path / "a" / "r.json", tmp_path / "b" / "r.md")
    assert json.loads((tmp_path / "a" / "r.json").read_text()) == results
    text = (tmp_path / "b" / "r.md").read_text()
    assert report.tables(results) in text
    for line in (
        "| base | math | 0.250 | 0.046 to 0.699 | 1 / 4 |",
        "| math | bf16 | delta | 1 | 1 | 4 | +0.0 | ± 69.3 |",
        "| math | 2 | 3 |",
        "| base | 2,000 |",
        "| `rows` | 12 |",
        "| fine-tuning math (2 steps) | 1.5 s |",
        "| compressing math, calibration included | 2.5 s |",
        "| 4 math answers, base | 1 s |",
        "| command | `python examples/smollm2_family/run.py --work-dir WORK-DIR --steps 2` |",
    ):
        assert line in text.splitlines()
    assert "/secret" not in json.dumps(results) + text
    assert "`expert=None`" in text
    assert "\nAnswer (right):\n" in text
    assert "\nBase (wrong):\n" in text
    assert text.count("\nAnswer:\n") == 1, "the base's own row has no right answer"
    assert text.count("Reference:") == 1


@pytest.mark.parametrize(
    "heading",
    list(report.TABLES),
)
def test_the_page_shows_the_tables_of_the_result_file(heading):
    results = json.loads((ROOT / "benchmarks" / "results" / "smollm2_family.json").read_text())
    page = (ROOT / "docs" / "smollm2_family.md").read_text()
    assert all(line in page.splitlines() for line in report.TABLES[heading](results).splitlines())
