"""Sixteen numbers at a time in Numba kernels: vectors that LLVM keeps in registers, and pointers that cost nothing to pass.

Numba leaves it to LLVM to find what can be done sixteen at a time, and LLVM gives up where arrays might overlap or a loop is
short. And an array that is passed to another compiled function has its reference count raised and lowered, by atomic
instructions that all threads contend for: in a function called for every row these cost more than the row's arithmetic.
With :func:`pointer`, :func:`load` and :func:`store` neither happens.

Nothing here is checked: an index must lie inside, and the array must outlive its pointer. Arithmetic is as written, without
fused multiply-adds, but in :func:`fused`.
"""

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

from nord_snn._compat.numba import call_intrinsic, data_pointer, pointer_type, stack_slot

__all__ = [
    "WIDTH",
    "advance",
    "as_integers",
    "as_pointer",
    "broadcast",
    "count_bits",
    "fused",
    "ge_mask",
    "iota",
    "load",
    "masked_load",
    "masked_store",
    "maximum",
    "ne_mask",
    "pointer",
    "prefetch",
    "reduce_sum",
    "store",
    "where",
]

#: Numbers in one vector: a whole cache line of float32. Where registers are shorter, LLVM takes several.
WIDTH = 16

_I32 = ir.IntType(32)


class Lanes(types.Type):
    """``WIDTH`` numbers of one dtype, a value like a number."""

    def __init__(self, dtype: types.Type) -> None:
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, ir.VectorType(manager.lookup(lanes.dtype).get_value_type(), WIDTH))


def _vector(context: Any, dtype: types.Type) -> ir.VectorType:
    return ir.VectorType(context.get_value_type(dtype), WIDTH)


def _all(builder: Any, number: Any) -> Any:
    """The vector of ``WIDTH`` times the same number."""
    nothing = ir.Constant(ir.VectorType(number.type, WIDTH), ir.Undefined)
    first = builder.insert_element(nothing, number, _I32(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(_I32, WIDTH), [0] * WIDTH))


def _first(builder: Any, count: Any) -> Any:
    """Which lanes are among the first ``count``."""
    numbers = ir.Constant(ir.VectorType(_I32, WIDTH), list(range(WIDTH)))
    return builder.icmp_signed("<", numbers, _all(builder, builder.trunc(count, _I32)))


def _masked(builder: Any, name: str, vector: ir.VectorType, result: Any, *operands: Any) -> Any:
    """Call LLVM's masked load or store."""
    bits = {"float": 32, "double": 64}[str(vector.element)]
    return call_intrinsic(builder, f"llvm.masked.{name}.v{WIDTH}f{bits}.p0", result, list(operands))


@intrinsic
def pointer(typing, array):
    """Where the elements of a contiguous array begin."""

    def generate(context, builder, signature, arguments):
        return data_pointer(context, builder, signature.args[0], arguments[0])

    return types.CPointer(array.dtype)(array), generate


@intrinsic
def as_pointer(typing, address, like):
    """A pointer to numbers of the type of ``like`` that begin at this address."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.intp, like), generate


@intrinsic
def advance(typing, source, index):
    """A pointer to ``source[index:]``."""

    def generate(context, builder, signature, arguments):
        return builder.gep(arguments[0], arguments[1:])

    return source(source, types.intp), generate


@intrinsic
def prefetch(typing, source, index):
    """Fetch the cache line of ``source[index]`` while something else is computed."""

    def generate(context, builder, signature, arguments):
        where = builder.bitcast(builder.gep(arguments[0], arguments[1:]), pointer_type(ir.IntType(8)))
        call_intrinsic(builder, "llvm.prefetch.p0", ir.VoidType(), [where, _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(source, types.intp), generate


def _at(context: Any, builder: Any, dtype: types.Type, begin: Any, index: Any) -> tuple[Any, ir.VectorType, int]:
    """Where a vector begins, its type, and its alignment: that of a single number."""
    vector = _vector(context, dtype)
    return builder.bitcast(builder.gep(begin, [index]), pointer_type(vector)), vector, dtype.bitwidth // 8


@intrinsic
def load(typing, source, index):
    """``source[index : index + WIDTH]``."""

    def generate(context, builder, signature, arguments):
        where, _, align = _at(context, builder, source.dtype, *arguments)
        return builder.load(where, align=align)

    return Lanes(source.dtype)(source, types.intp), generate


@intrinsic
def masked_load(typing, source, index, count):
    """The same, but only the first ``count`` are read, where there are fewer than ``WIDTH``; the others are 0."""

    def generate(context, builder, signature, arguments):
        where, vector, align = _at(context, builder, source.dtype, *arguments[:2])
        count = arguments[2]
        loaded = stack_slot(builder, vector)
        with builder.if_else(builder.icmp_signed(">=", count, count.type(WIDTH)), likely=True) as (whole, part):
            with whole:
                builder.store(builder.load(where, align=align), loaded)
            with part:
                zeros = ir.Constant(vector, [0.0] * WIDTH)
                some = _masked(builder, "load", vector, vector, where, _I32(align), _first(builder, count), zeros)
                builder.store(some, loaded)
        return builder.load(loaded)

    return Lanes(source.dtype)(source, types.intp, types.intp), generate


@intrinsic
def store(typing, target, index, lanes):
    """``target[index : index + WIDTH] = lanes``."""

    def generate(context, builder, signature, arguments):
        where, _, align = _at(context, builder, target.dtype, *arguments[:2])
        builder.store(arguments[2], where, align=align)
        return context.get_dummy_value()

    return types.void(target, types.intp, lanes), generate


@intrinsic
def masked_store(typing, target, index, count, lanes):
    """The same, but only the first ``count`` are written, where there are fewer than ``WIDTH``."""

    def generate(context, builder, signature, arguments):
        where, vector, align = _at(context, builder, target.dtype, *arguments[:2])
        count, value = arguments[2:]
        with builder.if_else(builder.icmp_signed(">=", count, count.type(WIDTH)), likely=True) as (whole, part):
            with whole:
                builder.store(value, where, align=align)
            with part:
                _masked(builder, "store", vector, ir.VoidType(), value, where, _I32(align), _first(builder, count))
        return context.get_dummy_value()

    return types.void(target, types.intp, types.intp, lanes), generate


@intrinsic
def broadcast(typing, like, number):
    """``WIDTH`` times the same number, in the dtype that the pointer ``like`` points to."""

    def generate(context, builder, signature, arguments):
        return _all(builder, context.cast(builder, arguments[1], signature.args[1], like.dtype))

    return Lanes(like.dtype)(like, number), generate


@intrinsic
def reduce_sum(typing, lanes):
    """The sum of all lanes, as a number."""

    def generate(context, builder, signature, arguments):
        result, lanes_left = arguments[0], WIDTH
        while lanes_left > 1:  # halves upon each other
            lanes_left //= 2
            first, second = (
                ir.Constant(ir.VectorType(_I32, lanes_left), list(range(start, start + lanes_left)))
                for start in (0, lanes_left)
            )
            result = builder.fadd(
                builder.shuffle_vector(result, result, first), builder.shuffle_vector(result, result, second)
            )
        return builder.extract_element(result, _I32(0))

    return lanes.dtype(lanes), generate


@intrinsic
def ge_mask(typing, a, b):
    """An integer with one bit for each lane, set where ``a >= b``: not where one is NaN."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.fcmp_ordered(">=", *arguments), ir.IntType(WIDTH))

    return types.uint16(a, b), generate


@intrinsic
def where(typing, bits, yes, no):
    """``yes`` in the lanes whose bit is set, and ``no`` in the others."""

    def generate(context, builder, signature, arguments):
        bits, yes, no = arguments
        lanes = builder.bitcast(bits, ir.VectorType(ir.IntType(1), WIDTH))
        return builder.select(lanes, yes, no)

    return yes(types.uint16, yes, no), generate


@intrinsic
def maximum(typing, a, b):
    """The larger of each two; ``b`` where one is NaN."""

    def generate(context, builder, signature, arguments):
        a, b = arguments
        return builder.select(builder.fcmp_ordered(">", a, b), a, b)

    return a(a, b), generate


@intrinsic
def fused(typing, a, b, c):
    """``a * b + c``, rounded once where the machine can."""

    def generate(context, builder, signature, arguments):
        vector = _vector(context, a.dtype)
        return call_intrinsic(builder, f"llvm.fmuladd.v{WIDTH}f{a.dtype.bitwidth}", vector, arguments)

    return a(a, b, c), generate


@intrinsic
def iota(typing, like):
    """``0, 1, 2, ...`` in the dtype that the pointer ``like`` points to."""

    def generate(context, builder, signature, arguments):
        return ir.Constant(_vector(context, like.dtype), [float(lane) for lane in range(WIDTH)])

    return Lanes(like.dtype)(like), generate


@intrinsic
def ne_mask(typing, a, b):
    """An integer with one bit for each lane, set where a and b differ or one is NaN."""

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(builder.fcmp_unordered("!=", *arguments), ir.IntType(WIDTH))
        return builder.zext(bits, ir.IntType(64))

    return types.int64(a, b), generate


@intrinsic
def count_bits(typing, integer):
    """How many bits of an int64 are set."""

    def generate(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.int64(types.int64), generate


@intrinsic
def as_integers(typing, source):
    """A pointer to the same bits, read as integers of the same length."""
    kind = types.CPointer({32: types.int32, 64: types.int64}[source.dtype.bitwidth])

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(kind))

    return kind(source), generate


def _lane_by_lane(symbol: Callable[..., Any], instruction: str) -> None:
    """Let an operator of Python work on lanes."""

    @intrinsic
    def both(typing, a, b):
        def generate(context, builder, signature, arguments):
            return getattr(builder, instruction)(*arguments)

        return a(a, b), generate

    @overload(symbol)
    def operation(a, b):
        return (lambda a, b: both(a, b)) if isinstance(a, Lanes) and isinstance(b, Lanes) else None


_lane_by_lane(operator.add, "fadd")
_lane_by_lane(operator.sub, "fsub")
_lane_by_lane(operator.mul, "fmul")
_lane_by_lane(operator.truediv, "fdiv")
