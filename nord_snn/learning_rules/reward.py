"""STDP whose sign and size a reward decides."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nord_snn.learning_rules.learner import Window
from nord_snn.learning_rules.ranks import mean_over_ranks, together
from nord_snn.learning_rules.sources import LossBelowBaseline, RewardSource, finite
from nord_snn.learning_rules.stdp import STDP
from nord_snn.ops import RewardSTDPState, reward_modulated_stdp
from nord_snn.ops.checks import check_time_constants

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
        source: where rewards come from; default: ``LossBelowBaseline(reward_scale, baseline, baseline_decay)``, three
            arguments that another source has no use for and that are then refused.

    Attributes:
        source: the reward source.
        baseline: the running mean of the loss, where the source has one.
        last_reward: what the last step was multiplied with, or None.

    Raises:
        TypeError: ``synapse`` is neither linear nor a convolution.
        ValueError: an argument is out of its range.

    Source: Izhikevich 2007 and Florian 2007 for reward-modulated STDP; the loss-driven reward is Nord's. SpikingJelly's
    ``MSTDPLearner`` multiplies the reward of a step with the pairs of the step before, its ``MSTDPETLearner`` also divides by
    the eligibility's time constant; here the reward is for what led up to it, this step included.

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
            check_time_constants(tau_eligibility=tau_eligibility)
        if per_sample and tau_eligibility is None:
            raise ValueError("per_sample is for an eligibility: give tau_eligibility, or leave it out")
        if source is not None and (reward_scale, baseline, baseline_decay) != (1.0, 10.0, 0.99):
            raise ValueError(
                "reward_scale, baseline and baseline_decay are those of the default source: give them, or source"
            )
        if source is not None and not isinstance(source, RewardSource):
            raise TypeError(f"source must be a RewardSource, got {type(source).__name__}")
        self.source = source or LossBelowBaseline(reward_scale, baseline, baseline_decay)
        self.tau_eligibility, self.per_sample = tau_eligibility, per_sample
        self.last_reward: float | Tensor | None = None
        self.eligibility: Tensor | None
        self.register_memory("eligibility", None)

    @property
    def baseline(self) -> float | None:
        """The running mean of the loss.

        Raises:
            AttributeError: the source has none.
        """
        return self.source.baseline  # type: ignore[attr-defined]  # not all have one

    @baseline.setter
    def baseline(self, value: float | None) -> None:
        self.source.baseline = value  # type: ignore[attr-defined]

    def step(  # type: ignore[override]  # the reward comes first, as in SpikingJelly's reward learners
        self,
        reward: float | Tensor | None = None,
        on_grad: bool = True,
        scale: float = 1.0,
        *,
        loss: float | Tensor | None = None,
        positions: slice | None = None,
    ) -> Tensor | None:
        """Turn what was recorded into ``reward * scale * dW``, and forget the record.

        In several processes (``torch.distributed``) all of them call this: the baseline, and the reward of a loss that is one
        number, are those of the mean loss; other rewards are each process's own; and the change is the mean of theirs.

        Args:
            reward: a number, or a tensor with one for each sample ``[B]``, for each token ``[B, S]`` (of the ``positions``),
                or for each of these and each neuron (channel) ``[B, *, n_out]``. It is taken as it is, unless the rule's
                source takes rewards.
            on_grad: see :meth:`STDP.step`.
            scale: factor on the change.
            loss: in place of a reward, the outcome that the source makes one of and then remembers: a number, or one for
                each sample.
            positions: see :meth:`STDP.step`.

        Returns:
            The change, shaped as the weight, or None with ``on_grad`` or if nothing was recorded; then nothing is remembered.

        Raises:
            TypeError: the outcome is neither a number nor a tensor.
            ValueError: not exactly one of ``loss`` and ``reward`` was given, the source does not take a loss, it is not finite
                or not of the right length; see also :meth:`STDP.step`.
        """
        if (loss is None) == (reward is None):
            raise ValueError("give step() either a loss or a reward")
        kind, given = ("reward", reward) if loss is None else ("loss", loss)
        if kind == "loss" and self.source.takes != kind:
            raise ValueError(f"this rule's source, {type(self.source).__name__}, takes rewards: give step() a reward")
        device = self.synapse.weight.device
        outcome = together(lambda: finite(given, kind), device)  # type: ignore[arg-type]  # one of them is there
        if self.source.takes != kind:
            factor, mean = outcome, None
        else:
            own = outcome.mean() if isinstance(outcome, Tensor) else torch.tensor(outcome, dtype=torch.float64)
            mean = float(mean_over_ranks(own, self.synapse.weight))  # type: ignore[arg-type]  # all have one
            one_for_all = kind == "loss" and not isinstance(outcome, Tensor)
            factor = self.source.reward(mean if one_for_all else outcome)
        delta = self._delta(partial(self._rewarded, reward=factor), scale, positions)
        if delta is None:
            return None
        self.last_reward = factor
        if mean is not None:
            self.source.update(mean)
        return self._deliver(delta, on_grad)

    def extra_repr(self) -> str:
        """The constants."""
        eligibility = f", tau_eligibility={self.tau_eligibility}, per_sample={self.per_sample}"
        return f"{super().extra_repr()}{eligibility}, source={type(self.source).__name__}"

    def get_extra_state(self) -> dict[str, Any]:
        """What the reward source remembers, for ``state_dict()``."""
        return self.source.state_dict()

    def set_extra_state(self, state: Any) -> None:
        """Take what the reward source remembers from a ``state_dict()``."""
        self.source.load_state_dict(state)

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
        if not n_samples:
            raise ValueError("per_sample needs at least one sample, got an empty batch")
        n_tokens = window.pre.shape[1] // n_samples
        if isinstance(reward, Tensor):
            if reward.ndim > 1 or (reward.view(n_samples, -1) != reward.view(n_samples, -1)[:, :1]).any():
                raise ValueError("with an eligibility a sample has one reward, got several for its tokens or neurons")
            rewards = reward[::n_tokens].tolist()
        else:
            rewards = [reward] * n_samples
        pre, post, eligibility = held
        total, states = torch.zeros_like(self.synapse.weight), []
        for sample, its_reward in enumerate(rewards):
            rows = slice(sample * n_tokens, (sample + 1) * n_tokens)
            state = None
            if pre is not None and post is not None and eligibility is not None:
                state = RewardSTDPState(pre[rows], post[rows], eligibility[sample])
            delta, after = reward_modulated_stdp(
                window.pre[:, rows],
                window.post[:, rows],
                its_reward,
                state,
                tau_eligibility=self.tau_eligibility,
                **self._constants(),
            )
            total = total + delta
            states.append(after)
        pres, posts, eligibilities = zip(*states, strict=True)
        return total, RewardSTDPState(torch.cat(pres), torch.cat(posts), torch.stack(eligibilities))


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
