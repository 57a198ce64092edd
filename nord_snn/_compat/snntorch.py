"""Private names of snnTorch. Written for 1.0 and tested with it."""

from typing import Any

import snntorch
from torch import nn

from nord_snn._compat.torch import StatePrecisionMixin, detached_state

__all__ = ["LeakyWithOwnState", "SynapticWithOwnState"]


class _OwnState(StatePrecisionMixin, nn.Module):
    """Mixin for neurons that snnTorch treats as its own; the subclass defines decays, threshold and states.

    The constructors of snnTorch's classes would register buffers under the names of the subclass's properties, so
    they are not called. Instead, this constructor sets the attributes that ``snntorch.utils.reset`` and the base class
    read. States are non-persistent buffers.

    Args:
        init_hidden: store the states in the module.
        output: with ``init_hidden``, also return the states.
    """

    def __init__(self, init_hidden: bool, output: bool) -> None:
        nn.Module.__init__(self)
        self.init_hidden, self.output = init_hidden, output
        self.inhibition, self.state_quant, self._reset_mechanism = False, False, "subtract"

    def register(self) -> None:
        """Add this instance to those that ``snntorch.utils.reset`` resets; call it last in the constructor."""
        snntorch.SpikingNeuron.instances.append(self)

    def get_state(self) -> dict[str, Any]:
        """Return the states: the buffers of this module without those of submodules."""
        return dict(self._buffers)

    def set_state(self, state: dict[str, Any]) -> None:
        """Set the states directly: the setters would clear the refractory counter."""
        self._buffers.update(state)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for copies and pickles, with detached states."""
        return self.__dict__ | {"_buffers": {name: detached_state(value) for name, value in self._buffers.items()}}


class LeakyWithOwnState(_OwnState, snntorch.Leaky):
    """Base class that snnTorch treats as ``Leaky``."""


class SynapticWithOwnState(_OwnState, snntorch.Synaptic):
    """Base class that snnTorch treats as ``Synaptic``."""
