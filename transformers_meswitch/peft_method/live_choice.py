"""The choice of experts as tensors on a device, for code that Python does not run again: graphs and compiled calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from meswitch_kernels import RowGroups, group_rows
from meswitch_kernels.row_groups import load_group_rows

from ..errors import UnsupportedOperationError

__all__ = ["LiveChoice", "as_chosen", "is_replayed"]

_MOST_NAMES = 4096
#: Whether what this thread captures is to keep the choice of now.
_AS_CHOSEN: ContextVar[bool] = ContextVar("meswitch_as_chosen", default=False)


@contextmanager
def as_chosen() -> Iterator[None]:
    """CUDA graphs that are captured inside keep the experts that are chosen now, and nothing else is captured."""
    token = _AS_CHOSEN.set(True)
    try:
        yield
    finally:
        _AS_CHOSEN.reset(token)


def is_replayed() -> bool:
    """Whether what runs now is recorded, to be run again without asking Python which experts are chosen.

    While ``torch.compile`` traces a model, or a CUDA graph captures one, unless :func:`as_chosen`.
    """
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing() and not _AS_CHOSEN.get()


class LiveChoice:
    """One expert per row of the request, in tensors that are written in place whenever the choice changes.

    All compiled calls and graphs of a model on a device read the same tensors, so threads that replay them with
    different experts at the same time get each other's.

    Args:
        device: where the model runs.
    """

    def __init__(self, device: torch.device) -> None:
        # The base alone until something is written, in whatever mode this is made.
        with torch.inference_mode(False):
            self._names = torch.full((_MOST_NAMES,), -1, dtype=torch.int32, device=device)
            self._known = torch.zeros_like(self._names)
            self._count = torch.ones((), dtype=torch.int64, device=device)
        self._captured: dict[Any, Any] | None = None
        self._traced: dict[Any, Any] | None = None
        load_group_rows(device)

    def write(self, slots: Sequence[int], known: Sequence[int]) -> None:
        """Take over a choice.

        Args:
            slots: of the expert of each row of the request, -1 for the base.
            known: how many ids each of them knows.

        Raises:
            UnsupportedOperationError: more rows than there is room for.
        """
        if len(slots) > _MOST_NAMES:
            raise UnsupportedOperationError(
                f"{len(slots)} experts were named for one batch, expected at most {_MOST_NAMES}. Split the batch."
            )
        self._names[: len(slots)].copy_(torch.tensor(slots, dtype=torch.int32))
        self._known[: len(slots)].copy_(torch.tensor(known, dtype=torch.int32))
        self._count.fill_(len(slots))

    def index(self, batch: int, repeats: int = 1) -> torch.Tensor:
        """Slots of ``batch`` rows of which each stands ``repeats`` times, int32 ``[batch * repeats]``.

        The rows of the request are spread over beams and return sequences when the batch is a multiple of them. Worked
        out once a call of the model, as every norm asks.
        """
        index: torch.Tensor = self._once(
            ("index", batch, repeats), lambda: self._names[self._row_of_request(batch, repeats)]
        )
        return index

    def known(self, batch: int) -> torch.Tensor:
        """How many ids the expert of each of ``batch`` rows knows, int32 ``[batch]``."""
        return self._known[self._row_of_request(batch, 1)]

    def _row_of_request(self, batch: int, repeats: int) -> torch.Tensor:
        row = torch.arange(batch * repeats, device=self._names.device) // repeats
        return row * self._count // batch

    def begin(self) -> None:
        """A call of the model begins, until :meth:`end` of which what is worked out is kept, as it is of one graph."""
        if torch.compiler.is_compiling():
            self._traced = {}
        else:
            self._captured = {}

    def end(self) -> None:
        """A call of the model ended."""
        if torch.compiler.is_compiling():
            self._traced = None
        else:
            self._captured = None

    @property
    def worked_out(self) -> dict[Any, Any] | None:
        """What was worked out in the model's call so far, for whoever adds to it; `None` outside of one.

        Compiled code sees what was begun while it was traced: a layer that was compiled alone is not to be compiled
        anew for whether a graph is being captured around it.
        """
        return self._traced if torch.compiler.is_compiling() else self._captured

    def groups(self, batch: int, repeats: int) -> RowGroups:
        """The rows by expert, as the kernels take them; worked out once a call of the model."""
        groups: RowGroups = self._once(("groups", batch, repeats), lambda: group_rows(self.index(batch, repeats)))
        return groups

    def _once(self, what: tuple[str, int, int], work_out: Callable[[], Any]) -> Any:
        kept = self.worked_out
        if kept is None:
            return work_out()
        # In compiled code, too: its compiler does not find out that layers ask for the same.
        if what not in kept:
            kept[what] = work_out()
        return kept[what]
