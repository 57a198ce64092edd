"""Pack key spikes for a cache: one bit per spike, eight per byte, head by head."""

import torch
from torch import Tensor

from nord_snn.ops.checks import check_flags, check_heads, check_tensor

__all__ = ["BITS", "STEP", "WORD", "check_spikes", "pack_spikes", "unpack_spikes"]

BITS, WORD = 8, 64  # bits of a byte and of a machine word
STEP = 16  # the neurons of a head at a time step are padded to a multiple of it, whole vectors of the kernels


def pack_spikes(k: Tensor, n_heads: int, *, trusted: bool = False) -> Tensor:
    """Return spikes as bits, head by head.

    Args:
        k: ``[T, B, S, D]`` of zeros and ones.
        n_heads: number of heads H, a divisor of D.
        trusted: skip the check that k contains only zeros and ones, which would synchronise with the GPU. Default: False.

    Returns:
        uint8 ``[B, H, S, bytes]``: neuron n of a head at time step t is bit ``16 * ceil(D/H / 16) * t + n``, the lowest
        bit of a byte first; padded with zeros to a multiple of 64 bits.

    Raises:
        TypeError: ``k`` is not a dense real tensor, or ``n_heads`` is not a whole number.
        ValueError: the rank is wrong, D is not a multiple of H, or a value is neither 0 nor 1.

    Example:
        >>> pack_spikes(torch.ones(1, 1, 1, 4), n_heads=2)[0, :, 0].tolist()
        [[3, 0, 0, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0, 0, 0]]
    """
    check_tensor(k, "k", "[T, B, S, D]", kind="real")
    check_flags(trusted=trusted)
    if k.ndim != 4:
        raise ValueError(f"pack_spikes expects spikes k [T, B, S, D], got {list(k.shape)}")
    check_heads(k.shape[-1], n_heads)
    if not trusted:
        check_spikes(k, "k")
    heads = (k != 0).unflatten(-1, (n_heads, -1)).permute(1, 3, 2, 0, 4)  # [B, H, S, T, D/H]
    steps = torch.nn.functional.pad(heads, (0, -heads.shape[-1] % STEP)).flatten(-2)
    padded = torch.nn.functional.pad(steps, (0, -steps.shape[-1] % WORD))
    bit_values = 2 ** torch.arange(BITS, dtype=torch.uint8, device=k.device)
    return (padded.unflatten(-1, (-1, BITS)) * bit_values).sum(-1, dtype=torch.uint8)


def unpack_spikes(keys: Tensor, n_steps: int, width: int) -> Tensor:
    """Return the spikes that :func:`pack_spikes` packed, bool ``[B, H, S, T * D/H]``; ``n_steps`` is T, ``width`` D/H."""
    bit_index = torch.arange(BITS, dtype=torch.uint8, device=keys.device)
    bits = ((keys.unsqueeze(-1) >> bit_index) & 1).bool().flatten(-2)
    padded = width + -width % STEP
    return bits[..., : n_steps * padded].unflatten(-1, (n_steps, padded))[..., :width].flatten(-2)


def check_spikes(x: Tensor, name: str) -> None:
    """Raise a ValueError unless all values of the argument ``name`` are 0 or 1."""
    if x.is_meta:
        raise ValueError(f"{name} on the device meta has no values to check: pass trusted=True")
    if x.dtype != torch.bool and not torch.equal((x != 0).to(x.dtype), x):
        raise ValueError(f"{name} must be spikes, zeros and ones: other values cannot be packed as bits")
