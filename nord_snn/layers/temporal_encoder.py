"""MultiScaleTemporalEncoder: one feature vector becomes a few time steps of input current."""

import torch
from torch import Tensor, nn

from nord_snn.ops.checks import check_features

__all__ = ["MultiScaleTemporalEncoder"]


class MultiScaleTemporalEncoder(nn.Module):
    """Spread features over fast steps of strong current, then slow steps of weak current.

    With ``p = projection(x)``, step k of a path is ``sigmoid(basis[k]) * p * scale``: every step has its own learnable gate
    over the features. The fast path drives the first spikes, the slow path holds a context for what decays slowly.

    Args:
        in_features: width of the input, D_in.
        out_features: D, the number of neurons that are driven; None for D_in.
        t_fast: fast steps, which come first.
        t_slow: slow steps; 0 for none.
        fast_scale: initial strength of the fast path.
        slow_scale: initial strength of the slow path.

    Shapes: ``[*, D_in]`` -> ``[t_fast + t_slow, *, D]``. It takes features, not token ids: embed those first.

    Raises:
        ValueError: there are no fast steps, or the input's last dimension is not D_in.

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
        if t_fast < 1 or t_slow < 0:
            raise ValueError(f"expected t_fast >= 1 and t_slow >= 0, got {t_fast} and {t_slow}")
        out_features = in_features if out_features is None else out_features
        self.in_features, self.t_fast, self.t_slow = in_features, t_fast, t_slow
        self.projection = nn.Linear(in_features, out_features, bias=False)
        self._initial_scales = (fast_scale, slow_scale)
        self.fast_basis = nn.Parameter(torch.empty(t_fast, out_features))
        self.slow_basis = nn.Parameter(torch.empty(t_slow, out_features))
        self.fast_scale = nn.Parameter(torch.empty(1))
        self.slow_scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bases anew and put the scales back; the projection has its own."""
        nn.init.normal_(self.fast_basis, std=0.02)
        nn.init.normal_(self.slow_basis, std=0.02)
        nn.init.constant_(self.fast_scale, self._initial_scales[0])
        nn.init.constant_(self.slow_scale, self._initial_scales[1])

    def forward(self, x: Tensor) -> Tensor:
        """Current ``[T, *, D]`` for features ``[*, D_in]``."""
        check_features(x, self.in_features, type(self).__name__, "[*, D]")
        gates = torch.cat((self.fast_basis.sigmoid() * self.fast_scale, self.slow_basis.sigmoid() * self.slow_scale))
        return torch.einsum("td,...d->t...d", gates, self.projection(x))

    def extra_repr(self) -> str:
        """The steps."""
        return f"t_fast={self.t_fast}, t_slow={self.t_slow}"
