"""Resonance of new positions with cached keys, which are stored as bits.

Cached keys never change, so for a sequence that grows token by token only the new positions are computed. Spikes are
packed eight per byte: for T = 10 time steps and 64 neurons, the key of a head takes 80 bytes instead of 2,560 in float32.
"""

from typing import Any

import torch
from torch import Tensor

from nord_snn._compat.torch import kernels_are_opaque
from nord_snn.ops.cached_resonance.cost import resonance_cached_cost
from nord_snn.ops.cached_resonance.packing import BITS, STEP, WORD, check_spikes
from nord_snn.ops.checks import (
    as_count,
    check_flags,
    check_heads,
    check_scalar,
    check_shape,
    check_tensor,
    compute_dtype,
    without_autocast,
)
from nord_snn.ops.costs import register_cost
from nord_snn.ops.dispatch import CallSignature, backend_selector, register_backends
from nord_snn.ops.registration import Kernel, register_op_without_gradient

__all__ = ["IMPLEMENTATIONS", "resonance_cached"]

IMPLEMENTATIONS = register_backends("resonance_cached", "cached_resonance", "numba")
_choose = backend_selector("resonance_cached", IMPLEMENTATIONS)


def resonance_cached(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    top_k: int,
    temperature: float | Tensor,
    recency: Tensor | None = None,
    lengths: Tensor | None = None,
    window: int | None = None,
    backend: str = "auto",
    trusted: bool = False,
) -> Tensor:
    """Return the causal :func:`nord_snn.ops.resonance` of the last positions only, with packed keys.

    Counts, scores and selected keys are the same as without a cache, ties included. There is no gradient.

    Args:
        q: query spikes ``[T, B, S, D]`` of the last S positions, zeros and ones; T time steps, B sequences.
        keys: key spikes of all ``S_all >= S`` positions, ``[B, H, S_all, bytes]`` from :func:`pack_spikes`; or, for a
            network without spikes, floating ``[B, H, S_all, T * D/H]``, which always run on the backend ``"torch"``.
        values: ``[B, H, S_all, V/H]``, V any multiple of H.
        top_k: number of keys that each query selects, at least 1.
        temperature: factor of the coincidence counts, a float, or a tensor of one element.
        recency: penalty per position of distance, for each head ``[H]``, or None.
        lengths: number of tokens of each sequence, integers ``[B]``. The tokens are the last positions; the positions before
            them are padding and are masked. None for no padding.
        window: number of positions that a query can attend to: its own and the ``window - 1`` before it. None for all.
        backend: ``"auto"``, ``"torch"`` or ``"numba"``; see :mod:`nord_snn.ops.dispatch`.
        trusted: skip the check that q contains only zeros and ones. Default: False.

    Returns:
        ``[B, S, V]`` in the dtype of ``values``; 0 where a query is padding.

    Raises:
        TypeError: an argument has another type, or a tensor another dtype or layout.
        ValueError: a shape, dtype or device is wrong, ``top_k`` or ``window`` is not positive, or q contains other values than
            zeros and ones.
        RuntimeError: a gradient is required, or the requested backend cannot run.

    Source: the Nord spiking language model; keys and values cached as in transformer decoders.

    Example:
        >>> from nord_snn.ops import pack_spikes
        >>> q = k = torch.eye(3).reshape(1, 1, 3, 3)                # position i fires neuron i
        >>> keys, values = pack_spikes(k, n_heads=1), torch.eye(3)[None, None]
        >>> resonance_cached(q[:, :, 2:], keys, values, top_k=1, temperature=1.0)
        tensor([[[0., 0., 1.]]])
    """
    _check(q, keys, values, top_k, temperature, recency, lengths, window)
    check_flags(trusted=trusted)
    top_k, window = int(top_k), keys.shape[2] if window is None else int(window)
    if torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in (q, values, temperature, recency)
    ):
        raise RuntimeError(
            "resonance_cached has no gradient: call it, or the model with its cache, under torch.no_grad()"
        )
    real_keys = keys.is_floating_point()
    if not trusted and not real_keys:
        check_spikes(q, "q")
    lengths = None if lengths is None else lengths.long()
    name = "torch" if real_keys else _choose(backend, CallSignature(values.device.type, values.dtype, values.shape[-1]))
    dtype = compute_dtype(values)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype).view(())
    else:
        temperature = torch.full((), float(temperature), dtype=dtype, device=values.device)
    run = _forward if name == "torch" and kernels_are_opaque() else _run
    return run(q, keys, values, top_k, temperature, recency, lengths, window, name)


def _forward(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    top_k: int,
    temperature: Tensor,
    recency: Tensor | None,
    lengths: Tensor | None,
    window: int,
    backend: str,
) -> Tensor:
    with without_autocast(values):
        return IMPLEMENTATIONS[backend].kernel().forward(q, keys, values, top_k, temperature, recency, lengths, window)


def _forward_fake(q: Tensor, keys: Tensor, values: Tensor, *arguments: Any) -> Tensor:
    return values.new_empty(q.shape[1], q.shape[2], values.shape[1] * values.shape[3])


def _check(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    top_k: int,
    temperature: float | Tensor,
    recency: Tensor | None,
    lengths: Tensor | None,
    window: int | None,
) -> None:
    check_tensor(values, "values", "[B, H, S_all, V/H]")
    check_tensor(q, "q", "[T, B, S, D]", kind="real", like=values)
    check_tensor(keys, "keys", "[B, H, S_all, bytes]", kind="real", like=values)
    if q.ndim != 4 or keys.ndim != 4 or not (keys.dtype == torch.uint8 or keys.is_floating_point()):
        raise ValueError(
            f"resonance_cached expects q [T, B, S, D] and uint8 or floating keys [B, H, S_all, bytes], got {list(q.shape)} and "
            f"{list(keys.shape)} of {keys.dtype}"
        )
    (T, B, S, D), (_, H, n_all, n_bytes) = q.shape, keys.shape
    check_heads(D, H)
    width = D // H
    expected = T * width if keys.is_floating_point() else -(-T * (width + -width % STEP) // WORD) * WORD // BITS
    if keys.shape[0] != B or n_bytes != expected or n_all < S:
        raise ValueError(
            f"keys must be [B, H, S_all, bytes] = [{B}, {H}, at least {S}, {expected}] for these queries, got "
            f"{list(keys.shape)}"
        )
    if values.ndim != 4 or values.shape[:3] != (B, H, n_all):
        raise ValueError(f"values must be [B, H, S_all, V/H] = [{B}, {H}, {n_all}, any], got {list(values.shape)}")
    as_count(top_k, "top_k")
    if window is not None:
        as_count(window, "window")
    check_scalar(temperature, "temperature", like=values)
    if recency is not None:
        check_shape(recency, "recency", "[H]", (H,), like=values)
    if lengths is not None:
        check_shape(lengths, "lengths", "[B]", (B,), kind="integer", like=values)


def _check_forward(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    top_k: int,
    temperature: Tensor,
    recency: Tensor | None,
    lengths: Tensor | None,
    window: int,
    backend: str,
) -> None:
    _check(q, keys, values, top_k, temperature, recency, lengths, window)
    if keys.is_floating_point() and backend != "torch":
        raise ValueError(f"keys of a floating dtype need the backend 'torch', got {backend!r}")


_run = register_op_without_gradient("resonance_cached", Kernel(_forward, _forward_fake), _check_forward)
register_cost("resonance_cached", resonance_cached_cost)
