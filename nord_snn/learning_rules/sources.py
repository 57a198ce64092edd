"""Where a reward comes from: small objects that turn an outcome into a reward and remember what is usual."""

import math
from numbers import Real
from typing import Any, Literal

from torch import Tensor

from nord_snn.ops import reward_from_loss

__all__ = ["GivenReward", "LossBelowBaseline", "RewardSource"]


class RewardSource:
    """What turns an outcome into a reward. ``state_dict()`` and ``load_state_dict()`` keep its memory with a run.

    A source can be called by itself, ``reward = source(outcome)``, when several rules share it; or be given to
    :class:`RewardModulatedSTDP`, which asks it in every step that brings an outcome of its kind. One of your own overrides
    :meth:`reward`, and the others where it remembers something.

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
        """The reward of an outcome; remembers nothing."""
        raise NotImplementedError

    def update(self, outcome: float) -> None:
        """Remember the mean outcome of a step."""

    def __call__(self, outcome: float | Tensor) -> float | Tensor:
        """The reward, before the outcome is remembered."""
        outcome = finite(outcome, "outcome")
        reward = self.reward(outcome)
        self.update(float(outcome.mean()) if isinstance(outcome, Tensor) else outcome)
        return reward

    def state_dict(self) -> dict[str, Any]:
        """What is remembered; accelerate's ``register_for_checkpointing`` saves it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what a ``state_dict`` holds."""


class LossBelowBaseline(RewardSource):
    """``r = 2 * sigmoid(scale * (baseline - loss)) - 1`` in (-1, 1): positive where a loss lies below its running mean.

    The baseline is read before it is updated, ``baseline = decay * baseline + (1 - decay) * loss``. A vector of losses gives
    a vector of rewards, and the baseline follows its mean.

    Args:
        scale: how steeply the reward answers to the loss.
        baseline: loss that is expected at first; None: the first loss is, and its reward 0.
        decay: of the running mean, in [0, 1).

    Raises:
        ValueError: ``decay`` is out of its range.

    Source: Nord's; a reward relative to what is expected goes back to Sutton 1984.

    Example:
        >>> source = LossBelowBaseline(baseline=4.0)
        >>> round(source(3.5), 4), round(source.baseline, 4)
        (0.2449, 3.995)
    """

    takes = "loss"

    def __init__(self, scale: float = 1.0, baseline: float | None = 10.0, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.scale, self.baseline, self.decay = scale, baseline, decay

    def reward(self, outcome: float | Tensor) -> float | Tensor:
        """The reward of a loss, or of each of several."""
        expected = self.baseline
        if expected is None:
            expected = float(outcome.mean()) if isinstance(outcome, Tensor) else outcome
        return reward_from_loss(outcome, expected, self.scale)

    def update(self, outcome: float) -> None:
        """Let the baseline follow."""
        if self.baseline is None:
            self.baseline = outcome
        self.baseline = self.decay * self.baseline + (1 - self.decay) * outcome

    def state_dict(self) -> dict[str, Any]:
        """The baseline."""
        return {"baseline": self.baseline}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the baseline from a ``state_dict``."""
        unset = "baseline" in state and state["baseline"] is None
        self.baseline = None if unset else _remembered(state, "baseline")


class GivenReward(RewardSource):
    """The reward that the caller gives, a number or a tensor with one for each sample, compared with what is usual if wanted.

    Args:
        decay: of a running mean of the rewards that is subtracted from them, in [0, 1); None: rewards are taken as given.

    Raises:
        ValueError: ``decay`` is out of its range.

    Source: a reward minus its mean is the success signal of Fremaux, Sprekeler and Gerstner 2010, without which
    reward-modulated STDP drifts where rewards are mostly of one sign.

    Example:
        >>> source = GivenReward(decay=0.9)
        >>> source(1.0), round(source(1.0), 4)
        (1.0, 0.9)
    """

    def __init__(self, decay: float | None = None) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1) or be None, got {decay}")
        self.decay, self.mean = decay, 0.0

    def reward(self, outcome: float | Tensor) -> float | Tensor:
        """The reward above what is usual."""
        return outcome if self.decay is None else outcome - self.mean

    def update(self, outcome: float) -> None:
        """Let the mean follow."""
        if self.decay is not None:
            self.mean = self.decay * self.mean + (1 - self.decay) * outcome

    def state_dict(self) -> dict[str, Any]:
        """The running mean."""
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the running mean from a ``state_dict``."""
        self.mean = _remembered(state, "mean")


def finite(outcome: float | Tensor, what: str) -> float | Tensor:
    """A number, or a tensor with dimensions and without a graph.

    Raises:
        TypeError: it is neither.
        ValueError: it is not finite.
    """
    if isinstance(outcome, Tensor) and outcome.is_complex():
        raise TypeError(f"the {what} must be real, got {outcome.dtype}")
    if isinstance(outcome, Tensor) and outcome.ndim:
        if not outcome.numel() or not outcome.isfinite().all():
            raise ValueError(f"the {what} must be finite and not empty, got {_described(outcome)}")
        return outcome.detach() if outcome.is_floating_point() else outcome.detach().float()
    if not isinstance(outcome, (Real, Tensor)):
        raise TypeError(f"the {what} must be a number or a tensor, got {type(outcome).__name__}")
    number = float(outcome.detach() if isinstance(outcome, Tensor) else outcome)
    if not math.isfinite(number):
        raise ValueError(f"the {what} must be finite, got {number}")
    return number


def _described(x: Tensor) -> str:
    return f"{list(x.shape)} with NaN or infinity in it" if x.numel() else f"shape {list(x.shape)}"


def _remembered(state: dict[str, Any], name: str) -> float:
    """A number that a ``state_dict`` holds."""
    value = state.get(name)
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"the state of a reward source must hold a finite {name}, got {value}")
    return float(value)
