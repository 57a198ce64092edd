"""Find neurons by what they do: their outputs are exactly zeros and ones, and their inputs are not."""

from typing import Any

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor, nn

from nord_snn.monitor.layers import first_tensor
from nord_snn.monitor.spike_counter import SpikeCounter

__all__ = ["Candidate", "candidates_in", "described"]

#: SpikingJelly's surrogate functions, which its users make children of their neurons; 0.0.0.0.14 has both base classes.
_SURROGATES = tuple(
    getattr(surrogate, name)
    for name in ("SurrogateFunctionBase", "MultiArgsSurrogateFunctionBase")
    if hasattr(surrogate, name)
)

#: Names of the flags of a candidate: each says whether there was such a value.
_FLAGS = ("other", "fired", "silent", "number_in", "created")


def candidates_in(net: nn.Module, known: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules of ``net`` that may be neurons: not torch's, and without children except surrogate functions.

    Args:
        net: any module.
        known: layers of neurons that are known by class; modules inside them are left out.
    """
    inside = {id(inner) for layer in known.values() for inner in layer.modules()}
    found = {}
    for name, module in net.named_modules():
        is_leaf = all(isinstance(child, _SURROGATES) for child in module.children())
        is_torch = type(module).__module__.partition(".")[0] == "torch" or isinstance(module, torch.jit.ScriptModule)
        if is_leaf and not is_torch and id(module) not in inside:
            found[name] = module
            inside |= {id(child) for child in module.children()}
    return found


class Candidate:
    """A module that may be a layer of neurons, and the counter of its spikes.

    It is ruled out by its first call whose output has a value other than 0 and 1. Later calls set flags on the device, so that
    the GPU is synchronised in the first call of each module, at powers of two until it is settled, and when figures are read.
    """

    def __init__(self, counter: SpikeCounter) -> None:
        self.counter, self.module = counter, counter.module
        self.flags: Tensor | None = None  # [5], see _FLAGS
        self.calls = 0
        self.ruled_out = self.settled = False
        self._hooks = [
            self.module.register_forward_pre_hook(lambda *call: self._before(*call)),  # copies of functions are shallow
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
        seen = dict(zip(_FLAGS, self.flags.tolist(), strict=True))
        if seen["other"]:
            return "numbers"
        if not seen["fired"]:
            return "never fired"
        if not seen["silent"]:
            return "always fired"
        return "neurons" if seen["number_in"] and seen["created"] else "passes on"

    def _before(self, module: nn.Module, args: Any) -> None:
        if module is self.module:  # else the hook was copied with the network
            self.counter.before(module)

    @torch.no_grad()
    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module is not self.module or not self.counter.on:
            return
        out = first_tensor(output)
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if given is None or not isinstance(out, Tensor) or not out.is_floating_point():
            self._rule_out()
            return
        flags = self._flags(given, out)
        self.calls += 1
        if self.flags is None and flags[0]:
            self._rule_out()
            return
        self.flags = flags if self.flags is None else self.flags | flags
        if not self.settled and self.calls & (self.calls - 1) == 0:
            self.settled = bool(self.flags[1:].all())
        self.counter.after(module, output)

    def _rule_out(self) -> None:
        self.ruled_out = True
        self.close()

    def _flags(self, given: Tensor, out: Tensor) -> Tensor:
        """Return the flags of one call; only the first is computed once the others are known."""
        ones, zeros = out == 1, out == 0
        other = ~(ones | zeros).all()
        if self.settled:
            return torch.cat((other[None], torch.ones(4, dtype=torch.bool, device=out.device)))
        given_ones = given == 1
        number_in = ~(given_ones | (given == 0)).all()
        # A 1 in the place of another input was made here. If shapes differ: no input was 1.
        created = (ones & ~given_ones).any() if given.shape == out.shape else ones.any() & ~given_ones.any()
        return torch.stack((other, ones.any(), zeros.any(), number_in, created))


def described(candidates: dict[str, Candidate]) -> str:
    """Return sentences that name what was found."""
    groups: dict[str, list[str]] = {}
    for name, candidate in candidates.items():
        groups.setdefault(candidate.verdict(), []).append(f"'{name}' ({type(candidate.module).__name__})")
    found = groups.get("neurons", [])
    sentences = [
        f"Taken for neurons, because their outputs are exactly 0 and 1 and their inputs are not: {', '.join(found)}."
        if found
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
