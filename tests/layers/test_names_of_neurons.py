"""Neurons of a layer have an attribute named after their role, and an earlier name ("lif...") in state dicts."""

import pytest

from nord_snn.layers import CoFiringResonance, SpikeFedBlock, SpikeFedResonance, SpikingFeedForward

NAMES = {
    CoFiringResonance: {"query_neuron": "lif_q", "key_neuron": "lif_k"},
    SpikeFedResonance: {
        "query_neuron": "lif_q",
        "key_neuron": "lif_k",
        "value_neuron": "lif_v",
        "output_neuron": "lif_o",
        "final_neuron": "lif_out",
    },
    SpikingFeedForward: {"hidden_neuron": "lif1", "output_neuron": "lif2"},
    SpikeFedBlock: {"attention_neuron": "lif1", "ffn_neuron": "lif2", "hidden_neuron": "lif_h"},
}
LAYERS = {
    CoFiringResonance: lambda: CoFiringResonance(64, 4),
    SpikeFedResonance: lambda: SpikeFedResonance(64, 4, spiking_values=True, spikes_out=True),
    SpikingFeedForward: lambda: SpikingFeedForward(64, 128),
    SpikeFedBlock: lambda: SpikeFedBlock(64, 4, 128),
}


@pytest.mark.parametrize("layer", NAMES, ids=lambda layer: layer.__name__)
def test_every_neuron_has_both_names(layer):
    module = LAYERS[layer]()
    children = dict(module.named_children())
    for attribute, lif_name in NAMES[layer].items():
        assert getattr(module, attribute) is children[lif_name]
    neurons = {name for name in children if name.startswith("lif")}
    assert neurons == set(NAMES[layer].values())


def test_neurons_that_a_layer_does_not_have_are_none():
    assert SpikeFedBlock(64, 4, 128, resonance=False).attention_neuron is None
    assert SpikeFedResonance(64, 4).value_neuron is None
    assert SpikeFedResonance(64, 4).final_neuron is None


def test_the_attribute_follows_a_replaced_neuron():
    """The neuron is replaced under its name in the state dict."""
    ffn = SpikingFeedForward(64, 128)
    other = SpikingFeedForward(64, 128).lif1
    ffn.lif1 = other
    assert ffn.hidden_neuron is other
