"""Which expert answers which row: one object per model, read by every layer, so that no two layers can disagree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from meswitch_kernels import RowGroups, group_rows

from ..delta_format.location import RepoLocation
from ..delta_format.reader import DeltaFiles
from ..errors import ExpertNotFoundError, UnsupportedOperationError
from .live_choice import LiveChoice, is_replayed
from .naming import known_expert
from .prefill_path import PrefillScratch
from .slots import Slots

__all__ = ["ExpertInfo", "ExpertSwitch", "RowGroup", "join_rows", "take_rows"]

#: An expert (`None` is the base) and the batch rows it answers: int64 ``[rows]``, or `None` for all of them.
RowGroup = tuple[str | None, torch.Tensor | None]

#: The rows chosen for the call in progress. A context variable, so that threads generating at once do not mix.
_ROWS: ContextVar[tuple[ExpertSwitch, _RowChoice] | None] = ContextVar("meswitch_rows", default=None)


def take_rows(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """The rows of a :data:`RowGroup` of ``[batch, ...]``."""
    return x if rows is None else x[rows]


def join_rows(parts: Sequence[tuple[torch.Tensor | None, torch.Tensor]], batch: int) -> torch.Tensor:
    """The output ``[batch, ...]`` of a batch, from that of each expert's rows.

    Args:
        parts: the rows of each group, and its output ``[rows, ...]``; together every row once.
        batch: all rows.
    """
    rows, out = parts[0]
    if rows is None:
        return out
    out = out.new_empty(batch, *out.shape[1:])
    for rows, part in parts:
        out[rows] = part
    return out


@dataclass(frozen=True)
class ExpertInfo:
    """What the model must know of an expert beside its tensors.

    Attributes:
        vocab_size: rows of its input embedding.
        eos_token_id: ids that end its answer.
        pad_token_id: its padding id, if it has one.
        tied: whether its output head is its input embedding.
        files: where its delta repo was read from; `None` for one that was handed over as tensors.
        assets: where its tokenizer, chat template and generation config are.
        generation_config: its generation config as JSON, where ``assets`` may have none.
    """

    vocab_size: int
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    tied: bool = True
    files: DeltaFiles | None = None
    assets: RepoLocation | None = None
    generation_config: str | None = None


class _RowChoice:
    """One expert per row of the request, spread over beams and return sequences when the batch is a multiple."""

    def __init__(self, names: Sequence[str | None], exact: bool = False) -> None:
        self.names = tuple(names)
        self.sole = self.names[0] if len(set(self.names)) == 1 else None
        self.exact = exact
        self.batch: int | None = None
        self._groups: dict[tuple[int, torch.device], list[RowGroup]] = {}
        self._kernel_groups: dict[tuple[int, int, torch.device], RowGroups] = {}
        self._changes = 0
        self._kernel_index: dict[tuple[int, torch.device, int], torch.Tensor] = {}

    def check_batch(self, batch: int) -> None:
        """Refuse a call of another number of rows than experts, where each must have been named."""
        if self.exact and batch != len(self.names):
            raise UnsupportedOperationError(
                f"{len(self.names)} experts were named for a batch of {batch} rows; adapter_names takes one per row."
            )

    def spread(self, batch: int) -> list[str | None]:
        copies, rest = divmod(batch, len(self.names))
        if rest:
            raise UnsupportedOperationError(
                f"{len(self.names)} experts were named, but a layer received a batch of {batch} rows. Name one expert "
                "per prompt."
            )
        return [name for name in self.names for _ in range(copies)]

    def groups(self, batch: int, device: torch.device) -> list[RowGroup]:
        cached = self._groups.get((batch, device))
        if cached is not None:
            return cached
        distinct = list(dict.fromkeys(self.names))
        groups: list[RowGroup] = [(distinct[0], None)]
        if len(distinct) > 1:
            rows = self.spread(batch)
            groups = [
                (name, torch.tensor([i for i, row in enumerate(rows) if row == name], device=device))
                for name in distinct
            ]
        self._groups[batch, device] = groups
        return groups

    def kernel_groups(self, slots: Slots, batch: int, repeats: int, device: torch.device) -> RowGroups:
        """What the kernels take for ``batch`` rows of which each stands ``repeats`` times."""
        if slots.changes != self._changes:
            self._kernel_groups, self._changes = {}, slots.changes
        key = (batch, repeats, device)
        cached = self._kernel_groups.get(key)
        if cached is None:
            index = [slot for slot in self._slots(slots, batch) for _ in range(repeats)]
            # Grouped on the host: the few kernels that do it on a device would cost more than one copy.
            cached = RowGroups(*(part.to(device) for part in group_rows(torch.tensor(index))))
            self._kernel_groups[key] = cached
        return cached

    def kernel_index(self, slots: Slots, batch: int, device: torch.device) -> torch.Tensor:
        """The slots of ``batch`` rows, int32."""
        key = (batch, device, slots.changes)
        cached = self._kernel_index.get(key)
        if cached is None:
            cached = torch.tensor(self._slots(slots, batch), dtype=torch.int32, device=device)
            self._kernel_index[key] = cached
        return cached

    def _slots(self, slots: Slots, batch: int) -> list[int]:
        # One expert for all answers batches of any size: what is the same for all rows may be looked up once.
        names = self.spread(batch) if len(set(self.names)) > 1 else [self.names[0]] * batch
        return [slots.of(name) for name in names]


@dataclass(eq=False)
class ExpertSwitch:
    """The sticky choice of a model and the per-row choice of a call.

    Precedence, highest first: rows chosen for the call (:meth:`rows`), ``disabled``, ``active``.

    Attributes:
        experts: loaded experts by name.
        base_vocab_size: rows of the base's input embedding.
        active: adapters made active through PEFT's calls; at most one of them is an expert.
        disabled: whether adapters are off (``disable_adapters``).
        merged: the expert merged into the base weights, if any.
        base_eos_token_id: ids that end the base's answer.
        keep: whether the model keeps its expert-aware calls when the last expert is deleted (a family does).
        pending: an expert that is attached but has no tensors yet.
        base_generation_config: the base's own, while the model has taken over that of the expert it was loaded from.
        generation_config_of: the expert whose generation defaults the model has taken over, or was compressed from.
        trainable: the base's parameters that required gradients before PEFT froze them.
        base_download: how the base was asked of the Hub (``revision``, ``token``, ``cache_dir``), where that is known.
        tokenizers: those loaded so far, by expert (`None` is the base) and by how they were asked for.
        slots: the numbers by which the kernels know the loaded experts.
        live: the choice as tensors, by device on which kernels run.
        scratch: memory for experts' whole weights, by device on which kernels run.
        widest_vocabulary: what :attr:`vocab_capacity` was at most: the width of logits that are compiled or captured,
            which deleting an expert must not change.
        replayed_batch: rows of the model's call, for what is compiled or captured of it.
    """

    base_vocab_size: int
    experts: dict[str, ExpertInfo] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    disabled: bool = False
    merged: str | None = None
    base_eos_token_id: tuple[int, ...] = ()
    keep: bool = False
    pending: str | None = None
    base_generation_config: Any = None
    generation_config_of: str | None = None
    trainable: list[torch.nn.Parameter] = field(default_factory=list)
    base_download: dict[str, Any] = field(default_factory=dict)
    tokenizers: dict[str | None, dict[str, Any]] = field(default_factory=dict, repr=False)
    slots: Slots = field(default_factory=Slots)
    live: dict[torch.device, LiveChoice] = field(default_factory=dict, repr=False)
    scratch: dict[torch.device, PrefillScratch] = field(default_factory=dict, repr=False)
    widest_vocabulary: int = 0
    replayed_batch: int | None = None
    _sticky: dict[str | None, _RowChoice] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.widest_vocabulary = self.vocab_capacity

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("active", "disabled") and "live" in self.__dict__:
            self._write_live()

    def __getstate__(self) -> dict[str, Any]:
        """Copies have layers of their own, which say where they are."""
        return {**self.__dict__, "live": {}, "scratch": {}}

    def live_on(self, device: torch.device) -> LiveChoice:
        """The choice as tensors of a device."""
        if device not in self.live:
            self.live[device] = LiveChoice(device)
            self._write_live()
        return self.live[device]

    def scratch_on(self, device: torch.device) -> PrefillScratch:
        """Memory for experts' whole weights on a device."""
        if device not in self.scratch:
            self.scratch[device] = PrefillScratch(device)
        return self.scratch[device]

    def _write_live(self) -> None:
        # The base stands in for an expert that is deleted while it is chosen; the block that chose it will raise.
        names = [name if name in self.experts else None for name in self.chosen_rows() or [self.active_expert]]
        slots = [self.slots.of(name) for name in names]
        known = [self.vocab_size(name) for name in names]
        for live in self.live.values():
            live.write(slots, known)

    def enter(self, expert: str, info: ExpertInfo) -> None:
        """Take up an expert."""
        self.experts[expert] = info
        self.slots.take(expert)
        self.widest_vocabulary = max(self.widest_vocabulary, self.vocab_capacity)

    @property
    def active_expert(self) -> str | None:
        """The expert that answers when a call names none; `None` is the base."""
        return None if self.disabled else self.chosen_expert

    @property
    def chosen_expert(self) -> str | None:
        """The expert that is active, whether or not adapters are disabled."""
        for name in self.active:
            if name in self.experts:
                return name
        return None

    @property
    def sole_expert(self) -> str | None:
        """The expert that answers all rows; `None` where there is more to it, and :meth:`groups` is to be asked."""
        chosen = _ROWS.get()
        if chosen is not None and chosen[0] is self:
            sole = chosen[1].sole
        else:
            sole = None if self.disabled else self.chosen_expert
        return None if self.merged is not None or sole == self.pending else sole

    @property
    def vocab_capacity(self) -> int:
        """Width of the logits: the largest vocabulary among the base and the loaded experts."""
        return max([self.base_vocab_size, *(info.vocab_size for info in self.experts.values())])

    def vocab_size(self, expert: str | None) -> int:
        """Number of ids that an expert (or the base) knows."""
        return self.base_vocab_size if expert is None else self.experts[expert].vocab_size

    def set_active(self, names: Sequence[str]) -> None:
        """Make adapters active, as PEFT's ``set_adapter`` does.

        Raises:
            UnsupportedOperationError: two experts at once; their deltas do not add up to a model.
        """
        chosen = [name for name in names if name in self.experts]
        if len(chosen) > 1:
            raise UnsupportedOperationError(
                f"Experts {chosen} cannot be active together: each is a complete fine-tune of the base. Activate one, "
                "or give each row of a batch its own with generate(..., expert=[...])."
            )
        self.active = list(names)

    def check_deletable(self, expert: str) -> None:
        """Refuse to delete an expert whose weights are in the base's place.

        Raises:
            UnsupportedOperationError: the expert is merged.
        """
        if expert == self.merged:
            raise UnsupportedOperationError(f"Expert {expert!r} is merged; call unmerge_adapter() before deleting it.")

    def forget(self, expert: str) -> None:
        """Drop an expert; if it was active, the alphabetically first remaining one becomes so, as in PEFT."""
        self.tokenizers.pop(expert, None)
        self.slots.free(expert)
        self._sticky.pop(expert, None)
        if self.experts.pop(expert, None) is not None and expert in self.active:
            self.active.remove(expert)
            if not self.active and self.experts:
                self.active = [min(self.experts)]
            self._write_live()

    @contextmanager
    def rows(self, experts: Sequence[str | None], exact: bool = False) -> Iterator[None]:
        """Let each row of the batches inside the block be answered by its own expert.

        Args:
            experts: one per row; `None`, ``"base"`` or ``"__base__"`` is the base.
            exact: whether calls of the model must have that many rows, rather than a multiple of them.

        Raises:
            ExpertNotFoundError: a name is not loaded, or its expert was deleted before the block ended.
            UnsupportedOperationError: adapters are disabled and a row asks for an expert, or an expert is merged and a
                row asks for another.
        """
        names = [known_expert(name, self.experts) for name in experts]
        if not names:
            raise ExpertNotFoundError("An empty list of experts was given; name one per row.")
        named = next((name for name in names if name is not None), None)
        if self.disabled and named is not None:
            raise UnsupportedOperationError(
                f"Expert {named!r} was asked for while adapters are disabled. Call enable_adapters() or set_expert() "
                "first."
            )
        self._check_merged(names)
        token = _ROWS.set((self, _RowChoice(names, exact)))
        try:
            self._write_live()
            yield
        finally:
            _ROWS.reset(token)
            self._write_live()
        self._check_present(names)  # without a layer left to ask, the base answered

    def eos_token_id(self, expert: str | None) -> tuple[int, ...]:
        """Ids that end an answer of an expert (or the base)."""
        own = () if expert is None else self.experts[expert].eos_token_id
        return own or self.base_eos_token_id

    @property
    def _choice(self) -> _RowChoice | None:
        chosen = _ROWS.get()
        return chosen[1] if chosen is not None and chosen[0] is self else None

    def chosen_rows(self, batch: int | None = None) -> list[str | None] | None:
        """The experts that an enclosing :meth:`rows` block chose for a batch, or `None` outside of one.

        Without a batch, the experts as they were named.
        """
        choice = self._choice
        if choice is None or batch is None:
            return None if choice is None else list(choice.names)
        choice.check_batch(batch)
        return choice.spread(batch)

    @property
    def has_rows(self) -> bool:
        """Whether an enclosing :meth:`rows` block chooses the experts."""
        return self._choice is not None

    @contextmanager
    def batch_of(self, batch: int | None) -> Iterator[None]:
        """The model's call is inside the block, with so many rows, for layers that see one row for all of them."""
        choice = self._choice
        with ExitStack() as undo:
            for memory in self.scratch.values():
                undo.enter_context(memory.call())
            if choice is not None:
                if batch is not None:
                    choice.check_batch(batch)
                undo.callback(setattr, choice, "batch", choice.batch)
                choice.batch = batch
            # The model's forward, or a module in it, may be compiled where its call is not.
            undo.callback(setattr, self, "replayed_batch", self.replayed_batch)
            self.replayed_batch = batch
            yield

    @property
    def rows_apart(self) -> int:
        """Number of rows in the model's call if their experts differ (see :meth:`rows`); 1 where all share one.

        All of them where the call is replayed, with other experts than now.
        """
        if is_replayed():
            return self.replayed_batch or 1
        choice = self._choice
        if choice is None or len(set(choice.names)) == 1:
            return 1
        return choice.batch or len(choice.names)

    def mask_unknown(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits ``[batch, ..., vocab]`` with the ids that a row's expert does not know at ``-inf``."""
        if is_replayed() and logits.device in self.live:
            known = self.live[logits.device].known(logits.shape[0]).view(-1, *[1] * (logits.ndim - 1))
            return logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= known, float("-inf"))
        groups = self.groups(logits.shape[0], logits.device)
        if all(self.vocab_size(expert) >= logits.shape[-1] for expert, _ in groups):
            return logits
        logits = logits.clone()
        for expert, rows in groups:
            logits[slice(None) if rows is None else rows, ..., self.vocab_size(expert) :] = float("-inf")
        return logits

    def groups(self, batch: int, device: torch.device) -> list[RowGroup]:
        """Experts and their rows for a batch of ``batch`` rows, in a form that a layer can loop over.

        Raises:
            ExpertNotFoundError: an expert was deleted since it was chosen.
            UnsupportedOperationError: an expert without tensors, or another one than is merged.
        """
        choice = self._choice
        if choice is not None:
            groups = choice.groups(batch, device)
            self._check_present(expert for expert, _ in groups)
        else:
            groups = [(self.active_expert, None)]
        if self.merged is not None:
            self._check_merged([expert for expert, _ in groups])
        if self.pending is not None and any(expert == self.pending for expert, _ in groups):
            raise UnsupportedOperationError(
                f"Expert {self.pending!r} has no tensors: it was attached from a config alone, or loading it was cut "
                "off. Delete it and load its delta repo."
            )
        return groups

    def kernel_groups(self, batch: int, repeats: int, device: torch.device) -> RowGroups | None:
        """The choice of :meth:`groups` as the kernels take it.

        Args:
            batch: rows of the model's call.
            repeats: how many rows of a layer's input each of them is: its tokens.
            device: where the kernels run.

        Returns:
            Groups of ``batch * repeats`` rows; `None` where the base answers all of them.
        """
        if is_replayed():
            return self.live_on(device).groups(batch, repeats)
        choice = self._kernel_choice(batch, device)
        return None if choice is None else choice.kernel_groups(self.slots, batch, repeats, device)

    def kernel_index(self, batch: int, device: torch.device) -> torch.Tensor | None:
        """The slot of each row of the model's call, int32 ``[batch]``; `None` where the base answers all of them."""
        if is_replayed():
            return self.live_on(device).index(batch)
        choice = self._kernel_choice(batch, device)
        return None if choice is None else choice.kernel_index(self.slots, batch, device)

    def _kernel_choice(self, batch: int, device: torch.device) -> _RowChoice | None:
        groups = self.groups(batch, device)
        if all(expert is None for expert, _ in groups):
            return None
        choice = self._choice
        if choice is None:
            expert = groups[0][0]
            choice = self._sticky.setdefault(expert, _RowChoice([expert]))
        return choice

    def _check_present(self, names: Iterable[str | None]) -> None:
        gone = next((name for name in names if name is not None and name not in self.experts), None)
        if gone is not None:
            raise ExpertNotFoundError(f"Expert {gone!r} was deleted while a call was using it; load it again.")

    def _check_merged(self, names: Sequence[str | None]) -> None:
        if self.merged is not None and any(name != self.merged for name in names):
            others = sorted({"the base" if name is None else repr(name) for name in names if name != self.merged})
            raise UnsupportedOperationError(
                f"Expert {self.merged!r} is merged into the base weights, so {' and '.join(others)} cannot be "
                "computed. Call unmerge_adapter() first."
            )
