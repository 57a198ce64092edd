"""Layers of the published block: each layer has its equation and documented properties."""

from functools import partial

import pytest
import torch
from helpers import fire_easily
from spikingjelly.activation_based.neuron import LIFNode
from torch import nn

from nord_snn.layers import (
    CoFiringResonance,
    LeakyClamp,
    MembraneReadout,
    MultiScaleTemporalEncoder,
    NordBlock,
    SpikingFeedForward,
)
from nord_snn.neurons import AssociativeLIFNode

pytestmark = pytest.mark.quick

node_with_four_clusters = partial(AssociativeLIFNode, n_clusters=4)


# --- LeakyClamp


def test_the_clamp_has_a_gradient_where_relu_has_none():
    clamp = LeakyClamp(3)
    x = torch.tensor([[2.0, -0.5, -9.0]]).requires_grad_()
    clamp(x).sum().backward()
    assert x.grad[0].tolist() == pytest.approx([1.0, 0.1, 0.0], abs=1e-6)
    assert clamp.leak_logit.grad[1] != 0  # the second channel is on the slope
    assert clamp.floor.grad.tolist() == [0, 0, 1]  # the third channel is at the floor
    relu = x.detach().clone().requires_grad_()
    nn.functional.relu(relu).sum().backward()
    assert relu.grad[0, 1] == 0


def test_the_clamp_equals_its_equation():
    clamp = LeakyClamp(4, floor=-0.2, leak=0.5)
    x = torch.randn(50, 4)
    expected = torch.where(x >= 0, x, (0.5 * x).clamp(min=-0.2))
    assert torch.allclose(clamp(x), expected, atol=1e-7)


def test_the_clamp_passes_gradcheck():
    clamp = LeakyClamp(3).double()
    x = torch.tensor([[1.0, -0.3, -7.0], [-2.5, 0.4, -0.9]], dtype=torch.float64).requires_grad_()
    parameters = tuple(clamp.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: clamp(x), (x, *parameters))


# --- MultiScaleTemporalEncoder


def test_the_encoder_returns_time_steps_of_the_fast_path_and_then_of_the_slow_path():
    encoder = MultiScaleTemporalEncoder(6, t_fast=3, t_slow=2)
    with torch.no_grad():
        encoder.fast_basis.zero_()
        encoder.slow_basis.zero_()
    x = torch.randn(4, 6)
    steps = encoder(x)
    p = encoder.projection(x)
    assert steps.shape == (5, 4, 6)
    for t in range(3):
        assert torch.allclose(steps[t], 0.5 * p * 15)
    for t in (3, 4):
        assert torch.allclose(steps[t], 0.5 * p * 5)


def test_every_time_step_of_the_encoder_has_its_own_gate():
    encoder = MultiScaleTemporalEncoder(6, out_features=8)
    x = torch.randn(2, 3, 6)
    encoder(x)[4].sum().backward()
    has_gradient = encoder.fast_basis.grad.abs().sum(1) > 0
    assert has_gradient.nonzero().flatten().tolist() == [4]
    assert encoder(x).shape == (10, 2, 3, 8)


def test_the_encoder_passes_gradcheck():
    encoder = MultiScaleTemporalEncoder(3, t_fast=2, t_slow=1).double()
    x = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: encoder(x), (x, *encoder.parameters()))


def test_the_slow_path_of_the_encoder_is_optional_and_the_fast_path_is_not():
    assert MultiScaleTemporalEncoder(4, t_slow=0)(torch.zeros(1, 4)).shape == (8, 1, 4)
    with pytest.raises(ValueError, match="t_fast must be at least 1"):
        MultiScaleTemporalEncoder(4, t_fast=0)


# --- CoFiringResonance


def test_resonance_is_causal_and_has_the_same_output_at_every_time_step():
    layer = CoFiringResonance(8, n_heads=2, top_k=3, recency=True, neuron=node_with_four_clusters)
    x = torch.randn(5, 2, 6, 8)
    before = layer(x)
    assert torch.equal(before, before[:1].expand(5, -1, -1, -1))
    x[:, :, 4:] += torch.randn(5, 2, 2, 8)
    after = layer(x)
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.equal(before[:, :, 4:], after[:, :, 4:])


def test_resonance_has_the_documented_initial_values_and_gradients():
    layer = CoFiringResonance(8, n_heads=2, recency=True, neuron=node_with_four_clusters)
    assert layer.temperature.tolist() == pytest.approx([4**-0.5])
    assert layer.recency.tolist() == pytest.approx([2**-1, 2**-3])
    layer(3 * torch.randn(6, 2, 6, 8)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.ndim >= 1
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert CoFiringResonance(8, n_heads=2, neuron=node_with_four_clusters).recency is None


def test_positions_that_fire_together_attend_to_each_other():
    """Positions 0 and 3 have the same features: 3 attends more to 0 than to 1 or 2."""
    torch.manual_seed(3)
    layer = CoFiringResonance(16, n_heads=1, neuron=partial(AssociativeLIFNode, n_clusters=None))
    with torch.no_grad():
        layer.k_proj.weight.copy_(layer.q_proj.weight)
        layer.temperature.fill_(1.0)
        layer.v_proj.weight.copy_(torch.eye(16))
        layer.o_proj.weight.copy_(torch.eye(16))
    features_0, features_1, features_2 = 4 * torch.randn(3, 1, 16)
    x = torch.stack((features_0, features_1, features_2, features_0), dim=1).expand(8, 1, 4, 16)
    context = layer(x)[0, 0, 3]
    similarity = [
        nn.functional.cosine_similarity(context, v[0], dim=0).item() for v in (features_0, features_1, features_2)
    ]
    assert similarity[0] > 0.9 > max(similarity[1:])


# --- SpikingFeedForward


def test_the_feed_forward_equals_its_equation_and_starts_from_rest():
    ffn = SpikingFeedForward(8, 12, neuron=node_with_four_clusters)
    x = 3 * torch.randn(6, 2, 3, 8)
    expected = ffn.lif2(ffn.down(ffn.lif1(ffn.up(x), stateless=True)), stateless=True)
    assert torch.equal(ffn(x), expected)
    assert torch.equal(ffn(x), expected)
    assert ffn(x[:, :1]).shape == (6, 1, 3, 8)  # no state is stored, so the batch may have another size


# --- MembraneReadout


def test_the_readout_equals_its_recursion_plus_the_firing_rate():
    readout = MembraneReadout(8, neuron=node_with_four_clusters)
    x = torch.randn(7, 3, 8)
    node = node_with_four_clusters(8, step_mode="m", store_v_seq=True)
    node.load_state_dict(readout.lif.state_dict())
    spikes = node(x)
    d, e = torch.tensor(1.4).sigmoid(), torch.zeros(3, 8)
    for v in node.v_seq:
        e = d * e + (1 - d) * v
    assert torch.allclose(readout(x), e + spikes.mean(0), atol=1e-6)
    assert readout.lif.v_seq is None  # so that the graph of the last batch is freed


def test_the_readout_distinguishes_inputs_below_threshold():
    """Below threshold there are no spikes; only the membrane potential differs."""
    readout = MembraneReadout(4, neuron=node_with_four_clusters)
    weak, weaker = torch.full((5, 1, 4), 0.2), torch.full((5, 1, 4), 0.1)
    assert (readout(weak) > readout(weaker)).all()


# --- NordBlock


def test_the_block_equals_its_equation():
    block = NordBlock(8, n_heads=2, hidden_features=12, residual_scale=0.05, neuron=node_with_four_clusters)
    x = torch.randn(5, 2, 4, 8)
    y = x + 0.05 * block.resonance(block.norm1(x))
    y = y + 0.05 * block.ffn(block.norm2(y))
    assert torch.allclose(block(x), block.clamp(y), atol=1e-6)


def test_positions_of_a_block_are_independent_only_without_resonance():
    x = torch.randn(5, 1, 4, 8)
    changed = x.clone()
    changed[:, :, 0] += 5
    for resonance in (True, False):
        block = NordBlock(8, 2, 12, resonance=resonance, neuron=node_with_four_clusters)
        with torch.no_grad():
            differs = not torch.equal(block(x)[:, :, 1:], block(changed)[:, :, 1:])
        assert differs is resonance


# --- all layers with neurons

LAYERS = {
    "resonance": lambda neuron: CoFiringResonance(8, n_heads=2, neuron=neuron),
    "feed_forward": lambda neuron: SpikingFeedForward(8, 12, neuron=neuron),
    "readout": lambda neuron: MembraneReadout(8, neuron=neuron),
    "block": lambda neuron: NordBlock(8, 2, 12, neuron=neuron),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_accepts_spikingjellys_neurons(name):
    layer = LAYERS[name](lambda n: LIFNode(tau=2.0, v_threshold=0.2))
    x = (3 * torch.randn(5, 2, 4, 8)).requires_grad_()
    out = layer(x)
    assert torch.equal(layer(x), out)  # each call starts from rest
    out.square().sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_under_autocast_are_close_to_those_in_float32(name):
    """Neurons and clamps compute in float32: at most 5 % of the outputs differ by more than rounding."""
    layer, x = LAYERS[name](node_with_four_clusters), 4 * torch.randn(5, 2, 4, 8)
    fire_easily(layer)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    near = (out - expected).abs() < 0.02 + 0.02 * expected.abs()
    assert expected.any()
    assert near.float().mean() > 0.95


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (LeakyClamp(8), (3, 7), r"LeakyClamp expects shape \[\*, D\] with D = 8, got \[3, 7\]"),
        (MultiScaleTemporalEncoder(8), (3, 7), r"MultiScaleTemporalEncoder expects shape \[\*, D\] with D = 8"),
        (
            LAYERS["resonance"](node_with_four_clusters),
            (5, 2, 8),
            r"CoFiringResonance expects shape \[T, B, S, D\] with D = 8, got",
        ),
        (
            LAYERS["feed_forward"](node_with_four_clusters),
            (5, 8),
            r"SpikingFeedForward expects shape \[T, N, \*, D\] with D = 8",
        ),
        (
            LAYERS["readout"](node_with_four_clusters),
            (5, 2, 9),
            r"MembraneReadout expects shape \[T, N, \*, D\] with D = 8",
        ),
        (LAYERS["block"](node_with_four_clusters), (5, 2, 4, 9), r"NordBlock expects shape \[T, B, S, D\] with D = 8"),
    ],
)
def test_wrong_rank_or_width_raises(layer, shape, message):
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(shape))


def test_bad_constructor_arguments_raise():
    with pytest.raises(ValueError, match="D = 8 and H = 3"):
        CoFiringResonance(8, n_heads=3)
    with pytest.raises(ValueError, match=r"leak must lie in \(0, 1\)"):
        LeakyClamp(8, leak=1.0)
    with pytest.raises(ValueError, match="D = 10 and C = 64"):
        SpikingFeedForward(10, 64, neuron=lambda n: AssociativeLIFNode(n, n_clusters=64))
    with pytest.raises(TypeError, match="must have store_v_seq"):
        MembraneReadout(8, neuron=lambda n: nn.ReLU())
