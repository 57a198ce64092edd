"""The plastic part of a weight, which learning rules have added, and its file format."""

import hashlib
import json
import operator
import os
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nord_snn._compat.torch import without_torch_function
from nord_snn.ops.checks import check_bounds, check_tensor, describe, is_dense

__all__ = ["PlasticPart", "load_plastic", "save_plastic"]

FORMAT = "nord_snn plastic 2"
#: Files of an earlier release, without a digest of the changes.
EARLIER_FORMAT = "nord_snn plastic 1"


class PlasticPart:
    """Add changes to the weight of a synapse with :meth:`apply` and remove them with :meth:`revert`.

    Args:
        synapse: the module whose ``weight`` is changed.
        bounds: range to which :meth:`apply` limits weights, or None. It limits added changes only: a weight that is already
            outside stays unchanged.

    Raises:
        ValueError: the lower bound is not below the upper one.

    Example:
        >>> fc = nn.Linear(2, 1, bias=False)
        >>> _ = fc.weight.data.copy_(torch.tensor([[0.5, 2.0]]))
        >>> part = PlasticPart(fc, bounds=(-0.3, 1.0))
        >>> part.apply(torch.ones(1, 2)); fc.weight.tolist()
        [[1.0, 2.0]]
        >>> part.revert(); fc.weight.tolist()
        [[0.5, 2.0]]
    """

    def __init__(self, synapse: nn.Module, bounds: tuple[float, float] | None = None) -> None:
        if bounds is not None:
            check_bounds(bounds)
        self.synapse, self.bounds = synapse, bounds
        self._trained: Tensor | None = None  # the weight before the first apply
        self._written: Tensor | None = None  # the weight after the last apply

    @property
    def weight(self) -> Tensor:
        """Return the weight of the synapse, after moving the stored copies to its device."""
        weight = cast(Tensor, self.synapse.weight)
        if self._trained is not None and self._written is not None and self._trained.device != weight.device:
            self._trained, self._written = self._trained.to(weight.device), self._written.to(weight.device)
        return weight

    @property
    def delta(self) -> Tensor | None:
        """Return the total change in float64, so that ``trained + delta`` is exactly the weight; None if there is none."""
        _ = self.weight  # moves _trained and _written to its device
        if self._trained is None or self._written is None:
            return None
        return self._written.double() - self._trained.double()

    @property
    def trained(self) -> Tensor:
        """Return the weight without the added changes; changes by an optimizer are included."""
        return self._without_delta(slice(None)).detach()

    @torch.inference_mode(False)
    @torch.no_grad()
    def apply(self, delta: Tensor, rows: Tensor | None = None) -> None:
        """Add ``delta``, in the shape of the weight, within the bounds; :meth:`revert` removes it.

        Args:
            delta: the change, of a floating dtype.
            rows: indices of the rows of the weight to change, without duplicates; ``delta`` then has only these rows. None: all
                rows.

        Raises:
            TypeError: ``rows`` are not integers.
            ValueError: the shape differs, ``rows`` are not different indices, or the sum would not be finite; the weight is
                unchanged.
        """
        weight = self.weight
        if rows is not None:
            rows = _different_rows(rows, weight)
        shape = list(weight.shape) if rows is None else [len(rows), *weight.shape[1:]]
        usable = isinstance(delta, Tensor) and is_dense(delta) and delta.is_floating_point() and not delta.is_meta
        if not usable or list(delta.shape) != shape:
            got = f"{describe(delta)} on {delta.device}" if isinstance(delta, Tensor) else describe(delta)
            layout = "[n_out, n_in] = " if weight.ndim == 2 else ""
            raise ValueError(f"apply expects a floating weight change delta of shape {layout}{shape}, got {got}")
        index = slice(None) if rows is None else rows
        old = weight[index]
        new = self._within_bounds(old, old + delta.to(weight.dtype))
        if not new.isfinite().all():
            raise ValueError(
                "apply expects a finite weight change delta that keeps the weights finite; the weights are unchanged"
            )
        if self._trained is None or self._written is None:
            self._written = weight.detach().clone()
            self._trained = self._written.clone()
        _run_uninterrupted(
            partial(
                operator.setitem, self._trained, index, self._without_delta(index)
            ),  # includes an optimizer's changes
            partial(operator.setitem, self._written, index, new),
            partial(operator.setitem, weight, index, new),
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def revert(self) -> None:
        """Remove all added changes.

        Entries of the weight that nothing else has changed since are restored bit for bit. From other entries (an optimizer
        ran in between) the added change is subtracted. Without added changes this is a no-op.
        """
        if self._trained is not None and self._written is not None:
            _run_uninterrupted(
                partial(self.weight.copy_, self.trained),
                partial(self.__dict__.update, _trained=None, _written=None),
            )

    @torch.inference_mode(False)
    @torch.no_grad()
    def replace(self, delta: Tensor) -> None:
        """Replace all added changes by ``delta``, without applying the bounds.

        Raises:
            ValueError: the shape differs, or the sum would not be finite; the weight is unchanged.
        """
        trained = self.trained.clone()
        check_tensor(delta, "delta", "of the weight")
        if delta.is_meta:
            raise ValueError("replace expects a change delta with values, got a tensor on the device meta")
        if delta.shape != trained.shape:
            raise ValueError(f"replace expects a change delta of shape {list(trained.shape)}, got {list(delta.shape)}")
        new = (trained.double() + delta.to(trained.device).double()).to(trained.dtype)
        if not new.isfinite().all():
            raise ValueError("replace expects a change delta that keeps the weights finite; the weights are unchanged")
        _run_uninterrupted(
            partial(self.__dict__.update, _trained=trained, _written=new.clone()),
            partial(self.weight.copy_, new),
        )

    def _without_delta(self, index: slice | Tensor) -> Tensor:
        """Return rows of the weight without the added changes."""
        weight = self.weight
        if self._trained is None or self._written is None:
            return weight[index]
        current, trained, written = weight[index], self._trained[index], self._written[index]
        # current == trained: the trained weights were loaded again.
        return torch.where((current == written) | (current == trained), trained, current - (written - trained))

    def _within_bounds(self, old: Tensor, new: Tensor) -> Tensor:
        if self.bounds is None:
            return new
        lower, upper = self.bounds
        return torch.minimum(torch.maximum(new, old.clamp(max=lower)), old.clamp(min=upper))


def _different_rows(rows: Tensor, weight: Tensor) -> Tensor:
    """Return ``rows`` as indices from 0 on, after checking that they are different rows of ``weight``."""
    n = len(weight)
    if isinstance(rows, (list, tuple)) and all(isinstance(row, int) and abs(row) < 2**31 for row in rows):
        rows = torch.tensor(rows, dtype=torch.long)
    check_tensor(rows, "rows", "[K]", kind="integer")
    if rows.ndim != 1 or rows.is_meta:
        raise ValueError(f"rows must be integers [K] with values, got {list(rows.shape)} on {rows.device}")
    rows = rows.to(weight.device)
    if len(rows) and not bool(((rows >= -n) & (rows < n)).all()):
        raise ValueError(
            f"rows must be indices of the {n} rows of the weight, got {int(rows.min())} to {int(rows.max())}"
        )
    rows = rows.long() % n
    if len(rows.unique()) != len(rows):
        raise ValueError("rows must be different indices: of two changes of one row, only one would remain")
    return rows


def _run_uninterrupted(*writes: Callable[[], object]) -> None:
    """Run functions implemented in C one after the other, without handling Ctrl-C between them.

    Python handles signals between bytecodes, and ``deque``, ``map`` and ``partial`` execute none. So ``_trained``, ``_written``
    and the weight always agree, without a signal handler, which only the application should install.
    """
    with without_torch_function():
        deque(map(operator.call, writes), maxlen=0)


class HasPlasticPart(Protocol):
    """Any object with a plastic part, such as a learner."""

    plastic: PlasticPart


def save_plastic(path: str | os.PathLike[str], learned: Mapping[str, PlasticPart | HasPlasticPart]) -> None:
    """Write the learned weight changes into a safetensors file, atomically: only rows that changed.

    Args:
        path: the file.
        learned: name of a synapse -> its plastic part, or the learner that has one.

    Raises:
        ValueError: no change was applied, or ``path`` is an existing file of another kind.
        OSError: the file cannot be written; an existing file is unchanged.

    Example::

        save_plastic("learned.safetensors", {"fc": rule})
        load_plastic("learned.safetensors", {"fc": rule})      # on the same trained weights, in this process or another
    """
    parts = {name: _plastic_part(source) for name, source in learned.items()}
    deltas = {name: delta.cpu() for name, part in parts.items() if (delta := part.delta) is not None}
    if not deltas:
        raise ValueError(f"{os.fspath(path)}: nothing to save, expected at least one applied weight change")
    path = Path(path)
    if not path.parent.is_dir() or path.is_dir():
        raise FileNotFoundError(f"{path}: expected a file in a folder that exists")
    if path.exists() and not _is_plastic(path):
        raise ValueError(f"{path}: expected a new file or a file of plastic weights; the existing file is unchanged")
    digests = {name: _digest(parts[name].trained) for name in deltas}
    tensors = {}
    for (
        name,
        delta,
    ) in deltas.items():  # changed rows only: a language model's output layer changes in rows of few tokens
        changed = delta.flatten(1).any(1).nonzero().flatten()
        tensors[f"{name}/rows"], tensors[f"{name}/delta"] = changed, delta[changed]
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        metadata = {"format": FORMAT, "trained": json.dumps(digests), "changes": _digest_of_all(tensors)}
        save_file(tensors, unfinished, metadata=metadata)
        os.replace(unfinished, path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error})") from error
    finally:
        unfinished.unlink(missing_ok=True)


def load_plastic(path: str | os.PathLike[str], learned: Mapping[str, PlasticPart | HasPlasticPart]) -> None:
    """Load the changes that :func:`save_plastic` has written; they replace all changes added before.

    The loaded weights equal the saved ones bit for bit; with float64 weights, or if an optimizer ran after the rule, up to
    rounding.

    Args:
        path: the file.
        learned: name of a synapse -> its plastic part, or the learner that has one.

    Raises:
        ValueError: the file is of another kind or damaged, or was learned on other synapses or other trained weights; nothing is
            changed.
        OSError: the file cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{os.fspath(path)}: expected a file of save_plastic(), got no such file")
    try:
        with safe_open(os.fspath(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        if metadata.get("format") not in (FORMAT, EARLIER_FORMAT):
            raise ValueError("unknown format")
        undamaged = metadata["format"] == EARLIER_FORMAT or metadata["changes"] == _digest_of_all(tensors)
        digests = dict(json.loads(metadata["trained"]))
        if not digests:
            raise ValueError("no weight changes")
        saved = {name: (tensors[f"{name}/rows"], tensors[f"{name}/delta"]) for name in digests}
    except (SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: not a file of plastic weights ({error})") from error
    parts = {name: _plastic_part(source) for name, source in learned.items()}
    deltas = {}
    for name, (rows, delta) in saved.items():
        if name not in parts:
            raise ValueError(
                f"{os.fspath(path)}: expected changes of {', '.join(parts) or 'no synapse'} only, got changes of {name}"
            )
        weight = parts[name].weight
        if digests[name] != _digest(parts[name].trained):
            raise ValueError(f"{os.fspath(path)}: {name} was learned on top of other trained weights")
        try:
            deltas[name] = torch.zeros(weight.shape, dtype=torch.float64).index_copy(0, rows, delta)
            if not (weight.cpu() + deltas[name]).to(weight.dtype).isfinite().all():
                raise ValueError(f"{os.fspath(path)}: the changes of {name} must be finite and keep the weights finite")
        except (IndexError, RuntimeError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)}: not a file of plastic weights ({name} has another shape)") from error
    if not undamaged:
        raise ValueError(f"{os.fspath(path)}: the changes are damaged")
    for name, part in parts.items():
        if name in deltas:
            part.replace(deltas[name])
        else:
            part.revert()


def _is_plastic(path: Path) -> bool:
    if not path.is_file():  # opening a pipe would wait
        return False
    try:
        with safe_open(os.fspath(path), "pt") as file:
            return (file.metadata() or {}).get("format") in (FORMAT, EARLIER_FORMAT)
    except (SafetensorError, OSError):
        return False


def _plastic_part(source: PlasticPart | HasPlasticPart) -> PlasticPart:
    return source if isinstance(source, PlasticPart) else source.plastic


def _digest_of_all(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {_digest(tensors[name])}\n".encode())
    return digest.hexdigest()


def _digest(weight: Tensor) -> str:
    numbers = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    return f"{weight.dtype} {list(weight.shape)} {hashlib.blake2b(numbers.data, digest_size=16).hexdigest()}"
