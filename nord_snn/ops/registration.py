"""Register kernels as ``torch.library`` ops, for torch.compile, dispatch modes and tensor subclasses."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nord_snn._compat.torch import dispatch_mode_is_active, kernels_are_opaque, tree_leaves
from nord_snn.ops.checks import check_storage, is_dense
from nord_snn.ops.dispatch import check_kernel

__all__ = ["Kernel", "register_op", "register_op_without_gradient"]


_OPAQUE = (
    "{}: torch.func, forward-mode derivatives, torch.jit.trace and ONNX export by tracing cannot trace a kernel: pass "
    "backend='torch'"
)


class Kernel(NamedTuple):
    """The implementation of a forward or backward pass.

    Attributes:
        run: function that computes the pass. It needs annotations, because ``torch.library`` infers the schema from its
            signature. The tensors of a forward pass are positional, its options keyword-only. No output may share
            memory with another output or with an input.
        fake: function with the signature of ``run`` that returns empty tensors in the shapes and dtypes of the outputs.
        direct: function that computes the pass if torch's dispatcher is not needed; it may return None for outputs that
            are not used. Default: None, ``run``.
    """

    run: Callable[..., Any]
    fake: Callable[..., Any]
    direct: Callable[..., Any] | None = None


def register_op(
    name: str,
    forward: Kernel,
    backward: Kernel,
    save: Callable[..., None],
    gradients: Callable[..., Any],
    checks: tuple[Callable[..., None], Callable[..., None]],
    differentiable: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register ``nord_snn::name`` and ``nord_snn::name_backward``; return the function to call.

    Under torch.compile, in a dispatch mode or with a tensor subclass, that function calls the registered op. Otherwise it
    runs the kernel directly, because the dispatcher takes more time than a small kernel.

    Args:
        name: name of the op, without the namespace.
        forward: forward pass.
        backward: backward pass.
        save: function ``(ctx, tensors, options, output)`` that saves in ``ctx`` what ``gradients`` needs.
        gradients: function ``(ctx, *grads, run)`` that calls the backward pass ``run`` and returns the gradients of all
            tensors.
        checks: functions of the arguments of the forward and of the backward pass that raise unless a kernel can take them. The
            registered ops call them, because ``torch.ops.nord_snn.name`` bypasses the checks of the public function.
        differentiable: function ``(tensors, options)`` that returns the first output, computed in plain PyTorch. With
            ``create_graph=True`` autograd differentiates this function, so that a second derivative exists. Default: None, a
            second derivative raises an error.
    """
    op = torch.library.custom_op(f"nord_snn::{name}", _checked(name, forward.run, checks[0]), mutates_args=())
    op.register_fake(forward.fake)
    backward_run = _checked(name, backward.run, checks[1])
    backward_op = torch.library.custom_op(f"nord_snn::{name}_backward", backward_run, mutates_args=())
    backward_op.register_fake(backward.fake)
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    n_tensors = sum(p.kind == positional for p in inspect.signature(forward.run).parameters.values())
    gradients = _explain_freed_graph(_with_second_derivative(gradients, name, differentiable, n_tensors))

    def setup_context(ctx: Any, inputs: Any, keyword_only_inputs: dict[str, Any], output: Any) -> None:
        save(ctx, inputs, keyword_only_inputs, output)

    op.register_autograd(functools.partial(gradients, run=backward_op), setup_context=setup_context)

    # One forward with ``ctx``: with a separate ``setup_context``, autograd.Function inspects signatures in every call.
    # ``apply`` takes no keywords, so the options are passed as a dict.
    forward_direct, backward_direct = forward.direct or forward.run, backward.direct or backward.run

    def forward_with_context(ctx: Any, *arguments: Any) -> Any:
        *tensors, options = arguments
        output = forward_direct(*tensors, **options)
        save(ctx, tensors, options, output)
        return output

    def run_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return *gradients(ctx, *grads, run=backward_direct), None

    methods = {"forward": staticmethod(forward_with_context), "backward": staticmethod(run_backward)}
    function: Any = type(f"nord_snn_{name}", (torch.autograd.Function,), methods)  # name shown by profilers

    def direct(*tensors: Any, **options: Any) -> Any:
        if kernels_are_opaque():
            raise RuntimeError(_OPAQUE.format(name))
        if _has_no_derivative(tensors):  # ``apply`` takes more time than a small kernel
            return forward_direct(*tensors, **options)
        return function.apply(*tensors, options)

    return _use_dispatcher_if_needed(op, direct)


def register_op_without_gradient(name: str, kernel: Kernel, check: Callable[..., None]) -> Callable[..., Any]:
    """Register ``nord_snn::name``; return the function to call, as :func:`register_op` does."""
    op = torch.library.custom_op(f"nord_snn::{name}", _checked(name, kernel.run, check), mutates_args=())
    op.register_fake(kernel.fake)

    def direct(*tensors: Any, **options: Any) -> Any:
        if kernels_are_opaque():
            raise RuntimeError(_OPAQUE.format(name))
        return (kernel.direct or kernel.run)(*tensors, **options)

    return _use_dispatcher_if_needed(op, direct)


def _checked(name: str, run: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    """Return ``run`` after a check of the backend and of the arguments."""
    place = list(inspect.signature(run).parameters).index("backend")

    @functools.wraps(run)
    def checked(*arguments: Any, **options: Any) -> Any:
        backend = options["backend"] if "backend" in options else arguments[place]
        check_kernel(name, backend, arguments[0].device.type)
        for x in tree_leaves((arguments, options)):
            if isinstance(x, Tensor) and x.is_cpu and is_dense(x):
                check_storage(x)
        check(*arguments, **options)
        return run(*arguments, **options)

    return checked


def _use_dispatcher_if_needed(op: Callable[..., Any], direct: Callable[..., Any]) -> Callable[..., Any]:
    def call(*tensors: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or dispatch_mode_is_active() or _any_subclass(tensors):
            return op(*tensors, **options)
        return direct(*tensors, **options)

    return call


def _has_no_derivative(tensors: Iterable[Any]) -> bool:
    """Return whether autograd has nothing to record: gradients are disabled, or no tensor requires one."""
    return not torch.is_grad_enabled() or not any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


_PLAIN_TYPES = {Tensor, torch.nn.Parameter, type(None), int, float, bool, str}


def _any_subclass(arguments: Iterable[Any]) -> bool:
    """Return whether an argument is of a subclass of Tensor."""
    return not _PLAIN_TYPES.issuperset(map(type, arguments))


def _explain_freed_graph(gradients: Callable[..., Any]) -> Callable[..., Any]:
    """Replace torch's error about a freed graph by one that names the usual cause, a state of an earlier call."""

    @functools.wraps(gradients)
    def wrapped(ctx: Any, *grads: Any, run: Any) -> Any:
        try:
            return gradients(ctx, *grads, run=run)
        except RuntimeError as error:
            if "a second time" not in str(error):
                raise
            raise RuntimeError(
                "backward reached a graph that an earlier backward has freed, most likely through a state of an earlier "
                "call: detach states (functional.detach_net) or reset them (functional.reset_net) between the two backward "
                "passes, or keep the graph with retain_graph=True"
            ) from None

    return wrapped


def _with_second_derivative(
    gradients: Callable[..., Any], name: str, differentiable: Callable[..., Any] | None, n_tensors: int
) -> Callable[..., Any]:
    """Compute a second derivative by ``differentiable``, or raise: autograd would treat a kernel's output as a constant."""
    message = f"the kernels of {name} have no second derivative: backend='torch' has one"

    @functools.wraps(gradients)
    def wrapped(ctx: Any, *grads: Any, run: Any) -> Any:
        if not torch.is_grad_enabled():
            return gradients(ctx, *grads, run=run)
        if differentiable is not None and grads[0] is not None:
            return _gradients_with_graph(differentiable, n_tensors, ctx, grads[0])
        unpacked_ctx = _Unpacked(ctx)
        with torch.no_grad():
            results = gradients(unpacked_ctx, *grads, run=run)
        sources = [x for x in (*grads, *unpacked_ctx.saved_tensors) if x is not None and x.requires_grad]
        return tuple(None if x is None else _Refusal.apply(message, x, *sources) for x in results)

    return wrapped


def _gradients_with_graph(
    differentiable: Callable[..., Any], n: int, ctx: Any, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the n tensors of a call; the gradients have derivatives themselves."""
    # Views are new nodes of the graph: if one tensor depends on another, the gradient of the other excludes that path.
    tensors: list[Any] = [x if x is None else x.view_as(x) for x in ctx.saved_tensors[:n]]
    needed = [x for x, need in zip(tensors, ctx.needs_input_grad[:n], strict=True) if need]
    output = differentiable(tensors, ctx.options)
    gradients = iter(torch.autograd.grad(output, needed, grad, create_graph=True, allow_unused=True))
    return tuple(next(gradients) if need else None for need in ctx.needs_input_grad[:n])


class _Unpacked:
    """An autograd context that unpacks its saved tensors once, because activation checkpointing forbids a second time."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Refusal(torch.autograd.Function):
    """Return the tensor ``x`` unchanged; raise an error when a backward pass reaches ``x`` or one of ``sources``."""

    @staticmethod
    def forward(ctx: Any, message: str, x: Tensor, *sources: Tensor) -> Tensor:
        ctx.message = message
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(ctx.message)
