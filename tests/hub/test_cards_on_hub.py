"""Cards on the Hub: what people wrote survives every way of pushing, and the licence is that of the origin."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.hub.conftest import Client, Published
from tests.hub_server import HubServer
from transformers_meswitch import MESwitchModelForCausalLM
from transformers_meswitch.hub import push_folder

pytestmark = pytest.mark.integration

BY_HAND = b"---\nlicense: mit\nlanguage: de\ntags: [mine]\n---\n# Von Hand\n\nNur ein Satz.\n"


@pytest.mark.parametrize("kind", ["delta", "family", "folder", "PEFT"])
def test_a_card_written_by_hand_stays_and_gains_what_the_hub_sorts_by(
    hub: HubServer, published: Published, tmp_path: Path, kind: str
) -> None:
    hub.add_repo("alice/made", {"README.md": BY_HAND})
    if kind == "family":
        MESwitchModelForCausalLM.from_pretrained("alice/base", experts={"math": "alice/math"}).push_to_hub(
            "alice/made"
        )
    elif kind == "PEFT":
        base = AutoModelForCausalLM.from_pretrained("alice/base")
        PeftModel.from_pretrained(base, "alice/math").push_to_hub("alice/made")
    else:
        model = AutoModelForCausalLM.from_pretrained("alice/math")
        model.save_pretrained(tmp_path / "delta")
        if kind == "folder":
            push_folder(tmp_path / "delta", "alice/made")
        else:
            model.push_to_hub("alice/made")
    text = hub.repos["alice/made"].files()["README.md"].decode()
    card = ModelCard(text)
    assert card.text.strip() == "# Von Hand\n\nNur ein Satz."
    data = card.data.to_dict()
    assert (data["license"], data["language"]) == ("mit", "de")
    assert "mine" in data["tags"]
    if kind != "PEFT":  # PEFT's own call keeps the card, and adds nothing of ours
        assert data["base_model"] == "alice/base"
        assert data["base_model_relation"] == "adapter"
        assert data["pipeline_tag"] == "text-generation"
        assert {"me-switch", "base_model:adapter:alice/base"} <= set(data["tags"])
        assert ("peft" in data["tags"]) == (kind != "family")


@pytest.mark.parametrize(
    ("expert", "base", "expected"),
    [
        ("license: mit", "license: apache-2.0", {"license": "mit"}),
        (None, "license: apache-2.0", {"license": "apache-2.0"}),
        (
            None,
            "license: other\nlicense_name: own\nlicense_link: https://example.org/own",
            {"license": "other", "license_name": "own", "license_link": "https://example.org/own"},
        ),
        (None, None, {}),
    ],
)
def test_the_licence_is_the_fine_tunes_else_the_bases(
    hub: HubServer,
    client: Client,
    delta_folder: Path,
    expert: str | None,
    base: str | None,
    expected: dict[str, str],
) -> None:
    for name, header in (("tune", expert), ("base", base)):
        if header is not None:
            hub.add_repo(f"alice/{name}", {"README.md": f"---\n{header}\n---\nCard.\n".encode()})
    (delta_folder / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "alice/base", "expert_model_name_or_path": "alice/tune"}'
    )
    push_folder(delta_folder, "alice/delta")
    data = ModelCard(hub.repos["alice/delta"].files()["README.md"].decode()).data.to_dict()
    assert {key: value for key, value in data.items() if key.startswith("license")} == expected
