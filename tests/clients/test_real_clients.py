"""lm-eval, LangChain and TRL load a family by themselves and print what ``docs/how-to/clients.md`` says they print.

Each is installed with pip into an environment of its own, kept in the folder ``MESWITCH_CLIENTS`` if set, with this
checkout on its path. ``PIP_*`` variables hold for the installations.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_docs import HOW_TO, ROOT, blocks_of, is_expected
from transformers_meswitch import MESwitchModelForCausalLM
from transformers_meswitch.demo.runner import FAMILY

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.xdist_group("clients")]

PACKAGES = {"lm-eval": "lm_eval[hf]", "langchain": "langchain-huggingface", "trl": "trl"}
OURS = ("transformers>=5.17,<6", "peft>=0.21", "huggingface_hub>=1.33", "accelerate", "filelock", "jinja2", "tqdm")
PAGE = (HOW_TO / "clients.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the page was followed."""
    folder = tmp_path_factory.mktemp("clients")
    shutil.copytree(FAMILY, folder / "demo-family")
    family = MESwitchModelForCausalLM.from_pretrained(folder / "demo-family")
    for name in ("letter", "redact"):
        family.set_expert(name)
        family.save_pretrained(folder / f"{name}-family")
    (folder / "tasks").mkdir()
    for name, language in (("letters.jsonl", "json"), ("letters.yaml", "yaml")):
        block = re.search(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
        assert block is not None
        (folder / "tasks" / name).write_text(block[1])
    return folder


def environment(name: str, folder: Path) -> Path:
    """The programs of a virtual environment with a client."""
    place = Path(os.environ.get("MESWITCH_CLIENTS", folder)) / name
    programs = place / ("Scripts" if os.name == "nt" else "bin")
    if not (place / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
        pip = [programs / "python", "-m", "pip", "install", "--quiet"]
        # First, and as it is here: another build of torch would come with it otherwise.
        subprocess.run([*pip, f"torch=={torch.__version__.split('+')[0]}"], check=True)
        subprocess.run([*pip, PACKAGES[name], *OURS], check=True)
        (place / "installed").touch()
    return programs


def run(folder: Path, *command: str | Path) -> str:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels" / "torch-ext")])
    settings = {"PYTHONPATH": path, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    done = subprocess.run(command, env=os.environ | settings, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def code_of(heading: str, language: str) -> tuple[str, str]:
    """A section's code, and what it prints."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0].replace("<!-- not run", "<!-- run")
    block = next(blocks_of(section, (language,)))
    assert block.output is not None
    return block.code, block.output


def test_lm_eval(folder: Path) -> None:
    programs = environment("lm-eval", folder)
    code, output = code_of("lm-eval", "bash")
    printed = run(folder, programs / "lm_eval", *code.replace("\\\n", "").split()[1:])
    assert is_expected(printed, output), printed
    other = code.replace("letter-family", "redact-family")  # which answers otherwise, and scores nothing
    assert "|exact_match|↑  |    0|" in run(folder, programs / "lm_eval", *other.replace("\\\n", "").split()[1:])


@pytest.mark.parametrize(("name", "heading"), [("langchain", "LangChain"), ("trl", "TRL")])
def test_programs(folder: Path, name: str, heading: str) -> None:
    code, output = code_of(heading, "python")
    printed = run(folder, environment(name, folder) / "python", "-c", code)
    assert is_expected(printed, output), printed
