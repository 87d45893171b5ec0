"""Model cards: what they carry, what they never show, and whose text survives."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from huggingface_hub import ModelCard

from tests.verification.records import evidence
from transformers_meswitch import Evidence
from transformers_meswitch.cards import delta_card, family_card, hub_id, merge_card, with_license, with_tags
from transformers_meswitch.configuration import MESwitchExpertConfig, MESwitchFamilyConfig

LINEAR = {"kind": "linear", "out_features": 8, "in_features": 64, "bits": 2, "salient_channels": 4}


def card_of(
    base: str | None = "mistralai/Mistral-7B-v0.1",
    expert: str | None = None,
    total: int = 1000,
    evidence: Evidence | None = None,
) -> str:
    modules = {"model.layers.0.mlp.up_proj": LINEAR, "model.layers.0.mlp.down_proj": LINEAR | {"bits": 1}}
    config = MESwitchExpertConfig(
        base_model_name_or_path=base, expert_model_name_or_path=expert, modules=modules, saliency="weight"
    )
    return delta_card(config, total_bytes=total, dense_bytes=4000, license="apache-2.0", evidence=evidence)


def test_metadata_of_a_delta():
    data = ModelCard(card_of()).data.to_dict()
    assert data["base_model"] == "mistralai/Mistral-7B-v0.1"
    assert data["base_model_relation"] == "adapter"
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == ("peft", "text-generation", "apache-2.0")
    expected = [
        "me-switch",
        "peft",
        "transformers",
        "base_model:adapter:mistralai/Mistral-7B-v0.1",
        "arxiv:2406.09041",
    ]
    assert data["tags"] == [*expected, "1-bit", "2-bit"]


def test_first_lines_carry_the_error_and_its_cure():
    for card in (card_of(), family_card(MESwitchFamilyConfig("me/base"))):
        head = "\n".join(ModelCard(card).text.strip().splitlines()[:4])
        assert "KeyError: 'MESWITCH'" in head
        assert "import transformers_meswitch" in head


def test_sizes_add_up():
    # codes (64 - 4) * bits / 8 a row, float32 step, int32 index and bfloat16 columns of 4 salient channels
    linear = sum(8 * ((60 * bits + 7) // 8) + 8 * 4 + 4 * 4 + 8 * 4 * 2 for bits in (1, 2))
    card = card_of()
    assert f"| {linear:,} |" in card
    assert f"| {1000 - linear:,} |" in card
    assert "| 4.00× |" in card


def test_quantised_rows_have_a_line_of_their_own():
    rows = {"kind": "quantized_rows", "num_rows": 10, "width": 8, "bits": 3, "coded_rows": 7, "exact_rows": 1}
    modules = {"model.layers.0.mlp.up_proj": LINEAR, "model.embed_tokens": rows}
    config = MESwitchExpertConfig(base_model_name_or_path="me/base", modules=modules)
    card = delta_card(config, total_bytes=1000, dense_bytes=4000)
    linear = 8 * 15 + 8 * 4 + 4 * 4 + 8 * 4 * 2
    # codes, steps and indices of 7 rows, and the index of an exact one
    coded = 7 * (3 + 4 + 4) + 4
    assert f"7 rows of embedding and output head (codes, step sizes, salient channels) | {coded} |" in card
    assert f"| all else: other changed rows, norms, biases, headers | {1000 - linear - coded} |" in card
    assert "7 changed rows of embedding and output head at 3 bits a weight" in card
    assert "rows of embedding and output head at" not in card_of()
    assert "own values where they differ" in card_of()


@pytest.mark.parametrize(
    "path", ["/data/secret/base", "./secret/base", "../secret/base", "~/secret/base", "C:\\secret"]
)
def test_no_local_path_leaks(path, tmp_path):
    card = card_of(base=path, expert=path)
    family = family_card(MESwitchFamilyConfig(path, experts={"math": str(tmp_path), "code": "./experts/code"}))
    for text in (card, family):
        assert "secret" not in text
        assert str(tmp_path) not in text
        assert "base_model" not in ModelCard(text).data.to_dict()


def test_a_folder_that_looks_like_an_id_is_local(tmp_path, monkeypatch):
    (tmp_path / "me" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("me/base") is None
    assert hub_id("me/other") == "me/other"


def test_family_lists_its_experts():
    experts = {"math": {"repo": "me/math-delta", "revision": "abc"}, "a|b": "./experts/ab"}
    card = family_card(MESwitchFamilyConfig("me/base", experts=experts, default_expert="math"), license="mit")
    assert "| `math` | [me/math-delta](https://huggingface.co/me/math-delta) | abc |" in card
    assert "| `a\\|b` | in this repo, `experts/ab` | — |" in card
    assert 'expert="math"' in card
    assert ModelCard(card).data.license == "mit"


def test_merging_a_fresh_card_changes_nothing():
    assert merge_card(card_of(), card_of()) == card_of()


def test_merge_keeps_what_people_wrote():
    existing = card_of().replace("license: apache-2.0", "license: llama3.1\nlanguage: de\nlicense_name: own")
    existing = existing.replace("- me-switch\n", "- me-switch\n- my-tag\n- 4-bit\n")
    existing = existing.replace("<!-- meswitch:begin -->", "Read \\1 this first.\n\n<!-- meswitch:begin -->")
    existing += "\n## Evaluation\n\nGSM8K: 71 %\n"
    merged = merge_card(existing, card_of(total=1234))
    card = ModelCard(merged)
    assert card.text.lstrip().startswith("Read \\1 this first.")
    assert merged.endswith("GSM8K: 71 %\n")
    assert "**1,234**" in merged
    assert "**1,000**" not in merged
    data = card.data.to_dict()
    assert (data["license"], data["license_name"], data["language"]) == ("llama3.1", "own", "de")
    assert "my-tag" in data["tags"]
    assert "4-bit" not in data["tags"]
    assert "2-bit" in data["tags"]


def test_merge_refreshes_only_metadata_where_the_block_is_gone():
    merged = merge_card("---\nlicense: mit\n---\n# All mine\n", card_of())
    assert ModelCard(merged).text == "# All mine\n"
    assert ModelCard(merged).data.library_name == "peft"


def test_merge_fills_an_empty_card_and_keeps_an_unreadable_one():
    assert "KeyError: 'MESWITCH'" in merge_card("---\nlicense: mit\n---\n", card_of())
    broken = "---\nlicense: [mit\n---\n# Mine\n"
    assert merge_card(broken, card_of()) == broken


@pytest.mark.parametrize("header", ["license: [mit", "- a list", "license: mit\n license: x"])
def test_a_card_whose_metadata_cannot_be_read_stays_as_it_is(header):
    card = f"---\n{header}\n---\nMine.\n"
    assert with_license(card, {"license": "mit"}) == card
    assert with_tags(card, ["new"]) == card
    assert merge_card(card, card_of()) == card
    assert merge_card(card_of(), card) == card_of()


def test_merge_keeps_windows_line_ends():
    merged = merge_card("---\r\nlicense: mit\r\n---\r\n# Mine\r\n", card_of())
    assert "\n" not in merged.replace("\r\n", "")


def test_distillation_is_stated_where_it_was_done():
    modules = {"model.layers.0.mlp.up_proj": LINEAR}
    distilled = {"steps": 200, "text": "chats.jsonl: 9 samples, 99 tokens", "kl_before": 0.5, "kl_after": 0.0123456}
    config = MESwitchExpertConfig(base_model_name_or_path="me/base", modules=modules, distilled=distilled)
    line = "200 steps on chats.jsonl: 9 samples, 99 tokens. KL from the fine-tuned model, nats a held-out token: 0.5"
    assert f"{line} before, 0.01235 after." in " ".join(delta_card(config, total_bytes=1, dense_bytes=1).split())
    assert "distilled" not in card_of()


def test_the_method_is_the_one_that_made_the_delta():
    config = MESwitchExpertConfig(modules={"model.layers.0.mlp.up_proj": LINEAR}, imported_from="BitDelta")
    card = delta_card(config, total_bytes=1, dense_bytes=1)
    assert "- Method: BitDelta ([arXiv:2402.10193](https://arxiv.org/abs/2402.10193)); imported" in card
    assert "- Method: ME-Switch" not in card
    assert "- Method: ME-Switch ([arXiv:2406.09041]" in card_of()


def test_fidelity_is_stated_where_it_was_measured():
    card = card_of(evidence=evidence())
    rows = [row for row in card.split("## Fidelity")[1].split("## How")[0].splitlines() if row.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[0] == ["on 4,000 tokens of text, float32", "base", "base + this delta", "fine-tuned model"]
    assert cells[2:] == [
        ["KL from the fine-tuned model, nats a token", "0.5", "0.004", "0"],
        ["same most probable next token", "60.00 %", "98.00 %", "100 %"],
        ["perplexity", "12.5", "4.375", "4.25"],
    ]
    assert evidence().judgement in card
    assert "The base knows 3,900 of the tokens" in card
    assert "0.375 in the mean, 0.500 at\nmost (`layers.1`)" in card


def test_the_error_of_each_layer_is_drawn_where_it_was_measured():
    errors = {f"model.layers.{i}.mlp.up_proj": 0.01 * (i + 1) for i in range(24)}
    errors |= {"model.layers.3.self_attn.q_proj": 0.12, "model.layers.4.mlp.down_proj": math.nan, "lm_head": 0.9}
    measured = evidence()
    measured = dataclasses.replace(measured, weights=dataclasses.replace(measured.weights, relative_errors=errors))
    lines = card_of(evidence=measured).split("```text\n")[1].split("```")[0].splitlines()
    bars = "".join("▁▂▃▄▅▆▇█"[i // 3] for i in range(24))
    assert lines == [
        "a bar a layer, first to last; █ is 0.240",
        f"mlp.up_proj       {bars}  0.010 to 0.240",
        "self_attn.q_proj  ▄  0.120 to 0.120",
    ]
    assert "```text" not in card_of()


def test_fidelity_without_text_or_without_evidence():
    weights_only = card_of(evidence=evidence(text=False))
    assert evidence(text=False).judgement in weights_only
    assert "KL from" not in weights_only
    assert "Fidelity" not in card_of()
    assert card_of() == merge_card(weights_only, card_of()), "the section goes with the evidence"


def test_no_table_runs_into_the_next_paragraph():
    for card in (card_of(), card_of(evidence=evidence()), card_of(evidence=evidence(text=False))):
        lines = card.splitlines()
        for line, following in itertools.pairwise(lines):
            assert not line.startswith("|") or not following or following.startswith("|"), following
            assert not following.startswith("## ") or not line, following
