"""replace_neurons and calibrate_thresholds work however a network calls its neurons: in loops, twice, with or without states."""

import copy
import warnings

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from nord_snn.convert import calibrate_thresholds, replace_neurons
from nord_snn.neurons import AssociativeLIFNode, NeuronActivityWarning

pytestmark = pytest.mark.quick
X_SEQ = torch.rand(6, 5, 8, generator=torch.Generator().manual_seed(0)) * 3  # input current [T, N, D]


def linear():
    torch.manual_seed(0)
    return nn.Linear(8, 8)


def node(step_mode="m", **more):
    return AssociativeLIFNode(8, preset="lif", step_mode=step_mode, **more)


class Network(nn.Module):
    """A linear map and a layer of neurons, run by the function ``call(fc, lif, x_seq)``, which returns spikes."""

    def __init__(self, lif, call):
        super().__init__()
        self.fc, self.lif, self.call = linear(), lif, call

    def forward(self, x_seq):
        return self.call(self.fc, self.lif, x_seq)


def snntorch_loop(start):
    """Return a loop over time whose first membrane potential is ``start(lif, x)``."""

    def call(fc, lif, x_seq):
        mem, spikes = start(lif, x_seq[0]), []
        for x in x_seq:
            spk, mem = lif(fc(x), mem)
            spikes.append(spk)
        return torch.stack(spikes)

    return call


def hidden_loop(fc, lif, x_seq):
    """Run a neuron of snnTorch that stores its state (``init_hidden=True``)."""
    lif.reset_mem()
    return torch.stack([lif(fc(x)) for x in x_seq])


def norse_loop(fc, lif, x_seq):
    """Run a neuron of Norse over time, with its state passed from call to call."""
    state, spikes = None, []
    for x in x_seq:
        spk, state = lif(fc(x), state)
        spikes.append(spk)
    return torch.stack(spikes)


def networks_that_pass_states():
    """Return networks of snnTorch and Norse that differ in how the state is passed or stored."""
    snn, norse = pytest.importorskip("snntorch"), pytest.importorskip("norse.torch")
    return {
        "init_leaky": Network(snn.Leaky(beta=0.9), snntorch_loop(lambda lif, x: lif.init_leaky())),
        "zeros": Network(snn.Leaky(beta=0.9), snntorch_loop(lambda lif, x: torch.zeros(len(x), 8))),
        "init_hidden": Network(snn.Leaky(beta=0.9, init_hidden=True), hidden_loop),
        "cell": Network(norse.LIFCell(), norse_loop),
        "sequence": Network(norse.LIF(), lambda fc, lif, x_seq: lif(fc(x_seq))[0]),
        "chunks": Network(norse.LIF(), lambda fc, lif, x_seq: norse_loop(fc, lif, x_seq.split(2)).flatten(0, 1)),
    }


NAMES = ["init_leaky", "zeros", "init_hidden", "cell", "sequence", "chunks"]


@pytest.mark.parametrize("like", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_membrane_potentials_of_a_sequence_are_stored(name, like):
    net = networks_that_pass_states()[name]
    example = X_SEQ if name in ("sequence", "chunks") else X_SEQ[:1]
    replace_neurons(net, example, like=like, overrides={"lif": {"store_v_seq": True}})
    for rows in (5, 3):  # every sequence starts from rest, also in another batch shape
        spikes = net(X_SEQ[:, :rows])
        stored = net.lif.node.v_seq
        assert spikes.shape == stored.shape == (6, rows, 8)
        inner = copy.deepcopy(net.lif.node)
        functional.set_step_mode(inner, "m")
        assert torch.equal(inner(net.fc(X_SEQ[:, :rows]), stateless=True), spikes)
        assert torch.allclose(inner.v_seq, stored, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_silent_neurons_warn_once_after_three_training_batches(name):
    net = networks_that_pass_states()[name]
    replace_neurons(net, X_SEQ, threshold=1e6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            net(X_SEQ)
    with pytest.warns(
        NeuronActivityWarning, match=r"AssociativeLIFNode\(8\) are silent in the first 3 training batches"
    ):
        net(X_SEQ)  # the start of the fourth sequence ends the third
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(X_SEQ)
        firing = networks_that_pass_states()[name]
        replace_neurons(firing, X_SEQ, threshold=0.3)
        for _ in range(5):
            firing(X_SEQ)
        in_eval_mode = networks_that_pass_states()[name].eval()
        replace_neurons(in_eval_mode, X_SEQ, threshold=1e6)
        for _ in range(5):
            in_eval_mode(X_SEQ)


def test_a_replaced_neuron_refuses_the_membrane_of_an_earlier_call():
    snn = pytest.importorskip("snntorch")
    net = Network(snn.Leaky(beta=0.9), snntorch_loop(lambda lif, x: lif.init_leaky()))
    replace_neurons(net, X_SEQ, preset="nord", n_clusters=None)
    _, first = net.lif(X_SEQ[0])
    net.lif(X_SEQ[1])
    with pytest.raises(ValueError, match=r"mem of an earlier call.*refractory_steps=0 and beta_syn=0"):
        net.lif(X_SEQ[2], first)


@pytest.mark.parametrize("preset", ["lif", "nord"])
@pytest.mark.parametrize("name", ["init_leaky", "init_hidden"])
def test_a_replaced_loop_of_snntorch_compiles_to_one_graph(name, preset):
    torch._dynamo.reset()
    net = networks_that_pass_states()[name]
    replace_neurons(net, X_SEQ, preset=preset, n_clusters=None)
    expected = net(X_SEQ)
    assert expected.any()
    assert torch.equal(torch.compile(net, fullgraph=True, backend="aot_eager")(X_SEQ), expected)


def rate_of_node(net, x_seq):
    """Return the mean of all outputs of the network's neurons in one call from rest."""
    spikes = []
    inner = net.lif if isinstance(net.lif, AssociativeLIFNode) else net.lif.node
    handle = inner.register_forward_hook(lambda module, args, output: spikes.append(output.flatten()))
    net(x_seq)
    handle.remove()
    inner.reset()
    return torch.cat(spikes).mean().item()


def two_uses(fc, lif, x_seq):
    first = lif(fc(x_seq))
    return lif(2 * fc(first))


def two_uses_from_rest(fc, lif, x_seq):
    first = lif(fc(x_seq), stateless=True)
    return lif(3 * fc(first), stateless=True)


def reset_between(fc, lif, x_seq):
    first = lif(fc(x_seq))
    lif.reset()
    return lif(fc(first[:, :2]))


def step_loop(fc, lif, x_seq):
    return torch.stack([lif(x=x) for x in fc(x_seq)])


def depth_loop(fc, lif, x_seq):
    """Use one layer of neurons three times, one after the other."""
    for _ in range(3):
        x_seq = lif(fc(x_seq) + 0.3, stateless=True)
    return x_seq


def without_gradient(fc, lif, x_seq):
    with torch.no_grad():
        return lif(fc(x_seq))


@pytest.mark.parametrize(
    ("step_mode", "call"),
    [
        ("m", lambda fc, lif, x_seq: lif(x=fc(x_seq))), ("s", step_loop), ("m", two_uses), ("m", two_uses_from_rest),
        ("m", reset_between), ("m", depth_loop), ("m", without_gradient),
    ],
    ids=["keyword", "step loop by keyword", "two uses", "two uses from rest", "reset between", "depth", "no_grad"],
)  # fmt: skip
@pytest.mark.parametrize("training", [True, False])
def test_the_calibrated_rate_is_the_mean_over_all_calls_of_a_node(step_mode, call, training):
    net = Network(node(step_mode), call).train(training)
    x_seq = X_SEQ.repeat(1, 8, 1)
    before = rate_of_node(net, x_seq)
    [row] = calibrate_thresholds(net, x_seq, rate=0.2)
    assert row.before == pytest.approx(before)
    assert row.after == pytest.approx(0.2, rel=0.1)
    assert net.lif.step_mode == step_mode
    if call not in (two_uses, two_uses_from_rest, reset_between, depth_loop):  # whose inputs depend on the thresholds
        assert rate_of_node(net, x_seq) == pytest.approx(row.after)


def test_two_sequences_with_alternating_calls_are_calibrated_each_from_rest():
    norse = pytest.importorskip("norse.torch")

    def alternate(fc, lif, x_seq):
        a = b = None
        for x in fc(x_seq):
            spikes, a = lif(x, a)
            _, b = lif(2 * x, b)
        return spikes

    net = Network(norse.LIFCell(), alternate)
    replace_neurons(net, X_SEQ)
    [row] = calibrate_thresholds(net, X_SEQ, rate=0.2)
    assert rate_of_node(net, X_SEQ) == pytest.approx(row.after)
    assert row.after == pytest.approx(0.2, rel=0.15)


def test_neurons_that_the_example_does_not_reach_raise_with_their_names():
    net = Network(node(), lambda fc, lif, x_seq: fc(x_seq))
    with pytest.raises(ValueError, match=r"the example input reached none of the neurons \['lif'\]"):
        calibrate_thresholds(net, X_SEQ)


def test_examples_may_be_dicts_tuples_and_keywords():
    def network(call):
        net = Network(neuron.LIFNode(step_mode="m"), call)
        net.forward = lambda *args, **kwargs: call(net.fc, net.lif, *args, **kwargs)
        return net

    by_dict = network(lambda fc, lif, batch: lif(fc(batch["x"])))
    by_tuple = network(lambda fc, lif, pair: lif(fc(pair[0] + pair[1])))
    by_keyword = network(lambda fc, lif, *, x, scale: lif(scale * fc(x)))
    run = {"forward": lambda batch: by_keyword(**batch)}
    for net, example, more in (
        (by_dict, {"x": X_SEQ}, {}),
        (by_tuple, (X_SEQ, X_SEQ), {}),
        (by_keyword, {"x": X_SEQ, "scale": 2.0}, run),
    ):
        [row] = replace_neurons(net, example, **more)
        assert (row.name, row.width) == ("lif", 8)
        [row] = calibrate_thresholds(net, example, rate=0.2, **more)
        assert row.after == pytest.approx(0.2, rel=0.2)


def test_lazy_batch_norms_are_initialised_by_the_example():
    net = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), neuron.LIFNode())
    [row] = replace_neurons(net, X_SEQ[0])
    assert row.width == 8
    assert net(X_SEQ[0]).shape == (5, 8)


def test_an_argument_that_like_does_not_take_raises():
    net = nn.Sequential(layer.Linear(8, 8, step_mode="m"), neuron.LIFNode(step_mode="m"))
    with pytest.raises(
        ValueError, match=r"like=True takes backend, channel_dim, learnable, store_v_seq.*\['threshold'\]"
    ):
        replace_neurons(net, X_SEQ, like=True, overrides={"1": {"threshold": 0.3}})
    assert isinstance(net[1], neuron.LIFNode)


def test_tables_fit_into_eighty_columns():
    net = nn.Sequential(
        nn.ModuleDict({"a_block_with_a_long_name": layer.Linear(8, 8)}).a_block_with_a_long_name,
        neuron.LIFNode(), layer.Linear(8, 8), neuron.LIFNode(), neuron.QIFNode(),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    report = str(replace_neurons(net, X_SEQ, like=True))
    calibrated = str(calibrate_thresholds(net, X_SEQ))
    lines = [*report.splitlines(), *calibrated.splitlines()]
    assert max(map(len, lines)) <= 80
    assert report.splitlines()[:2] == [
        "name  was      is                  width  channel_dim",
        "1     LIFNode  AssociativeLIFNode      8           -1",
    ]
    assert "skipped 4 (QIFNode): like() supports" in report
    assert calibrated.splitlines()[0] == "name  rate before  rate after  thresholds times"
