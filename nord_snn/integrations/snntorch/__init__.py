"""snnTorch: our neurons with snnTorch's signatures, and snnTorch's neurons in our layers."""

from nord_snn.integrations.snntorch.leaky import AssociativeLeaky
from nord_snn.integrations.snntorch.multi_step import MultiStep
from nord_snn.integrations.snntorch.synaptic import AssociativeSynaptic

__all__ = ["AssociativeLeaky", "AssociativeSynaptic", "MultiStep"]
