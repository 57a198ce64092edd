"""SequenceCache: padding and earlier positions of a batch of sequences, for the layers in which positions meet."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nord_snn.ops.checks import as_count, check_tensor, describe

__all__ = ["SequenceCache", "UpdateCache", "cache_argument"]

#: Takes keys and values of the new positions, stores them, and returns those of all positions.
UpdateCache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_OLD = {"lengths": "lengths", "remember": "update", "window": "window"}


@dataclass(frozen=True)
class SequenceCache:
    """Describe padding and earlier positions of a batch of sequences.

    Args:
        lengths: number of tokens of each sequence, counted from the last position, integers ``[B]``; positions before
            them are padding and no query sees them. Default: None, all positions are tokens.
        update: stores keys and values of the new positions and returns those of all positions, as the ``update`` of a
            cache of transformers does. Key spikes are bits ``[B, H, S, bytes]``, values ``[B, H, S, V/H]``. Default:
            None, the positions of this call are all there are.
        window: number of positions that a query sees, itself included; needs ``update``. Default: None, all.

    Raises:
        TypeError: a field has another type.
        ValueError: ``window`` is given without ``update``, or is less than 1.

    Source: keys and values stored as in transformers' decoders.

    Example:
        >>> import torch
        >>> from nord_snn.layers import CoFiringResonance, SequenceCache
        >>> layer = CoFiringResonance(64, n_heads=4)
        >>> layer(torch.randn(10, 2, 7, 64), cache=SequenceCache(lengths=torch.tensor([7, 3]))).shape
        torch.Size([10, 2, 7, 64])
    """

    lengths: Tensor | None = None
    update: UpdateCache | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        if self.lengths is not None:
            check_tensor(self.lengths, "lengths", "[B]", kind="integer")
        if self.update is not None and not callable(self.update):
            raise TypeError(f"update must be a function of keys and values, or None, got {describe(self.update)}")
        if self.window is not None:
            as_count(self.window, "window")
            if self.update is None:
                raise ValueError("window needs update: without earlier positions every position is seen")


def cache_argument(cache: SequenceCache | None, deprecated: Mapping[str, Any]) -> SequenceCache:
    """Return the cache of a call, made from the keywords that it replaces where a caller still passes these.

    Raises:
        TypeError: another keyword, or a cache and an old keyword.
    """
    if deprecated:
        unknown = sorted(deprecated.keys() - _OLD.keys())
        if unknown:
            raise TypeError(f"unexpected keyword {unknown[0]!r}: expected cache=SequenceCache(lengths, update, window)")
        if cache is not None:
            raise TypeError(f"{sorted(deprecated)[0]} is part of cache: pass cache alone")
        warnings.warn(
            "lengths, remember and window are deprecated: pass cache=SequenceCache(lengths, update, window)",
            FutureWarning,
            stacklevel=3,
        )
        return SequenceCache(**{_OLD[name]: value for name, value in deprecated.items()})
    return SequenceCache() if cache is None else cache
