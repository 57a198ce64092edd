"""Private names of Numba and llvmlite that the vectors of ``ops/lanes.py`` are made with. Tested with Numba 0.68.

Numba's documented extension interface (``numba.extending``) has no pointers to array data, no calls of LLVM intrinsics and
no stack slots; what it has for them lies in ``numba.core`` and ``numba.np``, which Numba may change in any release.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.np.arrayobj import make_array

__all__ = ["call_intrinsic", "data_pointer", "pointer_type", "stack_slot"]


def call_intrinsic(builder: Any, name: str, result: ir.Type, operands: list[Any]) -> Any:
    """Call an intrinsic function of LLVM, declaring it where that has not been done."""
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


def data_pointer(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    """Return the pointer to the elements of an array."""
    return make_array(array_type)(context, builder, array).data


def pointer_type(kind: ir.Type) -> ir.PointerType:
    """Return a typed pointer, which llvmlite will give up for opaque ones."""
    return kind.as_pointer()


def stack_slot(builder: Any, kind: ir.Type) -> Any:
    """Reserve memory on the stack, once a function and not in every turn of a loop."""
    return cgutils.alloca_once(builder, kind)
