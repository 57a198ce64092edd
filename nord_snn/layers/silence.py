"""Warn once of queries or keys that do not fire."""

import warnings

import torch
from torch import Tensor

from nord_snn.neurons.activity import NeuronActivityWarning, has_values

__all__ = ["SilenceWatch"]

CALLS = 10
SILENT = 1e-3  # firing rate


class SilenceWatch:
    """Measure the firing rates of queries and keys in the first ten calls, and warn once if either are silent.

    The counts stay on the device of the spikes and are read in the tenth call, the only one that waits for a GPU. Calls that
    are compiled, captured in a CUDA graph, or run on tensors without values are not counted.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._fired: Tensor | None = None  # of queries and of keys
        self._outputs = 0

    def observe(self, q: Tensor, k: Tensor, layer: str, remedy: str) -> None:
        """Count the spikes ``q`` and ``k`` of one call.

        Args:
            q: query spikes.
            k: key spikes, as many values as ``q``.
            layer: name of the layer, for the warning.
            remedy: end of the warning.
        """
        if torch.compiler.is_compiling() or self._calls == CALLS or not has_values(q):
            return
        fired = torch.stack((q.detach().count_nonzero(), k.detach().count_nonzero()))
        self._fired = fired if self._fired is None else self._fired.to(fired.device) + fired
        self._outputs += q.numel()
        self._calls += 1
        if self._calls == CALLS:
            self._warn(layer, remedy)
            self._fired = None

    def _warn(self, layer: str, remedy: str) -> None:
        assert self._fired is not None
        queries, keys = (count / max(1, self._outputs) for count in self._fired.tolist())
        if min(queries, keys) < SILENT:
            warnings.warn(
                f"{layer} is dead: in its first {CALLS} training batches queries fired at {queries:.2%} and keys at "
                f"{keys:.2%}, so its scores hardly depend on the input: {remedy}",
                NeuronActivityWarning,
                stacklevel=3,
            )
