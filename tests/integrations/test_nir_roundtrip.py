"""NIR: our neurons are restored bit for bit, also their refractory period, for which we extend NIR by a node."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn

import nord_snn
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.ops import Dynamics

nir = pytest.importorskip("nir")
np = pytest.importorskip("numpy")
nord_nir = pytest.importorskip("nord_snn.integrations.nir")
export_to_nir, import_from_nir, simulate = nord_nir.export_to_nir, nord_nir.import_from_nir, nord_nir.simulate
D = 6


def run(net: nn.Module, x_seq: Tensor) -> Tensor:
    """Return the outputs of a sequence from rest."""
    nord_snn.reset(net)
    with torch.no_grad():
        return net(x_seq)


def random_input(*shape: int) -> Tensor:
    return 6 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def through_file(net: nn.Module, x_seq: Tensor, tmp_path, **options) -> nn.Module:
    """Export a network into a file and import it."""
    nir.write(tmp_path / "graph.nir", export_to_nir(net, x_seq, **options))
    return import_from_nir(tmp_path / "graph.nir")


def random_node(**arguments) -> AssociativeLIFNode:
    generator = torch.Generator().manual_seed(1)
    arguments = {"threshold": torch.rand(D, generator=generator) + 0.2, "step_mode": "m"} | arguments
    return AssociativeLIFNode(D, arguments.pop("n_clusters", None), **arguments)


def hard_reset_node(**arguments) -> AssociativeLIFNode:
    return random_node(preset="lif", hard_reset=True, v_reset=-0.1, beta_syn=0.0, **arguments)


DYNAMICS = {
    "published": lambda: random_node(refractory_steps=0),
    "with a cascade": lambda: random_node(refractory_steps=0, n_clusters=3),
    "decays per neuron": lambda: random_node(
        refractory_steps=0, n_clusters=3, beta_mem=torch.linspace(0.5, 0.9, D), beta_syn=torch.linspace(0.2, 0.4, D)
    ),
    "no synaptic current": lambda: random_node(refractory_steps=0, beta_syn=0.0),
    "hard reset": hard_reset_node,
    "sum": lambda: hard_reset_node(decay_input=False),
    "IFNode": lambda: AssociativeLIFNode.like(neuron.IFNode(v_threshold=0.7, step_mode="m"), D),
    "LIFNode": lambda: AssociativeLIFNode.like(neuron.LIFNode(tau=3.0, v_reset=None, step_mode="m"), D),
    "LIFNode, v_reset": lambda: AssociativeLIFNode.like(neuron.LIFNode(tau=3.0, v_reset=-0.3, step_mode="m"), D),
    "leak": lambda: AssociativeLIFNode.like(neuron.LIFNode(tau=3.0, decay_input=False, step_mode="m"), D),
    "soft reset to a rest": lambda: random_node(refractory_steps=0, dynamics=Dynamics("sum", v_rest=0.1)),
}


@pytest.mark.parametrize("name", DYNAMICS)
def test_neurons_are_restored_bit_for_bit(name: str, tmp_path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, D), DYNAMICS[name]())
    x_seq = random_input(20, 3, 4)
    imported = through_file(net, x_seq, tmp_path)
    spikes = run(net, x_seq)
    assert spikes.sum() > 10
    assert torch.equal(run(imported, x_seq), spikes)
    original, restored = net[1], next(part for part in imported.modules() if isinstance(part, AssociativeLIFNode))
    assert original.dynamics == restored.dynamics
    assert {k: v.tolist() for k, v in original.state_dict().items()} == {
        k: v.tolist() for k, v in restored.state_dict().items()
    }
    assert [p.requires_grad for p in original.parameters()] == [p.requires_grad for p in restored.parameters()]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tau=st.floats(1.1, 50), tau_syn=st.none() | st.floats(1.0, 20), r=st.floats(0.1, 30), threshold=st.floats(0.1, 3),
    v_reset=st.floats(-1, 0.05), reset=st.sampled_from(["value", "subtract"]),
    leaks=st.booleans(), dt=st.sampled_from([1e-4, 1e-3, 1.0]),
    strict=st.booleans(),
)  # fmt: skip
def test_lif_and_cuba_lif_of_nir_give_the_spikes_of_their_equations(
    tau, tau_syn, r, threshold, v_reset, reset, leaks, dt, strict
) -> None:
    """Also after another export and import; in float64, where no membrane potential equals its threshold."""
    v_leak = (0.0 if reset == "value" and leaks and tau_syn is None else v_reset) if reset == "value" else 0.0
    fields = {"r": r, "v_leak": v_leak, "v_threshold": threshold, "v_reset": v_reset}
    if tau_syn is None:
        node = nir.LIF(**{k: np.full(3, v) for k, v in {**fields, "tau": tau * dt}.items()})
    else:
        more = {"tau_mem": tau * dt, "tau_syn": tau_syn * dt, "w_in": 1.3}
        node = nir.CubaLIF(**{k: np.full(3, v) for k, v in {**fields, **more}.items()})
    graph = nir.NIRGraph.from_list(node)
    x_seq = random_input(20, 2, 3).double()
    net = import_from_nir(graph, dt, dtype=torch.float64, reset=reset, strict=strict)
    expected = simulate(graph, x_seq, dt, reset=reset)
    assert torch.equal(run(net, x_seq), expected)
    if expected.sum():
        again = export_to_nir(net, x_seq, dt)
        assert torch.equal(run(import_from_nir(again, dtype=torch.float64), x_seq), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_a_network_with_2d_convolutions_is_restored(bias: bool, tmp_path) -> None:
    torch.manual_seed(0)
    channels = AssociativeLIFNode(
        4, None, channel_dim=1, refractory_steps=0, threshold=torch.rand(4) + 0.1, step_mode="m"
    )
    net = nn.Sequential(
        layer.Conv2d(2, 4, 3, stride=2, padding=1, bias=bias, step_mode="m"),
        channels,
        layer.AvgPool2d(2, step_mode="m"),
        layer.SeqToANNContainer(nn.Flatten()),
        layer.Linear(16, D, step_mode="m"),
        nn.Linear(D, D),
        random_node(refractory_steps=0),
    )
    nn.init.constant_(net[5].bias, 1.0)
    x_seq = random_input(10, 2, 2, 8, 8)
    imported = through_file(net, x_seq, tmp_path)
    assert run(net, x_seq).sum() > 10
    assert torch.equal(run(imported, x_seq), run(net, x_seq))


def test_a_network_with_a_1d_convolution_is_restored(tmp_path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv1d(2, D, 3, padding=1, dilation=1, groups=2, step_mode="m"),
        random_node(channel_dim=1, refractory_steps=0),
    )
    x_seq = random_input(10, 2, 2, 8)
    imported = through_file(net, x_seq, tmp_path)
    assert torch.equal(run(imported, x_seq), run(net, x_seq))


REFUSED = {
    "padding": (lambda: layer.Conv2d(2, 4, 3, padding_mode="reflect", padding=1, step_mode="m"), "NIR pads with zeros"),
    "pooling": (lambda: layer.AvgPool2d(2, ceil_mode=True, step_mode="m"), "NIR has no ceil_mode"),
    "two in a container": (
        lambda: layer.SeqToANNContainer(nn.Conv2d(2, 4, 3), nn.AvgPool2d(2)),
        "it must contain one module that NIR has a node for",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_nir_cannot_express_raise(name: str) -> None:
    make, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence):
        export_to_nir(make(), random_input(3, 2, 2, 8, 8))


def test_an_unknown_recurrent_container_raises() -> None:
    net = layer.ElementWiseRecurrentContainer(
        random_node(refractory_steps=0, step_mode="s"), lambda y, x: x + y, step_mode="m"
    )
    with pytest.raises(ValueError, match="must contain AssociativeLIFNode and AddFeedback"):
        export_to_nir(net, random_input(3, 2, D))


@pytest.mark.parametrize("n_clusters", [None, 3])
def test_associative_synaptic_is_restored_and_fires_above_its_threshold_only(n_clusters: int | None, tmp_path) -> None:
    nord_snntorch = pytest.importorskip("nord_snn.integrations.snntorch")
    torch.manual_seed(0)
    synaptic = nord_snntorch.AssociativeSynaptic(
        D, n_clusters, alpha=0.5, beta=0.5, threshold=0.5, refractory_steps=0, init_hidden=True
    )
    net = nn.Sequential(nn.Linear(D, D, bias=False), nord_snntorch.MultiStep(synaptic))
    nn.init.eye_(net[0].weight)
    at_threshold = torch.ones(1, 2, D)  # the membrane potential is 0.5
    x_seq = torch.cat((at_threshold, random_input(15, 2, D)))
    imported = through_file(net, x_seq, tmp_path)
    expected = run(net, x_seq)
    assert not expected[0].any()
    assert torch.equal(run(imported, x_seq), expected)


@pytest.mark.parametrize(
    "make",
    [lambda: random_node(n_clusters=3), lambda: random_node(beta_syn=0.0), lambda: hard_reset_node(refractory_steps=3)],
)
def test_with_the_extension_the_refractory_period_is_restored(make, tmp_path) -> None:
    """It is in the graph, its simulation, its file and the imported layer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, D), make())
    x_seq = random_input(25, 3, 4)
    with pytest.raises(ValueError, match=r"refractory period.*extension=True.*approximate=True"):
        export_to_nir(net, x_seq)
    graph = export_to_nir(net, x_seq, extension=True)
    assert graph.metadata["deviation"] == 0
    assert torch.equal(simulate(graph, x_seq), run(net, x_seq))
    imported = through_file(net, x_seq, tmp_path, extension=True)
    assert torch.equal(run(imported, x_seq), run(net, x_seq))
    with pytest.raises((AssertionError, KeyError, ValueError)):
        nir.read(tmp_path / "graph.nir")  # nir does not know the node of the extension


def test_a_node_of_the_extension_without_our_metadata_is_imported() -> None:
    from nord_snn.integrations.nir.extension import RefractoryLIF

    node = RefractoryLIF(*(np.full(3, value) for value in (1e-3, 20.0, 0.0, 0.5, 0.0)), refractory_time=3e-4)
    graph, x_seq = nir.NIRGraph.from_list(node), random_input(30, 2, 3)
    net = import_from_nir(graph)
    assert net.parts[1].refractory_steps == 3
    assert run(net, x_seq).sum() > 20
    assert torch.equal(run(net, x_seq), simulate(graph, x_seq))
    with pytest.raises(
        ValueError, match="refractory_time of 'refractorylif' must be the same for all neurons, and a multiple"
    ):
        import_from_nir(graph, dt=2e-4)
    with pytest.raises(ValueError, match="must be 0 s or more"):
        RefractoryLIF(*(np.full(3, value) for value in (1e-3, 20.0, 0.0, 0.5, 0.0)), refractory_time=-1.0)


@pytest.mark.parametrize("n_clusters", [None, 3])
def test_a_graph_of_an_earlier_release_is_imported(n_clusters: int | None) -> None:
    """Metadata without parameters: they are computed from the fields."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, D), random_node(refractory_steps=0, n_clusters=n_clusters))
    x_seq = random_input(20, 3, 4)
    graph = export_to_nir(net, x_seq)
    lif = next(
        node.nodes["lif"] if n_clusters else node
        for node in graph.nodes.values()
        if type(node) in (nir.CubaLIF, nir.NIRGraph)
    )
    for name in ("threshold", "beta_mem_logit", "beta_syn_logit", "learnable"):
        del lif.metadata[name]
    assert torch.equal(run(import_from_nir(graph), x_seq), run(net, x_seq))
