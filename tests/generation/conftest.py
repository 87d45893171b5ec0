from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures_models import TinyFamily, dense_model
from transformers_meswitch import MESwitchModelForCausalLM

NAMES = ("math", "code", None)
PROMPT = torch.tensor([[1, 50, 43, 5, 41]])


@pytest.fixture
def family(tiny_family: TinyFamily) -> Any:
    """The tiny family, with no expert active."""
    return MESwitchModelForCausalLM.from_pretrained(tiny_family.base, experts=dict(tiny_family.deltas))


@pytest.fixture(scope="session")
def references(tiny_family: TinyFamily) -> dict[str | None, Any]:
    """Stock models of the base and of each delta, without this package; their generation config is the base's."""
    models = {name: dense_model(tiny_family.base, path) for name, path in tiny_family.deltas.items()}
    return {**models, None: type(models["math"]).from_pretrained(tiny_family.base)}


@pytest.fixture(scope="session")
def endings(references: dict[str | None, Any]) -> dict[str | None, int]:
    """For each expert an id that its greedy answer to ``PROMPT`` holds, so that it can be made its EOS.

    Rows end after 3, 6 and 9 tokens; each has a different one.
    """
    found: dict[str | None, int] = {}
    for position, name in zip((2, 5, 8), NAMES, strict=True):
        answer = _continuation(references[name], name)
        fresh = [t for i, t in enumerate(answer) if i >= position and t not in answer[:i] and t not in found.values()]
        found[name] = fresh[0]
    return found


def _continuation(model: Any, name: str | None) -> list[int]:
    output = model.generate(PROMPT, do_sample=False, max_new_tokens=24, eos_token_id=999, pad_token_id=0)
    return output[0, PROMPT.shape[1] :].tolist()


@pytest.fixture(scope="session")
def ending_family(
    tiny_family: TinyFamily, endings: dict[str | None, int], tmp_path_factory: pytest.TempPathFactory
) -> TinyFamily:
    """The tiny family with ``endings`` as EOS of base and experts."""
    folder = tmp_path_factory.mktemp("ending-family")
    base = Path(shutil.copytree(tiny_family.base, folder / "base"))
    _edit(base / "generation_config.json", eos_token_id=endings[None])
    deltas = {}
    for name, path in tiny_family.deltas.items():
        deltas[name] = Path(shutil.copytree(path, folder / name))
        _edit(deltas[name] / "adapter_config.json", eos_token_id=[endings[name]], base_model_name_or_path=str(base))
        _edit(deltas[name] / "generation_config.json", eos_token_id=endings[name])
    return TinyFamily(base, tiny_family.experts, deltas)


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
