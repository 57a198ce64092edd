"""Reward-modulated STDP."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nord_snn.learning_rules.distributed import check_same_on_all_ranks, mean_over_ranks, raise_on_all_ranks
from nord_snn.learning_rules.learner import SpikeRecord
from nord_snn.learning_rules.sources import LossBelowBaseline, RewardSource, check_finite
from nord_snn.learning_rules.stdp import STDP
from nord_snn.ops import RewardSTDPState, reward_modulated_stdp
from nord_snn.ops.checks import check_flags, check_numbers, check_time_constants

__all__ = ["RewardModulatedSTDP"]


class RewardModulatedSTDP(STDP):
    """Multiply the STDP change by a reward: ``reward * dW``.

    ``dW`` is the change of :class:`STDP`; a negative reward reverses its sign. The equations are those of
    :func:`nord_snn.ops.reward_modulated_stdp`. The caller passes the reward, or a loss, from which it is computed:
    ``r = 2 * sigmoid(reward_scale * (baseline - loss)) - 1`` in (-1, 1), where the baseline is the running mean of the loss
    before this update. :meth:`reset` does not change the state of the reward source, which is part of ``state_dict()``.

    Args:
        step_mode: see :class:`STDP`.
        synapse: see :class:`STDP`.
        sn: see :class:`STDP`.
        tau_plus: time constant of the presynaptic trace, in time steps.
        tau_minus: time constant of the postsynaptic trace, in time steps.
        a_plus: see :class:`STDP`.
        a_minus: see :class:`STDP`.
        reduction: see :class:`STDP`.
        bounds: see :class:`STDP`.
        reward_scale: factor of ``baseline - loss``.
        baseline: initial baseline, in units of the loss; None: the first loss.
        baseline_decay: decay of the running mean of the loss per update, in [0, 1).
        mu: see :class:`STDP`.
        max_norm: see :class:`STDP`.
        name: see :class:`STDP`.
        tau_eligibility: time constant of the eligibility trace, in time steps; None: no trace, a reward applies only to the
            spikes since the last update.
        per_sample: with ``tau_eligibility``, store an eligibility trace for every sample of the batch, so that rewards may
            differ between samples. Each trace has the size of the weight. Without eligibility traces, rewards may differ
            between samples without this argument.
        source: the reward source; default: ``LossBelowBaseline(reward_scale, baseline, baseline_decay)``. With another source
            these three arguments must not be passed.

    Attributes:
        source: the reward source.
        baseline: the running mean of the loss, if the source has one.
        last_reward: reward of the last update, or None.

    Raises:
        TypeError: ``synapse`` is neither linear nor a convolution.
        ValueError: an argument is out of its range.

    Source: Izhikevich 2007 and Florian 2007 for reward-modulated STDP; the Nord language model for the reward from a loss.
    SpikingJelly's ``MSTDPLearner`` multiplies the reward of a time step with the pairs of the time step before, its
    ``MSTDPETLearner`` also divides by the time constant of the eligibility trace; here the reward applies to all pairs up to and
    including the present time step.

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
        *,
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
            step_mode,
            synapse,
            sn,
            tau_plus,
            tau_minus,
            a_plus,
            a_minus,
            reduction=reduction,
            bounds=bounds,
            mu=mu,
            max_norm=max_norm,
            name=name,
        )
        if tau_eligibility is not None:
            check_time_constants(tau_eligibility=tau_eligibility)
        check_flags(per_sample=per_sample)
        check_numbers(reward_scale=reward_scale, baseline_decay=baseline_decay)
        if baseline is not None:
            check_numbers(baseline=baseline)
        if not 0 <= baseline_decay < 1:
            raise ValueError(f"baseline_decay must lie in [0, 1), got {baseline_decay}")
        if per_sample and tau_eligibility is None:
            raise ValueError("per_sample=True needs an eligibility trace: pass tau_eligibility, or per_sample=False")
        if source is not None and (reward_scale, baseline, baseline_decay) != (1.0, 10.0, 0.99):
            raise ValueError(
                "reward_scale, baseline and baseline_decay configure the default source: pass either these or source"
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
        """Return the running mean of the loss.

        Raises:
            AttributeError: the source has no baseline.
        """
        return self.source.baseline  # type: ignore[attr-defined]  # not every source has one

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
        """Compute the weight update ``reward * scale * dW`` of the recorded spikes and clear the record.

        With ``torch.distributed`` all processes must call this. The baseline and the reward of a scalar loss are computed
        from the mean loss over all processes; other rewards are those of each process. The update is the mean over processes.

        Args:
            reward: a number, or a tensor with one number for each sample ``[B]``, for each token ``[B, S]`` (of the
                ``positions``), or for each sample or token and each neuron (channel) ``[B, *, n_out]``. It is used unchanged,
                unless the rule's source takes rewards.
            on_grad: see :meth:`STDP.step`.
            scale: factor of the update.
            loss: the loss from which the source computes the reward and updates its state; pass it instead of ``reward``. A
                number, or a tensor with the shapes of ``reward``.
            positions: see :meth:`STDP.step`.

        Returns:
            The update, shaped as the weight, or None with ``on_grad`` or if nothing was recorded. If nothing was recorded,
            the source is not updated.

        Raises:
            TypeError: the reward or loss is neither a number nor a tensor.
            ValueError: both or none of ``loss`` and ``reward`` were passed, the source does not take a loss, the reward or
                loss is not finite or has the wrong shape; see also :meth:`STDP.step`.
        """
        device = self.synapse.weight.device
        outcome, kind = raise_on_all_ranks(lambda: self._check_outcome(loss, reward), device)
        check_same_on_all_ranks(kind == "loss", device, "all processes must pass a loss, or all a reward")
        mean = None
        factor = outcome
        if self.source.takes == kind:
            own_mean = outcome.mean() if isinstance(outcome, Tensor) else torch.tensor(outcome, dtype=torch.float64)
            mean = float(mean_over_ranks(own_mean.double(), self.synapse.weight))  # type: ignore[arg-type]  # not None
            source_input = mean if kind == "loss" and not isinstance(outcome, Tensor) else outcome
            factor = raise_on_all_ranks(lambda: self.source.reward(source_input), device)
        delta = self._weight_update(partial(self._rewarded_change, reward=factor), scale, positions, on_grad)
        if delta is None:
            return None
        if mean is not None:
            raise_on_all_ranks(partial(self.source.update, mean), device)
        self.last_reward = factor
        return self._return_or_accumulate(delta, on_grad)

    def _check_outcome(
        self, loss: float | Tensor | None, reward: float | Tensor | None
    ) -> tuple[float | Tensor, Literal["loss", "reward"]]:
        """Return the loss or the reward, and its kind."""
        if (loss is None) == (reward is None):
            raise ValueError("pass either a loss or a reward to step()")
        if loss is None:
            return check_finite(reward, "reward"), "reward"  # type: ignore[arg-type]  # not None
        if self.source.takes != "loss":
            raise ValueError(f"the source of this rule, {type(self.source).__name__}, expects a reward, got a loss")
        return check_finite(loss, "loss"), "loss"

    def extra_repr(self) -> str:
        """Return the constants."""
        eligibility = f", tau_eligibility={self.tau_eligibility}, per_sample={self.per_sample}"
        return f"{super().extra_repr()}{eligibility}, source={type(self.source).__name__}"

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state of the reward source, for ``state_dict()``."""
        return self.source.state_dict()

    def set_extra_state(self, state: Any) -> None:
        """Load the state of the reward source from a ``state_dict()``."""
        self.source.load_state_dict(state)

    def _rewarded_change(self, record: SpikeRecord, reward: float | Tensor) -> tuple[Tensor, Callable[[], None]]:
        if isinstance(reward, Tensor):
            reward = _rewards_per_row(reward.to(record.post.device), record)
        stored: tuple[Tensor | None, Tensor | None, Tensor | None] = (self.trace_pre, self.trace_post, self.eligibility)
        compute = self._per_sample_change if self.per_sample else self._batch_change
        delta, state = compute(record, reward, stored)

        def commit() -> None:
            self.trace_pre, self.trace_post, self.eligibility = state

        return delta, commit

    def _batch_change(
        self, record: SpikeRecord, reward: float | Tensor, stored: tuple[Tensor | None, Tensor | None, Tensor | None]
    ) -> tuple[Tensor, RewardSTDPState]:
        if self.tau_eligibility is not None and isinstance(reward, Tensor):
            raise ValueError("with an eligibility trace, rewards that differ within a batch need per_sample=True")
        pre, post, eligibility = stored
        state = None if pre is None or post is None else RewardSTDPState(pre, post, eligibility)
        return reward_modulated_stdp(
            record.pre, record.post, reward, state, tau_eligibility=self.tau_eligibility, **self._constants()
        )

    def _per_sample_change(
        self, record: SpikeRecord, reward: float | Tensor, stored: tuple[Tensor | None, Tensor | None, Tensor | None]
    ) -> tuple[Tensor, RewardSTDPState]:
        """Compute the change sample by sample, each with its own eligibility trace ``[B, *weight]``."""
        n_samples = record.rows[0]
        if not n_samples:
            raise ValueError("per_sample needs at least one sample, got an empty batch")
        n_tokens = record.pre.shape[1] // n_samples
        if isinstance(reward, Tensor):
            if reward.ndim > 1 or (reward.view(n_samples, -1) != reward.view(n_samples, -1)[:, :1]).any():
                raise ValueError(
                    "with an eligibility trace a sample must have one reward, got several for its tokens or neurons"
                )
            rewards = reward[::n_tokens].tolist()
        else:
            rewards = [reward] * n_samples
        pre, post, eligibility = stored
        total, states = torch.zeros_like(self.synapse.weight), []
        for sample, sample_reward in enumerate(rewards):
            rows = slice(sample * n_tokens, (sample + 1) * n_tokens)
            state = None
            if pre is not None and post is not None and eligibility is not None:
                state = RewardSTDPState(pre[rows], post[rows], eligibility[sample])
            delta, new_state = reward_modulated_stdp(
                record.pre[:, rows],
                record.post[:, rows],
                sample_reward,
                state,
                tau_eligibility=self.tau_eligibility,
                **self._constants(),
            )
            total = total + delta
            states.append(new_state)
        pres, posts, eligibilities = zip(*states, strict=True)
        return total, RewardSTDPState(torch.cat(pres), torch.cat(posts), torch.stack(eligibilities))


def _rewards_per_row(reward: Tensor, record: SpikeRecord) -> Tensor:
    """Return the reward of each of the N rows, ``[N]`` or ``[N, n_out]``.

    Raises:
        ValueError: the shape fits neither samples nor tokens.
    """
    rows, n_out = record.rows, record.post.shape[2]
    if reward.shape == rows[: reward.ndim]:
        return reward.view(*reward.shape, *[1] * (len(rows) - reward.ndim)).expand(rows).flatten()
    if reward.shape == (*rows, n_out):
        return reward.flatten(0, -2)
    raise ValueError(
        f"the reward or loss must be one number or have shape {[rows[0]]} (samples)"
        f"{f', {list(rows)} (tokens)' * (len(rows) > 1)} or {[*rows, n_out]} (neurons), got {list(reward.shape)}; the weights "
        "are unchanged"
    )
