"""A warning for neurons that are silent or saturated in the first training batches."""

import warnings

import torch
from torch import Tensor

__all__ = ["FirstBatches", "NeuronActivityWarning", "has_values"]

BATCHES = 3
SATURATED = 0.95


class NeuronActivityWarning(RuntimeWarning):
    """Neurons of a layer fired never, or nearly always, in the first training batches."""


class FirstBatches:
    """Count the spikes of the first training batches of a layer, and warn once if there are none or too many.

    Sums stay on the device and are read after the third batch, the last one that counts. Calls that are compiled, captured in
    a CUDA graph, or run on tensors without values are not counted.
    """

    def __init__(self) -> None:
        self.batches_left = BATCHES
        self._spikes: Tensor | None = None
        self._outputs = 0
        self._in_batch = False

    @torch.no_grad()
    def add(self, spikes: Tensor) -> None:
        """Add the spikes of one call."""
        if not has_values(spikes):
            return
        count = spikes.detach().sum(dtype=torch.float32)
        self._spikes = count if self._spikes is None else self._spikes + count
        self._outputs += spikes.numel()
        self._in_batch = True

    def end_batch(self, layer: str) -> None:
        """Count a batch, if there was one since the last call; warn after the third one."""
        if not self._in_batch:
            return
        self._in_batch = False
        self.batches_left -= 1
        if self.batches_left or self._spikes is None or not self._outputs:
            return
        rate = self._spikes.item() / self._outputs
        self._spikes = None
        if 0 < rate <= SATURATED:
            return
        state = "silent" if rate == 0 else f"saturated: they fired in {100 * rate:.0f} % of the time steps"
        warnings.warn(
            f"the neurons of {layer} are {state} in the first {BATCHES} training batches, so they pass on nothing about their "
            "input: nord_snn.calibrate_thresholds(net, x) sets the thresholds of all layers for a firing rate",
            NeuronActivityWarning,
            stacklevel=4,
        )


def has_values(x: Tensor) -> bool:
    """Return whether a number of ``x`` can be read: not of a fake or meta tensor, and not while a CUDA graph is captured."""
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return type(x) is Tensor and not x.is_meta and not capturing
