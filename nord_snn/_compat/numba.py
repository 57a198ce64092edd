"""Private names of Numba and llvmlite for the kernels and their SIMD types. Tested with Numba 0.68.

Numba's documented extension interface (``numba.extending``) lacks pointers to array data, calls of LLVM intrinsics, stack
slots, and control over what invalidates a cache. ``numba.core`` and ``numba.np`` have all of these, but may change in any
release.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

__all__ = ["cached_njit", "call_in_team", "call_intrinsic", "data_pointer", "pointer_type", "stack_slot"]


def cached_njit(function: Callable[..., Any], stamp: str, **options: Any) -> Any:
    """Compile ``function`` and cache it on disk until the function's file or ``stamp`` changes.

    ``njit(cache=True)`` checks the function's own file only, and would run code compiled from earlier versions of the
    functions that it calls. ``stamp`` is a hash of their files; ``options`` are those of ``njit``.
    """
    dispatcher = njit(**options)(function)
    if hasattr(dispatcher, "enable_caching"):  # under NUMBA_DISABLE_JIT njit returns the function itself
        dispatcher.enable_caching()
        file = dispatcher._cache._cache_file
        file._source_stamp = (file._source_stamp, stamp)
    return dispatcher


@intrinsic
def call_in_team(typing_context, kernel, openmp, n, arguments):  # type: ignore[no-untyped-def]
    """Call ``kernel((k, size, 0), *arguments)`` in every thread k of an OpenMP team of ``size`` threads, at most ``n``.

    The 0 says that more calls follow, see :func:`nord_snn.ops._numba.threads.run_shares`. ``openmp`` has the addresses of
    ``GOMP_parallel``, ``omp_get_thread_num`` and ``omp_get_num_threads``, whose signatures are in the manual of libgomp. The
    kernel must not raise: an error in a thread is not reported.
    """
    parameters = (types.UniTuple(types.intp, 3), *arguments.types)
    kernel.get_call_type(typing_context, parameters, {})  # compiles the kernel
    compiled = kernel.dispatcher.overloads[parameters]

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _, functions, n_threads, packed = values
        context.active_code_library.add_linking_library(compiled.library)
        data = cgutils.alloca_once_value(builder, cgutils.make_anonymous_struct(builder, [packed, functions]))
        entry = _team_entry(context, builder.module, compiled, data.type)
        gomp_parallel = _function_at(
            builder, builder.extract_value(functions, 0), _VOID, [entry.type, _ADDRESS, _C_INT, _C_INT]
        )
        builder.call(
            gomp_parallel, [entry, builder.bitcast(data, _ADDRESS), builder.trunc(n_threads, _C_INT), _C_INT(0)]
        )
        return context.get_dummy_value()

    return types.void(kernel, openmp, n, arguments), generate


_VOID, _C_INT, _ADDRESS = ir.VoidType(), ir.IntType(32), ir.IntType(8).as_pointer()


def _team_entry(context: Any, module: ir.Module, compiled: Any, data_type: ir.Type) -> ir.Function:
    """Add the C function that every thread of a team runs. Its argument points to the kernel's arguments and ``openmp``."""
    entry = ir.Function(module, ir.FunctionType(_VOID, [_ADDRESS]), module.get_unique_name("run_in_team"))
    entry.linkage = "internal"
    builder = ir.IRBuilder(entry.append_basic_block())
    packed, functions = cgutils.unpack_tuple(builder, builder.load(builder.bitcast(entry.args[0], data_type)))
    k, size = (builder.call(_function_at(builder, builder.extract_value(functions, i), _C_INT, []), []) for i in (1, 2))
    share_type, *_ = compiled.signature.args
    share = context.make_tuple(
        builder, share_type, [*(builder.sext(i, ir.IntType(64)) for i in (k, size)), ir.IntType(64)(0)]
    )
    arguments = [share, *cgutils.unpack_tuple(builder, packed)]
    context.call_internal_no_propagate(builder, compiled.fndesc, compiled.signature, arguments)
    builder.ret_void()
    return entry


def _function_at(builder: Any, address: Any, result: ir.Type, parameters: list[ir.Type]) -> Any:
    return builder.inttoptr(address, pointer_type(ir.FunctionType(result, parameters)))


def call_intrinsic(builder: Any, name: str, result: ir.Type, operands: list[Any]) -> Any:
    """Call an LLVM intrinsic; declare it first if the module does not declare it."""
    function_type = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), operands)


def data_pointer(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    """Return the pointer to the elements of an array."""
    return make_array(array_type)(context, builder, array).data


def pointer_type(kind: ir.Type) -> ir.PointerType:
    """Return the type of a pointer to ``kind``; later releases of llvmlite will have opaque pointers only."""
    return kind.as_pointer()


def stack_slot(builder: Any, kind: ir.Type) -> Any:
    """Allocate memory on the stack, once per function call and not in every iteration of a loop."""
    return cgutils.alloca_once(builder, kind)
