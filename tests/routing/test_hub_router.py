"""A family's router on the Hub: pushed with it, loaded by its id, and gone when the family has none any more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_server import HubServer
from transformers_meswitch.demo.runner import FAMILY

CLIENT = """
import sys
import transformers_meswitch as ms
source, = sys.argv[1:]
def experts(): return {"json": f"{source}/experts/json", "letter": f"{source}/experts/letter"}
load = ms.MESwitchModelForCausalLM.from_pretrained
model = load("alice/base", experts=experts(), router=source)
model.push_to_hub("alice/family")
again = load("alice/family")
print(again.router.labels, again.route("mira 2024-03-09 4170").experts)
print(load("alice/base", experts=experts(), router="alice/family").router.labels)
print(ms.HeadRouter.from_pretrained("alice/family").labels)
again.set_router(None)
again.push_to_hub("alice/family")
print(load("alice/family", force_download=True).router)
"""


@pytest.mark.integration
def test_push_and_load(saved: Path, tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.add_repo("alice/base", {file.name: file.read_bytes() for file in (FAMILY / "base").iterdir()})
        process = subprocess.run(
            [sys.executable, "-c", CLIENT, str(saved)],
            env=os.environ | hub.environment("alice", str(tmp_path / "cache")),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert process.returncode == 0, process.stderr
        assert process.stdout.splitlines() == [
            "['json', 'letter'] ['json']",
            "['json', 'letter']",
            "['json', 'letter']",
            "None",
        ]
        after, before = (set(commit.files) for commit in hub.repos["alice/family"].history()[:2])
        assert {"router.safetensors", "router_config.json"} <= before - after
