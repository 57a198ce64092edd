"""Conventions: the energy of single operations, from published measurements."""

from dataclasses import dataclass

__all__ = ["CONVENTIONS", "Convention", "find_convention"]


@dataclass(frozen=True)
class Convention:
    """Energy of single operations, in joules, by which :func:`nord_snn.monitor.profile_energy` multiplies its counts.

    Attributes:
        mac: one multiply-accumulate.
        ac: one accumulate: the addition of a weight for an input spike.
        mul: one multiplication in the equations of a neuron.
        add: one addition or comparison in the equations of a neuron.
        byte: one byte of weights, activations or state, read or written; 0: memory is not counted.
        source: source of the figures.
    """

    mac: float
    ac: float
    mul: float
    add: float
    byte: float
    source: str


_HOROWITZ = "M. Horowitz, Computing's energy problem, ISSCC 2014: 45 nm, 0.9 V"

#: Conventions by name. The energies of arithmetic and memory are Horowitz's; that all bytes are in one memory is our assumption.
#:
#: - ``45nm-fp32``: float32 arithmetic; memory is not counted.
#: - ``45nm-fp32-sram``: float32 arithmetic, and all bytes in a 32 KB SRAM, 20 pJ for 8 bytes.
#: - ``45nm-fp32-dram``: float32 arithmetic, and all bytes in DRAM, 1.3 nJ for 8 bytes, the lowest figure of Horowitz.
#: - ``45nm-int8``: products of 8-bit integers, added in 32 bits, also in neurons; memory is not counted.
CONVENTIONS: dict[str, Convention] = {
    "45nm-fp32": Convention(4.6e-12, 0.9e-12, 3.7e-12, 0.9e-12, 0.0, _HOROWITZ),
    "45nm-fp32-sram": Convention(4.6e-12, 0.9e-12, 3.7e-12, 0.9e-12, 2.5e-12, _HOROWITZ),
    "45nm-fp32-dram": Convention(4.6e-12, 0.9e-12, 3.7e-12, 0.9e-12, 162.5e-12, _HOROWITZ),
    "45nm-int8": Convention(0.3e-12, 0.1e-12, 0.2e-12, 0.1e-12, 0.0, _HOROWITZ),
}


def find_convention(name: str) -> Convention:
    """Return one of :data:`CONVENTIONS`.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in CONVENTIONS:
        raise ValueError(f"unknown convention {name!r}: expected one of {sorted(CONVENTIONS)}")
    return CONVENTIONS[name]
