"""LeakyIntegrator: the membrane potential of a neuron that does not fire."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nord_snn._compat.spikingjelly import StatefulModule
from nord_snn.neurons.state import state_tensor
from nord_snn.ops.checks import as_count, as_number, check_tensor, compute_dtype, describe, is_dense

__all__ = ["LeakyIntegrator"]

_Tensors = tuple[Tensor, ...]
_States = tuple[Any, ...]


def _shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return the shape of one sample as a tuple."""
    sizes = tuple(shape) if isinstance(shape, (list, tuple)) else (shape,)
    return tuple([as_count(size, "shape") for size in sizes])


class LeakyIntegrator(StatefulModule):
    """Integrate a current with a leak, and return the membrane potential.

    ::

        i[t] = beta_syn * i[t-1] + x[t]
        v[t] = beta_mem * v[t-1] + (1 - beta_mem) * v_rest + gain * i[t]

    from ``v = v_rest`` and ``i = 0``. It is a ``MemoryModule`` of SpikingJelly: ``step_mode``, ``functional.reset_net`` and
    ``set_step_mode`` work on it. Its state, ``v`` and ``i_syn``, are tensors in the shape of one time step, or numbers that
    apply to all neurons. At rest ``v`` is ``v_rest``.

    ``beta_mem``, ``gain``, ``v_rest`` and ``beta_syn`` are numbers, or tensors that broadcast to ``shape``. They are buffers, so
    they are not trained.

    Args:
        shape: shape of one sample at one time step, without the batch: D, or a sequence such as ``[C, H, W]``.
        beta_mem: membrane decay in (0, 1]; 1 integrates without a leak. Default: 0.9.
        gain: factor of the current. Default: None, ``1 - beta_mem``, which makes ``v - v_rest`` an exponential moving average
            of the current.
        v_rest: resting potential. Default: 0.
        beta_syn: synaptic decay in [0, 1). Default: 0, the synaptic current is the input.
        step_mode: ``"s"`` for one time step ``[N, *shape]`` per call, ``"m"`` for sequences ``[T, N, *shape]``. Default:
            ``"s"``.

    Raises:
        ValueError: a decay is not in its range, a constant does not broadcast to ``shape``, an input does not end with
            ``shape`` or has no time step, or the batch shape of the input differs from that of the stored state.

    Source: ``LI`` and ``CubaLI`` of NIR (Pedersen et al. 2024), discretised with forward Euler.

    Example:
        >>> average = LeakyIntegrator(3, beta_mem=0.5, step_mode="m")
        >>> average(torch.ones(3, 1, 3))[:, 0, 0].tolist()
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
        self.shape = _shape(shape)
        for name, value in (("beta_mem", beta_mem), ("gain", gain), ("v_rest", v_rest), ("beta_syn", beta_syn)):
            if isinstance(value, Tensor):
                check_tensor(value, name, "that broadcasts to the shape")
            elif value is not None or name != "gain":
                as_number(value, name)
        if not isinstance(step_mode, str):
            raise TypeError(f"step_mode must be 's' or 'm', got {describe(step_mode)}")
        membrane_decay, synaptic_decay = torch.as_tensor(beta_mem), torch.as_tensor(beta_syn)
        if not bool(((membrane_decay > 0) & (membrane_decay <= 1)).all()):
            raise ValueError(f"beta_mem must lie in (0, 1], got {describe(beta_mem)}")
        if not bool(((synaptic_decay >= 0) & (synaptic_decay < 1)).all()):
            raise ValueError(f"beta_syn must lie in [0, 1), got {describe(beta_syn)}")
        gain = 1 - membrane_decay if gain is None else gain
        constants = {"beta_mem": membrane_decay, "gain": gain, "v_rest": v_rest, "beta_syn": synaptic_decay}
        for name, value in constants.items():
            self.register_buffer(name, self._constant(name, value))
        self.v: float | Tensor
        self.i_syn: float | Tensor
        # None stands for rest: v then returns the buffer v_rest, also after that is loaded or moved.
        self.register_memory("v", None)
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

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name != "v" or value is not None:
            return value
        return self.v_rest.item() if self.v_rest.numel() == 1 else self.v_rest.clone()

    def single_step_functional_forward(
        self, inputs: _Tensors, states: _States, **kwargs: object
    ) -> tuple[_Tensors, _States]:
        """Run one time step from explicit states ``(v, i_syn)``; the stored state is unchanged."""
        x = inputs[0]
        self._check_input(x, "s")
        state = self._step(x, *self.materialize_states(inputs, states, "s"))
        return (state[0].to(x.dtype),), state

    def multi_step_functional_forward(
        self, inputs: _Tensors, states: _States, **kwargs: object
    ) -> tuple[_Tensors, _States]:
        """Run a sequence from explicit states ``(v, i_syn)``; the stored state is unchanged."""
        x_seq = inputs[0]
        self._check_input(x_seq, "m")
        state = self.materialize_states(inputs, states, "m")
        potentials = []
        for x in x_seq:
            state = self._step(x, *state)
            potentials.append(state[0].to(x.dtype))
        return (torch.stack(potentials),), state

    def materialize_states(self, inputs: _Tensors, states: _States, step_mode: str) -> _Tensors:
        """Turn states into tensors for this input; raise if state tensors have another batch shape."""
        x, (v, i_syn) = inputs[0], states
        step_shape, dtype, owner = x.shape[1:] if step_mode == "m" else x.shape, compute_dtype(x), type(self).__name__
        rest = self.v_rest.to(dtype).expand(step_shape)
        return (
            rest if v is None else state_tensor(v, x, step_shape, dtype, owner),
            state_tensor(i_syn, x, step_shape, dtype, owner),
        )

    def _check_input(self, x: Tensor, step_mode: str) -> None:
        layout = f"[{'T, ' if step_mode == 'm' else ''}*, {', '.join(map(str, self.shape))}]"
        if not isinstance(x, Tensor) or not is_dense(x) or not x.is_floating_point():
            got = f"dtype {x.dtype}" if isinstance(x, Tensor) and is_dense(x) else describe(x)
            raise TypeError(f"{type(self).__name__} expects a floating-point tensor of shape {layout}, got {got}")
        step_shape = x.shape[1:] if step_mode == "m" else x.shape
        if tuple(step_shape[len(step_shape) - len(self.shape) :]) != self.shape:
            raise ValueError(f"{type(self).__name__} expects shape {layout}, got {list(x.shape)}")
        if step_mode == "m" and not len(x):
            raise ValueError(f"{type(self).__name__} expects shape {layout} with at least one time step, got T = 0")

    def _step(self, x: Tensor, v: Tensor, i_syn: Tensor) -> tuple[Tensor, Tensor]:
        dtype = v.dtype
        beta, gain, rest, beta_syn = (part.to(dtype) for part in (self.beta_mem, self.gain, self.v_rest, self.beta_syn))
        i_syn = beta_syn * i_syn + x.to(dtype)
        return beta * v + (1 - beta) * rest + gain * i_syn, i_syn

    def forward(self, x: Tensor) -> Tensor:
        """Return the membrane potentials for input current ``x``, in its shape and dtype."""
        if not torch.compiler.is_compiling():
            self.check_not_recomputed()
        run = self.multi_step_functional_forward if self.step_mode == "m" else self.single_step_functional_forward
        (potentials,), (v, i_syn) = run((x,), self.get_memories("v", "i_syn"))
        self.set_memories({"v": v, "i_syn": i_syn})
        return potentials

    def extra_repr(self) -> str:
        """Return the shape and the step mode."""
        width: Any = self.shape[0] if len(self.shape) == 1 else list(self.shape)
        return f"{width}, step_mode={self.step_mode!r}"
