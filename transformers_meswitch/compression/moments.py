"""Second moments of the inputs of linears, summed up while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..module_kinds import linear_sizes

__all__ = ["MomentCollector", "tensor_cores"]

#: Dtypes whose mantissas TF32 holds in full.
_SHORT = (torch.bfloat16, torch.float16)


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Let a GPU multiply float32 matrices on its tensor cores, in TF32 and with float32 sums: several times faster.

    TF32 drops mantissa bits that numbers which were bfloat16 or float16 do not have, so their products lose nothing.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class MomentCollector:
    """Sums up ``x xᵀ`` over the input vectors ``x`` of linears.

    Linears that are given the very same tensor one after the other (query, key and value; gate and up) share one sum.

    Args:
        linears: name to module.

    >>> linear = nn.Linear(2, 3)
    >>> collector = MomentCollector({"q": linear})
    >>> with collector.collecting(torch.tensor([[True, True, False]])):
    ...     _ = linear(torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]]))
    >>> collector.means()["q"].tolist()
    [[5.0, 7.0], [7.0, 10.0]]
    """

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        self._linears = dict(linears)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        #: Name of a linear to the name under which its sum is kept.
        self._owner: dict[str, str] = {}

    @contextmanager
    def collecting(self, real: Tensor, when: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """While the context lasts, every call of a linear counts.

        Args:
            real: bool ``[rows, length]``, the positions that count.
            when: asked at each call whether it counts.

        Raises:
            UnsupportedModelError: from the call of a linear that shares its input with another at some times only.
        """
        last: list[Any] = [None, ""]
        places = None if bool(real.all()) else real.reshape(-1).nonzero().squeeze(1)

        def hook(name: str, width: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def add(_: nn.Module, args: tuple[Any, ...]) -> None:
                if not when():
                    return
                inputs = args[0]
                owner = last[1] if inputs is last[0] else name
                last[:] = [inputs, owner]
                if self._owner.setdefault(name, owner) != owner:
                    raise UnsupportedModelError(
                        f"{name} has the same input as {self._owner[name]} in one forward pass and another in the "
                        "next; its second moment cannot be collected. Compress without calibration."
                    )
                if owner == name:
                    self._add(name, inputs.detach().reshape(-1, width), places, real.numel())

            return add

        handles = [
            module.register_forward_pre_hook(hook(name, linear_sizes(module)[1]))
            for name, module in self._linears.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, name: str, inputs: Tensor, places: Tensor | None, positions: int) -> None:
        # A linear that is not called once a position (after pooling, say) has no padding to tell apart.
        if places is not None and len(inputs) == positions:
            inputs = inputs[places.to(inputs.device)]
        if name not in self._sums:
            self._sums[name] = inputs.new_zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float32)
            self._counts[name] = 0
        wide = inputs.to(torch.float32)
        with tensor_cores() if inputs.dtype in _SHORT else nullcontext():
            self._sums[name].addmm_(wide.T, wide)
        self._counts[name] += len(inputs)

    def means(self) -> dict[str, Tensor]:
        """``E[x xᵀ]`` of every linear that was called; the sums are used up.

        Returns:
            Name to float32 ``[in, in]``, where the linear ran.

        Linears that share an input share one tensor.
        """
        means = {name: total.div_(max(1, self._counts[name])) for name, total in self._sums.items()}
        self._sums = {}
        return {name: means[owner] for name, owner in self._owner.items()}
