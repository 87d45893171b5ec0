"""What a head adds to a prompt: its time beside the base's own time to read the prompt, for few experts and many.

On a GPU it is measured as it is and with the early layers captured (``HeadRouter.capture``), beside the time that the
device itself is busy with them: what is left is the host's, which launches kernel after kernel.

No router needs to be trained for it: the time does not depend on what the weights say, only on layer, window, rank and
the number of experts. Weights of the base may be random for the same reason.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.decode.__main__ import random_model
from benchmarks.load.random_family import SHAPES
from benchmarks.timing import timed
from transformers_meswitch import HeadRouter
from transformers_meswitch.routing.head_fit import RANK
from transformers_meswitch.routing.hidden_states import early_layers
from transformers_meswitch.routing.statistics import ClassStatistics

from .head import WINDOW

__all__ = ["PROMPT_TOKENS", "cost", "shaped", "untrained_head"]

PROMPT_TOKENS = 2048
_FEW, _MANY = 4, 64
_REPEATS = 11
_WARM_UP = 2


class _NoExperts:
    """Stands for the switch of a model with experts where there are none to turn off."""

    @contextmanager
    def rows(self, _: Any) -> Iterator[None]:
        yield


def shaped(shape: str, device: str) -> Any:
    """A base of some shape (``benchmarks.load``) with random bfloat16 weights, no experts attached."""
    model = random_model(SHAPES[shape], device)
    model._meswitch_switch = _NoExperts()  # type: ignore[assignment]
    return model


def untrained_head(experts: int, layer: int, width: int) -> HeadRouter:
    """A head of so many experts that has seen noise, which takes as long as any other."""
    generator = torch.Generator().manual_seed(0)
    rank = min(RANK, width)
    points = {f"expert{i:02}": torch.randn(20, rank, generator=generator) + i for i in range(experts)}
    return HeadRouter(ClassStatistics.of(points), width, layer, WINDOW, 0.1, 1.0, 0.5, 1e9)


def _median_seconds(run: Callable[[], Any], device: torch.device) -> float:
    times = [timed(run, device.type)[1] for _ in range(_WARM_UP + _REPEATS)]
    return statistics.median(times[_WARM_UP:])


def _device_seconds(run: Callable[[], Any]) -> float:
    """How long the device is busy with one call, without the time that it waits for the host."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    return sum(event.time_range.elapsed_us() for event in found.events() if event.device_type.name == "CUDA") / 1e6


def cost(model: Any, tokens: int = PROMPT_TOKENS, layer: int | None = None) -> dict[str, Any]:
    """Seconds of a prompt's prefill and of its routing, medians of 11 calls, tokenisation in neither.

    Args:
        model: the base, or a family of which the base is read.
        tokens: of the prompt; a head reads a window of them.
        layer: that a head reads; the deepest that one may be fitted to if `None`, so that none takes longer.
    """
    config = model.config.get_text_config()
    layer = early_layers(model)[-1] if layer is None else layer
    ids = torch.randint(100, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    row, on_device = [ids[0, :WINDOW].tolist()], ids.to(model.device)
    with torch.no_grad():
        prefill = _median_seconds(lambda: model(on_device, logits_to_keep=1, use_cache=True), model.device)
    routers = {str(experts): untrained_head(experts, layer, config.hidden_size) for experts in (_FEW, _MANY)}
    calls = {
        experts: lambda router=router: router.route_ids(model, row, router.labels)
        for experts, router in routers.items()
    }
    times = {experts: _median_seconds(call, model.device) for experts, call in calls.items()}
    found = {
        "prompt_tokens": tokens,
        "window": WINDOW,
        "layer": layer,
        "layers_of_the_base": config.num_hidden_layers,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "prefill_seconds": prefill,
        "route_seconds_by_experts": times,
        "share_of_prefill": times[str(_FEW)] / prefill,
        "share_of_prefill_many": times[str(_MANY)] / prefill,
    }
    if model.device.type == "cuda":
        found["route_device_seconds"] = _device_seconds(calls[str(_FEW)])
        routers[str(_FEW)].capture(model)
        captured = {experts: _median_seconds(call, model.device) for experts, call in calls.items()}
        found |= {
            "captured_seconds_by_experts": captured,
            "captured_device_seconds": _device_seconds(calls[str(_FEW)]),
            "captured_share_of_prefill": captured[str(_FEW)] / prefill,
            "captured_share_of_prefill_many": captured[str(_MANY)] / prefill,
        }
    return found
