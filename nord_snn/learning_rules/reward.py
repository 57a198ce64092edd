"""STDP whose sign and size a reward decides."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from nord_snn.learning_rules.ranks import mean_over_ranks
from nord_snn.learning_rules.stdp import STDP
from nord_snn.ops import reward_from_loss

__all__ = ["RewardModulatedSTDP"]


class RewardModulatedSTDP(STDP):
    """``reward * dW``: what just fired together is strengthened if the outcome was good and weakened if it was bad.

    ``dW`` is that of :class:`STDP`. The reward is given by the caller, or it is
    ``r = 2 * sigmoid(reward_scale * (baseline - loss)) - 1`` in (-1, 1): positive where a loss lies below its running mean.
    The baseline is read before it is updated, ``baseline = decay * baseline + (1 - decay) * loss``. It outlives
    :meth:`reset` and is part of ``state_dict()``.

    Args:
        step_mode: see :class:`STDP`, as for all arguments up to ``bounds``.
        synapse: the ``nn.Linear`` that learns.
        sn: the neurons that it drives.
        tau_plus: time constant of the presynaptic trace, in steps.
        tau_minus: time constant of the postsynaptic trace, in steps.
        a_plus: strengthening per pair.
        a_minus: weakening per pair.
        reduction: ``"sum"`` or ``"mean"`` over rows.
        bounds: limits on what :meth:`apply` adds.
        reward_scale: how steeply the reward answers to the loss.
        baseline: loss that is expected at first.
        baseline_decay: of the running mean, in [0, 1).

    Attributes:
        baseline: the running mean of the loss.
        last_reward: what the last step was multiplied with, or None.

    Raises:
        ValueError: an argument is out of its range.

    Source: Izhikevich 2007 and Florian 2007 for reward-modulated STDP; the loss-driven reward is Nord's.

    Example:
        >>> import torch
        >>> from nord_snn.neurons import AssociativeLIFNode
        >>> net = nn.Sequential(nn.Linear(8, 4, bias=False), AssociativeLIFNode(4, n_clusters=2, step_mode="m"))
        >>> rule = RewardModulatedSTDP(step_mode="m", synapse=net[0], sn=net[1])
        >>> _ = net((torch.rand(10, 3, 8) < 0.5).float()); rule.apply(rule.step(loss=4.2, on_grad=False))
    """

    def __init__(
        self,
        step_mode: str,
        synapse: nn.Linear,
        sn: nn.Module,
        tau_plus: float = 20.0,
        tau_minus: float = 20.0,
        a_plus: float = 0.005,
        a_minus: float = 0.005,
        reduction: str = "sum",
        bounds: tuple[float, float] | None = (-0.3, 1.0),
        reward_scale: float = 1.0,
        baseline: float = 10.0,
        baseline_decay: float = 0.99,
    ) -> None:
        super().__init__(step_mode, synapse, sn, tau_plus, tau_minus, a_plus, a_minus, reduction, bounds)
        if not 0 <= baseline_decay < 1:
            raise ValueError(f"baseline_decay must lie in [0, 1), got {baseline_decay}")
        self.reward_scale, self.baseline, self.baseline_decay = reward_scale, baseline, baseline_decay
        self.last_reward: float | None = None

    def step(  # type: ignore[override]  # the reward comes first, as the outcome of the pass
        self,
        loss: float | Tensor | None = None,
        reward: float | Tensor | None = None,
        on_grad: bool = True,
        scale: float = 1.0,
        positions: slice | None = None,
    ) -> Tensor | None:
        """Turn what was recorded into ``reward * scale * dW``, and forget the record.

        In several processes (``torch.distributed``) all of them call this: reward and baseline are those of the mean loss,
        a reward that is given is each process's own, and the change is the mean of theirs.

        Args:
            loss: the outcome, compared with the running baseline, which it then updates.
            reward: the reward itself; give this or ``loss``.
            on_grad: see :meth:`STDP.step`.
            scale: factor on the change.
            positions: see :meth:`STDP.step`.

        Returns:
            ``[n_out, n_in]``, or None with ``on_grad`` or if nothing was recorded.

        Raises:
            ValueError: not exactly one of ``loss`` and ``reward`` was given, or it is not finite.
        """
        if (loss is None) == (reward is None):
            raise ValueError("give step() either a loss or a reward")
        outcome = self._outcome(loss, reward)
        if reward is None:
            self.last_reward = reward_from_loss(outcome, self.baseline, self.reward_scale)
        else:
            self.last_reward = outcome
        changed = super().step(on_grad=on_grad, scale=scale * self.last_reward, positions=positions)
        if loss is not None:
            self.baseline = self.baseline_decay * self.baseline + (1 - self.baseline_decay) * outcome
        return changed

    def _outcome(self, loss: float | Tensor | None, reward: float | Tensor | None) -> float:
        """The reward of this process, or the mean loss of all."""
        weight = self.synapse.weight

        def check() -> Tensor:
            given = loss if loss is not None else reward
            outcome = float(given.detach() if isinstance(given, Tensor) else given)  # type: ignore[arg-type]  # one is there
            if not math.isfinite(outcome):
                raise ValueError(f"the {'reward' if loss is None else 'loss'} must be finite, got {outcome}")
            return torch.tensor(outcome, dtype=torch.float64)

        if loss is None:
            own: list[float] = []
            mean_over_ranks(lambda: own.append(check().item()), weight)  # all of them raise if one does
            return own[0]
        mean = mean_over_ranks(lambda: check().to(weight.device), torch.zeros((), device=weight.device))
        return float(mean)  # type: ignore[arg-type]  # each process has a loss

    def get_extra_state(self) -> dict[str, float]:
        """The baseline, for ``state_dict()``."""
        return {"baseline": self.baseline}

    def set_extra_state(self, state: Any) -> None:
        """Take the baseline from a ``state_dict()``."""
        self.baseline = float(state["baseline"])
