"""Tests of nordlm.inference.plasticity, with which a model learns while it reads: only selected synapses and tokens."""

import pytest
import torch
from helpers import fire_easily
from nordlm.inference.loading import open_model
from nordlm.inference.plasticity import Control, Plasticity, PlasticityError, synapse_names

from nord_snn.models.nord import NordForCausalLM

BLOCKS = ["blocks.*.ffn.down"]


@pytest.fixture
def model(trained):
    """Return a trained model whose neurons fire, and the token ids of a sentence."""
    model, tokenizer = open_model(trained / "model")
    fire_easily(model)
    return model, torch.tensor([tokenizer("the neuron fires and rests while a spike wakes")["input_ids"]])


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before):
    """Return the names of the weights that differ from those of ``before``."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def loss(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def test_reading_a_text_repeatedly_lowers_its_loss(model):
    model, ids = model
    plasticity = Plasticity(model, learning_rate=0.005)
    before = loss(model, ids)
    losses = [plasticity.learn_from(ids, ids.shape[1]) for _ in range(20)]
    assert losses[0] == pytest.approx(before, abs=1e-5)
    assert loss(model, ids) < before - 0.2
    assert sum(losses[-5:]) < sum(losses[:5])


def test_the_mean_change_over_sampled_tokens_is_a_delta_rule(model, monkeypatch):
    """Mean dW = rate * sum over tokens of outer(one-hot - probabilities, trace).

    The trace has decayed by one time step when the token is read.
    """
    model, ids = model
    plasticity = Plasticity(model, learning_rate=0.001)
    synapse, readings = plasticity.synapses["lm_head"], []
    with monkeypatch.context() as patch:
        patch.setattr(synapse, "learn", lambda reading, control: lambda: readings.append((reading, synapse._spikes)))
        plasticity.learn_from(ids, ids.shape[1])
    reading, spikes = readings[0]
    assert spikes.any()
    steps = torch.arange(len(spikes), 0, -1)
    trace = (torch.exp(-steps / 20)[:, None, None] * spikes[:, 0, :-1]).sum(0)
    error = torch.nn.functional.one_hot(ids[0, 1:], model.config.vocab_size) - reading.probabilities
    expected = 0.001 * error.mT @ trace
    n = 2000  # samples, for a standard error below 5 %
    for _ in range(n):
        synapse._spikes = spikes
        synapse.learn(reading, Control())()
    total = synapse.plastic.delta.float()
    assert (total / n - expected).norm() < 0.05 * expected.norm()


def test_a_control_that_changes_spikes_is_supported_for_the_head_only(model):
    model, ids = model
    silent = Plasticity(model, control=Control(spikes=torch.zeros_like))
    silent.learn_from(ids, ids.shape[1])
    assert silent.change() == 0
    with pytest.raises(PlasticityError, match="expects lm_head as the only synapse"):
        Plasticity(model, BLOCKS, control=Control(spikes=torch.zeros_like))


@pytest.mark.quick
@pytest.mark.parametrize(("names", "reward"), [(None, "error"), (BLOCKS, "error"), (BLOCKS, "loss")])
def test_only_selected_synapses_change_and_reverting_is_exact(model, names, reward):
    model, ids = model
    before = weights(model)
    plasticity = Plasticity(model, names, reward=reward)
    plasticity.learn_from(ids, ids.shape[1])
    plasticity.learn_from(ids.flip(1), ids.shape[1])
    assert changed(model, before) == ({"lm_head.weight"} if names is None else {"blocks.0.ffn.down.weight"})
    assert plasticity.change() > 0
    plasticity.close()
    assert not changed(model, before)
    model(input_ids=ids)
    assert not any(getattr(synapse, "_spikes", None) is not None for synapse in plasticity.synapses.values())


@pytest.mark.quick
@pytest.mark.parametrize("names", [None, BLOCKS])
def test_without_rewards_nothing_changes(model, names):
    model, ids = model
    before = weights(model)
    plasticity = Plasticity(model, names, control=Control(rewards=torch.zeros_like))
    plasticity.learn_from(ids, ids.shape[1])
    assert not changed(model, before)


def test_only_weights_of_the_read_and_sampled_tokens_change_and_not_those_of_the_context(model):
    model, ids = model
    plasticity = Plasticity(model)
    plasticity.learn_from(ids, 2)
    rows = plasticity.synapses["lm_head"].plastic.delta.abs().sum(1).nonzero().flatten().tolist()
    assert 0 < len(rows) <= 4  # two tokens of the text, two sampled ones
    assert set(rows) & set(ids[0, -2:].tolist())
    plasticity.forget()
    torch.manual_seed(1)
    plasticity.learn_from(ids, 2)
    learned = plasticity.synapses["lm_head"].plastic.delta.clone()
    plasticity.forget()
    torch.manual_seed(1)
    plasticity.learn_from(ids, 2, reward_factor=-1.0)
    assert torch.allclose(plasticity.synapses["lm_head"].plastic.delta, -learned, atol=1e-7)


def test_a_single_token_changes_nothing(model):
    model, ids = model
    plasticity = Plasticity(model)
    assert plasticity.learn_from(ids[:, :1], 1) is None
    assert plasticity.learn_from(ids[:, :2], 2) is not None


def test_ctrl_c_while_learning_deletes_the_recorded_spikes(model, monkeypatch):
    model, ids = model
    plasticity = Plasticity(model, ["*"])
    rule = plasticity.synapses["blocks.0.ffn.down"].rule

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(rule, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        plasticity.learn_from(ids, 3)
    assert not rule._pre
    assert plasticity.synapses["lm_head"]._spikes is None


def test_if_one_synapse_fails_no_synapse_changes(model):
    """The reward of the second of two synapses is NaN."""
    model, ids = model
    before = weights(model)
    calls = []

    def nan_for_the_second(rewards):
        calls.append(rewards)
        return rewards if len(calls) == 1 else rewards * float("nan")

    plasticity = Plasticity(model, ["*"], reward="loss", control=Control(rewards=nan_for_the_second))
    with pytest.raises(ValueError, match="reward must be finite"):
        plasticity.learn_from(ids, ids.shape[1])
    assert not changed(model, before)
    assert plasticity.synapses["blocks.0.ffn.down"].source.baseline is None


def test_generation_is_not_recorded(model):
    model, ids = model
    plasticity = Plasticity(model, ["*"])
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert not plasticity.synapses["blocks.0.ffn.down"].rule._pre
    assert plasticity.synapses["lm_head"]._spikes is None


def test_silent_readout_neurons_warn_once(model):
    model, ids = model
    model.readout.lif.v_threshold.data.fill_(1e9)
    plasticity = Plasticity(model)
    with pytest.warns(UserWarning, match="the readout neurons did not fire"):
        plasticity.learn_from(ids, 3)
    plasticity.learn_from(ids, 3)
    assert plasticity.change() == 0


def test_names_of_modules_that_cannot_learn_raise(model):
    model, _ = model
    with pytest.raises(
        PlasticityError, match=r"ffn\.up: matches no synapse that can learn, expected one of lm_head, blocks\.0"
    ):
        Plasticity(model, ["blocks.0.ffn.up"])
    with pytest.raises(PlasticityError, match="one of error, loss, got x"):
        Plasticity(model, reward="x")


def test_a_tied_head_does_not_learn(model):
    config = model[0].config
    config.tie_word_embeddings = True
    tied = NordForCausalLM(config).eval()
    assert synapse_names(tied) == ["blocks.0.ffn.down"]
    assert list(Plasticity(tied).synapses) == ["blocks.0.ffn.down"]
    with pytest.raises(PlasticityError, match="lm_head"):
        Plasticity(tied, ["lm_head"])
