"""Read the curves of a training run from its TensorBoard log."""

import math
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nordlm.analysis.token_activity import zone
from nordlm.reading import check_regular
from nordlm.training.checkpoints import CheckpointError, read_json

__all__ = ["RUN_RESULTS", "read_results", "training_curves"]

#: Fields of ``results.json`` that a report shows; all are numbers.
RUN_RESULTS = ("steps", "tokens", "seed", "validation_loss", "bits_per_byte", "unigram_loss", "bigram_loss")

SMOOTH = 0.02  # width of the running mean, as a fraction of the curve


def training_curves(run: Path) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]] | None:
    """Return losses, and firing rates of the parts of the model, by training step; None if there is no log.

    Raises:
        CheckpointError: the folder of the log has a pipe or a device.
    """
    if not (run / "tensorboard").is_dir():
        return None
    for file in (run / "tensorboard").rglob("*"):
        if not file.is_dir():
            check_regular(file, CheckpointError)  # a pipe would block the reader
    log = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    log.Reload()  # of a damaged file, only the values before the damage
    names = log.Tags()["scalars"]
    if "loss" not in names:
        return None
    losses = {"training": _smooth(_scalars(log, "loss"))}
    if "held_out_loss" in names:
        losses["held out"] = _scalars(log, "held_out_loss")
    if {"steps", "validation_loss"} <= (results := read_results(run)).keys():
        losses.setdefault("held out", {})[results["steps"]] = results["validation_loss"]
    layers: dict[str, list[dict[int, float]]] = {}
    for name in names:
        if name.startswith("rate/"):
            layers.setdefault(zone(name.removeprefix("rate/")), []).append(_scalars(log, name))
    rates = {part: _smooth(_mean(curves)) for part, curves in layers.items()}
    return losses, rates


def read_results(run: Path | None) -> dict[str, Any]:
    """Read ``results.json`` of a finished run; return an empty dictionary if it is missing or damaged."""
    if run is None or not (run / "results.json").is_file():
        return {}
    try:
        results = read_json(run / "results.json")
    except CheckpointError:
        return {}
    if not isinstance(results, dict) or not all(map(_is_number, (results.get(name, 0) for name in RUN_RESULTS))):
        return {}
    return results


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _scalars(log: EventAccumulator, name: str) -> dict[int, float]:
    """Return values by training step; if a resumed run has two values of a training step, the later one."""
    return {event.step: event.value for event in log.Scalars(name)}


def _mean(curves: list[dict[int, float]]) -> dict[int, float]:
    """Return the unweighted mean over the layers of a part: the log does not contain their widths."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: sum(curve[step] for curve in curves) / len(curves) for step in steps}


def _smooth(values: dict[int, float]) -> dict[int, float]:
    """Return a centred running mean."""
    width = max(1, round(SMOOTH * len(values)))
    numbers = list(values.values())
    windows = [numbers[max(0, i - width // 2) : i + width // 2 + 1] for i in range(len(numbers))]
    return {step: sum(window) / len(window) for step, window in zip(values, windows, strict=True)}
