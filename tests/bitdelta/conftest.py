"""BitDelta diffs, made and applied from the format's definition alone: no code of this package or of BitDelta's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.fixtures_models import TinyFamily

#: BitDelta compresses what is called so inside ``self_attn`` and ``mlp``.
_COMPRESSED = "proj"


def packed(positive: np.ndarray) -> torch.Tensor:
    """Signs ``[out, in]`` as a mask, int32 ``[in / 32, out]``, sign by sign."""
    out_features, in_features = positive.shape
    words = np.zeros((in_features // 32, out_features), dtype=np.uint32)
    for row in range(out_features):
        for channel in range(in_features):
            words[channel // 32, row] |= np.uint32(int(positive[row, channel]) << (channel % 32))
    return torch.from_numpy(words.view(np.int32))


def signs(mask: torch.Tensor) -> np.ndarray:
    """What a mask says, ``[out, in]`` of -1 and 1, bit by bit."""
    words = np.ascontiguousarray(mask.numpy()).view(np.uint32)
    found = np.zeros((words.shape[1], 32 * words.shape[0]), dtype=np.int64)
    for word in range(words.shape[0]):
        for bit in range(32):
            found[:, 32 * word + bit] = 2 * ((words[word] >> np.uint32(bit)) & np.uint32(1)).astype(np.int64) - 1
    return found


def diff_of(base: Path, expert: Path) -> dict[str, torch.Tensor]:
    """The diff that BitDelta saves before it trains coefficients."""
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (expert, base))
    diff: dict[str, torch.Tensor] = {}
    for name, parameter in ours.named_parameters():
        module = name.removesuffix(".weight")
        if _COMPRESSED in module.rpartition(".")[2]:
            delta = (parameter - theirs.get_parameter(name)).detach()
            diff[module + ".mask"] = packed(~(delta < 0).numpy())
            diff[module + ".coeff"] = torch.nn.Parameter(delta.float().abs().mean())
        else:
            diff[name] = parameter
    return diff


def loaded(base: Path, diff: dict[str, torch.Tensor], tied: bool) -> Any:
    """The model that the diff makes of a base in the dtype of its checkpoint.

    ``±coeff`` is rounded to the weight's dtype and added in it; what is there whole replaces the base's.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    with torch.no_grad():
        for name, module in model.named_modules():
            if f"{name}.mask" in diff:
                coeff = diff[f"{name}.coeff"].float().numpy()
                delta = torch.from_numpy((signs(diff[f"{name}.mask"]) * coeff).astype(np.float32))
                module.weight.add_(delta.to(module.weight.dtype))
            elif f"{name}.weight" in diff:
                module.weight = torch.nn.Parameter(diff[f"{name}.weight"].detach().to(module.weight.dtype))
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


@pytest.fixture(scope="session", params=["float32", "bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.param)


@pytest.fixture(scope="session", params=["tiny_family", "untied_family"])
def family(request: pytest.FixtureRequest, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    """A tied or an untied family in some dtype, without deltas."""
    whole: TinyFamily = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp("bitdelta")
    for path in (whole.base, *whole.experts.values()):
        AutoModelForCausalLM.from_pretrained(path).to(dtype).save_pretrained(folder / path.name)
    experts = {name: folder / path.name for name, path in whole.experts.items()}
    return TinyFamily(folder / whole.base.name, experts, {})
