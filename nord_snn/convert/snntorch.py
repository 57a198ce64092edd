"""The protocol of snnTorch's neurons: ``spk, mem = lif(x, mem)``, ``spk, syn, mem = lif(x, syn, mem)``, or ``spk = lif(x)``."""

from typing import Any

import snntorch
from torch import nn

from nord_snn.convert.protocols import Protocol, require_our_node
from nord_snn.integrations.snntorch.leaky import CalledAsLeaky
from nord_snn.integrations.snntorch.synaptic import CalledAsSynaptic
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.neurons.detection import is_snntorch

__all__ = ["PROTOCOL"]


def _is_neuron(module: nn.Module) -> bool:
    return is_snntorch(module) and not any(isinstance(inner, AssociativeLIFNode) for inner in module.modules())


def _runs_sequences(module: nn.Module) -> bool:
    return False


def _why_not(module: nn.Module) -> str:
    if type(module) in (snntorch.Leaky, snntorch.Lapicque, snntorch.Synaptic):
        return ""
    return f"snnTorch's Leaky, Lapicque and Synaptic can be replaced, {type(module).__name__} has other states"


def _put(module: Any, new_neuron: nn.Module) -> nn.Module:
    node = require_our_node(new_neuron, "snnTorch")
    if node.dynamics.v_rest:
        raise ValueError(
            f"snnTorch resets membranes to 0, so the resting potential must be 0, got {node.dynamics.v_rest}"
        )
    kind = CalledAsSynaptic if isinstance(module, snntorch.Synaptic) else CalledAsLeaky
    return kind(node, module.init_hidden, module.output)


PROTOCOL = Protocol(_is_neuron, _runs_sequences, _why_not, AssociativeLIFNode.like, _put)
