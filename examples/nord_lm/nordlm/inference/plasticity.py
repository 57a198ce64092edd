"""Train synapses of a Nord model by reward-modulated STDP while it reads; changes and trained weights are stored separately.

Two kinds of synapses can learn:

``lm_head``
    from the readout neurons to the vocabulary. An entry of the vocabulary (an output of the head) has no neuron; the rule
    defines its spikes. For every token of the text two entries spike, one time step after the last time step of the previous
    token: the actual token, with reward +1, and one sampled from the model's prediction, with reward -1. If both are the same
    token, the changes cancel. With the presynaptic trace p at that time step, the expected change follows the prediction error:
    ``dW = a_plus * sum over tokens of (one-hot(token) - probabilities) outer p``. This is a delta rule but not the gradient of
    the loss, because the forward pass multiplies the head with the normalised output of the readout (membrane potentials and
    rates). In all pairs the presynaptic neuron spikes first, so ``a_plus`` is the learning rate, and only a negative reward
    weakens a weight.
``blocks.*.ffn.down``
    from the first to the second layer of neurons of a feed-forward, with the spikes of both. The reward of a token is
    ``"error"``, one number per neuron, or ``"loss"``, one number for all neurons. ``"error"`` is the prediction error of the
    token, projected to the neuron through the weights of the head and the gains of norm and block; the projection omits the
    clamp, the readout neurons, the division of the norm, and later blocks. ``"loss"`` is the running mean of the loss minus the
    loss of the token.
"""

import argparse
import warnings
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from nord_snn.layers import NordBlock
from nord_snn.learning_rules import (
    LossBelowBaseline,
    PlasticPart,
    RewardModulatedSTDP,
    load_plastic,
    save_plastic,
)
from nord_snn.models.nord import NordForCausalLM
from nord_snn.ops import reward_modulated_stdp
from nordlm.cli import number
from nordlm.errors import PlasticityError

__all__ = ["Control", "Plasticity", "PlasticityError", "add_plasticity_options", "synapse_names"]

#: Learning rates: change of a weight for each pair of spikes, by synapse, from the search in ``examples/online_learning``.
LEARNING_RATES = {"lm_head": 5e-5, "ffn.down": 0.05}
REWARDS = ("error", "loss")


class LearningSignals(NamedTuple):
    """Predictions and errors of one pass over a text, for the n tokens to learn from.

    Attributes:
        positions: positions that predict these tokens (each one before its token).
        targets: the tokens, ``[n]``.
        probabilities: predicted distribution of each token, ``[n, V]``.
        losses: loss of each token in nats, ``[n]``.
        projected_error: prediction error projected through the head to the channels of the residual stream, ``[n, D]``; None if
            no synapse uses it.
        reward_factor: factor of all rewards: 1, or -1 to make the text less probable.
    """

    positions: slice
    targets: Tensor
    probabilities: Tensor
    losses: Tensor
    projected_error: Tensor | None
    reward_factor: float


def _identity(x: Tensor) -> Tensor:
    return x


class Control(NamedTuple):
    """Functions that an experiment applies to the rewards ``[n, ...]`` and to the presynaptic spikes ``[T, n, D]``."""

    rewards: Callable[[Tensor], Tensor] = _identity
    spikes: Callable[[Tensor], Tensor] = _identity


class PlasticSynapse(Protocol):
    """Interface of both kinds of synapses."""

    plastic: PlasticPart
    uses_error: bool  # whether the rewards are LearningSignals.projected_error

    def start_recording(self) -> None:
        """Start recording spikes."""

    def stop_recording(self) -> None:
        """Stop recording and discard the record."""

    def learn(self, signals: LearningSignals, control: Control) -> Callable[[], None]:
        """Compute the change of the weights and return a function that applies it."""

    def clear_state(self) -> None:
        """Reset the state other than the weights."""

    def close(self) -> None:
        """Remove the hooks."""


class HeadSynapse:
    """The head: synapses from the readout neurons to the vocabulary."""

    uses_error = False

    def __init__(self, model: NordForCausalLM, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.plastic = PlasticPart(model.lm_head)
        self._spikes: Tensor | None = None
        self._recording = self._warned = False
        self._hook = model.readout.lif.register_forward_hook(self._record)

    def start_recording(self) -> None:
        """Start recording spikes."""
        self._recording = True

    def stop_recording(self) -> None:
        """Stop recording and discard the record."""
        self._recording, self._spikes = False, None

    def learn(self, signals: LearningSignals, control: Control) -> Callable[[], None]:
        """Reward the actual tokens, punish those sampled from the prediction."""
        if self._spikes is None:
            raise RuntimeError("no spikes were recorded")
        spikes = self._spikes[:, 0, signals.positions]
        if not self._warned and not spikes.any():
            self._warned = True
            warnings.warn("the readout neurons did not fire in this text, so the head did not change", stacklevel=3)
        # [T + 1, n, D]: vocabulary entries spike one time step after the last one
        pre = F.pad(control.spikes(spikes), (0, 0, 0, 0, 0, 1))
        sampled = torch.multinomial(signals.probabilities, 1).flatten()
        entries = torch.cat((signals.targets, sampled))  # vocabulary entries that spike, [2 n]
        rewards = torch.ones(len(entries), device=pre.device)
        rewards[len(sampled) :] = -1
        changed, index = entries.unique(return_inverse=True)
        post = pre.new_zeros(len(pre), len(entries), len(changed))
        post[-1, torch.arange(len(entries)), index] = 1
        scaled_rewards = signals.reward_factor * control.rewards(rewards)
        change, _ = reward_modulated_stdp(
            pre.repeat(1, 2, 1), post, scaled_rewards, a_plus=self.learning_rate, a_minus=0.0
        )
        return lambda: self.plastic.apply(change, changed)

    def clear_state(self) -> None:
        """Do nothing: there is no other state."""

    def close(self) -> None:
        """Remove the hooks."""
        self._hook.remove()

    def _record(self, module: Any, inputs: Any, spikes: Tensor) -> None:
        if self._recording:
            self._spikes = spikes.detach()


class FeedForwardSynapse:
    """The second linear map of a feed-forward, between its two layers of neurons."""

    def __init__(self, model: NordForCausalLM, index: int, learning_rate: float, reward: str) -> None:
        self.uses_error = reward == "error"
        self.source = LossBelowBaseline(baseline=None)
        self.norm, self.block = model.norm, cast(NordBlock, model.blocks[index])
        self.rule = RewardModulatedSTDP(
            step_mode="m",
            synapse=self.block.ffn.down,
            sn=self.block.ffn.lif2,
            a_plus=learning_rate,
            a_minus=learning_rate,
            reduction="mean",
            name=f"blocks.{index}.ffn.down",
        )
        self.rule.disable()
        self.plastic = self.rule.plastic

    def start_recording(self) -> None:
        """Start recording spikes."""
        self.rule.enable()

    def stop_recording(self) -> None:
        """Stop recording and discard the record."""
        self.rule.reset()
        self.rule.disable()

    def learn(self, signals: LearningSignals, control: Control) -> Callable[[], None]:
        """Apply reward-modulated STDP with the rewards of the tokens."""
        if signals.projected_error is not None:
            gain = self.block.ffn_gain
            rewards = signals.projected_error * self.norm.weight * gain / gain.abs().mean()
        else:
            rewards = cast(Tensor, self.source.reward(signals.losses))
        scaled_rewards = (signals.reward_factor * control.rewards(rewards))[None]
        delta = cast(Tensor, self.rule.step(scaled_rewards, on_grad=False, positions=signals.positions))

        def change() -> None:
            self.plastic.apply(delta)
            if not self.uses_error:
                self.source.update(signals.losses.mean().item())

        return change

    def clear_state(self) -> None:
        """Reset the running mean of the loss."""
        self.source.baseline = None

    def close(self) -> None:
        """Remove the hooks."""
        self.rule.close()


class Plasticity:
    """Synapses of a model that learn while it reads, each with its plastic part (the sum of all changes so far).

    Args:
        model: in eval mode.
        synapses: names, or patterns such as ``blocks.*.ffn.down``. Default: ``lm_head``; with tied embeddings, which must not
            change, every ``ffn.down``.
        learning_rate: change of a weight for each pair of spikes. Default: :data:`LEARNING_RATES`.
        reward: reward for every ``ffn.down``, ``"error"`` or ``"loss"``. Default: ``"error"``.
        control: functions that change rewards and spikes in an experiment. Default: no change.

    Raises:
        PlasticityError: a name matches no synapse that can learn.
    """

    def __init__(
        self,
        model: NordForCausalLM,
        synapses: Sequence[str] | None = None,
        learning_rate: float | None = None,
        reward: str = "error",
        control: Control = Control(),  # noqa: B008  # immutable
    ) -> None:
        if reward not in REWARDS:
            raise PlasticityError(f"the reward must be one of {', '.join(REWARDS)}, got {reward}")
        tied = model.config.tie_word_embeddings
        patterns = synapses or (("blocks.*.ffn.down",) if tied else ("lm_head",))
        names = synapse_names(model)
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise PlasticityError(
                    f"{pattern}: matches no synapse that can learn, expected one of {', '.join(names)}"
                )
        self.model, self.control = model, control
        self.synapses: dict[str, PlasticSynapse] = {}
        for name in (name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)):
            if name == "lm_head":
                rate = LEARNING_RATES["lm_head"] if learning_rate is None else learning_rate
                self.synapses[name] = HeadSynapse(model, rate)
            else:
                index = int(name.split(".")[1])
                rate = LEARNING_RATES["ffn.down"] if learning_rate is None else learning_rate
                self.synapses[name] = FeedForwardSynapse(model, index, rate, reward)
        if control.spikes is not _identity and set(self.synapses) != {"lm_head"}:
            raise PlasticityError("a control that changes presynaptic spikes expects lm_head as the only synapse")

    @torch.no_grad()
    def learn_from(self, context: Tensor, n_new: int, reward_factor: float = 1.0) -> float | None:
        """Run the model on ``context [1, S]`` and change the weights by STDP for its last ``n_new`` tokens.

        ``reward_factor`` multiplies all rewards. Return the mean loss of the ``n_new`` tokens before the change, in nats per
        token, or None for a single token without context, which has no prediction.
        """
        first = max(context.shape[1] - n_new, 1)  # the first token has no prediction
        targets = context[0, first:]
        if not len(targets):
            return None
        try:
            for synapse in self.synapses.values():
                synapse.start_recording()
            logits = self.model(input_ids=context, logits_to_keep=len(targets) + 1, use_cache=False).logits[0, :-1]
            probabilities = logits.float().softmax(-1)
            losses = F.cross_entropy(logits.float(), targets, reduction="none")
            projected_error = None
            if any(synapse.uses_error for synapse in self.synapses.values()):
                projected_error = (
                    self.model.lm_head.weight[targets] - probabilities.to(logits) @ self.model.lm_head.weight
                )
            signals = LearningSignals(
                slice(first - 1, -1), targets, probabilities, losses, projected_error, reward_factor
            )
            for change in [synapse.learn(signals, self.control) for synapse in self.synapses.values()]:
                change()
        finally:  # also after Ctrl-C, so that no spikes of the next generated text are recorded
            for synapse in self.synapses.values():
                synapse.stop_recording()
        return losses.mean().item()

    def forget(self) -> None:
        """Revert every change, bit for bit."""
        for synapse in self.synapses.values():
            synapse.plastic.revert()
            synapse.clear_state()

    def close(self) -> None:
        """Revert every change and remove the hooks."""
        self.forget()
        for synapse in self.synapses.values():
            synapse.close()

    def save(self, path: Path) -> None:
        """Write the learned change, without the trained weights, to a small safetensors file."""
        save_plastic(path, {name: synapse.plastic for name, synapse in self.synapses.items()})

    def load(self, path: Path) -> None:
        """Replace the learned change with the one in a file."""
        load_plastic(path, {name: synapse.plastic for name, synapse in self.synapses.items()})

    @torch.no_grad()
    def change(self) -> float:
        """Return the norm of all learned changes so far, relative to the norm of the trained weights of these synapses."""
        parts = [synapse.plastic for synapse in self.synapses.values()]
        learned = sum(float(delta.square().sum()) for part in parts if (delta := part.delta) is not None)
        return float((learned / sum(float(part.trained.square().sum()) for part in parts)) ** 0.5)


def synapse_names(model: NordForCausalLM) -> list[str]:
    """Return the names of the synapses that can learn: ``lm_head`` unless embeddings are tied, and every ``ffn.down``."""
    head = [] if model.config.tie_word_embeddings else ["lm_head"]
    return head + [
        f"blocks.{index}.ffn.down" for index, block in enumerate(model.blocks) if isinstance(block, NordBlock)
    ]


def add_plasticity_options(parser: argparse.ArgumentParser) -> None:
    """Add the plasticity options of ``chat.py`` and ``examples/online_learning``."""
    parser.add_argument(
        "--synapses",
        nargs="+",
        help="synapses that learn: lm_head, blocks.0.ffn.down, or patterns such as blocks.*.ffn.down (default: lm_head)",
    )
    parser.add_argument(
        "--rate",
        dest="learning_rate",
        metavar="RATE",
        type=number(0, 1),
        help="learning rate: change of a weight for each pair of spikes (default: 5e-5 for lm_head, 0.05 for ffn.down)",
    )
    parser.add_argument(
        "--reward", choices=REWARDS, default=REWARDS[0], help="reward of blocks.*.ffn.down (default: error)"
    )
