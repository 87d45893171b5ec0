"""What Triton's interpreter accepts may not compile: kernels are compiled for a GPU that need not be there."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: Any) -> str:
    """PTX for compute capability 9.0; arguments without a type are int32, and multiples of 16 if Triton may see it."""
    compiler = pytest.importorskip("triton.compiler")
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    seen = [i for i, name in enumerate(names) if name not in constants and not kernel.params[i].do_not_specialize]
    source = compiler.ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in seen},
    )
    return compiler.compile(source, target=target, options=options).asm["ptx"]


@pytest.mark.parametrize(
    ("dtype", "slot", "bias"), [("bf16", None, False), ("fp16", "i32", True), ("fp32", "i64", True)], ids=str
)
def test_add_delta(dtype: str, slot: str | None, bias: bool) -> None:
    pytest.importorskip("triton")
    module = importlib.import_module("meswitch_kernels.triton_add_delta")
    sizes = module.AddSizes()
    types = dict.fromkeys(("out", "weight", "bias_out", "bias"), f"*{dtype}")
    ptx = compiled(
        module._add_delta_kernel,
        {**types, "table": "*i64", "slot": f"*{slot or 'i64'}"},
        {
            "HAS_SLOT": slot is not None,
            "WRITES_BIAS": bias,
            "HAS_BIAS": bias,
            "BLOCK_ROWS": sizes.block_rows,
            "BLOCK_COLUMNS": sizes.block_columns,
            "TILES": sizes.tiles,
            "out_column_stride": 1,
            "weight_column_stride": 1,
        },
        num_warps=sizes.warps,
        enable_fp_fusion=False,
    )
    # Sixteen bytes at a time, and no product that is added without having been rounded.
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx
    assert "fma.rn.f32" not in ptx
