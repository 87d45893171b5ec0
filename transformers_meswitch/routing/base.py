"""What all routers share: which experts they choose among, how much they read, when they abstain, where they are."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..delta_format.location import RepoLocation
from ..errors import ExpertNotFoundError, RouterError
from .files import check_type, read_config
from .output import BASE_LABEL, RouterOutput, picked
from .window import token_window

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BaseRouter", "check_integer", "check_number", "listed"]


class BaseRouter(ABC):
    """A router of any kind.

    Attributes:
        router_type: what its config calls the kind.
        window: tokens of a prompt that are read at most, half at its beginning, half at its end.
        threshold: it abstains where no expert is at least this likely.
        default_expert: who answers where it abstains; `None` is the base.
    """

    router_type: str
    window: int
    threshold: float
    default_expert: str | None

    @property
    @abstractmethod
    def labels(self) -> list[str]:
        """The experts it knows; ``"base"`` is the base."""

    @abstractmethod
    def only(self, labels: Sequence[str]) -> Self | None:
        """This with those of its experts that are among ``labels``; `None` if it knows none of them."""

    @abstractmethod
    def check(self, model: Any) -> None:
        """Refuse a model that it cannot route for."""

    @abstractmethod
    def judge(self, model: Any, rows: Sequence[Sequence[int]], labels: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """How likely each expert is for each row.

        Args:
            model: whose base is read.
            rows: token ids by the base's tokenizer, one at least and no more than the window a row.
            labels: those of its experts to choose among, in its own order.

        Returns:
            Probabilities, float64 ``[rows, labels]``; and which rows are like nothing it knows, bool ``[rows]``.
        """

    @abstractmethod
    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write its files into a folder."""

    @classmethod
    @abstractmethod
    def from_files(cls, config: Mapping[str, Any], location: RepoLocation) -> Self:
        """What :func:`~.files.read_config` found of a router of this kind, checked.

        Raises:
            RouterError: an entry is malformed.
        """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Read a router from a family repo, or from a folder that :meth:`save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: Hub id or folder.
            **kwargs: ``revision``, ``subfolder``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

        Raises:
            RouterError: missing, malformed or of another kind; the file and the entry are named.
        """
        location = RepoLocation(os.fspath(pretrained_model_name_or_path), **kwargs, error=RouterError)
        config, location = read_config(location)
        check_type(config, cls.router_type, location)
        return cls.from_files(config, location)

    def without_expert(self, expert: str) -> Self:
        """This without one of its experts.

        Raises:
            ExpertNotFoundError: it does not know the expert.
            RouterError: it is the only one.
        """
        if expert not in self.labels:
            raise ExpertNotFoundError(f"The router does not know {expert!r}; it knows {listed(self.labels)}.")
        left = self.only([label for label in self.labels if label != expert])
        if left is None:
            raise RouterError(f"{expert!r} is the only expert of the router. Drop the router: model.set_router(None).")
        return left

    def route_ids(self, model: Any, rows: Sequence[Sequence[int]], experts: Sequence[str]) -> RouterOutput:
        """Pick an expert for each row of tokens.

        Args:
            model: whose base is read.
            rows: token ids by the base's tokenizer, of which no more than the window is read, its beginning and its
                end; an empty row is an abstention.
            experts: those that are there to choose from; labels beyond them are left out as if never fitted.

        Raises:
            RouterError: it knows none of the experts.
        """
        labels = tuple(label for label in self.labels if label == BASE_LABEL or label in experts)
        if not labels:
            raise RouterError(
                f"The router knows {listed(self.labels)}, and of these none is loaded. Loaded: {listed(experts)}."
            )
        read = [token_window(row, self.window) for row in rows if len(row)]
        probabilities, abstained = self._judged(model, read, labels)
        if len(read) < len(rows):
            filled = torch.tensor([len(row) > 0 for row in rows])
            uniform = torch.full((len(rows), len(labels)), 1 / len(labels))
            probabilities = uniform.index_put((filled,), probabilities)
            abstained = (~filled).index_put((filled,), abstained)
        default = self.default_expert if self.default_expert in experts else None
        return picked(probabilities, labels, abstained, default)

    def _judged(self, model: Any, rows: list[list[int]], labels: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """How likely each expert is for rows that are not empty, in float32, and on which of them it abstains."""
        if not rows:
            return torch.empty(0, len(labels)), torch.empty(0, dtype=torch.bool)
        likely, strange = self.judge(model, rows, labels)
        return likely.float(), (likely.amax(dim=1) < self.threshold) | strange


def listed(names: Sequence[str]) -> str:
    """Names for a message.

    >>> listed(["math", "code"]), listed([])
    ("'math', 'code'", 'none')
    """
    return ", ".join(map(repr, names)) or "none"


def check_integer(name: str, value: Any, least: int, most: int, where: str = "") -> None:
    """Refuse what is no integer from ``least`` to ``most``.

    Raises:
        RouterError: names it; ``where`` comes first.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise RouterError(f"{where}{name} is {value!r}, expected an integer from {least} to {most}.")


def check_number(name: str, value: Any, low: float, high: float, where: str = "") -> None:
    """Refuse what is no number from ``low`` to ``high``.

    Raises:
        RouterError: names it; ``where`` comes first.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RouterError(f"{where}{name} is {value!r}, expected a number from {low:g} to {high:g}.")
