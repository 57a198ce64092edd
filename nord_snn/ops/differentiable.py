"""An op of torch.library with gradients, and the short way to its kernel when nobody watches."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["differentiable"]


def differentiable(
    op: Any, backward_op: Any, setup_context: Callable[..., None], gradients: Callable[..., Any]
) -> Callable[..., Any]:
    """Give ``op`` its gradients, and return what to call in its place.

    ``gradients(ctx, *grads, run)`` computes them by ``run``, which is ``backward_op`` or the function under it. Ops are what
    torch.compile, dispatch modes and tensor subclasses see. Everywhere else the functions under them are called at once:
    the dispatcher's way from Python to Python and back takes longer than a small kernel.
    """
    gradients = _says_what_was_freed(gradients)
    op.register_autograd(functools.partial(gradients, run=backward_op), setup_context=setup_context)

    # One function that also fills the context: of two, torch would inspect the signature on every call.
    def forward(ctx: Any, *arguments: Any) -> Any:
        output = op._init_fn(*arguments)
        setup_context(ctx, arguments, output)
        return output

    backward = functools.partial(gradients, run=backward_op._init_fn)
    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    direct: Any = type(op._name.replace("::", "_"), (torch.autograd.Function,), parts)  # profilers show the name

    def call(*arguments: Any) -> Any:
        watched = torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or not _plain(arguments[0])
        return op(*arguments) if watched else direct.apply(*arguments)

    return call


def _says_what_was_freed(gradients: Callable[..., Any]) -> Callable[..., Any]:
    """Torch says that the graph is gone; in a network with states it was one of those that led there."""

    def told(ctx: Any, *grads: Any, run: Any) -> Any:
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

    return told


def _plain(x: Any) -> bool:
    return type(x) in (Tensor, torch.nn.Parameter)
