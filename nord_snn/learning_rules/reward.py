"""STDP whose sign and size a reward decides."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nord_snn.learning_rules.learner import Window
from nord_snn.learning_rules.ranks import mean_over_ranks, together
from nord_snn.learning_rules.sources import GivenReward, LossBelowBaseline, RewardSource, finite
from nord_snn.learning_rules.stdp import STDP
from nord_snn.ops import RewardSTDPState, reward_modulated_stdp

__all__ = ["RewardModulatedSTDP"]


class RewardModulatedSTDP(STDP):
    """``reward * dW``: what just fired together is strengthened if the outcome was good and weakened if it was bad.

    ``dW`` is that of :class:`STDP`; the equations are those of :func:`nord_snn.ops.reward_modulated_stdp`. The reward is
    given by the caller or made of a loss: ``r = 2 * sigmoid(reward_scale * (baseline - loss)) - 1`` in (-1, 1), where the
    baseline is the loss's running mean, read before it is updated. What a reward source remembers outlives :meth:`reset` and
    is part of ``state_dict()``.

    Args:
        step_mode: see :class:`STDP`.
        synapse: see :class:`STDP`.
        sn: see :class:`STDP`.
        tau_plus: time constant of the presynaptic trace, in steps.
        tau_minus: time constant of the postsynaptic trace, in steps.
        a_plus: strengthening per pair.
        a_minus: weakening per pair.
        reduction: see :class:`STDP`.
        bounds: see :class:`STDP`.
        reward_scale: how steeply the reward answers to the loss.
        baseline: loss that is expected at first; None: the first loss.
        baseline_decay: of the running mean, in [0, 1).
        mu: see :class:`STDP`.
        max_norm: see :class:`STDP`.
        name: see :class:`STDP`.
        tau_eligibility: how long what fired waits for a reward, in steps; None: a reward is for what was recorded since the
            last step alone.
        per_sample: with ``tau_eligibility``, let every sample of the batch wait for a reward of its own. That takes memory
            for batch times weight; without eligibility, rewards may differ between samples at no cost.
        source: where rewards come from, in place of the default ``LossBelowBaseline(reward_scale, baseline,
            baseline_decay)``.

    Attributes:
        source: the reward source.
        last_reward: what the last step was multiplied with, or None.

    Raises:
        TypeError: ``synapse`` is neither linear nor a convolution.
        ValueError: an argument is out of its range.

    Source: Izhikevich 2007 and Florian 2007 for reward-modulated STDP; the loss-driven reward is Nord's.

    Example:
        >>> from nord_snn.neurons import AssociativeLIFNode
        >>> net = nn.Sequential(nn.Linear(64, 16, bias=False), AssociativeLIFNode(16, n_clusters=4, step_mode="m"))
        >>> rule = RewardModulatedSTDP(step_mode="m", synapse=net[0], sn=net[1])
        >>> _ = net((torch.rand(10, 3, 64) < 0.5).float()); rule.apply(rule.step(loss=4.2, on_grad=False))
    """

    def __init__(
        self,
        step_mode: str,
        synapse: nn.Module,
        sn: nn.Module,
        tau_plus: float = 20.0,
        tau_minus: float = 20.0,
        a_plus: float = 0.005,
        a_minus: float = 0.005,
        reduction: str = "sum",
        bounds: tuple[float, float] | None = (-0.3, 1.0),
        reward_scale: float = 1.0,
        baseline: float | None = 10.0,
        baseline_decay: float = 0.99,
        mu: float = 0.0,
        max_norm: float | None = None,
        name: str | None = None,
        tau_eligibility: float | None = None,
        per_sample: bool = False,
        source: RewardSource | None = None,
    ) -> None:
        super().__init__(
            step_mode, synapse, sn, tau_plus, tau_minus, a_plus, a_minus, reduction, bounds, mu, max_norm, name
        )
        if tau_eligibility is not None:
            self._check_time_constants(tau_eligibility=tau_eligibility)
        if per_sample and tau_eligibility is None:
            raise ValueError("per_sample is for an eligibility: give tau_eligibility, or leave it out")
        self.source = source or LossBelowBaseline(reward_scale, baseline, baseline_decay)
        self.tau_eligibility, self.per_sample = tau_eligibility, per_sample
        self.last_reward: float | Tensor | None = None
        self.eligibility: Tensor | None
        self.register_memory("eligibility", None)

    @property
    def baseline(self) -> float | None:
        """The running mean of the loss."""
        return self._loss_source().baseline

    @baseline.setter
    def baseline(self, value: float | None) -> None:
        self._loss_source().baseline = value

    def step(  # type: ignore[override]  # the reward comes first, as the outcome of the pass
        self,
        loss: float | Tensor | None = None,
        reward: float | Tensor | None = None,
        on_grad: bool = True,
        scale: float = 1.0,
        positions: slice | None = None,
    ) -> Tensor | None:
        """Turn what was recorded into ``reward * scale * dW``, and forget the record.

        In several processes (``torch.distributed``) all of them call this: the baseline, and the reward of a loss that is one
        number, are those of the mean loss; other rewards are each process's own; and the change is the mean of theirs.

        Args:
            loss: the outcome, compared with the running baseline, which it then updates: a number, or one for each sample.
            reward: the reward itself; give this or ``loss``. A number, or a tensor with one for each sample ``[B]``, for each
                token ``[B, S]`` (of the ``positions``), or for each of these and each neuron (channel) ``[B, *, n_out]``.
            on_grad: see :meth:`STDP.step`.
            scale: factor on the change.
            positions: see :meth:`STDP.step`.

        Returns:
            The change, shaped as the weight, or None with ``on_grad`` or if nothing was recorded.

        Raises:
            ValueError: not exactly one of ``loss`` and ``reward`` was given, it is not finite or not of the right length; see
                also :meth:`STDP.step`.
        """
        if (loss is None) == (reward is None):
            raise ValueError("give step() either a loss or a reward")
        weight, source = self.synapse.weight, self.source
        kind, given = ("loss", loss) if loss is not None else ("reward", reward)
        if kind == "loss":
            self._loss_source()
        outcome = together(lambda: finite(given, kind), weight.device)  # type: ignore[arg-type]  # one of them is there
        asked = kind == "loss" or isinstance(source, GivenReward)
        if asked:
            own = outcome.mean() if isinstance(outcome, Tensor) else torch.tensor(outcome, dtype=torch.float64)
            mean = float(mean_over_ranks(own.to(weight.device), own.to(weight.device)))  # type: ignore[arg-type]
            one_for_all = kind == "loss" and not isinstance(outcome, Tensor)
            factor = source.reward(mean if one_for_all else outcome)
        else:
            factor = outcome
        changed = self._step(partial(self._rewarded, reward=factor), on_grad, scale, positions)
        self.last_reward = factor
        if asked:
            source.update(mean)
        return changed

    def get_extra_state(self) -> dict[str, Any]:
        """What the reward source remembers, for ``state_dict()``."""
        return self.source.state_dict()

    def set_extra_state(self, state: Any) -> None:
        """Take what the reward source remembers from a ``state_dict()``."""
        self.source.load_state_dict(state)

    def _loss_source(self) -> LossBelowBaseline:
        if not isinstance(self.source, LossBelowBaseline):
            raise TypeError(f"this rule's source, {type(self.source).__name__}, takes rewards: give step() a reward")
        return self.source

    def _rewarded(self, window: Window, reward: float | Tensor) -> tuple[Tensor, Callable[[], None]]:
        if isinstance(reward, Tensor):
            reward = _for_rows(reward.to(window.post.device), window)
        held: tuple[Tensor | None, Tensor | None, Tensor | None] = (self.trace_pre, self.trace_post, self.eligibility)
        change = self._change_of_each if self.per_sample else self._change_of_all
        delta, state = change(window, reward, held)

        def keep() -> None:
            self.trace_pre, self.trace_post, self.eligibility = state

        return delta, keep

    def _change_of_all(
        self, window: Window, reward: float | Tensor, held: tuple[Tensor | None, Tensor | None, Tensor | None]
    ) -> tuple[Tensor, RewardSTDPState]:
        if self.tau_eligibility is not None and isinstance(reward, Tensor):
            raise ValueError("rewards that differ within a batch, and an eligibility, need per_sample=True")
        pre, post, eligibility = held
        state = None if pre is None or post is None else RewardSTDPState(pre, post, eligibility)
        return reward_modulated_stdp(
            window.pre, window.post, reward, state, tau_eligibility=self.tau_eligibility, **self._constants()
        )

    def _change_of_each(
        self, window: Window, reward: float | Tensor, held: tuple[Tensor | None, Tensor | None, Tensor | None]
    ) -> tuple[Tensor, RewardSTDPState]:
        """Sample by sample, each with an eligibility of its own ``[B, *weight]``."""
        n_samples = window.rows[0]
        rewards = torch.as_tensor(reward, device=window.post.device).expand(window.pre.shape[1]).view(n_samples, -1)
        if (rewards != rewards[:, :1]).any():
            raise ValueError("with an eligibility a sample has one reward, got several for its tokens")
        parts = []
        for sample in range(n_samples):
            rows = slice(sample * rewards.shape[1], (sample + 1) * rewards.shape[1])
            pre, post, eligibility = held
            state = None
            if pre is not None and post is not None and eligibility is not None:
                if len(eligibility) != n_samples:
                    raise ValueError(
                        f"the batch had {len(eligibility)} samples and has {n_samples} now: reset() in between"
                    )
                state = RewardSTDPState(pre[rows], post[rows], eligibility[sample])
            parts.append(
                reward_modulated_stdp(
                    window.pre[:, rows],
                    window.post[:, rows],
                    rewards[sample, 0].item(),
                    state,
                    tau_eligibility=self.tau_eligibility,
                    **self._constants(),
                )
            )
        state = RewardSTDPState(
            torch.cat([state.pre for _, state in parts]),
            torch.cat([state.post for _, state in parts]),
            torch.stack([state.eligibility for _, state in parts if state.eligibility is not None]),
        )
        return torch.stack([delta for delta, _ in parts]).sum(0), state


def _for_rows(reward: Tensor, window: Window) -> Tensor:
    """A reward for each of the N rows, ``[N]`` or ``[N, n_out]``.

    Raises:
        ValueError: it fits neither samples nor tokens.
    """
    rows, n_out = window.rows, window.post.shape[2]
    if reward.shape == rows[: reward.ndim]:
        return reward.view(*reward.shape, *[1] * (len(rows) - reward.ndim)).expand(rows).flatten()
    if reward.shape == (*rows, n_out):
        return reward.flatten(0, -2)
    raise ValueError(
        f"the reward must be one number, {[rows[0]]} for the samples{f', {list(rows)} for the tokens' * (len(rows) > 1)} or "
        f"{[*rows, n_out]} for their neurons, got {list(reward.shape)}; the weights are untouched"
    )
