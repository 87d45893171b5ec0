"""The decode kernels compile for a GPU, which needs none: what the interpreter accepts may still not compile."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

import pytest

from meswitch_kernels.configurations import _TABLES, Configuration, Key, Kind

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

HOPPER = GPUTarget("cuda", 90, 32)
#: Arguments that are not sizes.
POINTERS = {
    **dict.fromkeys(("y", "base_out", "x", "weight", "base_bias", "factor"), "*bf16"),
    **dict.fromkeys(("order", "slot", "start", "group_count"), "*i32"),
    **dict.fromkeys(("scale", "offset"), "*fp32"),
    **dict.fromkeys(("table", "coded_table", "rows_table", "ids"), "*i64"),
}
#: Those of several linears, one of each.
TUPLES = {
    **dict.fromkeys(("ys", "base_outs", "weights", "base_biases"), "*bf16"),
    "tables": "*i64",
    "out_features": "i32",
}
LINEARS: tuple[Kind, ...] = ("fused", "single", "several")
#: Sizes that a model's layers have as multiples of 16.
MULTIPLES = ("in_features", "weight_out_stride", "capacity", "base_width", "width", "weight_stride")


@dataclass(frozen=True)
class Compiled:
    ptx: str
    ttir: str
    ttgir: str
    shared_bytes: int


def compile_for_hopper(
    module: str, name: str, planes: int, constants: dict[str, Any], linears: int = 1, **options: int
) -> Compiled:
    kernel = getattr(importlib.import_module(f"meswitch_kernels.{module}"), name)
    pointers = {**POINTERS, "values": "*i8" if planes else "*fp32"}
    signature, constexprs, attributes = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            constexprs[(place,)] = constants[argument]
            continue
        if argument in TUPLES and name != "_head_rows_kernel":
            signature[argument] = (TUPLES[argument],) * linears
            attributes |= {(place, linear): [["tt.divisibility", 16]] for linear in range(linears)}
            continue
        signature[argument] = pointers.get(argument, "i32")
        if argument in pointers or argument in MULTIPLES:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    compiled = compile_kernel(source, target=HOPPER, options=options)
    return Compiled(compiled.asm["ptx"], compiled.asm["ttir"], compiled.asm["ttgir"], compiled.metadata.shared)


def constants_of(sizes: Configuration, planes: int, rows: int) -> dict[str, Any]:
    return {
        "PLANES": planes,
        "BLOCK_ROWS": rows,
        "BLOCK_OUT": sizes.block_out,
        "BLOCK_CODES": sizes.block_codes,
        "WARPS": sizes.warps,
        "SHARERS": sizes.sharers,
        "PTX": True,
        "OVERLAP": True,
        "STAGES": sizes.stages,
    }


def several_of_bytes() -> list[Configuration]:
    return list(dict.fromkeys(v for k, v in _TABLES[9, 0].items() if k.kind == "several" and k.numerics != "exact"))


def cases() -> list[Any]:
    """All that is shipped for linears; the fast ones by default."""
    table = {key: sizes for key, sizes in _TABLES[9, 0].items() if key.kind in LINEARS}
    made = []
    for place, (key, sizes) in enumerate(
        [*table.items(), *((Key(kind, "int16"), Configuration()) for kind in LINEARS)]
    ):
        fast = key.numerics == "int16" and place < len(table)
        marks = [] if fast else [pytest.mark.slow]
        made.append(pytest.param(key, sizes, marks=marks, id=f"{place}-{key.kind}-{key.numerics}"))
    return made


def linears_of(cases: list[Any]) -> list[Any]:
    """Each of one linear, and one of each kind of three together."""
    made = [pytest.param(*case.values, 1, marks=case.marks, id=case.id) for case in cases]
    kinds = {case.values[0].kind: case for case in reversed(cases) if not case.marks}
    return made + [
        pytest.param(*case.values, 3, marks=() if kind == "single" else pytest.mark.slow, id=f"{case.id}-three")
        for kind, case in kinds.items()
    ]


@pytest.mark.parametrize(("key", "sizes", "linears"), linears_of(cases()))
def test_linears(key: Key, sizes: Configuration, linears: int, tmp_path, monkeypatch) -> None:
    kind, planes = key.kind, ("exact", "int8", "int16").index(key.numerics)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = constants_of(sizes, planes, 16 if kind == "several" else 1)
    if kind == "fused":
        del constants["BLOCK_ROWS"], constants["SHARERS"]
        constants |= {"HAS_BASE_BIAS": True, "BLOCK_IN": sizes.block_in, "EVEN_IN": True, "weight_in_stride": 1}
    else:
        constants["HAS_BASE"] = True
    name = "fused_linear" if kind == "fused" else "delta_linear"
    compiled = compile_for_hopper(
        f"triton_{name}", f"_{name}_kernel", planes, constants, linears, **sizes.launch_options()
    )
    assert compiled.shared_bytes <= 227 * 1024
    # Codes come in wide loads, or in wide copies to shared memory; the base's weight, in the latter if at all.
    by_copies = kind == "several" and planes == 0 and sizes.stages > 1
    assert ("cp.async.cg.shared.global" if by_copies else "v4.b32") in compiled.ptx
    assert ("dp4a" in compiled.ptx) == (planes > 0 and kind != "several")
    assert ("mma.sync.aligned.m16n8k32" in compiled.ptx) == (planes == 1 and kind == "several")
    assert ("mma.sync" in compiled.ptx) == (kind == "several")
    if kind == "fused" and sizes.stages > 1:
        # The base's weight, whichever linear's, in copies of 16 bytes.
        assert re.search(r"cp\.async\.cg\.shared\.global .*, 0x10", compiled.ptx)


def layouts_of_products(ttgir: str) -> set[str]:
    """How the tensors lie that products of a warp's own words take, without the order of their dimensions."""
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.(.*), order", ttgir, re.MULTILINE))
    products = [line for line in ttgir.splitlines() if "mma.sync.aligned.m16n8k" in line]
    return {layouts[name] for line in products for name in re.findall(r"x(?:i32|f32), (#\w+)>", line)}


def products() -> list[Any]:
    """Kernels of several rows with all sizes; those that are shipped for linears by default."""
    made = []
    for name, planes, numerics in (
        ("delta_linear", 1, "int8"),
        ("delta_linear", 2, "int16"),
        ("head_rows", 2, "int16"),
    ):
        alike = [own for key, own in _TABLES[9, 0].items() if key[:2] == ("several", numerics)]
        for sizes in (Configuration(block_out=16), *several_of_bytes()):
            shipped = name == "delta_linear" and sizes in alike
            marks = () if shipped else pytest.mark.slow
            made.append(pytest.param(name, planes, sizes, marks=marks, id=f"{name}-{planes}-{sizes}"))
    return made


@pytest.mark.parametrize(("name", "planes", "sizes"), products())
def test_threads_hold_what_their_products_take(
    name: str, planes: int, sizes: Configuration, tmp_path, monkeypatch
) -> None:
    """The instruction multiplies what the threads of a warp hold, wherever that comes from in Triton's tensors."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = constants_of(sizes, planes, 16) | ({"HAS_BASE": True} if name == "delta_linear" else {})
    options = sizes.launch_options()
    compiled = compile_for_hopper(f"triton_{name}", f"_{name}_kernel", planes, constants, **options)
    ones, threads, warps = "[1, 1, 1]", "[1, 1, 32]", f"[1, 1, {sizes.warps}]"
    in_order = f"blocked<{{sizePerThread = {ones}, threadsPerWarp = {threads}, warpsPerCTA = {warps}"
    assert layouts_of_products(compiled.ttgir) == {in_order}
    # Of bytes, or of bfloat16, for which there would be two: what is laid out is one or the other.
    assert ("mma.sync.aligned.m16n8k32" in compiled.ttgir) == (planes == 1)
    # Operands whose dimensions change have layouts to reconcile, of which so many take Triton a minute and a half.
    assert compiled.ttir.count("tt.expand_dims") < compiled.ttir.count("mma.sync.aligned.m16n8k")
    moved = compiled.ttgir.replace("threadsPerWarp = [1, 1, 32]", "threadsPerWarp = [1, 2, 16]")
    assert layouts_of_products(moved) != {in_order}


@pytest.mark.parametrize("planes", [0, 1, 2])
def test_activations(planes: int, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"PLANES": planes, "BLOCK_CODES": 1024, "OVERLAP": True}
    compiled = compile_for_hopper("triton_activations", "_prepare_kernel", planes, constants, num_warps=4)
    assert ".target sm_90" in compiled.ptx


@pytest.mark.parametrize(
    ("rows", "planes", "numerics"),
    [
        (1, 2, "int16"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((16, 2, "int16"), (1, 0, "exact"), (16, 0, "exact"))
        ),
    ],
)
def test_heads(rows: int, planes: int, numerics: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = _TABLES[9, 0][Key("head_several" if rows > 1 else "head_single", numerics)]
    constants = constants_of(sizes, planes, rows)
    compiled = compile_for_hopper("triton_head_rows", "_head_rows_kernel", planes, constants, **sizes.launch_options())
    assert compiled.shared_bytes <= 227 * 1024
    # Though the rows of codes that belong to a block's ids need not be neighbours.
    assert "v4.b32" in compiled.ptx
    assert ("mma.sync" in compiled.ptx) == (rows > 1)


def test_embeddings(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"HAS_FACTOR": True, "BLOCK": 512}
    options = {"num_warps": 4, "enable_fp_fusion": False}
    compiled = compile_for_hopper("triton_embed_rows", "_embed_rows_kernel", 0, constants, **options)
    # A product that is rounded before it is added, as on the host.
    assert "fma.rn.f32" not in compiled.ptx
    assert "mul.rn.f32" in compiled.ptx
