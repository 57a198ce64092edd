"""CoFiringResonance with cached keys, as in decoding, and with padding in front; which neurons can be cached as bits."""

import pytest
import torch
from spikingjelly.activation_based import surrogate
from spikingjelly.activation_based.neuron import LIFNode
from torch import nn

from nord_snn.layers import CoFiringResonance, NordBlock, SequenceCache, SpikeFedBlock, SpikeFedResonance
from nord_snn.neurons import AssociativeLIFNode, DenseActivation
from nord_snn.neurons.detection import emits_binary_spikes

pytestmark = pytest.mark.quick


class Cache:
    """Cache that concatenates keys and values."""

    def __init__(self):
        self.keys_and_values = ()

    def __call__(self, *new):
        self.keys_and_values = (
            tuple(torch.cat(pair, 2) for pair in zip(self.keys_and_values, new, strict=True))
            if self.keys_and_values
            else new
        )
        return self.keys_and_values


@pytest.mark.parametrize("neuron", [None, lambda n: LIFNode()])
@torch.no_grad()
def test_cached_calls_equal_one_call_on_the_whole_sequence(neuron):
    layer = CoFiringResonance(64, n_heads=4, top_k=3, recency=True, neuron=neuron)
    x = 4 * torch.randn(6, 2, 9, 64)
    whole, key_cache = layer(x), Cache()
    parts = [layer(part, cache=SequenceCache(update=key_cache)) for part in x.split((4, 1, 3, 1), dim=2)]
    assert torch.allclose(torch.cat(parts, 2), whole, atol=1e-5)
    assert key_cache.keys_and_values[0].dtype == torch.uint8


@torch.no_grad()
def test_padding_in_front_has_no_effect():
    layer = CoFiringResonance(64, n_heads=4, top_k=3, recency=True)
    x = 4 * torch.randn(6, 2, 9, 64)
    lengths = torch.tensor([9, 5])
    padded = layer(x, cache=SequenceCache(lengths))
    assert torch.allclose(padded[:, :1], layer(x[:, :1]), atol=1e-5)
    assert torch.allclose(padded[:, 1:, 4:], layer(x[:, 1:, 4:]), atol=1e-5)
    assert not padded[:, 1:, :4].any()
    assert torch.equal(layer(x, cache=SequenceCache(torch.tensor([9, 20], dtype=torch.uint8))), layer(x))


class RealValued(nn.Module):
    """Neurons with real-valued outputs."""

    def forward(self, x):
        """Return half of the input."""
        return x / 2


@torch.no_grad()
def test_keys_other_than_spikes_and_invalid_caches_raise():
    x = torch.randn(2, 1, 3, 8)
    with pytest.raises(ValueError, match="zeros and ones"):
        CoFiringResonance(8, n_heads=2, neuron=lambda n: RealValued())(x, cache=SequenceCache(update=Cache()))
    with pytest.raises(ValueError, match="window must be at least 1"):
        CoFiringResonance(64, n_heads=2)(torch.randn(2, 1, 3, 64), cache=SequenceCache(update=Cache(), window=0))
    with pytest.raises(ValueError, match="window needs update"):
        CoFiringResonance(64, n_heads=2)(torch.randn(2, 1, 3, 64), cache=SequenceCache(window=2))
    with pytest.raises(ValueError, match="a cache needs a causal resonance"):
        CoFiringResonance(64, n_heads=2, causal=False)(torch.randn(2, 1, 3, 64), cache=SequenceCache(update=Cache()))
    with pytest.raises(ValueError, match="padding needs a causal resonance"):
        CoFiringResonance(64, n_heads=2, causal=False)(torch.randn(2, 1, 3, 64), cache=SequenceCache(torch.tensor([2])))


@pytest.mark.parametrize("block", [NordBlock, SpikeFedBlock])
@torch.no_grad()
def test_deprecated_keywords_warn_and_have_the_same_effect(block):
    layer, x = block(64, n_heads=4, hidden_features=64), torch.randn(3, 2, 5, 64)
    lengths = torch.tensor([5, 2])
    with pytest.warns(FutureWarning, match="SequenceCache"):
        before = layer(x, lengths=lengths, remember=Cache(), window=4)
    assert torch.equal(before, layer(x, cache=SequenceCache(lengths, Cache(), 4)))
    with pytest.raises(TypeError, match="unexpected keyword 'length'"):
        layer(x, length=lengths)
    with pytest.raises(TypeError, match=r"pass cache=SequenceCache\(\.\.\.\) alone"):
        layer(x, cache=SequenceCache(), lengths=lengths)


class Unchanged(AssociativeLIFNode):
    """Subclass that overrides nothing."""


class Halved(AssociativeLIFNode):
    """Subclass whose forward returns half of the spikes."""

    def forward(self, x, **more):
        """Return half of the spikes."""
        return super().forward(x, **more) / 2


class Declared(Halved):
    """Subclass whose forward returns spikes and which says so by ``emits_binary_spikes``."""

    emits_binary_spikes = True

    def forward(self, x, **more):
        """Return the spikes."""
        return 2 * super().forward(x, **more)


class DeclaredByBase(Declared):
    """Subclass that inherits forward and declaration."""


class Mixed(RealValued, AssociativeLIFNode):
    """Subclass with the forward of its first base class."""


def test_emits_binary_spikes_is_not_inherited_by_an_overridden_forward():
    small = {"n_clusters": None}
    by_class = {
        kind: emits_binary_spikes(kind(8, **small))
        for kind in (AssociativeLIFNode, Unchanged, Halved, Declared, DeclaredByBase)
    }
    assert by_class == {AssociativeLIFNode: True, Unchanged: True, Halved: False, Declared: True, DeclaredByBase: True}
    assert not emits_binary_spikes(Mixed(8, **small))
    for module in (LIFNode(), RealValued(), DenseActivation()):
        assert not emits_binary_spikes(module)
    assert emits_binary_spikes(AssociativeLIFNode(8, None, surrogate=surrogate.ATan()))
    assert not emits_binary_spikes(AssociativeLIFNode(8, None, surrogate=surrogate.Sigmoid(spiking=False)))
    assert not emits_binary_spikes(AssociativeLIFNode(8, None, surrogate=torch.sigmoid))


@pytest.mark.parametrize(
    "neuron",
    [lambda n: Halved(n, None, threshold=0.01), lambda n: AssociativeLIFNode(n, None, surrogate=torch.sigmoid)],
)
@pytest.mark.parametrize("make", [CoFiringResonance, SpikeFedResonance])
@torch.no_grad()
def test_outputs_other_than_spikes_raise_instead_of_being_stored_as_bits(neuron, make):
    layer = make(8, n_heads=2, neuron=neuron)
    with pytest.raises(ValueError, match="zeros and ones"):
        layer(9 * torch.rand(6, 1, 3, 8), cache=SequenceCache(update=Cache()))
