"""Leaky integrators: the membrane of a neuron that does not fire."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nord_snn._compat.spikingjelly import StatefulModule
from nord_snn.ops.checks import compute_dtype

__all__ = ["LeakyIntegrator"]


class LeakyIntegrator(StatefulModule):
    """Integrate a current with a leak, and return the membrane potential.

    ::

        i[t] = beta_syn * i[t-1] + x[t]
        v[t] = beta_mem * v[t-1] + (1 - beta_mem) * v_rest + gain * i[t]

    from ``v = v_rest`` and ``i = 0``. The constants are buffers, which are not trained. It is a SpikingJelly memory module:
    ``step_mode``, ``functional.reset_net`` and ``set_step_mode`` work on it; its state is ``v`` and ``i_syn``.

    Args:
        shape: shape of one row of the input: D, or a sequence such as ``[C, H, W]``.
        beta_mem: membrane decay in (0, 1], a number or a tensor that broadcasts to ``shape``; 1 integrates without a leak.
        gain: factor of the current, in the same way. Default: None, ``1 - beta_mem``, for a mean of the current.
        v_rest: resting potential, in the same way.
        beta_syn: synaptic decay in [0, 1), in the same way; 0 is no synaptic current.
        step_mode: ``"s"`` for one time step ``[N, *shape]`` per call, ``"m"`` for sequences ``[T, N, *shape]``.

    Raises:
        ValueError: a decay is not in its range, a constant does not broadcast to ``shape``, an input does not end with
            ``shape``, or its batch shape differs from that of the stored state.

    Source: ``LI`` and ``CubaLI`` of NIR (Pedersen et al. 2024), by forward Euler.

    Example:
        >>> mean = LeakyIntegrator(3, beta_mem=0.5, step_mode="m")
        >>> mean(torch.ones(3, 1, 3))[:, 0, 0].tolist()
        [0.5, 0.75, 0.875]
    """

    beta_mem: Tensor
    gain: Tensor
    v_rest: Tensor
    beta_syn: Tensor

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        beta_mem: float | Tensor = 0.9,
        gain: float | Tensor | None = None,
        v_rest: float | Tensor = 0.0,
        beta_syn: float | Tensor = 0.0,
        step_mode: str = "s",
    ) -> None:
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        mem, syn = torch.as_tensor(beta_mem), torch.as_tensor(beta_syn)
        if not bool(((mem > 0) & (mem <= 1)).all()):
            raise ValueError(f"beta_mem must lie in (0, 1], got {beta_mem}")
        if not bool(((syn >= 0) & (syn < 1)).all()):
            raise ValueError(f"beta_syn must lie in [0, 1), got {beta_syn}")
        constants = {"beta_mem": mem, "gain": 1 - mem if gain is None else gain, "v_rest": v_rest, "beta_syn": syn}
        for name, value in constants.items():
            self.register_buffer(name, self._constant(name, value))
        self.v: float | Tensor
        self.i_syn: float | Tensor
        self.register_memory("v", 0.0)
        self.register_memory("i_syn", 0.0)
        self.step_mode = step_mode

    def _constant(self, name: str, value: float | Tensor) -> Tensor:
        x = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.get_default_dtype()).clone()
        try:
            fits = torch.broadcast_shapes(x.shape, self.shape) == torch.Size(self.shape)
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"{name} must be a number or broadcast to {list(self.shape)}, got {list(x.shape)}")
        return x

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[object, ...], **kwargs: object
    ) -> tuple[tuple[Tensor, ...], tuple[object, ...]]:
        """Run one time step from explicit states ``(v, i_syn)``; the stored state is unchanged."""
        v, i_syn = self._step(inputs[0], *states)
        return (v.to(inputs[0].dtype),), (v, i_syn)

    def _step(self, x: Tensor, v: Any, i_syn: Any) -> tuple[Tensor, Tensor]:
        if tuple(x.shape[-len(self.shape) :]) != self.shape or not x.is_floating_point():
            layout = ", ".join(map(str, self.shape))
            raise ValueError(
                f"LeakyIntegrator expects a floating tensor [*, {layout}] in each time step, got {list(x.shape)}"
            )
        for state in (v, i_syn):
            if isinstance(state, Tensor) and state.shape != x.shape:
                raise ValueError(
                    f"LeakyIntegrator has state of shape {list(state.shape)}, but got input of shape {list(x.shape)} per time "
                    "step: call reset() before a batch of another shape"
                )
        dtype = compute_dtype(x)
        beta, gain, rest, beta_syn = (part.to(dtype) for part in (self.beta_mem, self.gain, self.v_rest, self.beta_syn))
        i_syn = beta_syn * i_syn + x.to(dtype)
        v = beta * (v if isinstance(v, Tensor) else rest) + (1 - beta) * rest + gain * i_syn
        return v, i_syn

    def forward(self, x: Tensor) -> Tensor:
        """Return the membrane potentials for input current ``x``, in its shape and dtype."""
        if not torch.compiler.is_compiling():
            self.check_not_recomputed()
        potentials = []
        for step in x if self.step_mode == "m" else (x,):
            self.v, self.i_syn = self._step(step, self.v, self.i_syn)
            potentials.append(self.v.to(x.dtype))
        return torch.stack(potentials) if self.step_mode == "m" else potentials[0]

    def extra_repr(self) -> str:
        """Return the shape and the step mode."""
        width: Any = self.shape[0] if len(self.shape) == 1 else list(self.shape)
        return f"{width}, step_mode={self.step_mode!r}"
