"""Random deltas of a linear layer, and what a batch's rows make of them in float64 by arithmetic of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from meswitch_kernels import DeltaLeaves, ExpertTable, RowGroups, align_rows, group_rows

__all__ = ["Layer", "dense_delta", "expert_indices", "random_leaves"]

#: How rows choose among experts; 16 rows where the number of rows is not in the name.
DISTRIBUTIONS = ("distinct", "uniform", "zipf", "identical", "skewed", "with_base", "all_base", "two_rows", "one_row")


def expert_indices(distribution: str, experts: int) -> torch.Tensor:
    """int64 ``[rows]``, as punica's benchmark draws them; -1 is the base."""
    rng = np.random.default_rng(0)
    zipf = np.minimum(rng.zipf(1.5, 16), experts) - 1
    drawn = {
        "distinct": rng.permutation(experts),
        "uniform": np.arange(16) % (experts // 2),
        "zipf": zipf,
        "identical": np.full(16, 1),
        "skewed": np.where(np.arange(16) == 5, 2, 0),
        "with_base": np.where(np.arange(16) % 3 == 0, -1, rng.integers(0, experts, 16)),
        "all_base": np.full(3, -1),
        "two_rows": np.array([3, 3]),
        "one_row": np.array([2]),
        "many_rows": rng.integers(-1, experts, 37) // 3,
    }[distribution]
    return torch.from_numpy(drawn)


def random_leaves(
    out: int, width: int, bits: int, *, salient: int = 0, column_steps: bool = False, bias: bool = False, seed: int = 0
) -> DeltaLeaves:
    """A delta on the CPU; the bits after the last code of a row are random too, since nothing may depend on them."""
    generator = torch.Generator().manual_seed(seed)
    coded = width - salient
    codes = torch.randint(0, 256, (out, (coded * bits + 7) // 8), dtype=torch.uint8, generator=generator)
    step = torch.rand(out, generator=generator) * 1e-2
    step[0] = 0
    chosen = torch.randperm(width, generator=generator)[:salient].sort().values
    return DeltaLeaves(
        codes=codes,
        step=step,
        bits=bits,
        column_step=torch.rand(coded, generator=generator) + 0.5 if column_steps else None,
        salient_index=chosen.to(torch.int32) if salient else None,
        salient=(torch.randn(out, salient, generator=generator) * 1e-2).to(torch.bfloat16) if salient else None,
        bias=torch.randn(out, generator=generator) if bias else None,
    )


def dense_delta(leaves: DeltaLeaves, width: int) -> torch.Tensor:
    """float64 ``[out, width]``."""
    stream = np.unpackbits(leaves.codes.cpu().numpy(), axis=1, bitorder="little")
    salient = [] if leaves.salient_index is None else leaves.salient_index.tolist()
    coded = [channel for channel in range(width) if channel not in set(salient)]
    taken = stream[:, : len(coded) * leaves.bits].reshape(len(stream), len(coded), leaves.bits)
    codes = torch.from_numpy(taken.astype(np.float64)) @ torch.tensor([1.0, 2, 4, 8][: leaves.bits]).double()
    values = (codes - (2**leaves.bits - 1) / 2) * leaves.step.cpu().double()[:, None]
    delta = torch.full((len(stream), width), float("nan"), dtype=torch.float64)
    delta[:, coded] = values if leaves.column_step is None else values * leaves.column_step.cpu().double()
    if leaves.salient is not None:
        delta[:, salient] = leaves.salient.cpu().double()
    return delta


@dataclass(frozen=True)
class Layer:
    """Experts of one layer on a device, in a table."""

    experts: list[DeltaLeaves | None]
    table: ExpertTable
    device: str

    @classmethod
    def make(cls, experts: list[DeltaLeaves | None], out: int, width: int, device: str) -> Layer:
        table = ExpertTable(len(experts), out, width, device)
        placed = [expert and move(expert, device) for expert in experts]
        for slot, expert in enumerate(placed):
            if expert is not None:
                table.set(slot, expert)
        return cls(placed, table, device)

    def groups(self, index: torch.Tensor) -> RowGroups:
        return group_rows(index.to(self.device))

    def expected(self, x: torch.Tensor, base: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What rows get, and the root of the sum of squares of what a delta adds; both float64 ``[rows, out]``."""
        total, size = base.cpu().double(), torch.zeros(base.shape, dtype=torch.float64)
        for slot, expert in enumerate(self.experts):
            if expert is None:
                continue
            rows = (index == slot).nonzero()[:, 0]
            delta, inputs = dense_delta(expert, x.shape[1]), x.cpu().double()[rows]
            total[rows] += inputs @ delta.T
            if expert.bias is not None:
                total[rows] += expert.bias.cpu().double()
            size[rows] = (inputs.square() @ delta.square().T).sqrt()
        return total, size


def move(leaves: DeltaLeaves, device: str) -> DeltaLeaves:
    """The same delta on a device, laid out for the kernels."""
    tensors = {name: tensor.to(device) for name, tensor in leaves.tensors().items()}
    tensors["codes"] = align_rows(tensors["codes"])
    return DeltaLeaves(bits=leaves.bits, **tensors)
