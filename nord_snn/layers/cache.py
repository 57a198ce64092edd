"""SequenceCache: padding and earlier positions of a batch of sequences, for layers in which positions interact."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nord_snn.ops.checks import as_count, check_tensor, describe

__all__ = ["SequenceCache", "UpdateCache", "cache_argument"]

#: A function that stores the keys and values of new positions, and returns the keys and values of all positions.
UpdateCache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
#: Deprecated keyword of a layer -> field of :class:`SequenceCache`.
_FIELD_OF_KEYWORD = {"lengths": "lengths", "remember": "update", "window": "window"}


@dataclass(frozen=True)
class SequenceCache:
    """Describe padding and earlier positions of a batch of sequences.

    Args:
        lengths: number of tokens of each sequence, integers ``[B]``. The tokens are the last positions; the positions before
            them are padding, to which no query attends. Default: None, no padding.
        update: function that stores the keys and values of the new positions and returns those of all positions, as the
            ``update`` of a cache of transformers does. Key spikes are bits ``[B, H, S, bytes]``, values
            ``[B, H, S, V/H]``: sequences, heads, positions, width. Default: None, there are no earlier positions.
        window: largest number of positions that a query attends to, its own included; needs ``update``. Default: None, all.

    Raises:
        TypeError: a field has another type.
        ValueError: ``window`` is passed without ``update``, or is less than 1.

    Source: the caches of the transformers library.

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
                raise ValueError(
                    "window needs update: without it there are no earlier positions that a window could exclude"
                )


def cache_argument(cache: SequenceCache | None, deprecated: Mapping[str, Any]) -> SequenceCache:
    """Return the cache of a call, built from deprecated keywords if there are any; it is empty if nothing was passed.

    Raises:
        TypeError: a keyword is unknown, or there is a cache and a deprecated keyword.
    """
    if deprecated:
        unknown = sorted(deprecated.keys() - _FIELD_OF_KEYWORD.keys())
        if unknown:
            raise TypeError(f"unexpected keyword {unknown[0]!r}: expected cache=SequenceCache(lengths, update, window)")
        if cache is not None:
            raise TypeError(
                f"{sorted(deprecated)[0]} is deprecated and part of cache: pass cache=SequenceCache(...) alone"
            )
        warnings.warn(
            "lengths, remember and window are deprecated: pass cache=SequenceCache(lengths, update, window)",
            FutureWarning,
            stacklevel=3,
        )
        return SequenceCache(**{_FIELD_OF_KEYWORD[name]: value for name, value in deprecated.items()})
    return SequenceCache() if cache is None else cache
