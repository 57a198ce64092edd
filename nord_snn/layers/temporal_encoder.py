"""MultiScaleTemporalEncoder: input current over a few time steps from one feature vector."""

import torch
from torch import Tensor, nn

from nord_snn.ops.checks import as_count, check_features, check_numbers

__all__ = ["MultiScaleTemporalEncoder"]


class MultiScaleTemporalEncoder(nn.Module):
    """Return input current over time: time steps of the fast path with strong current, then of the slow path with weak.

    With ``p = projection(x)``, a linear map, the current at time step k of a path is ``sigmoid(basis[k]) * p * scale``. Each
    path has its own basis (a gate per time step and feature) and scale, both learnable. The fast path causes the first spikes;
    the slow path adds current while membrane potentials decay.

    Args:
        in_features: width of the input, D_in.
        out_features: D, the number of neurons that receive the current; None for D_in.
        t_fast: number of time steps of the fast path.
        t_slow: number of time steps of the slow path; 0 for none.
        fast_scale: initial scale of the fast path.
        slow_scale: initial scale of the slow path.

    Shapes: features ``[*, D_in]`` -> current ``[t_fast + t_slow, *, D]``; token ids need an embedding first.

    Raises:
        ValueError: ``t_fast`` is less than 1, ``t_slow`` is negative, or the input's last dimension is not D_in.

    Source: the Nord spiking language model.

    Example:
        >>> encoder = MultiScaleTemporalEncoder(16, t_fast=8, t_slow=2)
        >>> encoder(torch.randn(4, 16)).shape
        torch.Size([10, 4, 16])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        t_fast: int = 8,
        t_slow: int = 2,
        fast_scale: float = 15.0,
        slow_scale: float = 5.0,
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        for name, width in (("in_features", in_features), ("out_features", out_features)):
            as_count(width, name)
        as_count(t_fast, "t_fast")
        as_count(t_slow, "t_slow", 0)
        check_numbers(fast_scale=fast_scale, slow_scale=slow_scale)
        self.in_features, self.t_fast, self.t_slow = in_features, t_fast, t_slow
        self.projection = nn.Linear(in_features, out_features, bias=False)
        self._initial_scales = (fast_scale, slow_scale)
        self.fast_basis = nn.Parameter(torch.empty(t_fast, out_features))
        self.slow_basis = nn.Parameter(torch.empty(t_slow, out_features))
        self.fast_scale = nn.Parameter(torch.empty(1))
        self.slow_scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new bases and reset the scales, but not the projection."""
        nn.init.normal_(self.fast_basis, std=0.02)
        nn.init.normal_(self.slow_basis, std=0.02)
        nn.init.constant_(self.fast_scale, self._initial_scales[0])
        nn.init.constant_(self.slow_scale, self._initial_scales[1])

    def forward(self, x: Tensor) -> Tensor:
        """Return the current ``[T, *, D]`` for features ``[*, D_in]``."""
        check_features(x, self.in_features, type(self).__name__, "[*, D]")
        gates = torch.cat((self.fast_basis.sigmoid() * self.fast_scale, self.slow_basis.sigmoid() * self.slow_scale))
        return torch.einsum("td,...d->t...d", gates, self.projection(x))

    def extra_repr(self) -> str:
        """Return the numbers of time steps."""
        return f"t_fast={self.t_fast}, t_slow={self.t_slow}"
