"""Explicit SIMD in Numba kernels: vectors of sixteen numbers in registers, and raw pointers.

Numba leaves vectorisation to LLVM, which does not vectorise a loop that is short or whose arrays might overlap. Passing an
array to another compiled function increments and decrements its reference count with atomic instructions, for which all
threads contend: in a function called for every row these take longer than the arithmetic of the row. Explicit vectors and
:func:`pointer` avoid both.

Nothing is checked: indices must be in bounds, and the array must outlive its pointer. Arithmetic is as written, without
fused multiply-adds, except in :func:`fused`.
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

#: Number of lanes (numbers in a vector): one cache line of float32. If registers are shorter, LLVM uses several for a vector.
WIDTH = 16

_I32 = ir.IntType(32)


class Lanes(types.Type):
    """Numba type of a vector of ``WIDTH`` numbers of one dtype."""

    def __init__(self, dtype: types.Type) -> None:
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, ir.VectorType(manager.lookup(lanes.dtype).get_value_type(), WIDTH))


def _vector(context: Any, dtype: types.Type) -> ir.VectorType:
    return ir.VectorType(context.get_value_type(dtype), WIDTH)


def _broadcast(builder: Any, number: Any) -> Any:
    """Return a vector with ``number`` in all lanes."""
    undefined = ir.Constant(ir.VectorType(number.type, WIDTH), ir.Undefined)
    first = builder.insert_element(undefined, number, _I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, WIDTH), [0] * WIDTH))


def _lane_mask(builder: Any, count: Any) -> Any:
    """Return a mask of the first ``count`` lanes."""
    numbers = ir.Constant(ir.VectorType(_I32, WIDTH), list(range(WIDTH)))
    return builder.icmp_signed("<", numbers, _broadcast(builder, builder.trunc(count, _I32)))


def _masked(builder: Any, name: str, vector: ir.VectorType, result: Any, *operands: Any) -> Any:
    """Call LLVM's masked load or store."""
    bits = {"float": 32, "double": 64}[str(vector.element)]
    return call_intrinsic(builder, f"llvm.masked.{name}.v{WIDTH}f{bits}.p0", result, list(operands))


@intrinsic
def pointer(typing, array):
    """Return a pointer to the elements of a contiguous array."""

    def generate(context, builder, signature, arguments):
        return data_pointer(context, builder, signature.args[0], arguments[0])

    return types.CPointer(array.dtype)(array), generate


@intrinsic
def as_pointer(typing, address, like):
    """Return an address as a pointer to numbers of the type of ``like``."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.intp, like), generate


@intrinsic
def advance(typing, source, index):
    """Return a pointer to ``source[index:]``."""

    def generate(context, builder, signature, arguments):
        return builder.gep(arguments[0], arguments[1:])

    return source(source, types.intp), generate


@intrinsic
def prefetch(typing, source, index):
    """Prefetch the cache line of ``source[index]``."""

    def generate(context, builder, signature, arguments):
        address = builder.bitcast(builder.gep(arguments[0], arguments[1:]), pointer_type(ir.IntType(8)))
        call_intrinsic(builder, "llvm.prefetch.p0", ir.VoidType(), [address, _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(source, types.intp), generate


def _vector_pointer(
    context: Any, builder: Any, dtype: types.Type, begin: Any, index: Any
) -> tuple[Any, ir.VectorType, int]:
    """Return a pointer to the vector at ``index``, its type, and its alignment, which is that of a single number."""
    vector = _vector(context, dtype)
    return builder.bitcast(builder.gep(begin, [index]), pointer_type(vector)), vector, dtype.bitwidth // 8


@intrinsic
def load(typing, source, index):
    """Return ``source[index : index + WIDTH]``."""

    def generate(context, builder, signature, arguments):
        address, _, align = _vector_pointer(context, builder, source.dtype, *arguments)
        return builder.load(address, align=align)

    return Lanes(source.dtype)(source, types.intp), generate


@intrinsic
def masked_load(typing, source, index, count):
    """Return ``source[index : index + WIDTH]``, but read only the first ``count`` lanes; the others are 0."""

    def generate(context, builder, signature, arguments):
        address, vector, align = _vector_pointer(context, builder, source.dtype, *arguments[:2])
        count = arguments[2]
        loaded = stack_slot(builder, vector)
        with builder.if_else(builder.icmp_signed(">=", count, count.type(WIDTH)), likely=True) as (whole, part):
            with whole:
                builder.store(builder.load(address, align=align), loaded)
            with part:
                zeros = ir.Constant(vector, [0.0] * WIDTH)
                masked = _masked(
                    builder, "load", vector, vector, address, _I32(align), _lane_mask(builder, count), zeros
                )
                builder.store(masked, loaded)
        return builder.load(loaded)

    return Lanes(source.dtype)(source, types.intp, types.intp), generate


@intrinsic
def store(typing, target, index, lanes):
    """Set ``target[index : index + WIDTH] = lanes``."""

    def generate(context, builder, signature, arguments):
        address, _, align = _vector_pointer(context, builder, target.dtype, *arguments[:2])
        builder.store(arguments[2], address, align=align)
        return context.get_dummy_value()

    return types.void(target, types.intp, lanes), generate


@intrinsic
def masked_store(typing, target, index, count, lanes):
    """Set ``target[index : index + WIDTH] = lanes``, but write only the first ``count`` lanes."""

    def generate(context, builder, signature, arguments):
        address, vector, align = _vector_pointer(context, builder, target.dtype, *arguments[:2])
        count, value = arguments[2:]
        with builder.if_else(builder.icmp_signed(">=", count, count.type(WIDTH)), likely=True) as (whole, part):
            with whole:
                builder.store(value, address, align=align)
            with part:
                _masked(
                    builder, "store", vector, ir.VoidType(), value, address, _I32(align), _lane_mask(builder, count)
                )
        return context.get_dummy_value()

    return types.void(target, types.intp, types.intp, lanes), generate


@intrinsic
def broadcast(typing, like, number):
    """Return a vector with ``number`` in all lanes, in the dtype that the pointer ``like`` points to."""

    def generate(context, builder, signature, arguments):
        return _broadcast(builder, context.cast(builder, arguments[1], signature.args[1], like.dtype))

    return Lanes(like.dtype)(like, number), generate


@intrinsic
def reduce_sum(typing, lanes):
    """Return the sum of all lanes."""

    def generate(context, builder, signature, arguments):
        result, lanes_left = arguments[0], WIDTH
        while lanes_left > 1:  # add the upper half to the lower half
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
    """Return an integer with one bit per lane, set where ``a >= b``; not set where one is NaN."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.fcmp_ordered(">=", *arguments), ir.IntType(WIDTH))

    return types.uint16(a, b), generate


@intrinsic
def where(typing, bits, if_set, otherwise):
    """Return ``if_set`` in the lanes whose bit is set, ``otherwise`` in the other lanes."""

    def generate(context, builder, signature, arguments):
        bits, if_set, otherwise = arguments
        mask = builder.bitcast(bits, ir.VectorType(ir.IntType(1), WIDTH))
        return builder.select(mask, if_set, otherwise)

    return if_set(types.uint16, if_set, otherwise), generate


@intrinsic
def maximum(typing, a, b):
    """Return the larger of ``a`` and ``b`` per lane; ``b`` where one is NaN."""

    def generate(context, builder, signature, arguments):
        a, b = arguments
        return builder.select(builder.fcmp_ordered(">", a, b), a, b)

    return a(a, b), generate


@intrinsic
def fused(typing, a, b, c):
    """Return ``a * b + c``, rounded once if the hardware has fused multiply-adds."""

    def generate(context, builder, signature, arguments):
        vector = _vector(context, a.dtype)
        return call_intrinsic(builder, f"llvm.fmuladd.v{WIDTH}f{a.dtype.bitwidth}", vector, arguments)

    return a(a, b, c), generate


@intrinsic
def iota(typing, like):
    """Return ``0, 1, 2, ...`` in the dtype that the pointer ``like`` points to."""

    def generate(context, builder, signature, arguments):
        return ir.Constant(_vector(context, like.dtype), [float(lane) for lane in range(WIDTH)])

    return Lanes(like.dtype)(like), generate


@intrinsic
def ne_mask(typing, a, b):
    """Return an integer with one bit per lane, set where a and b differ or one is NaN."""

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(builder.fcmp_unordered("!=", *arguments), ir.IntType(WIDTH))
        return builder.zext(bits, ir.IntType(64))

    return types.int64(a, b), generate


@intrinsic
def count_bits(typing, integer):
    """Return the number of set bits of an int64."""

    def generate(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.int64(types.int64), generate


@intrinsic
def as_integers(typing, source):
    """Return ``source`` as a pointer to integers of the same size."""
    integers = types.CPointer({32: types.int32, 64: types.int64}[source.dtype.bitwidth])

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(integers))

    return integers(source), generate


def _vectorize_operator(symbol: Callable[..., Any], instruction: str) -> None:
    """Define a Python operator on vectors as an LLVM instruction."""

    @intrinsic
    def apply(typing, a, b):
        def generate(context, builder, signature, arguments):
            return getattr(builder, instruction)(*arguments)

        return a(a, b), generate

    @overload(symbol)
    def operation(a, b):
        return (lambda a, b: apply(a, b)) if isinstance(a, Lanes) and isinstance(b, Lanes) else None


_vectorize_operator(operator.add, "fadd")
_vectorize_operator(operator.sub, "fsub")
_vectorize_operator(operator.mul, "fmul")
_vectorize_operator(operator.truediv, "fdiv")
