"""Register kernels with ``torch.library``, as ops that torch.compile, dispatch modes and tensor subclasses see."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nord_snn._compat.torch import dispatch_mode_is_active

__all__ = ["Kernel", "register_op", "register_op_without_gradient"]


class Kernel(NamedTuple):
    """One pass of an op.

    Attributes:
        run: computes it; annotated, since ``torch.library`` reads the schema off its signature. No output may share memory
            with another one or with an input.
        fake: the same signature; returns empty tensors of the right shapes and dtypes.
    """

    run: Callable[..., Any]
    fake: Callable[..., Any]


def register_op(
    name: str,
    forward: Kernel,
    backward: Kernel,
    setup_context: Callable[..., None],
    gradients: Callable[..., Any],
    second_derivative: str,
) -> Callable[..., Any]:
    """Register ``nord_snn::name`` and ``nord_snn::name_backward``; return the function to call.

    Under torch.compile, a dispatch mode or a tensor subclass that function calls the registered op. Otherwise it runs the
    kernel directly, because the dispatcher costs more than a small kernel.

    Args:
        name: of the op.
        forward: its forward pass.
        backward: its backward pass.
        setup_context: ``(ctx, inputs, output)``, as ``torch.library.register_autograd`` takes it.
        gradients: ``(ctx, *grads, run)``: the gradients of all inputs, computed by ``run``, a backward pass.
        second_derivative: what to use for a second derivative, which the kernels do not have; for the message that refuses it.
    """
    op = torch.library.custom_op(f"nord_snn::{name}", forward.run, mutates_args=())
    op.register_fake(forward.fake)
    backward_op = torch.library.custom_op(f"nord_snn::{name}_backward", backward.run, mutates_args=())
    backward_op.register_fake(backward.fake)
    gradients = _explain_freed_graph(_refuse_second_derivative(gradients, name, second_derivative))
    op.register_autograd(functools.partial(gradients, run=backward_op), setup_context=setup_context)

    # Defined with ``ctx``: with a ``setup_context`` of its own, autograd.Function inspects signatures in every call.
    def forward_with_context(ctx: Any, *arguments: Any) -> Any:
        output = forward.run(*arguments)
        setup_context(ctx, arguments, output)
        return output

    run_backward = functools.partial(gradients, run=backward.run)
    parts = {"forward": staticmethod(forward_with_context), "backward": staticmethod(run_backward)}
    direct: Any = type(f"nord_snn_{name}", (torch.autograd.Function,), parts)  # profilers show this name

    return _through_the_dispatcher_if_needed(op, direct.apply)


def register_op_without_gradient(name: str, kernel: Kernel) -> Callable[..., Any]:
    """Register ``nord_snn::name``; return the function to call, as :func:`register_op` does."""
    op = torch.library.custom_op(f"nord_snn::{name}", kernel.run, mutates_args=())
    op.register_fake(kernel.fake)
    return _through_the_dispatcher_if_needed(op, kernel.run)


def _through_the_dispatcher_if_needed(op: Callable[..., Any], direct: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or dispatch_mode_is_active() or _any_subclass(arguments):
            return op(*arguments)
        return direct(*arguments)

    return call


def _any_subclass(arguments: Iterable[Any]) -> bool:
    return any(isinstance(x, Tensor) and type(x) not in (Tensor, torch.nn.Parameter) for x in arguments)


def _explain_freed_graph(gradients: Callable[..., Any]) -> Callable[..., Any]:
    """Raise torch's error about a freed graph again, with what to do about states that were carried over."""

    @functools.wraps(gradients)
    def wrapped(ctx: Any, *grads: Any, run: Any) -> Any:
        try:
            return gradients(ctx, *grads, run=run)
        except RuntimeError as error:
            if "a second time" not in str(error):
                raise
            raise RuntimeError(
                "backward reached a graph that an earlier backward has freed, most likely through a state that was carried "
                "over: detach states (functional.detach_net) or reset them (functional.reset_net) between the two, or keep "
                "the graph with retain_graph=True"
            ) from None

    return wrapped


def _refuse_second_derivative(gradients: Callable[..., Any], name: str, cure: str) -> Callable[..., Any]:
    """Raise when a gradient is differentiated again: a kernel's output would count as a constant."""
    message = f"the kernels of {name} have no second derivative: {cure}"

    @functools.wraps(gradients)
    def wrapped(ctx: Any, *grads: Any, run: Any) -> Any:
        if not torch.is_grad_enabled():
            return gradients(ctx, *grads, run=run)
        once = _Unpacked(ctx)
        with torch.no_grad():
            results = gradients(once, *grads, run=run)
        sources = [x for x in (*grads, *once.saved_tensors) if x is not None and x.requires_grad]
        return tuple(None if x is None else _Refusal.apply(message, x, *sources) for x in results)

    return wrapped


class _Unpacked:
    """A context whose saved tensors were unpacked once, as activation checkpointing allows."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Refusal(torch.autograd.Function):
    """The identity on its first tensor; raises in the backward pass to any of them."""

    @staticmethod
    def forward(ctx: Any, message: str, x: Tensor, *sources: Tensor) -> Tensor:
        ctx.message = message
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(ctx.message)
