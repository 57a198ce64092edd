"""Warnings of neurons that are silent or saturated in the first training batches."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["FirstBatches", "NeuronActivityWarning", "has_values", "warn_of_inactive_neurons"]

#: Number of training batches over which neurons are checked, and firing rate above which they are saturated.
BATCHES, SATURATED = 3, 0.95


class NeuronActivityWarning(RuntimeWarning):
    """Report neurons that never, or nearly always, fired in the first training batches."""


class FirstBatches:
    """Measure the firing rates of populations of neurons over the first training batches.

    Counts stay on the device; only the last of these batches synchronises with a GPU, to read them. Calls during the capture
    of a CUDA graph, or with tensors without values, are not counted.

    Args:
        n_batches: number of batches to count.

    Attributes:
        batches_left: number of batches that remain to be counted.

    Example:
        >>> batches = FirstBatches(2)
        >>> for spikes in (torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0])):
        ...     batches.add(spikes, 1 - spikes)
        ...     print(batches.end_batch())
        None
        (0.25, 0.75)
    """

    def __init__(self, n_batches: int = BATCHES) -> None:
        self.batches_left = n_batches
        self._fired: Tensor | None = None  # number of spikes of each population
        self._outputs = 0  # number of zeros and ones of each population
        self._in_batch = False

    def add(self, *populations: Tensor) -> None:
        """Add the spikes of one call: one tensor per population, all of the same size."""
        if not self.batches_left or not has_values(populations[0]):
            return
        fired = torch.stack([spikes.detach().count_nonzero() for spikes in populations])
        self._fired = fired if self._fired is None else self._fired.to(fired.device) + fired
        self._outputs += populations[0].numel()
        self._in_batch = True

    def end_batch(self) -> tuple[float, ...] | None:
        """Count a batch if there were calls since the previous one; return the firing rates after the last batch, else None."""
        if not self._in_batch:
            return None
        self._in_batch = False
        self.batches_left -= 1
        if self.batches_left or self._fired is None or not self._outputs:
            return None
        rates = tuple(count / self._outputs for count in self._fired.tolist())
        self._fired = None
        return rates


def warn_of_inactive_neurons(rates: Sequence[float] | None, layer: str) -> None:
    """Warn if the firing rate of a layer of neurons is 0 or above ``SATURATED``.

    ``rates`` has one firing rate, or is None until the first batches have run; ``layer`` is a name for the message.
    """
    if rates is None or 0 < rates[0] <= SATURATED:
        return
    state = f"saturated: they fired in {100 * rates[0]:.0f} % of the time steps" if rates[0] else "silent"
    warnings.warn(
        f"the neurons of {layer} are {state} in the first {BATCHES} training batches, so their output hardly depends on their "
        "input: nord_snn.calibrate_thresholds(net, x) sets the thresholds of all layers for a firing rate",
        NeuronActivityWarning,
        stacklevel=5,
    )


def has_values(x: Tensor) -> bool:
    """Return whether the values of ``x`` can be read: False for fake and meta tensors, and while a CUDA graph is captured."""
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return type(x) is Tensor and not x.is_meta and not capturing
