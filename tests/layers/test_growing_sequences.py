"""CoFiringResonance over sequences that grow, or have padding in front."""

import pytest
import torch
from spikingjelly.activation_based.neuron import LIFNode
from torch import nn

from nord_snn.layers import CoFiringResonance, NordBlock, SequenceCache, SpikeFedBlock

pytestmark = pytest.mark.quick


class Memory:
    """The plainest thing that remembers."""

    def __init__(self):
        self.held = ()

    def __call__(self, *new):
        self.held = tuple(torch.cat(pair, 2) for pair in zip(self.held, new, strict=True)) if self.held else new
        return self.held


@pytest.mark.parametrize("neuron", [None, lambda n: LIFNode()])
@torch.no_grad()
def test_a_sequence_that_grows_is_bound_as_if_it_were_whole(neuron):
    layer = CoFiringResonance(64, n_heads=4, top_k=3, recency=True, neuron=neuron)
    x = 4 * torch.randn(6, 2, 9, 64)
    whole, memory = layer(x), Memory()
    parts = [layer(part, cache=SequenceCache(update=memory)) for part in x.split((4, 1, 3, 1), dim=2)]
    assert torch.allclose(torch.cat(parts, 2), whole, atol=1e-5)
    assert memory.held[0].dtype == torch.uint8


@torch.no_grad()
def test_padding_in_front_is_not_seen():
    layer = CoFiringResonance(64, n_heads=4, top_k=3, recency=True)
    x = 4 * torch.randn(6, 2, 9, 64)
    lengths = torch.tensor([9, 5])
    padded = layer(x, cache=SequenceCache(lengths))
    assert torch.allclose(padded[:, :1], layer(x[:, :1]), atol=1e-5)
    assert torch.allclose(padded[:, 1:, 4:], layer(x[:, 1:, 4:]), atol=1e-5)
    assert not padded[:, 1:, :4].any()
    assert torch.equal(layer(x, cache=SequenceCache(torch.tensor([9, 20], dtype=torch.uint8))), layer(x))


class Graded(nn.Module):
    """Neurons that give real numbers."""

    def forward(self, x):
        """Half of the input."""
        return x / 2


@torch.no_grad()
def test_what_cannot_be_remembered_is_named():
    x = torch.randn(2, 1, 3, 8)
    with pytest.raises(ValueError, match="zeros and ones"):
        CoFiringResonance(8, n_heads=2, neuron=lambda n: Graded())(x, cache=SequenceCache(update=Memory()))
    with pytest.raises(ValueError, match="window must be at least 1"):
        CoFiringResonance(64, n_heads=2)(torch.randn(2, 1, 3, 64), cache=SequenceCache(update=Memory(), window=0))
    with pytest.raises(ValueError, match="window needs update"):
        CoFiringResonance(64, n_heads=2)(torch.randn(2, 1, 3, 64), cache=SequenceCache(window=2))
    with pytest.raises(ValueError, match="not causal cannot grow"):
        CoFiringResonance(64, n_heads=2, causal=False)(torch.randn(2, 1, 3, 64), cache=SequenceCache(update=Memory()))
    with pytest.raises(ValueError, match="padding needs a causal resonance"):
        CoFiringResonance(64, n_heads=2, causal=False)(torch.randn(2, 1, 3, 64), cache=SequenceCache(torch.tensor([2])))


@pytest.mark.parametrize("block", [NordBlock, SpikeFedBlock])
@torch.no_grad()
def test_keywords_of_before_warn_and_mean_the_same(block):
    layer, x = block(64, n_heads=4, hidden_features=64), torch.randn(3, 2, 5, 64)
    lengths = torch.tensor([5, 2])
    with pytest.warns(FutureWarning, match="SequenceCache"):
        before = layer(x, lengths=lengths, remember=Memory(), window=4)
    assert torch.equal(before, layer(x, cache=SequenceCache(lengths, Memory(), 4)))
    with pytest.raises(TypeError, match="unexpected keyword 'length'"):
        layer(x, length=lengths)
    with pytest.raises(TypeError, match="pass cache alone"):
        layer(x, cache=SequenceCache(), lengths=lengths)
