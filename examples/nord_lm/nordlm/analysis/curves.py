"""Curves of a training run, read from its TensorBoard log."""

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nordlm.analysis.token_activity import zone
from nordlm.training.checkpoints import CheckpointError, read_json

__all__ = ["read_results", "training_curves"]

SMOOTH = 0.02  # the part of a curve over which a line is averaged


def training_curves(run: Path) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]] | None:
    """Losses, and rates of the parts of the model, by step; None where there is no log."""
    if not (run / "tensorboard").is_dir():
        return None
    log = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    log.Reload()  # of a damaged file what stands before the damage
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
    fired = {part: _smooth(_mean(of)) for part, of in layers.items()}
    return losses, fired


def read_results(run: Path | None) -> dict[str, Any]:
    """Of a run that has finished; nothing where that file is damaged, which only the curves need."""
    if run is None or not (run / "results.json").is_file():
        return {}
    try:
        results = read_json(run / "results.json")
    except CheckpointError:
        return {}
    return results if isinstance(results, dict) else {}


def _scalars(log: EventAccumulator, name: str) -> dict[int, float]:
    """By step; where a run went on from a checkpoint, what came later."""
    return {event.step: event.value for event in log.Scalars(name)}


def _mean(curves: list[dict[int, float]]) -> dict[int, float]:
    """Of the layers of a part, all counting the same: the log does not know how wide they are."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: sum(curve[step] for curve in curves) / len(curves) for step in steps}


def _smooth(values: dict[int, float]) -> dict[int, float]:
    """A running mean over the points around each."""
    wide = max(1, round(SMOOTH * len(values)))
    numbers = list(values.values())
    windows = [numbers[max(0, i - wide // 2) : i + wide // 2 + 1] for i in range(len(numbers))]
    return {step: sum(window) / len(window) for step, window in zip(values, windows, strict=True)}
