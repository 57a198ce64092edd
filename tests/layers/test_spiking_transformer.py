"""SpikeFedResonance as the attention of a spiking transformer: firing rates on sparse spikes, channels first, masks, warnings."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based.neuron import LIFNode, ParametricLIFNode
from torch import nn

from nord_snn.layers import CoFiringResonance, SequenceCache, SpikeFedResonance
from nord_snn.layers.masking import masked_resonance
from nord_snn.monitor import SpikeMonitor
from nord_snn.neurons import AssociativeLIFNode, NeuronActivityWarning, fire_from_rest
from nord_snn.ops import resonance

pytestmark = pytest.mark.quick

NEURONS = {
    "LIFNode": lambda n: LIFNode(),
    "ParametricLIFNode, soft reset": lambda n: ParametricLIFNode(v_reset=None),
    "ours": lambda n: AssociativeLIFNode(n, preset="lif"),
}


def sparse_spikes(*shape, rate=0.1):
    """Return random spikes with a firing rate."""
    return (torch.rand(shape) < rate).float()


def attention(n=16, heads=2, **more):
    """Return a resonance that attends in both directions, with LIFNode."""
    torch.manual_seed(0)
    return SpikeFedResonance(n, heads, **{"causal": False, "neuron": lambda n: LIFNode(v_threshold=0.5)} | more)


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("neuron", NEURONS)
def test_on_sparse_spikes_every_layer_fires_and_positions_differ(neuron, norm, width):
    layer = attention(width, 4, neuron=NEURONS[neuron], norm=norm, spiking_values=True, spikes_out=True)
    with SpikeMonitor(layer) as monitor, torch.no_grad():
        out = layer(sparse_spikes(4, 4, 16, width))
    rates = monitor.rates()
    assert rates.keys() == {"lif_q", "lif_k", "lif_v", "lif_o", "lif_out"}
    assert min(rates.values()) > 0.005
    assert max(rates.values()) < 0.25
    between_positions = out.var(2).mean() / out.var()
    assert between_positions > 0.1


@pytest.mark.parametrize("neuron", NEURONS)
def test_co_firing_resonance_without_norms_is_silent_on_sparse_spikes(neuron):
    """The documentation of CoFiringResonance warns of this."""
    layer = CoFiringResonance(64, 4, causal=False, neuron=NEURONS[neuron])
    with SpikeMonitor(layer) as monitor, torch.no_grad():
        out = layer(sparse_spikes(4, 4, 16, 64))
    assert max(monitor.rates().values()) < 0.001
    assert out.std(2).max() < 1e-3


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_channels_first_gives_the_transposed_output_of_the_transposed_input(norm):
    layer = attention(norm=norm, spiking_values=True, spikes_out=True)
    transposed = attention(norm=norm, spiking_values=True, spikes_out=True, channels_first=True)
    transposed.load_state_dict(layer.state_dict())
    x = sparse_spikes(5, 3, 7, 16, rate=0.3)
    expected = layer(x)
    assert expected.any()
    assert torch.equal(transposed(x.mT), expected.mT)


def test_spikes_out_adds_a_norm_and_neurons_after_the_last_linear_map():
    currents, spikes = attention(), attention(spikes_out=True)
    spikes.load_state_dict(currents.state_dict(), strict=False)
    x = sparse_spikes(5, 2, 7, 16, rate=0.3)
    out = spikes(x)
    assert set(out.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(out, fire_from_rest(spikes.final_neuron, spikes.norm_out(currents(x))))
    assert currents.final_neuron is None


def test_batch_norm_is_over_channels_and_can_be_converted_to_sync_batch_norm():
    layer = attention(norm="batch")
    x = torch.randn(5, 2, 7, 16)
    norm = nn.BatchNorm1d(16)
    assert torch.allclose(layer.norm_q(x), norm(x.flatten(0, 1).mT).mT.unflatten(0, (5, 2)), atol=1e-6)
    assert torch.allclose(layer.norm_q.norm.running_var, norm.running_var)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(layer).eval()
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in synchronised.modules()) == 3
    assert synchronised(sparse_spikes(5, 2, 7, 16)).shape == (5, 2, 7, 16)


def test_gradients_reach_every_parameter():
    layer = attention(norm="batch", spiking_values=True, spikes_out=True, channels_first=True, recency=True)
    (layer(sparse_spikes(4, 3, 16, 9, rate=0.3)) * torch.randn(4, 3, 16, 9)).sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


# --- masks


def by_loops(q, k, v, visible, n_heads, top_k, temperature, recency, causal):
    """Return the resonance of visible keys, computed for one query at a time."""
    _, B, S, D = q.shape
    out = torch.zeros_like(v)
    for b in range(B):
        for h in range(n_heads):
            channels = slice(h * D // n_heads, (h + 1) * D // n_heads)
            values = v[b].unflatten(-1, (n_heads, -1))[:, h]
            for a in range(S):
                scores = []
                for key in range(S):
                    if visible[b, a, key] and (key <= a or not causal):
                        count = (q[:, b, a, channels] * k[:, b, key, channels]).sum()
                        scores.append((float(temperature * count - recency[h] * abs(a - key)), key))
                best = sorted(scores)[-top_k:]  # of equal scores those of the latest positions
                if best:
                    weights = torch.tensor([score for score, _ in best]).softmax(0)
                    context = sum(w * values[key] for w, (_, key) in zip(weights, best, strict=True))
                    out[b].unflatten(-1, (n_heads, -1))[a, h] = context
    return out


@given(st.integers(0, 10_000), st.integers(1, 7), st.booleans(), st.sampled_from([0.5, 0.0, -0.5]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_masked_resonance_equals_its_equation(seed, top_k, causal, temperature, has_recency):
    torch.manual_seed(seed)
    q, k = sparse_spikes(3, 2, 6, 8, rate=0.4), sparse_spikes(3, 2, 6, 8, rate=0.4)
    v, visible = torch.randn(2, 6, 4), torch.rand(2, 6, 6) < 0.6
    recency = torch.tensor([0.25, 0.5]) if has_recency else torch.zeros(2)
    settings = {"n_heads": 2, "top_k": top_k, "temperature": torch.tensor([temperature]), "recency": recency}
    got = masked_resonance(q, k, v, visible[:, None], causal=causal, **settings)
    assert torch.allclose(got, by_loops(q, k, v, visible, 2, top_k, temperature, recency, causal), atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_the_masked_resonance_equals_the_op_if_every_key_is_visible(causal):
    leaves = [
        sparse_spikes(3, 2, 6, 8, rate=0.4),
        sparse_spikes(3, 2, 6, 8, rate=0.4),
        torch.randn(2, 6, 4),
        torch.tensor([0.5]),
    ]
    leaves = [*leaves, torch.tensor([0.25, 0.5])]
    gradients = []
    for run in (resonance, lambda *args, **more: masked_resonance(*args, torch.ones(1, 1, 6, 6).bool(), **more)):
        q, k, v, temperature, recency = (x.clone().requires_grad_() for x in leaves)
        out = run(q, k, v, n_heads=2, top_k=3, temperature=temperature, recency=recency, causal=causal)
        (out * torch.arange(48).view(2, 6, 4)).sum().backward()
        gradients.append([out, *(x.grad for x in (q, k, v, temperature, recency))])
    for got, expected in zip(*gradients, strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels_first", [False, True])
def test_padding_changes_nothing_for_the_positions_before_it(channels_first):
    """Sequences of 4 and 6 positions are padded to 9 by spikes."""
    layer = attention(top_k=3, recency=True, spiking_values=True, spikes_out=True, channels_first=channels_first)
    x, lengths = sparse_spikes(5, 2, 9, 16, rate=0.3), (4, 6)
    key_mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    padded = layer(x.mT if channels_first else x, key_mask=key_mask)
    padded = padded.mT if channels_first else padded
    assert padded.any()
    for i, length in enumerate(lengths):
        short = x[:, i : i + 1, :length]
        unpadded = layer(short.mT if channels_first else short)
        assert torch.equal(padded[:, i : i + 1, :length], unpadded.mT if channels_first else unpadded)


def test_a_mask_of_queries_and_keys_separates_groups():
    """Positions attend only to their group, as in two sequences."""
    layer = attention(recency=True)
    x = sparse_spikes(5, 2, 7, 16, rate=0.3)
    group = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    out = layer(x, mask=group[:, None] == group)
    assert torch.allclose(out[:, :, :3], layer(x[:, :, :3]), atol=1e-6)
    assert torch.allclose(out[:, :, 3:], layer(x[:, :, 3:]), atol=1e-6)


def test_a_query_without_visible_keys_has_a_context_of_zero_and_finite_gradients():
    layer = attention(neuron=lambda n: LIFNode(v_threshold=0.2))
    contexts = []
    layer.norm_o.register_forward_pre_hook(lambda module, args: contexts.append(args[0]))
    out = layer(sparse_spikes(5, 2, 7, 16, rate=0.3), key_mask=torch.tensor([[False] * 7, [True] * 7]))
    assert not contexts[0][:, 0].any()
    assert contexts[0][:, 1].any()
    out.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"mask": torch.ones(7, 7)}, TypeError, r"mask must be a tensor of booleans, .* got torch.float32"),
        ({"key_mask": [[True] * 7] * 2}, TypeError, r"key_mask must be a tensor of booleans, .* got list"),
        ({"mask": torch.ones(2, 7).bool()}, ValueError, r"mask must have shape \[S, S\] = \[7, 7\], got \[2, 7\]"),
        ({"key_mask": torch.ones(7, 7).bool()}, ValueError, r"key_mask must have shape \[B, S\] = \[2, 7\]"),
        ({"mask": torch.ones(7, 7).bool(), "cache": SequenceCache(torch.tensor([7, 7]))}, ValueError, "not both"),
    ],
)
def test_wrong_masks_raise(masks, error, message):
    with pytest.raises(error, match=message):
        attention()(sparse_spikes(3, 2, 7, 16), **masks)


def test_wrong_shapes_and_norms_raise():
    with pytest.raises(ValueError, match=r"SpikeFedResonance expects shape \[T, N, C, L\] with T >= 1 and C = 16"):
        attention(channels_first=True)(sparse_spikes(3, 2, 7, 16))
    with pytest.raises(ValueError, match=r"SpikeFedResonance expects shape \[T, B, S, D\] with D = 16"):
        attention()(sparse_spikes(3, 2, 16, 7))
    with pytest.raises(ValueError, match=r"norm must be one of \['batch', 'layer'\], got 'group'"):
        attention(norm="group")


# --- the warning of silent queries or keys


def calls(layer, n=10, rate=0.1):
    """Call a layer n times with new random spikes."""
    for _ in range(n):
        layer(sparse_spikes(4, 2, 5, 64, rate=rate))


@pytest.mark.parametrize("module", [CoFiringResonance, SpikeFedResonance])
def test_a_layer_with_silent_queries_warns_once_in_the_tenth_call_and_names_a_remedy(module):
    layer = module(64, 4, neuron=lambda n: LIFNode(v_threshold=50.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calls(layer, 9)
    remedy = "use SpikeFedResonance" if module is CoFiringResonance else "raise the weights of norm_q and norm_k"
    with pytest.warns(
        NeuronActivityWarning, match=rf"{module.__name__} is silent: .* queries was 0.00%.*{remedy}"
    ) as record:
        calls(layer, 30)
    assert len(record) == 1


def test_silent_keys_alone_warn_and_a_firing_layer_does_not():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calls(attention(64, 4, neuron=lambda n: LIFNode()), 12)
    layer = attention(64, 4)
    layer.lif_k.v_threshold = 50.0
    with pytest.warns(NeuronActivityWarning, match=r"that of keys 0.00%"):
        calls(layer)


def test_a_silent_layer_in_eval_mode_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calls(CoFiringResonance(64, 4, neuron=lambda n: LIFNode(v_threshold=50.0)).eval(), 12)


def test_it_compiles_without_a_graph_break_with_and_without_a_mask():
    layer = attention(neuron=NEURONS["ours"], spikes_out=True, channels_first=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, key_mask = sparse_spikes(4, 2, 16, 7, rate=0.3), torch.arange(7) < torch.tensor([[5], [7]])
    expected = layer(x), layer(x, key_mask=key_mask)
    assert not torch.equal(*expected)
    assert torch.equal(compiled(x), expected[0])
    assert torch.equal(compiled(x, key_mask=key_mask), expected[1])
