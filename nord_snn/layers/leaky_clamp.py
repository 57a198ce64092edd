"""LeakyClamp: a leaky ReLU with a learnable lower bound."""

import math

import torch
from torch import Tensor, nn

from nord_snn.ops import leaky_clamp
from nord_snn.ops.checks import as_count, check_features, check_numbers
from nord_snn.ops.dispatch import check_backend

__all__ = ["LeakyClamp"]


class LeakyClamp(nn.Module):
    """Return ``x`` where ``x >= 0``, else ``max(leak * x, floor)``, with ``floor`` and ``leak`` learnable per channel.

    ReLU discards how far below zero its input was; this clamp keeps negative values, scaled by ``leak``, down to ``floor``.

    Args:
        n_features: D, the number of channels.
        floor: initial lower bound.
        leak: initial slope for negative ``x``, in (0, 1); stored as a logit.
        backend: ``"auto"``, ``"torch"`` or ``"numba"``, see :func:`nord_snn.ops.leaky_clamp`.

    Shapes: ``[*, D]`` -> ``[*, D]``.

    Raises:
        ValueError: ``leak`` is not in (0, 1), or the input's last dimension is not D.

    Source: the Nord spiking language model; the slope as in leaky and parametric ReLU (Maas et al. 2013, He et al. 2015).

    Example:
        >>> clamp = LeakyClamp(1)
        >>> x = torch.tensor([[2.0], [-0.5], [-9.0]])
        >>> clamp(x).flatten().tolist() == [2.0, clamp.leak.item() * -0.5, clamp.floor.item()]
        True
    """

    #: SpikingJelly 0.0.0.0.14's ``functional.set_backend`` skips modules that do not list the backend here.
    supported_backends = ("auto", "torch", "numba")

    def __init__(self, n_features: int, floor: float = -0.1, leak: float = 0.1, backend: str = "auto") -> None:
        super().__init__()
        as_count(n_features, "n_features")
        check_numbers(floor=floor, leak=leak)
        check_backend(backend)
        if not 0 < leak < 1:
            raise ValueError(f"leak must lie in (0, 1), got {leak}")
        self.n_features, self.backend = n_features, backend
        self._initial = (floor, math.log(leak / (1 - leak)))
        self.floor = nn.Parameter(torch.empty(n_features))
        self.leak_logit = nn.Parameter(torch.empty(n_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset floor and leak to their initial values."""
        nn.init.constant_(self.floor, self._initial[0])
        nn.init.constant_(self.leak_logit, self._initial[1])

    @property
    def leak(self) -> Tensor:
        """Return the slope for negative inputs, ``[D]``."""
        return self.leak_logit.sigmoid()

    def forward(self, x: Tensor, branch: Tensor | None = None, gain: Tensor | None = None) -> Tensor:
        """Clamp ``x [*, D]``, or ``x + gain * branch`` with ``branch [*, D]`` and ``gain [D]``, in one pass over memory."""
        check_features(x, self.n_features, type(self).__name__, "[*, D]")
        return leaky_clamp(x, branch, gain, leak=self.leak, floor=self.floor, backend=self.backend)

    def extra_repr(self) -> str:
        """Return the width."""
        return f"n_features={self.n_features}"
