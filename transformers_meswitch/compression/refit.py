"""What a budget chose, fitted once more.

Candidates of a linear are fitted to its inputs in the expert, since what comes before it is not chosen yet. After the
choice, each linear is fitted to what the choice makes of those before it, see :mod:`.sequential`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from transformers import PreTrainedModel

from ..configuration import MESwitchConfig
from ..delta_format.spec import LinearRecord
from ..module_kinds import module_kinds
from .driver import compress_modules, write_behind
from .sequential import SequentialStatistics
from .sources import Parameters
from .work_folder import WorkFolder, codes_of

__all__ = ["refit_chosen"]


def refit_chosen(
    model: PreTrainedModel,
    base: Parameters,
    expert: Parameters,
    config: MESwitchConfig,
    work: WorkFolder,
    statistics: Callable[[Collection[str]], SequentialStatistics],
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> None:
    """Fit all linears of a work folder once more, with the codes that they have.

    Args:
        model: the expert's causal LM; see :func:`~.driver.compress_modules`, for errors too.
        base: the base's parameters.
        expert: the expert's.
        config: the request's.
        work: all modules are in it, chosen or finished; what an earlier run refitted is left as it is.
        statistics: from the names of modules that are what they will be to statistics for the others.
        device: where to compute.
        progress: whether to show a progress bar.
    """
    work.begin_refits()
    linears = {name: record for name, record in work.records.items() if isinstance(record, LinearRecord)}
    done = work.refitted | (work.records.keys() - linears.keys())
    in_turn = statistics(done)
    modules = compress_modules(
        model,
        base,
        expert,
        config,
        finished=done | (module_kinds(model).keys() - work.records.keys()),
        codes={name: codes_of(record) for name, record in linears.items()},
        second_moments=in_turn,
        drifts=in_turn,
        device=device,
        progress=progress,
    )
    write_behind(modules, work)
