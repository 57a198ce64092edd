"""replace_neurons and calibrate_thresholds in networks of Norse, whose forward code is not changed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nord_snn.convert import calibrate_thresholds, replace_neurons
from nord_snn.ops import AssociativeLIFState

norse = pytest.importorskip("norse.torch")

pytestmark = pytest.mark.quick

IMAGES = torch.rand(7, 1, 12, 12, generator=torch.Generator().manual_seed(0)) * 5
X_SEQ = torch.rand(30, 6, 20, generator=torch.Generator().manual_seed(0)) * 5


def cells():
    """Return a convolutional network of Norse cells, which is called once per time step."""
    torch.manual_seed(0)
    return norse.SequentialState(
        nn.Conv2d(1, 4, 3), norse.LIFCell(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(100, 16), norse.LIFCell(),
        norse.LILinearCell(16, 5),
    )  # fmt: skip


def sequences(**options):
    """Return a network of Norse modules, which is called with whole sequences."""
    torch.manual_seed(0)
    return norse.SequentialState(nn.Linear(20, 16), norse.LIF(**options), nn.Linear(16, 5), norse.LIF(**options))


def run(net, x, steps=10):
    """Return the outputs of ``steps`` time steps with the same input."""
    state, outputs = None, []
    for _ in range(steps):
        out, state = net(x, state)
        outputs.append(out)
    return torch.stack(outputs)


def spikes_of(net, index, call):
    """Return the spikes of the neurons at ``net[index]`` during ``call()``."""
    spikes = []
    handle = net[index].register_forward_hook(lambda module, args, output: spikes.append(output[0]))
    call()
    handle.remove()
    return torch.stack(spikes)


@pytest.mark.parametrize("preset", ["lif", "nord"])
def test_one_call_replaces_the_neurons_of_cells_and_the_network_learns(preset):
    net = cells()
    parameters_before = dict(net.state_dict())
    report = replace_neurons(net, IMAGES, preset=preset, n_clusters="auto")
    assert [(row.name, row.was, row.now, row.width, row.channel_dim) for row in report] == [
        ("1", "LIFCell", "AssociativeLIFNode", 4, 1),
        ("5", "LIFCell", "AssociativeLIFNode", 16, -1),
    ]
    assert all(torch.equal(net.state_dict()[name], value) for name, value in parameters_before.items())
    optimizer, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(4):
        loss = nn.functional.cross_entropy(run(net, IMAGES)[-1], torch.arange(7) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert net[1].node.v_threshold.grad is not None


def test_one_call_replaces_the_neurons_of_sequences_and_their_state_can_be_passed_on():
    net = sequences()
    report = replace_neurons(net, X_SEQ, preset="nord", n_clusters=None)
    assert [(row.name, row.was, row.width) for row in report] == [("1", "LIF", 16), ("3", "LIF", 5)]
    spikes, states = net(X_SEQ)
    assert spikes.unique().tolist() == [0, 1]
    assert isinstance(states[1], AssociativeLIFState)
    first, states = net(X_SEQ[:11])
    second, _ = net(X_SEQ[11:], states)
    assert torch.equal(torch.cat((first, second)), spikes)


@pytest.mark.parametrize(
    ("class_name", "parameters"),
    [
        ("LIFCell", {}),
        ("LIFCell", {"v_leak": -0.5, "v_reset": -0.5, "v_th": 0.3, "tau_mem_inv": 300.0, "tau_syn_inv": 700.0}),
        ("LIFCell", {"method": "tanh", "alpha": 2.0}),
        ("LIFBoxCell", {}),
        ("LIFBoxCell", {"v_leak": 0.2, "reset_method": norse.reset_subtract}),
        ("IAFCell", {}),
    ],
)
def test_like_gives_the_same_spikes_and_gradients(class_name, parameters):
    norse_class = getattr(norse, class_name)
    norse_parameters = getattr(norse, class_name.replace("Cell", "Parameters"))()
    norse_parameters = norse_parameters._replace(
        **{k: torch.tensor(v) if isinstance(v, float) else v for k, v in parameters.items()}
    )
    results = []
    for like in (False, True):
        net = norse.SequentialState(nn.Identity(), norse_class(norse_parameters))
        if like:
            [row] = replace_neurons(net, X_SEQ[0], like=True)
            assert row.now == "AssociativeLIFNode", row.skipped
        x_seq, state, spikes = X_SEQ.clone().requires_grad_(), None, []
        for x in x_seq:
            z, state = net(x / 2, state)
            spikes.append(z)
        torch.stack(spikes).square().sum().backward()
        results.append((torch.stack(spikes).detach(), x_seq.grad, state[1].v))
    (expected, expected_grad, expected_v), (spikes, grad, v) = results
    assert 0.02 < expected.mean() < 0.98
    assert torch.equal(spikes, expected)
    assert torch.allclose(v, expected_v, atol=1e-5)
    assert torch.allclose(grad, expected_grad, rtol=1e-3, atol=1e-4)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    membrane=st.floats(0.05, 1.0),
    current=st.floats(0.05, 1.0),
    v_th=st.floats(0.1, 2.0),
    v_rest=st.floats(-1.0, 0.05),
    seed=st.integers(0, 100),
)
def test_like_gives_the_same_spikes_for_all_time_constants(membrane, current, v_th, v_rest, seed):
    norse_parameters = norse.LIFParameters(
        *(torch.tensor(value) for value in (current * 1000, membrane * 1000, v_rest, v_th, v_rest))
    )
    net = norse.SequentialState(nn.Identity(), norse.LIF(norse_parameters))
    x = torch.rand(8, 3, 4, generator=torch.Generator().manual_seed(seed)) * 3
    expected, _ = net(x)
    assert not replace_neurons(net, x, like=True).skipped
    assert torch.equal(net(x)[0], expected)


def test_like_gives_the_same_outputs_of_whole_networks():
    net = cells()
    expected = run(net, IMAGES)
    replace_neurons(net, IMAGES, like=True)
    assert torch.allclose(run(net, IMAGES), expected, atol=1e-5)
    net = sequences()
    expected, _ = net(X_SEQ)
    assert expected.sum() > 0
    replace_neurons(net, X_SEQ, like=True)
    assert torch.equal(net(X_SEQ)[0], expected)


def test_a_membrane_potential_equal_to_the_threshold_does_not_fire_as_in_norse():
    net = norse.SequentialState(nn.Identity(), norse.IAFCell())
    x = torch.ones(1, 2)
    assert net(x)[0].sum() == 0
    replace_neurons(net, x, like=True)
    assert net(x)[0].sum() == 0


@pytest.mark.parametrize(
    ("norse_parameters", "reason"),
    [
        ({"v_reset": torch.tensor(-0.2)}, "cannot match v_reset = -0.2"),
        ({"tau_mem_inv": torch.tensor(2000.0)}, r"needs dt * tau_mem_inv in (0, 1], got 2"),
        ({"v_th": torch.ones(20)}, "needs one number for v_th, got 20"),
    ],
)
def test_neurons_that_like_cannot_match_are_skipped_with_a_reason(norse_parameters, reason):
    net = norse.SequentialState(nn.Identity(), norse.LIF(norse.LIFParameters()._replace(**norse_parameters)))
    [row] = replace_neurons(net, X_SEQ, like=True, only="1")
    assert reason in row.skipped
    assert isinstance(net[1], norse.LIF)


def test_only_overrides_and_the_reason_why_a_neuron_is_skipped():
    assert [row.name for row in replace_neurons(cells(), IMAGES, only=norse.LIFCell)] == ["1", "5"]
    assert [row.name for row in replace_neurons(cells(), IMAGES, only="5")] == ["5"]
    net = norse.SequentialState(nn.Linear(20, 16), norse.LIF(), norse.LIFRecurrent(16, 4), norse.LI())
    report = replace_neurons(net, X_SEQ, overrides={"1": {"threshold": 0.7}}, beta_mem=0.9)
    assert net[1].node.v_threshold.tolist() == pytest.approx([0.7] * 16)
    assert [row.name for row in report] == ["1", "2"]
    [skipped] = report.skipped
    assert skipped.skipped == (
        "Norse's LIF, LIFCell, LIFBoxCell, IAF, IAFCell can be replaced, LIFRecurrent has other states or recurrent weights"
    )
    assert f"skipped 2 (LIFRecurrent): {skipped.skipped}" in " ".join(str(report).split())
    assert net(X_SEQ)[0].shape == (30, 6, 4)
    with pytest.raises(TypeError, match=r"in a network of Norse, neuron= must make an AssociativeLIFNode"):
        replace_neurons(cells(), IMAGES, neuron=lambda n, **_: nn.Linear(n, n))


def test_a_state_of_norse_raises_after_replacement():
    net = sequences()
    replace_neurons(net, X_SEQ)
    state = norse.LIFFeedForwardState(v=torch.zeros(6, 16), i=torch.zeros(6, 16))
    with pytest.raises(TypeError, match="expects the state that it returned last, an AssociativeLIFState, or None"):
        net[1](torch.rand(3, 6, 16), state)


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_calibration_with_whole_sequences_and_with_single_time_steps(rate):
    net = sequences()
    replace_neurons(net, X_SEQ)
    layers = calibrate_thresholds(net, X_SEQ, rate=rate)
    assert [one.name for one in layers] == ["1.node", "3.node"]
    assert net(X_SEQ)[0].mean().item() == pytest.approx(layers[1].after)

    net = cells()
    replace_neurons(net, IMAGES)
    with pytest.raises(ValueError, match=r"1\.node runs single time steps and received one: pass forward="):
        calibrate_thresholds(net, IMAGES)
    layers = calibrate_thresholds(net, IMAGES, rate=rate, forward=lambda x: run(net, x))
    for index, layer in zip((1, 5), layers, strict=True):
        spikes = spikes_of(net, index, lambda: run(net, IMAGES))
        assert spikes.mean().item() == pytest.approx(layer.after)
        assert abs(layer.after - rate) < 0.3 * rate
