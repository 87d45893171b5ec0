"""A small module (a norm) run with each row's own parameters at once, picked from a stack by the expert's slot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from meswitch_kernels import NormForm, norm_rows

from .kernel_path import DTYPES, are_for_kernels, is_watched
from .slots import ROOM

__all__ = ["NormKind", "ValuesStack", "norm_kind", "run_with_rows", "takes_rows"]


class NormKind(NamedTuple):
    """What there is to know of a norm, beside its weight, to work it out elsewhere.

    Attributes:
        form: how it applies its weight.
        eps: what it adds to the mean of squares.
        dtype: of input, weight and output, in which it was tried: what rounds shows the form.
        device: where it was tried.
    """

    form: NormForm
    eps: float
    dtype: torch.dtype
    device: torch.device


class ValuesStack(nn.Module):
    """The experts' own parameters of a small module, by slot, for code that picks them by tensors alone.

    A second copy of a few thousand numbers an expert, so that no loop over experts is needed. The last row is the
    base's: it has nothing of its own, and -1 is its index.

    Args:
        base: the base's module.
    """

    has: torch.Tensor
    of_weight: torch.Tensor

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        first = next(base.parameters())
        self._names = [name for name, _ in base.named_parameters(recurse=False)]
        self._slots: dict[str, int] = {}
        with torch.inference_mode(False), torch.no_grad():  # written to later, in whatever mode it is made
            self.register_buffer("has", torch.zeros(ROOM + 1, dtype=torch.bool, device=first.device), persistent=False)
            for name, parameter in base.named_parameters(recurse=False):
                self.register_buffer(f"of_{name}", parameter.new_zeros(ROOM + 1, *parameter.shape), persistent=False)
        self._norm: NormKind | None = None
        self._asked: tuple[torch.dtype, torch.device] | None = None
        self.ask(base)

    def __getstate__(self) -> dict[str, Any]:
        """Copies ask anew: they may be in another process, where no kernel has been launched."""
        return {**self.__dict__, "_asked": None, "_norm": None}

    @staticmethod
    def _now(parameter: torch.Tensor) -> tuple[torch.dtype, torch.device]:
        return parameter.dtype, parameter.device

    @torch.no_grad()
    def ask(self, base: nn.Module) -> None:
        """Find out, once for each dtype and device, whether the base's module is a norm that a kernel works out.

        Args:
            base: the base's module.
        """
        first = next(base.parameters())
        if self._asked == self._now(first):
            return
        # What casts parameters alone leaves the stack as it was.
        alike = all((b.dtype, b.device) == self._now(first) for b in self.buffers() if b is not self.has)
        self._asked, self._norm = self._now(first), norm_kind(base) if alike else None
        if self._norm is not None:
            # While a graph is captured CUDA loads no kernel, so it is launched here for the first time.
            self.norm(base, first.new_ones(1, *first.shape), torch.zeros(1, dtype=torch.int32, device=first.device))

    def put(self, expert: str, slot: int, values: Mapping[str, torch.Tensor | None]) -> None:
        """Enter an expert: its name, its slot, and all parameters of its module by name, the base's among them."""
        # A graph that was captured with fewer has to be captured again, as the documentation says.
        while slot >= self.has.shape[0] - 1:
            self._double()
        for name in self._names:
            getattr(self, f"of_{name}")[slot].copy_(values[name])  # type: ignore[arg-type]  # the base has all of them
        self.has[slot] = True
        self._slots[expert] = slot

    def _double(self) -> None:
        """Make room for twice as many experts. The last row, the base's, is zero everywhere."""
        with torch.inference_mode(False), torch.no_grad():
            for name, buffer in list(self.named_buffers(recurse=False)):
                larger = buffer.new_zeros(2 * (buffer.shape[0] - 1) + 1, *buffer.shape[1:])
                larger[: buffer.shape[0]] = buffer
                setattr(self, name, larger)

    def clear(self, expert: str) -> None:
        """Forget an expert, if it was entered."""
        slot = self._slots.pop(expert, None)
        if slot is not None:
            self.has[slot] = False

    def pick(self, base: nn.Module, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """Parameters ``[rows, *shape]`` of each row's expert by name, or the base's.

        Args:
            base: the base's module.
            index: int32 ``[rows]``, slots, -1 for the base.
        """
        # Each of these is a kernel of microseconds in a step that has two norms a layer, so they are few.
        own = self.has[index]
        picked = {}
        for name in self._names:
            rows = getattr(self, f"of_{name}")[index]
            picked[name] = torch.where(own.view(-1, *[1] * (rows.ndim - 1)), rows, getattr(base, name))
        return picked

    def norms(self, base: nn.Module, x: torch.Tensor) -> bool:
        """Whether :meth:`norm` gives what the base's module does, in one kernel instead of a dozen.

        Not while ``torch.compile`` traces, which makes one kernel of the dozen itself.

        Args:
            base: the module that the rows run.
            x: its input.
        """
        if torch.compiler.is_compiling() or self._norm is None:
            return False
        weight = base._parameters.get("weight")
        return (
            type(weight) is nn.Parameter
            and x.ndim > 1
            and weight.shape == x.shape[-1:]
            and weight.dtype == x.dtype == self._norm.dtype == self.of_weight.dtype
            and weight.device == self._norm.device == self.has.device
            and not is_watched(base)
            and are_for_kernels(x, weight.device, base)
        )

    def norm(self, base: nn.Module, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """As the base's module with the weight of each row's expert, of inputs that it :meth:`norms`.

        Args:
            base: the base's module.
            x: ``[rows, ..., width]``.
            index: int32 ``[rows]``, slots, -1 for the base.

        Returns:
            As ``x``.
        """
        assert self._norm is not None
        own = self.of_weight
        return norm_rows(x, base.weight, own, self.has, index, eps=self._norm.eps, form=self._norm.form)  # type: ignore[arg-type]


def run_with_rows(module: nn.Module, x: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """``module(x)`` where row ``i`` of the batch has ``parameters[...][i]``.

    Args:
        module: the base's module; of those that :func:`takes_rows`.
        x: ``[batch, ..., *shape]``.
        parameters: name to ``[batch, *shape]``, all parameters of the module.

    Returns:
        As ``module(x)``.
    """
    spread = {
        name: rows.view(rows.shape[0], *[1] * (x.ndim - rows.ndim), *rows.shape[1:])
        for name, rows in parameters.items()
    }
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        # torch's operators take one weight, which they apply before they round.
        if isinstance(module, nn.LayerNorm):
            y = F.layer_norm(x.float(), module.normalized_shape, eps=module.eps)
        else:
            eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
            y = F.rms_norm(x.float(), module.normalized_shape, eps=eps)
        if "weight" in spread:
            y = y * spread["weight"].float()
        if "bias" in spread:
            y = y + spread["bias"].float()
        return y.to(x.dtype)
    result: torch.Tensor = functional_call(module, spread, (x,))
    return result


@torch.no_grad()
def takes_rows(module: nn.Module) -> bool:
    """Whether :func:`run_with_rows` gives each row what the module alone gives it, tried on numbers.

    So it is with norms of transformers' models, which end in a product with their weight; it need not be with any
    module.

    >>> takes_rows(nn.LayerNorm(8)), takes_rows(nn.Conv1d(3, 3, 1))
    (True, False)
    """
    own = dict(module.named_parameters(recurse=False))
    if not own or len(own) != len(list(module.parameters())):
        return False
    shape = max((p.shape for p in own.values()), key=len)
    device, dtype = next(iter(own.values())).device, next(iter(own.values())).dtype
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    rows: dict[str, Any] = {name: torch.stack([draw(*p.shape) for _ in range(2)]) for name, p in own.items()}
    x = draw(2, 3, *shape)
    try:
        together = run_with_rows(module, x, rows)
        apart = [functional_call(module, {k: v[i] for k, v in rows.items()}, (x[i : i + 1],)) for i in range(2)]
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    expected = torch.cat(apart)
    return together.shape == expected.shape and torch.allclose(
        together.float(), expected.float(), rtol=2e-2, atol=1e-2
    )


@torch.no_grad()
def norm_kind(module: nn.Module) -> NormKind | None:
    """What kind of norm by the root of the mean square a module is, tried on numbers; `None` if of no kind known.

    Bit for bit, in the module's dtype: where it rounds tells two kinds apart. Nothing is known of one whose sums are
    in an order that torch knows no operator for.

    >>> norm_kind(nn.RMSNorm(8, eps=0.5)).eps, norm_kind(nn.LayerNorm(8))
    (0.5, None)
    """
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if weight is None or len(parameters) > 1 or weight.ndim != 1 or weight.dtype not in DTYPES:
        return None
    known = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    # torch's norm has a default, of its input's dtype or of the one that it sums in.
    guesses = [torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps] if known is None else [known]
    if not all(isinstance(eps, float) for eps in guesses):
        return None
    generator = torch.Generator().manual_seed(0)
    tried = torch.randn(2, len(weight), generator=generator).to(weight)
    # Rows in which epsilon is about as large as the squares, among them; many, since few numbers may round alike.
    size = torch.tensor([1.0, 30.0, *(max(eps, 1e-8) ** 0.5 for eps in guesses)]).repeat(16)
    x = (size[:, None] * torch.randn(len(size), len(weight), generator=generator)).view(2, len(size) // 2, -1)
    x = x.to(weight)
    try:
        expected = [functional_call(module, {"weight": own}, (x,)) for own in tried]
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None

    for eps in guesses:
        for normalised in _normalised(x, eps):
            for form in get_args(NormForm):
                found = [_weigh(normalised, own, form) for own in tried]
                if all(map(_are_the_same, found, expected)):
                    return NormKind(form, eps, weight.dtype, weight.device)
    return None


def _normalised(x: torch.Tensor, eps: float) -> Iterator[torch.Tensor]:
    """Rows without a weight, float32, with the sums of transformers' norms and with those of torch's own."""
    values = x.float()
    yield values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    yield F.rms_norm(values, values.shape[-1:], eps=eps)


def _weigh(normalised: torch.Tensor, weight: torch.Tensor, form: NormForm) -> torch.Tensor:
    if form == "round_first":
        return weight * normalised.to(weight.dtype)
    return (normalised * (weight.float() + (form == "plus_one"))).to(weight.dtype)


def _are_the_same(found: torch.Tensor, expected: Any) -> bool:
    return isinstance(expected, torch.Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)
