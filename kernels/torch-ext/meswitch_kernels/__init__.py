"""Triton kernels for ME-Switch deltas, and the same arithmetic in plain torch.

Imports without Triton and without an accelerator. This folder is the source of a Hub kernel repository, so it uses
nothing but torch and Triton.
"""

from .add_delta import add_delta, merged_weight
from .delta_leaves import DeltaLeaves, align_rows, blank_codes
from .expert_table import ExpertTable
from .linear import delta_linear, fused_linear, fused_linears
from .norm_rows import NormForm, norm_rows, norm_rows_reference
from .numerics import Numerics
from .op import dequantize_delta, has_kernel, is_nvidia
from .prefill import PrefillLayer, prefill_linear
from .reference import add_delta_reference, delta_linear_reference, dequantize_delta_reference
from .rounding import round_in_turn, round_in_turn_reference
from .row_groups import RowGroups, group_rows
from .rows import embed_rows, head_rows
from .rows_leaves import RowsLeaves, map_rows
from .rows_reference import embed_rows_reference, head_rows_reference
from .rows_table import RowsTable
from .scratch_ring import ScratchRing

__all__ = [
    "DeltaLeaves",
    "ExpertTable",
    "NormForm",
    "Numerics",
    "PrefillLayer",
    "RowGroups",
    "RowsLeaves",
    "RowsTable",
    "ScratchRing",
    "add_delta",
    "add_delta_reference",
    "align_rows",
    "blank_codes",
    "delta_linear",
    "delta_linear_reference",
    "dequantize_delta",
    "dequantize_delta_reference",
    "embed_rows",
    "embed_rows_reference",
    "fused_linear",
    "fused_linears",
    "group_rows",
    "has_kernel",
    "head_rows",
    "head_rows_reference",
    "is_nvidia",
    "map_rows",
    "merged_weight",
    "norm_rows",
    "norm_rows_reference",
    "prefill_linear",
    "round_in_turn",
    "round_in_turn_reference",
]
