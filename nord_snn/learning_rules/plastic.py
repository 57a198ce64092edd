"""The part of a weight that a rule has learned, apart from what was trained, and its file."""

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
from nord_snn.ops.checks import check_bounds

__all__ = ["PlasticPart", "load_plastic", "save_plastic"]

FORMAT = "nord_snn plastic 1"


class PlasticPart:
    """What :meth:`apply` has added to a synapse's weight, until :meth:`revert` takes it back.

    Args:
        synapse: the module whose ``weight`` is written into.
        bounds: what :meth:`apply` may bring a weight to, or None. They limit only what is added: a weight that already lies
            outside stays where it is.

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
        """The parameter that the synapse has now."""
        weight = cast(Tensor, self.synapse.weight)
        if self._trained is not None and self._written is not None and self._trained.device != weight.device:
            self._trained, self._written = self._trained.to(weight.device), self._written.to(weight.device)
        return weight

    @property
    def delta(self) -> Tensor | None:
        """What was added, in float64, so that trained weight and delta make the same sum again; None if nothing was."""
        _ = self.weight  # its device is where the two are
        if self._trained is None or self._written is None:
            return None
        return self._written.double() - self._trained.double()

    @property
    def trained(self) -> Tensor:
        """The weight without what was added; an optimizer's part in it included."""
        return self._without_added(slice(None)).detach()

    @torch.inference_mode(False)
    @torch.no_grad()
    def apply(self, delta: Tensor, rows: Tensor | None = None) -> None:
        """Add ``delta``, shaped as the weight, within the bounds; :meth:`revert` can take it back.

        Args:
            delta: the change.
            rows: of a weight of which few rows change, which ones: integers, each once; ``delta`` then has only these.

        Raises:
            ValueError: another shape, or the sum would not be finite; the weight is untouched.
        """
        weight = self.weight
        shape = list(weight.shape) if rows is None else [len(rows), *weight.shape[1:]]
        if not isinstance(delta, Tensor) or list(delta.shape) != shape or not delta.is_floating_point():
            got = f"{list(delta.shape)} of {delta.dtype}" if isinstance(delta, Tensor) else type(delta).__name__
            layout = "[n_out, n_in] = " if weight.ndim == 2 else ""
            raise ValueError(f"apply expects a floating weight change of shape {layout}{shape}, got {got}")
        index = slice(None) if rows is None else rows
        old = weight[index]
        new = self._within_bounds(old, old + delta.to(weight.dtype))
        if not new.isfinite().all():
            raise ValueError(
                "apply expects a finite weight change that keeps the weights finite; the weights are untouched"
            )
        if self._trained is None or self._written is None:
            self._written = weight.detach().clone()
            self._trained = self._written.clone()
        _without_interruption(
            partial(operator.setitem, self._trained, index, self._without_added(index)),  # an optimizer's part included
            partial(operator.setitem, self._written, index, new),
            partial(operator.setitem, weight, index, new),
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def revert(self) -> None:
        """Take back everything that was added.

        Bit for bit where nothing else has changed the weight since; elsewhere (an optimizer ran in between) what was added
        is subtracted from what it is now. Does nothing if nothing was added.
        """
        if self._trained is not None and self._written is not None:
            _without_interruption(
                partial(self.weight.copy_, self.trained),
                partial(self.__dict__.update, _trained=None, _written=None),
            )

    @torch.inference_mode(False)
    @torch.no_grad()
    def replace(self, delta: Tensor) -> None:
        """Make ``delta`` all that was ever added; the bounds were for what a rule adds and are not asked.

        Raises:
            ValueError: another shape, or the sum would not be finite; the weight is untouched.
        """
        trained = self.trained.clone()
        if delta.shape != trained.shape:
            raise ValueError(f"replace expects a change of shape {list(trained.shape)}, got {list(delta.shape)}")
        new = (trained.double() + delta.to(trained.device).double()).to(trained.dtype)
        if not new.isfinite().all():
            raise ValueError("the weights would not be finite any more; they are untouched")
        _without_interruption(
            partial(self.__dict__.update, _trained=trained, _written=new.clone()),
            partial(self.weight.copy_, new),
        )

    def _without_added(self, index: slice | Tensor) -> Tensor:
        weight = self.weight
        if self._trained is None or self._written is None:
            return weight[index]
        now, trained, written = weight[index], self._trained[index], self._written[index]
        # Equal to what was trained: somebody loaded it again.
        return torch.where((now == written) | (now == trained), trained, now - (written - trained))

    def _within_bounds(self, old: Tensor, new: Tensor) -> Tensor:
        if self.bounds is None:
            return new
        lower, upper = self.bounds
        return torch.minimum(torch.maximum(new, old.clamp(max=lower)), old.clamp(min=upper))


def _without_interruption(*writes: Callable[[], object]) -> None:
    """Run functions of C one after the other, with no place for Ctrl-C between them.

    Python handles signals between bytecodes, and ``deque``, ``map`` and ``partial`` execute none. So the weight and the record
    of what was added to it always agree, without a signal handler, which belongs to the application.
    """
    with without_torch_function():
        deque(map(operator.call, writes), maxlen=0)


class HasPlasticPart(Protocol):
    """A learner."""

    plastic: PlasticPart


def save_plastic(path: str | os.PathLike[str], learned: Mapping[str, PlasticPart | HasPlasticPart]) -> None:
    """Write what was learned on top of the trained weights into a small safetensors file, in one move.

    Args:
        path: the file.
        learned: plastic parts, or learners that hold one, by the name of their synapse.

    Raises:
        ValueError: nothing was learned, or there is a file that holds something else.
        OSError: the file cannot be written; one that was there before is untouched.

    Example::

        save_plastic("mine.safetensors", {"fc": rule})
        load_plastic("mine.safetensors", {"fc": rule})      # on the same trained weights, in this process or another
    """
    parts = {name: _part(thing) for name, thing in learned.items()}
    deltas = {name: delta.cpu() for name, part in parts.items() if (delta := part.delta) is not None}
    if not deltas:
        raise ValueError(f"{os.fspath(path)}: there is nothing to save, since nothing was applied")
    path = Path(path)
    if not path.parent.is_dir() or path.is_dir():
        raise FileNotFoundError(f"{path}: expected a file in a folder that exists")
    if path.exists() and not _is_plastic(path):
        raise ValueError(f"{path}: there is a file that holds something else; it is untouched")
    digests = {name: _digest(parts[name].trained) for name in deltas}
    tensors = {}
    for name, delta in deltas.items():  # a head of many words has learned about few of them
        changed = delta.flatten(1).any(1).nonzero().flatten()
        tensors[f"{name}/rows"], tensors[f"{name}/delta"] = changed, delta[changed]
    beside = path.with_name(f".{path.name}.unfinished")
    try:
        save_file(tensors, beside, metadata={"format": FORMAT, "trained": json.dumps(digests)})
        os.replace(beside, path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error})") from error
    finally:
        beside.unlink(missing_ok=True)


def load_plastic(path: str | os.PathLike[str], learned: Mapping[str, PlasticPart | HasPlasticPart]) -> None:
    """Put what :func:`save_plastic` wrote on top of the trained weights, in place of what was learned here.

    The sum is the same bit for bit; to rounding for weights in float64, and where an optimizer ran after the rule.

    Args:
        path: the file.
        learned: plastic parts, or learners that hold one, by the name of their synapse.

    Raises:
        ValueError: it is no such file, or was learned on other synapses or other trained weights; nothing is changed.
        OSError: it cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{os.fspath(path)}: no such file")
    try:
        with safe_open(os.fspath(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        if metadata.get("format") != FORMAT:
            raise ValueError("another format")
        digests = dict(json.loads(metadata["trained"]))
        if not digests:
            raise ValueError("nothing in it")
        saved = {name: (tensors[f"{name}/rows"], tensors[f"{name}/delta"]) for name in digests}
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{os.fspath(path)}: not a file of plastic weights ({error})") from error
    parts = {name: _part(thing) for name, thing in learned.items()}
    deltas = {}
    for name, (rows, delta) in saved.items():
        if name not in parts:
            raise ValueError(
                f"{os.fspath(path)}: holds {name}, and what can learn here is {', '.join(parts) or 'nothing'}"
            )
        weight = parts[name].weight
        if digests[name] != _digest(parts[name].trained):
            raise ValueError(f"{os.fspath(path)}: {name} was learned on top of other trained weights")
        try:
            deltas[name] = torch.zeros(weight.shape, dtype=torch.float64).index_copy(0, rows, delta)
            if not (weight.cpu() + deltas[name]).to(weight.dtype).isfinite().all():
                raise ValueError(f"{os.fspath(path)}: {name} holds NaN or infinity")
        except (IndexError, RuntimeError) as error:
            raise ValueError(f"{os.fspath(path)}: not a file of plastic weights ({name} has another shape)") from error
    for name, part in parts.items():
        if name in deltas:
            part.replace(deltas[name])
        else:
            part.revert()


def _is_plastic(path: Path) -> bool:
    try:
        with safe_open(os.fspath(path), "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def _part(thing: PlasticPart | HasPlasticPart) -> PlasticPart:
    return thing if isinstance(thing, PlasticPart) else thing.plastic


def _digest(weight: Tensor) -> str:
    numbers = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    return f"{weight.dtype} {list(weight.shape)} {hashlib.blake2b(numbers.data, digest_size=16).hexdigest()}"
