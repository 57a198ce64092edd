"""Run snnTorch's neurons over whole sequences, as the neurons of a layer of nord-snn."""

from typing import Any

import snntorch
import torch
from torch import Tensor, nn

from nord_snn._compat.torch import StatePrecisionMixin, detached_state
from nord_snn.integrations.snntorch.base import STORED, OneStepNeuron

__all__ = ["MultiStep"]


class MultiStep(StatePrecisionMixin, nn.Module):
    """Run snnTorch's neurons over a whole sequence from rest, for the argument ``neuron`` of a layer of nord-snn.

    Args:
        neuron: a neuron module of snnTorch.

    Attributes:
        store_v_seq: store the membrane potentials of the last call in ``v_seq``.
        v_seq: the stored membrane potentials, ``[T, N, *, D]``, or None.

    Shapes: ``[T, N, *, D]`` -> spikes ``[T, N, *, D]``. The states that ``neuron`` stores are restored after the call.

    Raises:
        TypeError: ``neuron`` is not a snnTorch neuron.
        ValueError: ``store_v_seq`` is set, but the neuron does not return ``mem`` (``init_hidden=True`` without
            ``output=True``).

    Example:
        >>> from nord_snn.layers import SpikingFeedForward
        >>> ffn = SpikingFeedForward(16, 32, neuron=lambda n: MultiStep(snntorch.Leaky(beta=0.9)))
        >>> ffn(torch.rand(5, 2, 16)).shape
        torch.Size([5, 2, 16])
    """

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        if not isinstance(neuron, snntorch.SpikingNeuron):
            raise TypeError(f"MultiStep expects a neuron of snnTorch, got {type(neuron).__name__}")
        self.neuron = neuron
        self.store_v_seq = False
        self.v_seq: Tensor | None = None

    def forward(self, x_seq: Tensor) -> Tensor:
        """Run all time steps, one after the other, from rest."""
        if x_seq.ndim < 2 or not len(x_seq):
            raise ValueError(
                f"MultiStep expects shape [T, N, *, D] with at least one time step, got {list(x_seq.shape)}"
            )
        saved = {name: getattr(self.neuron, name) for name in _saved_names(self.neuron)}
        try:
            return self._run(x_seq)
        finally:
            for name, value in saved.items():
                setattr(self.neuron, name, value)

    def get_state(self) -> dict[str, Any]:
        """Return the stored membrane potentials."""
        return {"v_seq": self.v_seq}

    def set_state(self, state: dict[str, Any]) -> None:
        """Set the stored membrane potentials."""
        self.v_seq = state["v_seq"]

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for copies and pickles, with detached membrane potentials."""
        return self.__dict__ | {"v_seq": detached_state(self.v_seq)}

    def _run(self, x_seq: Tensor) -> Tensor:
        states = self._rest(x_seq[0])
        spikes, membranes = [], []
        for x in x_seq:
            out = self.neuron(x, *states)
            first, *more = out if isinstance(out, tuple) else (out,)
            parts = (first.to(x.dtype), *more)  # snnTorch's surrogates return float32 for every input dtype
            spikes.append(parts[0])
            if self.store_v_seq:
                if len(parts) == 1:
                    raise ValueError(
                        f"{type(self.neuron).__name__} with init_hidden=True must have output=True if a layer reads v_seq"
                    )
                membranes.append(parts[-1])
            # Recurrent neurons also receive their last spikes.
            states = () if self.neuron.init_hidden else parts[-len(states) :]
        self.v_seq = torch.stack(membranes) if self.store_v_seq else None
        return torch.stack(spikes)

    def _rest(self, x: Tensor) -> tuple[Tensor, ...]:
        """Set the neuron's states to rest and return them as arguments, unless it has ``init_hidden``."""
        names = _state_names(self.neuron)
        if isinstance(self.neuron, OneStepNeuron):
            self.neuron.rest_like(x)
            return () if self.neuron.init_hidden else tuple(getattr(self.neuron, f"_{name}") for name in names)
        zeros = {name: torch.zeros_like(x) for name in names}
        for name, value in zeros.items():
            setattr(self.neuron, name, value)
        return () if self.neuron.init_hidden else tuple(zeros.values())


def _state_names(neuron: nn.Module) -> tuple[str, ...]:
    """Return the names of a neuron's state attributes, in the order of its arguments."""
    known: dict[type, tuple[str, ...]] = {
        snntorch.RSynaptic: ("spk", "syn", "mem"),
        snntorch.RLeaky: ("spk", "mem"),
        snntorch.Alpha: ("syn_exc", "syn_inh", "mem"),
        snntorch.Synaptic: ("syn", "mem"),
        snntorch.Leaky: ("mem",),
        snntorch.Lapicque: ("mem",),
    }
    for kind, names in known.items():
        if isinstance(neuron, kind):
            return names
    raise TypeError("MultiStep expects Leaky, Lapicque, Synaptic, Alpha, RLeaky, "
                     "RSynaptic, AssociativeLeaky or AssociativeSynaptic, got "
                    f"{type(neuron).__name__}, whose states are unknown")  # fmt: skip


def _saved_names(neuron: nn.Module) -> tuple[str, ...]:
    """Return the attributes to save and restore."""
    if isinstance(neuron, OneStepNeuron):
        return STORED
    return _state_names(neuron)
