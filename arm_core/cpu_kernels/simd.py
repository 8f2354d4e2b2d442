"""Vectors of 64 float32 lanes for Numba kernels: `load`, `store`, `+ - *`, `fma` and a few more.

A compiler turns loops into vector instructions only if it recognises them, and this takes long. Here a
kernel is explicit: an operation on a `Float32x64` becomes 4 AVX-512, 8 AVX2 or 16 NEON instructions,
depending on the processor. These are independent of each other, which keeps the processor busy.

Numba's disk cache only detects changes in a kernel's own file. After an edit here or in `functions.py`,
`HELPERS` in the files of the kernels must change; a test prints the new value.
"""

# Compiled code has no Python types, and an intrinsic is called without its typing context.
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False
# mypy: disable-error-code="call-arg"

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic, models, overload, register_model

LANES = 64
SUMS = 16
"""Lanes of the partial sums that `store_dot` writes and `store_row_sums` adds up."""
CACHE_LINE = 16  # values

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
_ANY_FLOATS = ir.Constant(_FLOATS, ir.Undefined)


class Float32x64(types.Type):
    """The Numba type of a vector; such values exist only in compiled code."""

    def __init__(self) -> None:
        super().__init__(name="Float32x64")


VECTOR = Float32x64()


@register_model(Float32x64)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _FLOATS)


def _pointer(context, builder, array_type, array, index_type, index, target=_FLOATS):
    """Address of array[index] as a pointer to `target`; no bounds checks, no negative indices."""
    struct = context.make_array(array_type)(context, builder, array)
    items = zip(cgutils.unpack_tuple(builder, index), index_type, strict=True)
    indices = [context.cast(builder, value, typ, types.intp) for value, typ in items]
    pointer = cgutils.get_item_pointer(context, builder, array_type, struct, indices, wraparound=False)
    return builder.bitcast(pointer, target.as_pointer())


def _check_array(array: Any, index: Any, *, writable: bool = False) -> None:
    if not (isinstance(array, types.Array) and array.dtype == types.float32 and array.layout == "C"):
        raise TypingError(f"expected a C-ordered float32 array, found {array}")
    if len(index) != array.ndim:
        raise TypingError(f"expected {array.ndim} indices, found {index}")
    if writable and not array.mutable:
        raise TypingError(f"expected an array to write to, found {array}")


@intrinsic
def load(typing_context, array, index):
    """The `LANES` values from array[index] on."""
    _check_array(array, index)

    def generate(context, builder, signature, arguments):
        value = builder.load(_pointer(context, builder, array, arguments[0], index, arguments[1]))
        value.align = 4
        return value

    return VECTOR(array, index), generate


@intrinsic
def store(typing_context, array, index, value):
    """Write a vector from array[index] on."""
    _check_array(array, index, writable=True)

    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, array, arguments[0], index, arguments[1])
        builder.store(arguments[2], pointer).align = 4
        return context.get_dummy_value()

    return types.void(array, index, VECTOR), generate


@intrinsic
def prefetch(typing_context, array, index):
    """Prefetch the memory of the vector at array[index], for writing if the array is writable."""
    _check_array(array, index)

    def generate(context, builder, signature, arguments):
        first = _pointer(context, builder, array, arguments[0], index, arguments[1], _FLOAT)
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _INT, _INT, _INT])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        for start in range(0, LANES, CACHE_LINE):
            line = builder.bitcast(builder.gep(first, [_INT(start)]), byte)
            builder.call(function, [line, _INT(int(array.mutable)), _INT(3), _INT(1)])
        return context.get_dummy_value()

    return types.void(array, index), generate


def _constant(value):
    """The number in every lane, as a constant in the code."""
    if isinstance(value, int):
        return ir.Constant(_INTS, [value] * LANES)
    return ir.Constant(_FLOATS, [ir.Constant(_FLOAT, float(np.float32(value)))] * LANES)


def _as_vector(context, builder, typ, value):
    """A vector unchanged; a number copied to every lane."""
    if typ == VECTOR:
        return value
    number = context.cast(builder, value, typ, types.float32)
    first = builder.insert_element(_ANY_FLOATS, number, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, _ANY_FLOATS, _constant(0))


@intrinsic
def fill(typing_context, number):
    """The number in every lane."""

    def generate(context, builder, signature, arguments):
        return _as_vector(context, builder, number, arguments[0])

    return VECTOR(number), generate


def _arithmetic(symbol, instruction):
    """Define `symbol` for two vectors, or a vector and a number."""

    @intrinsic
    def combine(typing_context, a, b):
        def generate(context, builder, signature, arguments):
            values = (_as_vector(context, builder, *pair) for pair in zip((a, b), arguments, strict=True))
            return getattr(builder, instruction)(*values)

        return VECTOR(a, b), generate

    @overload(symbol)
    def choose(a, b):
        return (lambda a, b: combine(a, b)) if VECTOR in (a, b) else None


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")


def _multiply_add(builder, a, b, c):
    kind = ir.FunctionType(a.type, [a.type] * 3)
    name = f"llvm.fmuladd.v{a.type.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b, c])


@intrinsic
def fma(typing_context, a, b, c):
    """a * b + c, rounded once if the processor supports it; each is a vector or a number."""

    def generate(context, builder, signature, arguments):
        values = [_as_vector(context, builder, *pair) for pair in zip((a, b, c), arguments, strict=True)]
        return _multiply_add(builder, *values)

    return VECTOR(a, b, c), generate


@intrinsic
def at_least(typing_context, vector, number):
    """The larger of the two in each lane; NaN stays NaN."""

    def generate(context, builder, signature, arguments):
        floor = _as_vector(context, builder, number, arguments[1])
        return builder.select(builder.fcmp_ordered("<", arguments[0], floor), floor, arguments[0])

    return VECTOR(vector, number), generate


@intrinsic
def where_negative(typing_context, condition, a, b):
    """Lanes of a where the condition is below zero, else of b."""

    def generate(context, builder, signature, arguments):
        return builder.select(builder.fcmp_ordered("<", arguments[0], _constant(0.0)), *arguments[1:])

    return VECTOR(condition, a, b), generate


@intrinsic
def minus_abs(typing_context, vector):
    """-|x|, by setting the sign."""

    def generate(context, builder, signature, arguments):
        bits = builder.or_(builder.bitcast(arguments[0], _INTS), _constant(-(2**31)))
        return builder.bitcast(bits, _FLOATS)

    return VECTOR(vector), generate


@intrinsic
def add_to_exponent(typing_context, vector, shifted):
    """vector * 2**n for shifted = n + 1.5 * 2**23: the low bits of such a float are the integer n."""

    def generate(context, builder, signature, arguments):
        bits, n = (builder.bitcast(value, _INTS) for value in arguments)
        return builder.bitcast(builder.add(bits, builder.shl(n, _constant(23))), _FLOATS)

    return VECTOR(vector, shifted), generate


def _shuffle(builder, a, b, lanes):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, len(lanes)), list(lanes)))


def _add_halves(builder, a, b, width):
    """Each of the groups of 2 * width lanes, first a's then b's, folded to width lanes."""
    starts = range(0, a.type.count + b.type.count, 2 * width)
    low = [start + i for start in starts for i in range(width)]
    return builder.fadd(_shuffle(builder, a, b, low), _shuffle(builder, a, b, [i + width for i in low]))


@intrinsic
def store_dot(typing_context, array, index, a, b):
    """Write `SUMS` partial sums of a * b from array[index] on, each of every `SUMS`-th lane."""
    _check_array(array, index, writable=True)

    def generate(context, builder, signature, arguments):
        kind = ir.VectorType(_FLOAT, SUMS)
        value = ir.Constant(kind, [0.0] * SUMS)
        for start in range(0, LANES, SUMS):
            parts = (_shuffle(builder, v, v, range(start, start + SUMS)) for v in arguments[2:])
            value = _multiply_add(builder, *parts, value)
        pointer = _pointer(context, builder, array, arguments[0], index, arguments[1], kind)
        builder.store(value, pointer).align = 4
        return context.get_dummy_value()

    return types.void(array, index, VECTOR, VECTOR), generate


@intrinsic
def store_row_sums(typing_context, array, index, source, row):
    """Write `SUMS` sums from array[index] on: the i-th over the `SUMS` values from source[row + i, 0] on.

    `row` are the indices of the first row of `source`, whose last axis has `SUMS` values.
    """
    _check_array(array, index, writable=True)
    _check_array(source, row)

    def generate(context, builder, signature, arguments):
        kind = ir.VectorType(_FLOAT, SUMS)
        first = _pointer(context, builder, source, arguments[2], row, arguments[3], kind)
        rows = [builder.load(builder.gep(first, [_INT(i)])) for i in range(SUMS)]
        for value in rows:
            value.align = 4
        width = SUMS
        while len(rows) > 1:  # two rows become one, with groups of lanes half as wide
            width //= 2
            rows = [_add_halves(builder, a, b, width) for a, b in zip(rows[::2], rows[1::2], strict=True)]
        pointer = _pointer(context, builder, array, arguments[0], index, arguments[1], kind)
        builder.store(rows[0], pointer).align = 4
        return context.get_dummy_value()

    return types.void(array, index, source, row), generate
