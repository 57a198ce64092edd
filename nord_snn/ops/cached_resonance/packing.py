"""Spikes as bits, eight to a byte, head by head: what a cache stores of its keys."""

import torch
from torch import Tensor

from nord_snn.ops.checks import check_heads

__all__ = ["BITS", "STEP", "WORD", "check_spikes", "pack_spikes", "unpack_spikes"]

BITS, WORD = 8, 64
STEP = 16  # a time step's neurons are filled up to whole vectors of the kernels


def pack_spikes(k: Tensor, n_heads: int, *, trusted: bool = False) -> Tensor:
    """Spikes as bits, head by head.

    Args:
        k: ``[T, B, S, D]`` of zeros and ones.
        n_heads: H; D must be a multiple of it.
        trusted: do not look whether there are only zeros and ones, for which a GPU would have to be waited for.

    Returns:
        uint8 ``[B, H, S, bytes]``: neuron n of a head at step t is bit ``16 * ceil(D/H / 16) * t + n``, the lowest bit of a
        byte first; filled up with zeros to a multiple of 64 bits.

    Raises:
        ValueError: wrong rank, H does not divide D, or something is neither 0 nor 1.

    Example:
        >>> pack_spikes(torch.ones(1, 1, 1, 4), n_heads=2)[0, :, 0].tolist()
        [[3, 0, 0, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0, 0, 0]]
    """
    if k.ndim != 4:
        raise ValueError(f"pack_spikes expects spikes [T, B, S, D], got {list(k.shape)}")
    check_heads(k.shape[-1], n_heads)
    if not trusted:
        check_spikes(k)
    heads = (k != 0).unflatten(-1, (n_heads, -1)).permute(1, 3, 2, 0, 4)  # [B, H, S, T, D/H]
    steps = torch.nn.functional.pad(heads, (0, -heads.shape[-1] % STEP)).flatten(-2)
    filled = torch.nn.functional.pad(steps, (0, -steps.shape[-1] % WORD))
    worth = 2 ** torch.arange(BITS, dtype=torch.uint8, device=k.device)
    return (filled.unflatten(-1, (-1, BITS)) * worth).sum(-1, dtype=torch.uint8)


def unpack_spikes(keys: Tensor, n_steps: int, width: int) -> Tensor:
    """The bits of :func:`pack_spikes` as bool ``[B, H, S, T * D/H]``, for T steps of D/H neurons each."""
    worth = torch.arange(BITS, dtype=torch.uint8, device=keys.device)
    bits = ((keys.unsqueeze(-1) >> worth) & 1).bool().flatten(-2)
    padded = width + -width % STEP
    return bits[..., : n_steps * padded].unflatten(-1, (n_steps, padded))[..., :width].flatten(-2)


def check_spikes(x: Tensor) -> None:
    """Raise a ValueError unless everything is 0 or 1."""
    if x.dtype != torch.bool and not torch.equal((x != 0).to(x.dtype), x):
        raise ValueError("expected spikes of zeros and ones: others cannot be kept as bits")
