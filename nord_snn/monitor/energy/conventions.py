"""Energy of single operations under published conventions."""

from dataclasses import dataclass

__all__ = ["CONVENTIONS", "Convention", "find_convention"]


@dataclass(frozen=True)
class Convention:
    """Energy of single operations, in joules.

    Attributes:
        mac: one multiply-accumulate.
        ac: one accumulate: the addition of a weight for an input spike.
        mul: one multiplication in a neuron's update.
        add: one addition or comparison in a neuron's update.
        byte: one byte read or written; 0 excludes memory.
        source: source of the figures.
    """

    mac: float
    ac: float
    mul: float
    add: float
    byte: float
    source: str


_HOROWITZ = "M. Horowitz, Computing's energy problem, ISSCC 2014: 45 nm, 0.9 V"

#: float32 arithmetic without memory; with all memory in a 32 KB SRAM (20 pJ for 8 bytes); with all memory in DRAM (1.3 nJ for 8
#: bytes, the lower end of the range); 8-bit integers accumulated in 32 bits, without memory.
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
