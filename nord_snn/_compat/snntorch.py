"""Private names of snnTorch. Written for 1.0 and tested with it."""

from typing import Any

import snntorch
from torch import nn

from nord_snn._compat.torch import KeepsStatePrecision, without_graph

__all__ = ["SynapticWithOwnState"]


class SynapticWithOwnState(KeepsStatePrecision, snntorch.Synaptic):
    """A ``snntorch.Synaptic`` by class and life cycle, whose decays, threshold and states are its subclass's.

    ``Synaptic.__init__`` would register buffers under the names of the subclass's properties, so it is not called; what
    ``snntorch.utils.reset`` and the base class read is set here. States are buffers that ``state_dict`` leaves out.

    Args:
        init_hidden: keep the states in the module.
        output: with ``init_hidden``, return the states all the same.
    """

    def __init__(self, init_hidden: bool, output: bool) -> None:
        nn.Module.__init__(self)
        self.init_hidden, self.output = init_hidden, output
        self.inhibition, self.state_quant, self._reset_mechanism = False, False, "subtract"

    def register(self) -> None:
        """Enter the list in which ``snntorch.utils.reset`` finds instances; call it when nothing can fail any more."""
        snntorch.SpikingNeuron.instances.append(self)

    def get_state(self) -> dict[str, Any]:
        """Return the states, which are this module's own buffers."""
        return dict(self._buffers)

    def set_state(self, state: dict[str, Any]) -> None:
        """Set the states, past the setters that clear the refractory counter."""
        self._buffers.update(state)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles have: the states, but not the graph behind them."""
        return self.__dict__ | {"_buffers": {name: without_graph(value) for name, value in self._buffers.items()}}
