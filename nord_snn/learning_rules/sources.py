"""Reward sources: objects that compute a reward from an outcome (a loss, or a reward of the caller) and its running mean."""

import math
from numbers import Real
from typing import Any, Literal

from torch import Tensor

from nord_snn.ops import reward_from_loss
from nord_snn.ops.checks import as_number, check_numbers, check_tensor, describe

__all__ = ["GivenReward", "LossBelowBaseline", "RewardSource"]


class RewardSource:
    """Compute a reward from an outcome: a loss, or a reward of the caller.

    Call a source directly, ``reward = source(outcome)``, if several rules share it; or pass it to
    :class:`RewardModulatedSTDP`, which calls it in every update whose outcome is of the kind ``takes``. A subclass overrides
    :meth:`reward`, and the other methods if it has state.

    Attributes:
        takes: the kind of outcome, ``"loss"`` or ``"reward"``.

    Example:
        >>> class OnlyTheSign(RewardSource):
        ...     def reward(self, outcome):
        ...         return math.copysign(1.0, outcome)
        >>> OnlyTheSign()(-0.3)
        -1.0
    """

    takes: Literal["loss", "reward"] = "reward"

    def reward(self, outcome: float | Tensor) -> float | Tensor:
        """Return the reward of an outcome, without changing the state."""
        raise NotImplementedError

    def update(self, outcome: float) -> None:
        """Update the state with an outcome, a number: the mean if the outcome was a tensor."""

    def __call__(self, outcome: float | Tensor) -> float | Tensor:
        """Return the reward, then update the state."""
        outcome = check_finite(outcome, "outcome")
        reward = self.reward(outcome)
        self.update(float(outcome.mean()) if isinstance(outcome, Tensor) else outcome)
        return reward

    def state_dict(self) -> dict[str, Any]:
        """Return the state; accelerate's ``register_for_checkpointing`` saves it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state from a ``state_dict``."""


class LossBelowBaseline(RewardSource):
    """Reward losses below their running mean: ``r = 2 * sigmoid(scale * (baseline - loss)) - 1`` in (-1, 1).

    The reward uses the baseline before its update, ``baseline = decay * baseline + (1 - decay) * loss``. A vector of losses
    gives a vector of rewards, and its mean updates the baseline.

    Args:
        scale: factor of ``baseline - loss``.
        baseline: initial baseline, in units of the loss; None: the first loss, whose reward is then 0.
        decay: decay of the running mean per update, in [0, 1).

    Raises:
        TypeError: an argument is not a number.
        ValueError: ``decay`` is out of its range, or an argument is not finite.

    Source: the Nord language model; rewards relative to an expected reward go back to Sutton 1984.

    Example:
        >>> source = LossBelowBaseline(baseline=4.0)
        >>> round(source(3.5), 4), round(source.baseline, 4)
        (0.2449, 3.995)
    """

    takes = "loss"

    def __init__(self, scale: float = 1.0, baseline: float | None = 10.0, decay: float = 0.99) -> None:
        check_numbers(scale=scale, decay=decay)
        if baseline is not None:
            check_numbers(baseline=baseline)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.scale, self.baseline, self.decay = scale, baseline, decay

    def reward(self, outcome: float | Tensor) -> float | Tensor:
        """Return the reward of a loss, or the rewards of a vector of losses."""
        expected = self.baseline
        if expected is None:
            expected = float(outcome.mean()) if isinstance(outcome, Tensor) else outcome
        return reward_from_loss(outcome, expected, self.scale)

    def update(self, outcome: float) -> None:
        """Update the baseline."""
        if self.baseline is None:
            self.baseline = outcome
        self.baseline = self.decay * self.baseline + (1 - self.decay) * outcome

    def state_dict(self) -> dict[str, Any]:
        """Return the baseline."""
        return {"baseline": self.baseline}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the baseline from a ``state_dict``."""
        unset = "baseline" in state and state["baseline"] is None
        self.baseline = None if unset else _read_number(state, "baseline")


class GivenReward(RewardSource):
    """Return the caller's rewards, a number or a tensor with one for each sample, optionally minus their running mean.

    Args:
        decay: decay per update of the running mean that is subtracted from the rewards, in [0, 1); None: nothing is subtracted.

    Raises:
        TypeError: ``decay`` is not a number.
        ValueError: it is out of its range.

    Source: a reward minus its mean is the success signal of Fremaux, Sprekeler and Gerstner 2010, without which
    reward-modulated STDP drifts if most rewards have the same sign.

    Example:
        >>> source = GivenReward(decay=0.9)
        >>> source(1.0), round(source(1.0), 4)
        (1.0, 0.9)
    """

    def __init__(self, decay: float | None = None) -> None:
        if decay is not None and not 0 <= as_number(decay, "decay") < 1:
            raise ValueError(f"decay must lie in [0, 1) or be None, got {decay}")
        self.decay, self.mean = decay, 0.0

    def reward(self, outcome: float | Tensor) -> float | Tensor:
        """Return the reward minus the running mean."""
        return outcome if self.decay is None else outcome - self.mean

    def update(self, outcome: float) -> None:
        """Update the running mean."""
        if self.decay is not None:
            self.mean = self.decay * self.mean + (1 - self.decay) * outcome

    def state_dict(self) -> dict[str, Any]:
        """Return the running mean."""
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the running mean from a ``state_dict``."""
        self.mean = _read_number(state, "mean")


def check_finite(outcome: float | Tensor, kind: str) -> float | Tensor:
    """Return the outcome as a float, or as a detached tensor if it has dimensions.

    Raises:
        TypeError: the outcome is neither a real number nor a tensor.
        ValueError: the outcome is not finite.
    """
    if isinstance(outcome, Tensor):
        check_tensor(outcome, f"the {kind}", "of numbers", kind="real")
        if outcome.is_meta:
            raise ValueError(f"the {kind} must have values, got a tensor on the device meta")
    if isinstance(outcome, Tensor) and outcome.ndim:
        if not outcome.numel() or not outcome.isfinite().all():
            raise ValueError(f"the {kind} must be finite and not empty, got {_describe(outcome)}")
        return outcome.detach() if outcome.is_floating_point() else outcome.detach().float()
    if not isinstance(outcome, Tensor) and (not isinstance(outcome, Real) or isinstance(outcome, bool)):
        raise TypeError(f"the {kind} must be a number or a tensor, got {describe(outcome)}")
    number = float(outcome.detach()) if isinstance(outcome, Tensor) else as_number(outcome, f"the {kind}")
    if not math.isfinite(number):
        raise ValueError(f"the {kind} must be finite, got {number}")
    return number


def _describe(x: Tensor) -> str:
    return f"{list(x.shape)} with NaN or infinity" if x.numel() else f"shape {list(x.shape)}"


def _read_number(state: dict[str, Any], name: str) -> float:
    """Return a number from a ``state_dict``."""
    value = state.get(name)
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"the state of a reward source must have a finite {name}, got {value}")
    return float(value)
