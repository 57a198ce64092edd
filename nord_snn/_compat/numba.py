"""Private names of Numba and llvmlite for the kernels and their SIMD types. Tested with Numba 0.68.

Numba's documented extension interface (``numba.extending``) has no pointers to array data, no calls of LLVM intrinsics, no
stack slots, and no way to set what a cache depends on. ``numba.core`` and ``numba.np`` have these, and may change in any
release.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils
from numba.np.arrayobj import make_array

__all__ = ["cached_njit", "call_intrinsic", "data_pointer", "pointer_type", "stack_slot"]


def cached_njit(function: Callable[..., Any], stamp: str, **options: Any) -> Any:
    """Compile ``function`` and cache it on disk; the cache is valid while its file and ``stamp`` stay the same.

    ``njit(cache=True)`` checks the function's own file only, and would run code compiled from earlier versions of the
    functions that it calls.
    """
    dispatcher = njit(**options)(function)
    if hasattr(dispatcher, "enable_caching"):  # under NUMBA_DISABLE_JIT njit returns the function itself
        dispatcher.enable_caching()
        file = dispatcher._cache._cache_file
        file._source_stamp = (file._source_stamp, stamp)
    return dispatcher


def call_intrinsic(builder: Any, name: str, result: ir.Type, operands: list[Any]) -> Any:
    """Call an LLVM intrinsic, and declare it first if necessary."""
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


def data_pointer(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    """Return the pointer to the elements of an array."""
    return make_array(array_type)(context, builder, array).data


def pointer_type(kind: ir.Type) -> ir.PointerType:
    """Return a typed pointer type, which a future llvmlite replaces by opaque pointers."""
    return kind.as_pointer()


def stack_slot(builder: Any, kind: ir.Type) -> Any:
    """Allocate memory on the stack, once per function call and not in every iteration of a loop."""
    return cgutils.alloca_once(builder, kind)
