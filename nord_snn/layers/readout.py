"""MembraneReadout: one vector from the membrane potentials and spikes of all time steps."""

from typing import Any

import torch
from torch import Tensor, nn

from nord_snn.neurons import NeuronFactory, make_neuron
from nord_snn.neurons.factory import fire_with_membranes
from nord_snn.ops.checks import check_features, check_numbers, compute_dtype, without_autocast

__all__ = ["MembraneReadout"]


class MembraneReadout(nn.Module):
    """Return an exponential moving average of the membrane potentials of one layer of neurons, plus their firing rates.

    ``e[t] = d * e[t-1] + (1 - d) * v[t]`` from ``e = 0``, with v the membrane potential after reset, s the spikes and
    ``d = sigmoid(decay_logit)``, which is learnable; the output is ``e[T] + mean_t s[t]``. A firing rate alone would have
    only T + 1 possible values.

    Args:
        n_features: D.
        decay_logit: initial logit of d.
        neuron: factory of the neurons, which need the attributes ``store_v_seq`` and ``v_seq``, as SpikingJelly's have; None
            for ``AssociativeLIFNode``.

    Shapes: input current ``[T, N, *, D]`` -> ``[N, *, D]``: time steps, rows, any dimensions, neurons. Every call starts from
    rest.

    Raises:
        TypeError: the neurons do not have these attributes.
        RuntimeError: the neurons stored no membrane potentials, for example under SpikingJelly's memory optimisation
            (``memopt``).
        ValueError: the input has another rank or width.

    Source: the Nord spiking language model.

    Example:
        >>> readout = MembraneReadout(64)
        >>> readout(torch.randn(10, 4, 64)).shape
        torch.Size([4, 64])

        With SpikingJelly's neurons:

        >>> from spikingjelly.activation_based.neuron import LIFNode
        >>> MembraneReadout(64, neuron=lambda n: LIFNode())(torch.randn(10, 4, 64)).shape
        torch.Size([4, 64])
    """

    def __init__(self, n_features: int, decay_logit: float = 1.4, neuron: NeuronFactory | None = None) -> None:
        super().__init__()
        check_numbers(decay_logit=decay_logit)
        self.n_features = n_features
        self.lif: Any = make_neuron(neuron, n_features, store_v_seq=True)
        self._initial_decay_logit = decay_logit
        self.decay_logit = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset the decay to its initial value, but not the neurons."""
        nn.init.constant_(self.decay_logit, self._initial_decay_logit)

    def forward(self, x: Tensor) -> Tensor:
        """Return the readout ``[N, *, D]`` of the input current ``x [T, N, *, D]``."""
        check_features(x, self.n_features, type(self).__name__, "[T, N, *, D]")
        spikes, v_seq = fire_with_membranes(self.lif, x)
        if v_seq is None or (x.requires_grad and spikes.requires_grad and not v_seq.requires_grad):
            raise RuntimeError(
                "the neurons of MembraneReadout stored no membrane potentials: gradient checkpointing of the neurons alone "
                "(memopt) discards them; checkpoint the whole MembraneReadout, or nothing in it"
            )
        decay = self.decay_logit.to(compute_dtype(x)).sigmoid()
        steps_left = torch.arange(x.shape[0] - 1, -1, -1, device=x.device)
        weights = (1 - decay) * decay**steps_left  # e[T] is the sum of weights[t] * v[t]
        with without_autocast(x):
            mean = torch.tensordot(weights, v_seq.to(weights.dtype), dims=1)
        return mean.to(x.dtype) + spikes.mean(0)
