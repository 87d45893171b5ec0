"""What a warp does as one: NVIDIA's products of matrices on tensor cores, and wide loads of a thread's own words.

Tensors here have the threads of a program as their last dimension, one element each, so Triton keeps element ``i`` in
thread ``i`` and what each thread holds is known. ``PTX`` says that NVIDIA's instructions may be used; else, as in the
interpreter, the same arithmetic is spelled out. Importing this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "begin_loads",
    "load_four_words",
    "load_word",
    "multiply_bytes",
    "multiply_floats",
    "spread_rows",
    "two_floats",
    "wait_for_loads",
]

#: Bits of a bfloat16's fraction; 128 twice, whose fraction is worth 1 a unit.
_FRACTION = tl.constexpr(7)
_ONES = tl.constexpr(0x43004300)


@triton.jit
def _plus_product(a, b, c0, c1, c2, c3):
    """The sums that threads hold plus ``a`` ``[n, 16, 1, k]`` times ``b`` ``[n, 1, 8, k]``, spelled out."""
    d = tl.sum(a * b, axis=3).reshape(a.shape[0], 2, 8, 4, 2).permute(0, 2, 3, 4, 1)
    upper, lower = tl.split(d.reshape(c0.shape[0], c0.shape[1], c0.shape[2], 2, 2))
    d0, d1 = tl.split(upper)
    d2, d3 = tl.split(lower)
    return c0 + d0, c1 + d1, c2 + d2, c3 + d3


@triton.jit
def multiply_bytes(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, PTX: tl.constexpr):
    """Each warp's sums ``c`` ``[16, 8]`` plus unsigned bytes ``a`` ``[16, 32]`` times signed ones ``b`` ``[32, 8]``.

    Thread ``4 * g + t`` of a warp holds, of ``a``, bytes ``4 * t`` to ``4 * t + 3`` of row ``g`` in ``a0`` and of row
    ``g + 8`` in ``a1``, and those 16 columns on in ``a2`` and ``a3``; of ``b``, the same rows of column ``g`` in
    ``b0`` and ``b1``; of ``c``, columns ``2 * t`` and ``2 * t + 1`` of row ``g`` in ``c0`` and ``c1``, and of row
    ``g + 8`` in ``c2`` and ``c3`` (PTX, ``mma.m16n8k32``).

    Args:
        a0: this and the others of ``a``, int32 ``[column tiles, m, threads]``, four bytes each.
        b0: this and ``b1``, the same.
        c0: this and the others of ``c``, int32 of that shape.
        PTX: whether there are such tensor cores.

    Returns:
        The four of the sums.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
            [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    # As much as can be at once: the interpreter takes its time for each call.
    COUNT: tl.constexpr = c0.numel // 32
    left = 24 - 8 * tl.arange(0, 4)
    a = tl.join(tl.join(a0, a2), tl.join(a1, a3)).reshape(COUNT, 8, 8, 2).permute(0, 3, 1, 2).reshape(COUNT, 16, 8, 1)
    a = (((a << left) >> 24) & 0xFF).reshape(COUNT, 16, 1, 32)
    b = ((tl.join(b0, b1).reshape(COUNT, 8, 8, 1) << left) >> 24).reshape(COUNT, 1, 8, 32)
    return _plus_product(a, b, c0, c1, c2, c3)


@triton.jit
def two_floats(words, FIRST: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """Two codes, in the bits from ``FIRST`` on and in those 16 further: two bfloat16 in an int32, the first one lower.

    Exact. ``FIRST`` and ``BITS`` are together 16 at most, ``BITS`` at most 4.
    """
    MASK: tl.constexpr = (1 << BITS) - 1
    if PTX:
        # As few shifts as there are fractions' worth of codes; within a fraction codes stay where they are.
        SHIFT: tl.constexpr = FIRST // (_FRACTION // BITS * BITS) * (_FRACTION // BITS * BITS)
        LEFT: tl.constexpr = FIRST - SHIFT
        # 2^-LEFT, and -128 times that, each twice.
        FACTOR: tl.constexpr = (127 - LEFT) * 0x00800080
        TERM: tl.constexpr = (127 + 7 - LEFT) * 0x00800080 - 0x7FFF8000
        return tl.inline_asm_elementwise(
            "{ .reg .b32 both; lop3.b32 both, $1, $2, $3, 0xEA; fma.rn.bf16x2 $0, both, $4, $5; }",
            "=r,r,r,r,r,r",
            [words >> SHIFT, MASK * 0x00010001 << LEFT, _ONES, FACTOR, TERM],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    low = ((words >> FIRST) & MASK).to(tl.float32).to(tl.int32, bitcast=True)
    high = ((words >> (FIRST + 16)) & MASK).to(tl.float32).to(tl.int32, bitcast=True)
    return (low >> 16) | high


@triton.jit
def _lower_float(words):
    return (words << 16).to(tl.float32, bitcast=True)


@triton.jit
def _upper_float(words):
    return ((words >> 16) << 16).to(tl.float32, bitcast=True)


@triton.jit
def multiply_floats(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, PTX: tl.constexpr):
    """Each warp's sums ``c`` ``[16, 8]`` plus ``a`` ``[16, 16]`` times ``b`` ``[16, 8]``, bfloat16 in float32.

    Thread ``4 * g + t`` of a warp holds, of ``a``, columns ``2 * t`` and ``2 * t + 1`` of row ``g`` in ``a0`` and of
    row ``g + 8`` in ``a1``, and those 8 columns on in ``a2`` and ``a3``; of ``b``, the same rows of column ``g`` in
    ``b0`` and ``b1``; of ``c``, what it holds in :func:`multiply_bytes` (PTX, ``mma.m16n8k16``).

    Args:
        a0: this and the others of ``a``, int32 ``[column tiles, m, threads]``, two bfloat16 each.
        b0: this and ``b1``, the same.
        c0: this and the others of ``c``, float32 of that shape.
        PTX: whether there are such tensor cores.

    Returns:
        The four of the sums.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    COUNT: tl.constexpr = c0.numel // 32
    a = tl.join(tl.join(a0, a2), tl.join(a1, a3)).reshape(COUNT, 8, 8, 2).permute(0, 3, 1, 2)
    a = tl.join(_lower_float(a), _upper_float(a)).reshape(COUNT, 16, 1, 16)
    b = tl.join(b0, b1).reshape(COUNT, 8, 8)
    b = tl.join(_lower_float(b), _upper_float(b)).reshape(COUNT, 1, 8, 16)
    return _plus_product(a, b, c0, c1, c2, c3)


@triton.jit
def load_four_words(address, CACHED: tl.constexpr, PTX: tl.constexpr):
    """Four neighbouring words from an address each, in one load of 16 bytes.

    Args:
        address: int64 ``[..., threads]``, multiples of 16.
        CACHED: whether the first cache keeps them; what is read once is better past it.
        PTX: whether the device has NVIDIA's instructions.

    Returns:
        Four int32 of that shape.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            ("ld.global" if CACHED else "ld.global.cg") + ".v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [address],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    word = address.to(tl.pointer_type(tl.int32))
    return tl.load(word), tl.load(word + 1), tl.load(word + 2), tl.load(word + 3)


@triton.jit
def load_word(address, PTX: tl.constexpr):
    """One word, which the first cache keeps, from an address each: int32 of the shape of ``address``, int64."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ld.global.b32 $0, [$1];", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )
    return tl.load(address.to(tl.pointer_type(tl.int32)))


@triton.jit
def wait_for_loads(loaded, address, count, PTX: tl.constexpr):
    """Wait until what was loaded is there, and begin no load that follows before.

    A warp has six counters of loads under way, which loads of unlike latencies otherwise share: words from the cache
    would be waited for until words from memory have come, too.

    Args:
        loaded: int32, made of what was loaded.
        address: int64 of that shape, where it could be stored.
        count: a number that is never negative, which the compiler may not know. It would drop what comes to nothing,
            but not a store that is not made.
        PTX: whether the device has NVIDIA's instructions; nothing is done if not.
    """
    if PTX:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.lt.s32 p, $3, 0; @p st.global.b32 [$2], $1; mov.b32 $0, $1; "
            "bar.warp.sync 0xffffffff; }",
            "=r,r,l,r",
            [loaded, address, count],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def begin_loads(thread, PTX: tl.constexpr):
    """Begin the loads before this, rather than when what they load is needed, as the compiler does to spare registers.

    ``thread`` is any int32 of an element a thread. A warp waits for its own threads, which costs next to nothing.
    """
    if PTX:
        tl.inline_asm_elementwise(
            "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def spread_rows(values, SHARERS: tl.constexpr, WARPS: tl.constexpr):
    """One value a row to the threads that hold those rows of ``a`` in :func:`multiply_bytes`.

    Args:
        values: ``[16 * m * WARPS / SHARERS]``: of the rows of all warps, of which ``SHARERS`` have the same.
        SHARERS: warps in a row that have the same rows.
        WARPS: warps of a program.

    Returns:
        For rows ``g`` and for rows ``g + 8``, ``[m, threads]``.
    """
    OWNERS: tl.constexpr = WARPS // SHARERS
    TILES: tl.constexpr = values.numel // 16 // OWNERS
    top, bottom = tl.split(values.reshape(OWNERS, TILES, 2, 8).permute(1, 0, 3, 2))
    SHAPE: tl.constexpr = (TILES, OWNERS, SHARERS, 8, 4)
    top = tl.broadcast_to(top[:, :, None, :, None], SHAPE).reshape(TILES, 32 * WARPS)
    return top, tl.broadcast_to(bottom[:, :, None, :, None], SHAPE).reshape(TILES, 32 * WARPS)
