"""Find layers of neurons by their outputs, which are exactly zeros and ones while their inputs are not."""

from typing import Any

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor, nn

from nord_snn.monitor.layers import first_tensor
from nord_snn.monitor.spike_counter import SpikeCounter
from nord_snn.neurons.locking import one_at_a_time

__all__ = ["Candidate", "candidates_in", "described"]

#: SpikingJelly's base classes of surrogate functions, which are children of neurons; only 0.0.0.0.14 has both.
_SURROGATES = tuple(
    getattr(surrogate, name)
    for name in ("SurrogateFunctionBase", "MultiArgsSurrogateFunctionBase")
    if hasattr(surrogate, name)
)

#: Flags of a candidate, each true if there was: an output other than 0 and 1, an output of 1, an output of 0, an input other
#: than 0 and 1, an output of 1 that was not copied from the input.
_FLAGS = ("other", "fired", "silent", "number_in", "created")


def candidates_in(net: nn.Module, known: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules of ``net`` that may be neurons: not torch's, and without children except surrogate functions.

    Args:
        net: any module.
        known: layers of neurons of known classes; these and modules inside them are left out.
    """
    inside = {id(inner) for layer in known.values() for inner in layer.modules()}
    candidates = {}
    for name, module in net.named_modules():
        is_leaf = all(isinstance(child, _SURROGATES) for child in module.children())
        is_torch = type(module).__module__.partition(".")[0] == "torch" or isinstance(module, torch.jit.ScriptModule)
        if is_leaf and not is_torch and id(module) not in inside:
            candidates[name] = module
            inside |= {id(child) for child in module.children()}
    return candidates


class Candidate:
    """A module that may be a layer of neurons, and the counter of its spikes.

    It is ruled out if the output of its first call has a value other than 0 and 1. Later calls set flags on the device. The GPU
    is synchronised in calls 1, 2, 4, 8, ... until all flags but the first are true (``settled``), and when figures are read.
    """

    def __init__(self, counter: SpikeCounter) -> None:
        self.counter, self.module = counter, counter.module
        self.flags: Tensor | None = None  # [5], see _FLAGS
        self.calls = 0
        self.ruled_out = self.settled = False
        self._hooks = [
            # Functions, not methods: a deep copy of the network would copy the object of a method.
            self.module.register_forward_pre_hook(lambda *call: self._before(*call)),
            self.module.register_forward_hook(lambda *call: self._after(*call), with_kwargs=True),
        ]

    def close(self) -> None:
        """Stop observing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.counter.close()

    def verdict(self) -> str:
        """Return ``"neurons"``, ``"numbers"``, ``"passes on"``, ``"never fired"``, ``"always fired"`` or ``"did not run"``."""
        if self.ruled_out:
            return "numbers"
        if self.flags is None:
            return "did not run"
        flags = dict(zip(_FLAGS, self.flags.tolist(), strict=True))
        if flags["other"]:
            return "numbers"
        if not flags["fired"]:
            return "never fired"
        if not flags["silent"]:
            return "always fired"
        return "neurons" if flags["number_in"] and flags["created"] else "passes on"

    def _before(self, module: nn.Module, args: Any) -> None:
        if module is self.module:  # a copy of the network has the same hook
            self.counter.before(module)

    @torch.no_grad()
    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module is not self.module or not self.counter.on:
            return
        out = first_tensor(output)
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None or not isinstance(out, Tensor) or not out.is_floating_point():
            self._rule_out()
            return
        flags = self._flags(x, out)
        self.calls += 1
        if self.flags is None and flags[0]:
            self._rule_out()
            return
        with one_at_a_time():  # threads that run the network at the same time
            self.flags = flags if self.flags is None else self.flags | flags
        if not self.settled and self.calls & (self.calls - 1) == 0:
            self.settled = bool(self.flags[1:].all())
        self.counter.after(module, output)

    def _rule_out(self) -> None:
        self.ruled_out = True
        self.close()

    def _flags(self, x: Tensor, out: Tensor) -> Tensor:
        """Return the flags of a call with input ``x``; only the first is computed once the others are true."""
        ones, zeros = out == 1, out == 0
        other = ~(ones | zeros).all()
        if self.settled:
            return torch.cat((other[None], torch.ones(4, dtype=torch.bool, device=out.device)))
        input_ones = x == 1
        number_in = ~(input_ones | (x == 0)).all()
        # An output of 1 is not copied if its input is not 1; if shapes differ, if no input is 1.
        created = (ones & ~input_ones).any() if x.shape == out.shape else ones.any() & ~input_ones.any()
        return torch.stack((other, ones.any(), zeros.any(), number_in, created))


def described(candidates: dict[str, Candidate]) -> str:
    """Return sentences that name the candidates by verdict."""
    groups: dict[str, list[str]] = {}
    for name, candidate in candidates.items():
        groups.setdefault(candidate.verdict(), []).append(f"'{name}' ({type(candidate.module).__name__})")
    neurons = groups.get("neurons", [])
    sentences = [
        f"Taken for neurons, because their outputs are exactly 0 and 1 and their inputs are not: {', '.join(neurons)}."
        if neurons
        else "No module was taken for neurons by outputs of exactly 0 and 1 from inputs of other values."
    ]
    endings = {
        "passes on": "Outputs of 0 and 1 from inputs of 0 and 1 only, or copied from them",
        "never fired": "Outputs of 0 only",
        "always fired": "Outputs of 1 only",
        "did not run": "Not called",
    }
    sentences += [f"{text}: {', '.join(groups[key])}." for key, text in endings.items() if key in groups]
    return " ".join(sentences)
