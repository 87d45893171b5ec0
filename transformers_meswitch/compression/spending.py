"""From fitted candidates and a budget to the delta: which candidate each linear gets."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from ..configuration import MESwitchConfig, MESwitchExpertConfig
from ..delta_format.spec import LinearRecord, bits_per_weight, record_bytes, tensor_key
from ..delta_format.writer import delta_bytes
from ..errors import BudgetError
from .budget import Option, allocate, allocate_to_loss, total
from .work_folder import Codes, WorkFolder, codes_of

__all__ = ["Allocation", "spend"]

#: Deltas that are measured at most for ``max_kl``, before the best there is.
_MEASUREMENTS = 5
#: A delta that comes this near to ``max_kl`` from below is near enough.
_NEAR = 0.9
#: What is aimed at, as a share of ``max_kl``: just below it, since a delta above is of no use.
_AIM = 0.95
#: The first delta that is measured for ``max_kl``, bits a weight.
_FIRST_GUESS = 2.0


@dataclass(frozen=True)
class Allocation:
    """What a budget bought.

    Attributes:
        bits_per_weight: of all linears together; `None` where there is none.
        counts: how many linears are stored how.
        loss: sum of the predicted losses of the linears that had candidates, see :mod:`.candidates`.
        kl: for ``max_kl``, the KL divergence that was measured, nats a token.
    """

    bits_per_weight: float | None
    counts: dict[Codes, int]
    loss: float
    kl: float | None = None

    def __str__(self) -> str:
        """One line for people.

        >>> print(Allocation(1.5, {Codes(1, 0, True): 2, Codes(2, 16): 1}, 0.01, kl=0.0123))
        1.50 bits a weight: 2 linears at 1 bit + column steps, 1 at 2 bits + 16 channels; KL 0.0123 on text kept apart
        """
        parts = []
        for i, (codes, count) in enumerate(sorted(self.counts.items())):
            noun = "" if i else " linear" if count == 1 else " linears"
            how = [f"{codes.bits} bit{'' if codes.bits == 1 else 's'}"]
            how += [f"{codes.salient_channels} channels"] if codes.salient_channels else []
            how += ["column steps"] if codes.column_steps else []
            parts.append(f"{count}{noun} at {' + '.join(how)}")
        if not parts:
            return "no linear layer changed"
        kl = "" if self.kl is None else f"; KL {self.kl:.3g} on text kept apart"
        return f"{self.bits_per_weight or 0:.2f} bits a weight: {', '.join(parts)}{kl}"


def spend(
    config: MESwitchConfig,
    work: WorkFolder,
    describe: Callable[[], MESwitchExpertConfig],
    divergence: Callable[[], float] | None = None,
) -> Allocation:
    """Choose a candidate of every linear that has some, by the config's budget; the choice is made in ``work``.

    Args:
        config: with a budget.
        work: all modules that are finished, and all candidates of the others.
        describe: the ``adapter_config.json`` of what is chosen in ``work``, for ``target_size``.
        divergence: measures KL(expert ‖ base + what is chosen in ``work``), for ``max_kl``.

    Raises:
        BudgetError: not even the smallest delta fits; or, for ``max_kl``, not even the best one comes near
            enough.
    """
    problem = _Problem(work)
    assert config.budget is not None
    kind, _ = config.budget
    kl = None
    if kind == "target_bits":
        choice = _within_bits(problem, float(config.target_bits or 0))
        problem.choose(choice)
    elif kind == "target_size":
        choice = _within_size(problem, int(config.target_size or 0), lambda: delta_bytes(describe(), work.tensors()))
    else:
        assert divergence is not None
        choice, kl = _within_kl(problem, float(config.max_kl or 0), divergence)
        problem.choose(choice)
    linears = [record for record in work.records.values() if isinstance(record, LinearRecord)]
    counts = Counter(map(codes_of, linears))
    loss = total(problem.options(_tensor_bytes), choice).loss
    return Allocation(bits_per_weight(linears), dict(sorted(counts.items())), loss, kl)


class _Problem:
    """The linears with candidates as items of :func:`~.budget.allocate`."""

    def __init__(self, work: WorkFolder) -> None:
        self.work = work
        self.names = sorted(work.candidates)
        self.codes = [sorted(work.candidates[name]) for name in self.names]
        free = set(self.names)
        #: Linears whose candidate is no matter of choice.
        self.pinned = [r for n, r in work.records.items() if isinstance(r, LinearRecord) and n not in free]

    def options(self, size: Callable[[str, LinearRecord], int]) -> list[list[Option]]:
        """Size and loss of all candidates, with a measure of size."""
        return [
            [Option(size(name, (candidate := self.work.candidates[name][key]).record), candidate.loss) for key in keys]
            for name, keys in zip(self.names, self.codes, strict=True)
        ]

    def choose(self, choice: Sequence[int]) -> None:
        self.work.choose({name: keys[i] for name, keys, i in zip(self.names, self.codes, choice, strict=True)})

    def weights(self) -> int:
        """Weights of all linears."""
        free = [next(iter(self.work.candidates[name].values())).record for name in self.names]
        return sum(record.out_features * record.in_features for record in [*free, *self.pinned])

    def pinned_bytes(self) -> int:
        return sum(record_bytes(record, own_bytes=0) for record in self.pinned)


def _tensor_bytes(name: str, record: LinearRecord) -> int:
    """Bytes of codes, steps and salient channels; a bias, which all candidates share, is in the expert's own dtype."""
    return record_bytes(record, own_bytes=0)


def _file_bytes(name: str, record: LinearRecord) -> int:
    """About what a module takes on disk: its tensors, and its entries in their header and in the modules table."""
    table = [f'"{tensor_key(name, leaf)}":{{"dtype":"BF16","shape":[1234,1234],' for leaf in record.leaves()]
    offsets = len('"data_offsets":[1234567890,1234567890]},') * len(table)
    return _tensor_bytes(name, record) + sum(map(len, table)) + offsets + len(json.dumps(asdict(record), indent=6))


def _smallest(options: Sequence[Sequence[Option]]) -> list[int]:
    return [min(range(len(of_item)), key=of_item.__getitem__) for of_item in options]


def _within_bits(problem: _Problem, target: float) -> list[int]:
    options, weights = problem.options(_tensor_bytes), problem.weights()
    # A target that was worked out from bytes must give those bytes, whatever its last digit was rounded to.
    room = math.floor(target * weights / 8 * (1 + 1e-12)) - problem.pinned_bytes()
    least = total(options, _smallest(options)).size
    if least > room:
        # Rounded up, so that what is named can be had.
        possible = math.ceil(80_000 * (least + problem.pinned_bytes()) / weights) / 10_000
        raise BudgetError(
            f"target_bits is {target:g}; the linear layers of this expert take {possible} bits a weight at least: "
            "those of layer_bits, one elsewhere, and the step sizes. Give at least that much."
        )
    return allocate(options, room)


def _within_size(problem: _Problem, target: int, measured: Callable[[], int]) -> list[int]:
    """As large as fits, chosen in the work folder; headers and configuration are known once all modules are."""
    options = problem.options(_file_bytes)
    choice = _smallest(options)
    problem.choose(choice)
    least = measured()
    if least > target:
        raise BudgetError(
            f"target_size is {target:,} bytes; the delta of this expert takes {least:,} at least, with one bit a "
            "weight and no salient channels. Give at least that much, or smaller embedding_bits or layer_bits."
        )
    room = total(options, choice).size + target - least
    while True:
        choice = allocate(options, room)
        problem.choose(choice)
        excess = measured() - target
        if excess <= 0:
            return choice
        # What modules take in headers depends a little on each other; never below the smallest, which fits.
        room = max(room - excess, total(options, _smallest(options)).size)


def _within_kl(problem: _Problem, target: float, divergence: Callable[[], float]) -> tuple[list[int], float]:
    """The smallest of a few measured deltas that comes near enough.

    The sum of losses predicts KL up to a factor and, for embeddings and rounding, an offset, so the next sum to try is
    interpolated between the logarithms of those that were measured, or, while all are on one side, scaled.
    """
    options = problem.options(_tensor_bytes)
    most, least = (total(options, end).loss for end in (_smallest(options), allocate_to_loss(options, 0.0)))
    measured: dict[tuple[int, ...], tuple[Option, float]] = {}

    def measure(choice: Sequence[int]) -> float:
        problem.choose(choice)
        kl = divergence()
        measured[tuple(choice)] = (total(options, choice), kl)
        return kl

    weights = problem.weights()
    guess = math.floor(_FIRST_GUESS * weights / 8) - problem.pinned_bytes()
    choice = allocate(options, max(guess, total(options, _smallest(options)).size))
    for _ in range(_MEASUREMENTS):
        if _NEAR * target <= measure(choice) <= target:
            break
        limit = _next_limit([(found.loss, kl) for found, kl in measured.values()], target)
        choice = allocate_to_loss(options, min(max(limit, least), most))
        if tuple(choice) in measured:
            break
    if not any(kl <= target for _, kl in measured.values()):
        best = allocate_to_loss(options, 0.0)
        kl = measured[tuple(best)][1] if tuple(best) in measured else measure(best)
        if kl > target:
            raise BudgetError(
                f"max_kl is {target:g}; at 4 bits, the most there are, the KL divergence from the expert is {kl:.3g} "
                f"on the calibration text kept apart. Keep it as a full model, or allow max_kl={_rounded_up(kl):g}; "
                "embedding_bits=4 or None helps where the embedding was trained."
            )
    fitting = {choice: found for choice, found in measured.items() if found[1] <= target}
    smallest = min(fitting, key=lambda choice: fitting[choice][0])
    return list(smallest), fitting[smallest][1]


def _rounded_up(value: float) -> float:
    """To two digits, so that what is named can be had.

    >>> _rounded_up(0.01201)
    0.013
    """
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit) * unit:.2g}")


def _next_limit(points: Sequence[tuple[float, float]], target: float) -> float:
    """The sum of losses at which KL should come to just below the target.

    Args:
        points: sums of losses, and the KL measured there.
        target: of KL.

    >>> round(_next_limit([(1.0, 0.04)], target=0.01), 4)
    0.2375
    >>> round(_next_limit([(1.0, 0.04), (0.01, 0.0004)], target=0.01), 4)
    0.2375
    """
    tiny = math.ulp(0.0)
    aim = _AIM * target
    below = max((p for p in points if p[1] <= target), default=None)
    above = min((p for p in points if p[1] > target), default=None)
    if below is None or above is None or not 0 < below[0] < above[0] or not 0 < below[1] < aim:
        loss, kl = below or above or (0.0, 0.0)
        if below is not None and above is not None:
            return math.sqrt(max(below[0], tiny) * max(above[0], tiny))
        return loss * aim / max(kl, tiny)
    share = math.log(aim / below[1]) / math.log(above[1] / below[1])
    return math.exp(math.log(below[0]) + share * math.log(above[0] / below[0]))
