"""NIR: exported graphs give the outputs of the network in other libraries and after import; other modules raise with a name."""

import copy
import logging

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

import nord_snn
from nord_snn.layers import (
    AssociativeCascade,
    CoFiringResonance,
    LeakyClamp,
    MembraneReadout,
    MultiScaleTemporalEncoder,
    NordBlock,
    SpikeFedBlock,
    SpikingFeedForward,
)
from nord_snn.neurons import AssociativeLIFNode, NeuronFactory

nir = pytest.importorskip("nir")
np = pytest.importorskip("numpy")
nord_nir = pytest.importorskip("nord_snn.integrations.nir")
deviation, export_to_nir, import_from_nir, simulate = (
    nord_nir.deviation,
    nord_nir.export_to_nir,
    nord_nir.import_from_nir,
    nord_nir.simulate,
)

T, N, D = 23, 3, 10


def random_node(
    n_features: int, n_clusters: int | None, refractory_steps: int = 0, v_reset: float = -0.1
) -> AssociativeLIFNode:
    """Return a node whose parameters are all random, as after training."""
    node = AssociativeLIFNode(
        n_features,
        n_clusters,
        refractory_steps=refractory_steps,
        v_reset=v_reset,
        beta_mem=0.83,
        beta_syn=0.41,
        step_mode="m",
    )
    with torch.no_grad():
        node.v_threshold.uniform_(0.15, 0.4)
        if node.cascade is not None:
            node.cascade.gain.uniform_(-0.5, 1.0)
            node.cascade.weight.normal_()
    return node


def random_linear(n_in: int, n_out: int, bias: bool = False) -> nn.Linear:
    """Return a linear map with weights so large that the neurons after it fire."""
    linear = nn.Linear(n_in, n_out, bias=bias)
    nn.init.normal_(linear.weight, std=2 / n_in**0.5)
    return linear


def node_with_five_clusters(n_features: int) -> AssociativeLIFNode:
    return random_node(n_features, 5)


def snn_leaky() -> nn.Module:
    return pytest.importorskip("snntorch").Leaky(beta=0.9)


def feed_forward(n_features: int, hidden_features: int, neuron: NeuronFactory) -> SpikingFeedForward:
    ffn = SpikingFeedForward(n_features, hidden_features, neuron=neuron)
    ffn.up, ffn.down = random_linear(n_features, hidden_features), random_linear(hidden_features, n_features)
    return ffn


def networks(refractory_steps: int) -> dict[str, nn.Module]:
    """Return networks that NIR can express without a refractory period."""

    def neurons(n: int) -> AssociativeLIFNode:
        return random_node(n, 5, refractory_steps)

    return {
        "a layer alone": neurons(D),
        "without cascade": nn.Sequential(random_linear(D, 15), random_node(15, None, refractory_steps)),
        "with cascade": nn.Sequential(random_linear(D, 15, bias=True), neurons(15), random_linear(15, 5), neurons(5)),
        "feed-forward": feed_forward(D, 15, neurons),
        "readout": MembraneReadout(D, neuron=neurons),
        "all layers": nn.Sequential(
            random_linear(D, 20),
            neurons(20),
            LeakyClamp(20),
            feed_forward(20, 15, neurons),
            LeakyClamp(20),
            random_linear(20, 15),
            neurons(15),
            random_linear(15, 10),
            neurons(10),
            random_linear(10, 10),
            MembraneReadout(10, neuron=neurons),
            nn.Linear(10, 3),
        ),
    }


NAMES = list(networks(0))


def through_file(graph, tmp_path):
    nir.write(tmp_path / "graph.nir", graph)
    return nir.read(tmp_path / "graph.nir")


def run(net: nn.Module, x_seq: Tensor) -> Tensor:
    """Return the outputs of a sequence from rest."""
    nord_snn.reset(net)
    with torch.no_grad():
        return net(x_seq)


@pytest.fixture
def x_seq() -> Tensor:
    torch.manual_seed(0)
    return 2 * torch.randn(T, N, D)


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_from_a_file_gives_the_outputs_of_the_network(name: str, x_seq: Tensor, tmp_path) -> None:
    """In float64 all spikes are equal: no membrane potential is within rounding of its threshold."""
    net, x_seq = networks(0)[name].double(), x_seq.double()
    graph = through_file(export_to_nir(net, x_seq), tmp_path)
    assert run(net, x_seq).abs().sum() > 0
    assert deviation(net, graph, x_seq) < 1e-6  # the file has recurrent weights in float32
    assert float(graph.metadata["deviation"]) < 1e-6


@pytest.mark.quick
@pytest.mark.parametrize("refractory_steps", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_import_restores_the_exported_network(name: str, refractory_steps: int, x_seq: Tensor, tmp_path) -> None:
    """The refractory period, the weights of the cascade and the classes of our layers are restored."""
    net = networks(refractory_steps)[name]
    graph = through_file(export_to_nir(net, x_seq, approximate=True), tmp_path)
    imported = import_from_nir(graph)
    torch.testing.assert_close(run(imported, x_seq), run(net, x_seq), rtol=0, atol=1e-6)

    def class_names(net: nn.Module) -> list[str]:
        # LeakyClamp is not exported: it does not change spikes.
        exported = (AssociativeLIFNode, AssociativeCascade, SpikingFeedForward, MembraneReadout, nn.Linear)
        return sorted(type(module).__name__ for module in net.modules() if isinstance(module, exported))

    assert class_names(imported) == class_names(net)


@pytest.mark.quick
def test_an_imported_network_can_be_trained(x_seq: Tensor) -> None:
    imported = import_from_nir(export_to_nir(networks(0)["all layers"], x_seq))
    imported(x_seq).square().mean().backward()
    assert all(p.grad is not None for p in imported.parameters() if p.requires_grad)


def test_a_refractory_period_raises_or_is_omitted_with_a_stored_deviation(
    x_seq: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    net = nn.Sequential(random_linear(D, 15), random_node(15, 5, refractory_steps=2))
    with pytest.raises(ValueError, match=r"refractory period.*refractory_steps=0.*approximate=True"):
        export_to_nir(net, x_seq)
    with caplog.at_level(logging.WARNING, "nord_snn"):
        graph = export_to_nir(net, x_seq, approximate=True)
    of_network, of_graph = run(net, x_seq), simulate(graph, x_seq)
    assert graph.metadata["deviation"] == pytest.approx((of_network != of_graph).sum().item() / of_network.sum().item())
    assert graph.metadata["deviation"] > 0.1  # without the refractory period the spikes differ
    assert "refractory period" in caplog.text


def test_an_exported_neuron_without_a_refractory_period_resets_to_v_reset(x_seq: Tensor) -> None:
    """The equation is computed time step by time step."""
    node = random_node(D, None, refractory_steps=2, v_reset=-0.3)
    graph = export_to_nir(node, x_seq, approximate=True)
    beta_mem, beta_syn = node.beta_mem.item(), node.beta_syn.item()
    v = i = torch.zeros(N, D)
    for x, expected in zip(x_seq, simulate(graph, x_seq), strict=True):
        i = beta_syn * i + x
        v = beta_mem * v + (1 - beta_mem) * i
        fired = v > node.v_threshold
        assert torch.equal(fired.float(), expected)
        v = torch.where(fired, -0.3, v)


@pytest.mark.quick
@pytest.mark.parametrize("n_clusters", [None, 5])
def test_norse_gives_the_same_spikes(n_clusters: int | None, x_seq: Tensor, tmp_path) -> None:
    norse = pytest.importorskip("norse.torch")
    subtract = pytest.importorskip("norse.torch.functional.reset").reset_subtract

    def neurons(n: int) -> AssociativeLIFNode:
        return random_node(n, n_clusters)

    net = nn.Sequential(
        random_linear(D, 15),
        neurons(15),
        LeakyClamp(15),
        feed_forward(15, 20, neurons),
        random_linear(15, 5),
        neurons(5),
    )
    graph = through_file(export_to_nir(net, x_seq), tmp_path)
    norse_network = norse.from_nir(graph, reset_method=subtract, dt=1e-4)
    _assert_same_spikes(norse_network, x_seq, run(net, x_seq))


@pytest.mark.parametrize("n_clusters", [None, 5])
@pytest.mark.parametrize("reader", ["spikingjelly.activation_based.nir_exchange", "snntorch.import_nir"])
def test_spikingjelly_and_snntorch_read_neurons_that_reset_to_zero(
    reader: str, n_clusters: int | None, x_seq: Tensor, tmp_path
) -> None:
    """Both libraries need one threshold per layer, and reset to 0 as the fields of the node say; our metadata say "subtract"."""
    read = pytest.importorskip(reader).import_from_nir
    net = nn.Sequential(random_linear(D, 15), random_node(15, n_clusters))
    nn.init.constant_(net[1].v_threshold, 0.3)
    graph = through_file(export_to_nir(net, x_seq), tmp_path)
    _assert_same_spikes(read(graph), x_seq, simulate(graph, x_seq, reset="value"))


def _assert_same_spikes(network: nn.Module, x_seq: Tensor, expected: Tensor) -> None:
    state, spikes = None, []
    with torch.no_grad():
        for x in x_seq:
            out, state = network(x, state)
            spikes.append(out)
    assert expected.sum() > 20
    assert torch.equal(torch.stack(spikes), expected)


class Branched(nn.Module):
    """Network of two paths that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.zeta, self.alpha = random_linear(D, 15), random_linear(D, 15)
        self.last = random_node(15, 5)
        self.first = random_linear(15, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.last(self.zeta(x) + self.alpha(x)))


def test_the_forward_of_a_user_module_is_traced(x_seq: Tensor, tmp_path) -> None:
    net = Branched().double()
    graph = through_file(export_to_nir(net, x_seq.double()), tmp_path)
    assert deviation(net, graph, x_seq.double()) < 1e-6
    torch.testing.assert_close(run(import_from_nir(graph).double(), x_seq.double()), run(net, x_seq.double()))


def test_functions_in_more_convert_further_modules_and_nodes(x_seq: Tensor) -> None:
    """The user's functions convert SpikingJelly's LIFNode."""
    net = nn.Sequential(random_node(D, 5), random_linear(D, 4), neuron.LIFNode(tau=2.0, v_reset=0.0, step_mode="m"))

    def lif(node: neuron.LIFNode) -> object:
        return nir.LIF(*(np.full(4, value) for value in (node.tau * 1e-4, 1.0, 0.0, node.v_threshold)))

    with pytest.raises(ValueError, match=r"cannot export LIFNode at '2'.*`more`"):
        export_to_nir(net, x_seq)
    graph = export_to_nir(net, x_seq, more={neuron.LIFNode: lif})
    assert graph.metadata["deviation"] == 0
    assert torch.equal(run(import_from_nir(graph), x_seq), run(net, x_seq))
    imported = import_from_nir(graph, more={nir.LIF: lambda node: neuron.LIFNode(tau=2.0, v_reset=0.0, step_mode="m")})
    assert torch.equal(run(imported, x_seq), run(net, x_seq))


def test_export_does_not_change_the_network(x_seq: Tensor) -> None:
    """The network is in training mode and step mode "s", and its state has an autograd graph."""
    node = random_node(D, 5)
    node.step_mode = "s"
    net = nn.Sequential(random_linear(D, D), node)
    net(x_seq[0])
    v, weight = node.v, net[0].weight.clone()
    export_to_nir(net, x_seq)
    assert node.v is v
    assert net.training
    assert node.step_mode == "s"
    assert torch.equal(net[0].weight, weight)


REFUSED = {
    "resonance": (lambda: CoFiringResonance(D, n_heads=2, neuron=lambda n: random_node(n, 5)), "top-K"),
    "block": (lambda: NordBlock(D, 2, 15, neuron=lambda n: random_node(n, 5)), "layer normalisation"),
    "spike-fed block": (lambda: SpikeFedBlock(D, 2, 15, neuron=lambda n: random_node(n, 5)), "layer normalisation"),
    "encoder": (lambda: MultiScaleTemporalEncoder(D), "gates that change with the time step"),
    "normalisation": (lambda: nn.LayerNorm(D), "layer normalisation"),
    "cascade alone": (lambda: AssociativeCascade(D, 5), "AssociativeLIFNode that contains it"),
    "clamp on currents": (lambda: nn.Sequential(random_linear(D, D), LeakyClamp(D)), "LeakyClamp.*must be spikes"),
    "activation": (lambda: nn.Sequential(random_linear(D, D), nn.GELU()), "GELU at '1'.*no NIR node"),
    "a subclass": (
        lambda: nn.Sequential(type("Mine", (SpikingFeedForward,), {})(D, 5, node_with_five_clusters)),
        "Mine at '0'.*no NIR node",
    ),
    "snnTorch's neurons": (lambda: nn.Sequential(random_linear(D, D), snn_leaky()), "Leaky at '1'.*no NIR node"),
    "SpikingJelly's neurons in a layer": (
        lambda: SpikingFeedForward(D, 5, neuron=lambda n: neuron.LIFNode()),
        "its lif1 must be an AssociativeLIFNode, got LIFNode",
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("approximate", [False, True])
def test_modules_that_nir_cannot_express_raise_by_name(name: str, approximate: bool, x_seq: Tensor) -> None:
    make, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence):
        export_to_nir(make(), x_seq, approximate=approximate)


def test_bad_arguments_raise(x_seq: Tensor) -> None:
    node = random_node(D, 5)
    with pytest.raises(ValueError, match="dt must be positive"):
        export_to_nir(node, x_seq, dt=0)
    with pytest.raises(ValueError, match=r"\[T, N, \*, D\]"):
        export_to_nir(node, x_seq[0])
    with pytest.raises(ValueError, match="reset must be"):
        simulate(export_to_nir(node, x_seq), x_seq, reset="hard")


def cuba(**changes):
    """Return a CubaLIF of four neurons with some fields changed."""
    values = {
        "tau_syn": 2e-4,
        "tau_mem": 1e-3,
        "r": 10.0,
        "v_leak": 0.0,
        "v_threshold": 1.0,
        "v_reset": 0.0,
        "w_in": 2.0,
    }
    return nir.CubaLIF(**{name: np.full(4, value) for name, value in {**values, **changes}.items()})


BAD_NEURONS = {
    "leak": (cuba(v_leak=0.2), "value", "v_leak of 'cubalif' must be its v_reset"),
    "leaks": (cuba(v_leak=np.arange(4.0)), "subtract", "v_leak of 'cubalif' must be the same for all neurons"),
    "late": (cuba(tau_mem=np.array([1, 1, 1, 2]) * 1e-3), "delayed_subtract", "tau of 'cubalif' must be the same"),
    "too short": (cuba(tau_mem=5e-5), None, "tau_mem of 'cubalif' must be finite and longer than a time step"),
    "too short a synapse": (
        cuba(tau_syn=5e-5),
        None,
        "tau_syn of 'cubalif' must be finite and longer than a time step",
    ),
    "for ever": (cuba(tau_mem=np.inf), None, "tau_mem of 'cubalif' must be finite"),
    "negative resistance": (cuba(r=-1.0), None, "positive r and w_in"),
    "no threshold": (cuba(v_threshold=np.nan), None, "finite v_threshold"),
    "places": (
        nir.IF(np.ones((3, 2, 2)), np.arange(1.0, 13.0).reshape(3, 2, 2)),
        None,
        "threshold of 'if' must be the same at all positions of a channel",
    ),
}


@pytest.mark.parametrize("name", BAD_NEURONS)
def test_neurons_of_nir_that_our_neurons_cannot_match_raise(name: str) -> None:
    lif, reset, sentence = BAD_NEURONS[name]
    with pytest.raises(ValueError, match=sentence):
        import_from_nir(nir.NIRGraph.from_list(lif), reset=reset)


def test_an_unknown_reset_raises() -> None:
    with pytest.raises(ValueError, match="reset must be one of"):
        import_from_nir(nir.NIRGraph.from_list(cuba()), reset="hard")


def test_cuba_lif_neurons_with_any_r_and_w_in_are_imported(x_seq: Tensor) -> None:
    """The fields r and w_in scale the input."""
    graph = nir.NIRGraph.from_list(cuba(r=3.0, w_in=0.7, v_threshold=0.2))
    for reset in ("value", "subtract"):
        imported = import_from_nir(graph, reset=reset)
        assert torch.equal(run(imported, x_seq[..., :4]), simulate(graph, x_seq[..., :4], reset=reset))
    with pytest.warns(FutureWarning, match='now reset="subtract"'):
        old = import_from_nir(graph, approximate=True)
    assert torch.equal(run(old, x_seq[..., :4]), run(imported, x_seq[..., :4]))


def loop(**changes):
    """Return a graph whose neurons receive their own spikes through the linear map "w"."""
    nodes = {
        "input": nir.Input(np.array([4])),
        "lif": cuba(),
        "w": nir.Linear(np.eye(4, dtype=np.float32)),
        "output": nir.Output(np.array([4])),
    }
    return nir.NIRGraph(
        nodes={**nodes, **changes}, edges=[("input", "lif"), ("lif", "w"), ("w", "lif"), ("lif", "output")]
    )


def test_a_loop_other_than_recurrent_neurons_raises(x_seq: Tensor) -> None:
    graph = loop(lif=nir.LI(*(np.full(4, value) for value in (1e-3, 1.0, 0.0))))
    with pytest.raises(ValueError, match=r"neurons and one linear map of their spikes, but 'w' leads back to 'lif'"):
        import_from_nir(graph)
    graph = loop()
    graph.edges.append(("w", "output"))
    with pytest.raises(ValueError, match=r"but 'w' leads back to 'lif'"):
        import_from_nir(graph)


def doubled(name: str, field: str):
    def change(inner) -> None:
        setattr(inner.nodes[name], field, 2 * getattr(inner.nodes[name], field))

    return change


CHANGES = {
    "cascade's weight": ("a layer alone", doubled("w_rec", "weight")),
    "cascade's edge": ("a layer alone", lambda inner: inner.edges.remove(("w_rec", "lif"))),
    "feed-forward's edge": ("feed-forward", lambda inner: inner.edges.append(("input", "output"))),
    "readout's mean": ("readout", doubled("mean", "tau")),
    "readout's rate": ("readout", doubled("rate", "r")),
    "readout's reset": ("readout", doubled("reset", "scale")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_subgraph_that_was_changed_after_its_export_raises(name: str, x_seq: Tensor) -> None:
    """Its metadata no longer describe it."""
    network, change = CHANGES[name]
    graph = export_to_nir(networks(0)[network], x_seq)
    change(next(node for node in graph.nodes.values() if isinstance(node, nir.NIRGraph)))
    with pytest.raises(ValueError, match="was changed since its export"):
        import_from_nir(graph)


@pytest.mark.parametrize(
    ("network", "name"), [("a layer alone", "w_rec"), ("feed-forward", "n1_up"), ("readout", "synapse")]
)
def test_a_subgraph_with_a_missing_node_raises(network: str, name: str, x_seq: Tensor) -> None:
    graph = export_to_nir(networks(0)[network], x_seq)
    inner = next(node for node in graph.nodes.values() if isinstance(node, nir.NIRGraph))
    inner.nodes.pop(name)
    inner.edges[:] = [edge for edge in inner.edges if name not in edge]
    with pytest.raises(ValueError, match=r"does not have its structure|was changed since"):
        import_from_nir(graph)


def test_metadata_that_contradict_the_node_raise(x_seq: Tensor) -> None:
    graph = export_to_nir(random_node(D, None, refractory_steps=2), x_seq, approximate=True)
    lif = next(node for node in graph.nodes.values() if isinstance(node, nir.CubaLIF))
    lif.v_reset = 5 * lif.v_reset
    with pytest.raises(ValueError, match=r"changed since its export \(v_reset\)"):
        import_from_nir(graph)
    lif.metadata["part"] = "MembraneReadout"
    with pytest.raises(ValueError, match=r"does not have its structure"):
        import_from_nir(graph)


def test_the_graph_stores_its_time_step_dt(x_seq: Tensor, tmp_path) -> None:
    net = networks(0)["with cascade"]
    graph = through_file(export_to_nir(net, x_seq, dt=1e-3), tmp_path)
    assert torch.equal(run(import_from_nir(graph), x_seq), run(net, x_seq))
    assert deviation(net, graph, x_seq) < 1e-6
    for read in (import_from_nir, lambda graph, dt: simulate(graph, x_seq, dt)):
        with pytest.raises(ValueError, match=r"must be 0.001 s.*got 0.0001 s"):
            read(graph, dt=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_networks_in_other_precisions_are_exported(dtype: torch.dtype, x_seq: Tensor, tmp_path) -> None:
    """float64 stays float64; half precision is exported in float32, in which its neurons compute."""
    net = networks(0)["with cascade"].to(dtype)
    if dtype.itemsize == 2:
        net, x_seq = net[1], x_seq[..., :1].expand(T, N, 15)
    graph = through_file(export_to_nir(net, x_seq.to(dtype)), tmp_path)
    assert float(graph.metadata["deviation"]) < 1e-6
    if dtype == torch.float64:
        imported = import_from_nir(graph, dtype=dtype)
        assert all(p.dtype == dtype for p in imported.parameters())
        for a, b in zip(net.parameters(), imported.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_export_of_a_silent_network_logs_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "nord_snn"):
        graph = export_to_nir(random_node(D, 5), torch.zeros(T, N, D))
    assert graph.metadata["deviation"] == 0
    assert "are zero" in caplog.text


def test_a_user_surrogate_is_imported_as_the_default_with_a_logged_warning(
    x_seq: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    def node(surrogate_function) -> AssociativeLIFNode:
        return AssociativeLIFNode(D, 5, refractory_steps=0, surrogate=surrogate_function, alpha=3.0, step_mode="m")

    named = import_from_nir(export_to_nir(node("atan"), x_seq))
    assert {(m.surrogate_function, m.alpha) for m in named.modules() if isinstance(m, AssociativeLIFNode)} == {
        ("atan", 3.0)
    }
    with caplog.at_level(logging.WARNING, "nord_snn"):
        import_from_nir(export_to_nir(node(surrogate.ATan()), x_seq))
    assert "ATan" in caplog.text


def test_an_imported_network_can_be_saved_and_copied(x_seq: Tensor, tmp_path) -> None:
    imported = import_from_nir(export_to_nir(networks(0)["all layers"], x_seq))
    expected = run(imported, x_seq)
    torch.save(imported, tmp_path / "net.pt")
    assert torch.equal(run(torch.load(tmp_path / "net.pt", weights_only=False), x_seq), expected)
    assert torch.equal(run(copy.deepcopy(imported), x_seq), expected)


def test_similar_names_are_not_confused(x_seq: Tensor, tmp_path) -> None:
    """Some modules have names of nodes of a subgraph, and the file lists names in another order."""
    parts = {"b": random_node(D, 5), "b_lif": random_node(D, None), "b_w_rec": random_linear(D, D),
             "a": feed_forward(D, 5, node_with_five_clusters), "a_n1_up": random_linear(D, D), "class": random_node(D, 2),
             "output": random_linear(D, D), "input": random_node(D, None)}  # fmt: skip
    net = nn.Sequential()
    for name, part in parts.items():
        net.add_module(name, part)
    graph = through_file(export_to_nir(net, x_seq), tmp_path)
    assert torch.equal(run(import_from_nir(graph), x_seq), run(net, x_seq))
    assert deviation(net, graph, x_seq) == 0


class Forward(nn.Module):
    """Network whose forward is an argument."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.a, self.b, self.n, self.drop = random_linear(D, D), random_linear(D, D), random_node(D, 5), nn.Dropout()
        self.free = nn.Parameter(torch.ones(D))
        self.traced = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.traced(self, x)


FORWARDS = {
    "residual": lambda s, x: s.n(s.a(x) + x),
    "residual output": lambda s, x: s.b(s.n(s.a(x))) + s.a(x),
    "input to output": lambda s, x: x + s.b(s.n(x)),
    "three": lambda s, x: s.n(x + s.a(x) + s.b(x)),
    "in place": lambda s, x: s.n(s.a(x).add_(s.b(x))),
    "dropout": lambda s, x: s.n(s.drop(s.a(s.drop(x)))),
    "unused": lambda s, x: (s.b(x), s.n(s.a(x)))[1],
    "shared weights": lambda s, x: s.n(s.a(s.a(x))),
    "torch.add": lambda s, x: s.n(torch.add(s.a(x), x)),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_forwards_that_a_graph_can_express(name: str, x_seq: Tensor, tmp_path) -> None:
    net = Forward(FORWARDS[name]).eval()
    graph = through_file(export_to_nir(net, x_seq), tmp_path)
    assert deviation(net, graph, x_seq) < 1e-5
    torch.testing.assert_close(run(import_from_nir(graph), x_seq), run(net, x_seq), rtol=1e-4, atol=1e-4)


BAD_FORWARDS = {
    "number": (lambda s, x: s.n(s.a(x) + 1.0), "computed from the network's input, got 1.0"),
    "parameter": (lambda s, x: s.n(s.a(x) + s.free), "got 'free'"),
    "twice the same": (
        lambda s, x: (lambda h: s.n(h + h))(s.a(x)),
        "'n' must not receive the same value twice",
    ),
    "weighted": (lambda s, x: s.n(s.a(x).add(s.b(x), alpha=-2)), "addition of two values"),
    "product": (lambda s, x: s.n(s.a(x) * s.b(x)), "got 'mul'"),
    "activation": (lambda s, x: s.n(torch.relu(s.a(x))), "got 'relu'"),
    "mean": (lambda s, x: s.n(x).mean(0), "got 'mean'"),
    "branch": (lambda s, x: s.n(x) if x.sum() > 0 else x, "cannot trace the forward of Forward"),
    "one state twice": (lambda s, x: s.n(s.a(s.n(x))), "'n' must be called once.*share one state"),
    "two outputs": (lambda s, x: (s.n(x), s.a(x)), "must return one value"),
    "nothing": (lambda s, x: x, "must compute something"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", BAD_FORWARDS)
def test_forwards_that_a_graph_cannot_express_raise(name: str, x_seq: Tensor) -> None:
    forward, sentence = BAD_FORWARDS[name]
    with pytest.raises(ValueError, match=sentence):
        export_to_nir(Forward(forward), x_seq)


@pytest.mark.parametrize(
    ("parts", "features", "error"),
    [
        ((nn.Linear(D, 6), AssociativeLIFNode(7, None, refractory_steps=0)), (D,), r"with D = 7, got \[2, 3, 6\]"),
        ((nn.Linear(D, 7), AssociativeLIFNode(7, None, refractory_steps=0)), (D + 1,), "shapes cannot be multiplied"),
        ((nn.Conv2d(4, 6, 3), AssociativeLIFNode(6, None, refractory_steps=0)), (4, 8, 8), "input to conv2d"),
    ],
    ids=["widths", "input", "rank"],
)
def test_a_forward_that_fails_on_the_input_raises_its_own_error(
    parts: tuple[nn.Module, ...], features: tuple[int, ...], error: str
) -> None:
    with pytest.raises((ValueError, RuntimeError), match=error):
        export_to_nir(nn.Sequential(*parts), torch.rand(2, 3, *features))


def test_a_hook_which_tracing_does_not_see_raises_as_outputs_differ(x_seq: Tensor) -> None:
    net = nn.Sequential(random_linear(D, D), random_node(D, 5))
    net[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match=r"must give the outputs of the network, but differs by \d\.\d+.*hook"):
        export_to_nir(net, x_seq)


def test_decays_without_a_time_constant_raise(x_seq: Tensor) -> None:
    for logit in (-40.0, 40.0):
        node = random_node(D, 5)
        nn.init.constant_(node.beta_mem_logit, logit)
        with pytest.raises(ValueError, match=r"1 - beta_mem must not round to 0 or 1"):
            export_to_nir(node, x_seq)


def test_convolutions_exported_by_spikingjelly_run_on_sequences(tmp_path) -> None:
    """The graph has a convolution, pooling, flattening, a linear map and a LIF."""
    exchange = pytest.importorskip("spikingjelly.activation_based.nir_exchange")
    net = nn.Sequential(
        layer.Conv2d(2, 3, 3, stride=2, padding=1),
        layer.AvgPool2d(2),
        layer.Flatten(),
        layer.Linear(12, 4),
        neuron.LIFNode(tau=2.0, v_reset=0.0, v_threshold=0.1),
    )
    images = 20 * torch.randn(T, N, 2, 8, 8)
    graph = through_file(exchange.export_to_nir(net, images[0]), tmp_path)
    functional.reset_net(net)
    functional.set_step_mode(net, "m")
    expected = run(net, images)
    assert expected.any()
    assert torch.equal(simulate(graph, images), expected)
    imported = import_from_nir(graph, more={nir.LIF: lambda lif: neuron.LIFNode(2.0, v_threshold=0.1, step_mode="m")})
    assert torch.equal(run(imported, images), expected)


BAD_GRAPHS = {
    "two inputs": (
        {"i": "in", "j": "in", "lif": "lif", "o": "out"},
        [("i", "lif"), ("j", "lif"), ("lif", "o")],
        "one Input",
    ),
    "no output": ({"i": "in", "lif": "lif"}, [("i", "lif")], "one Output"),
    "lost edge": (
        {"i": "in", "lif": "lif", "o": "out"},
        [("i", "lif"), ("gone", "lif"), ("lif", "o")],
        "got 'gone'",
    ),
    "no way": ({"i": "in", "lif": "lif", "o": "out"}, [("i", "lif")], "must have a path"),
    "no input": (
        {"i": "in", "lif": "lif", "constant": "lif", "o": "out"},
        [("i", "lif"), ("constant", "lif"), ("lif", "o")],
        "all nodes of the graph must have a path from its input, 'constant' has none",
    ),
    "no graph": (None, None, "NIRGraph or the name of a file"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", BAD_GRAPHS)
def test_invalid_graphs_raise(name: str) -> None:
    nodes, edges, sentence = BAD_GRAPHS[name]
    if nodes is None:
        graph = cuba()
    else:
        makers = {"in": lambda: nir.Input(np.array([4])), "out": lambda: nir.Output(np.array([4])), "lif": cuba}
        graph = nir.NIRGraph(nodes={key: makers[kind]() for key, kind in nodes.items()}, edges=edges, type_check=False)
    with pytest.raises((ValueError, TypeError), match=sentence):
        import_from_nir(graph)


def test_an_export_does_not_depend_on_the_stored_state(x_seq: Tensor) -> None:
    """Graphs exported before and after a run of the network are equal."""
    net = nn.Sequential(random_linear(D, 15), random_node(15, 5))
    first = export_to_nir(net, x_seq)
    net(x_seq)
    second = export_to_nir(net, x_seq)
    functional.reset_net(net)
    assert torch.equal(simulate(first, x_seq), simulate(second, x_seq))


def test_a_graph_inside_another_graph_keeps_its_dt(x_seq: Tensor, tmp_path) -> None:
    net = networks(0)["with cascade"]
    graph = export_to_nir(net, x_seq, dt=1e-3)
    outer = nir.NIRGraph(
        nodes={"input": nir.Input(np.array([D])), "net": graph, "output": nir.Output(np.array([5]))},
        edges=[("input", "net"), ("net", "output")],
    )
    outer = through_file(outer, tmp_path)
    assert torch.equal(simulate(outer, x_seq), simulate(graph, x_seq))
    assert torch.equal(run(import_from_nir(outer), x_seq), run(net, x_seq))


def test_a_single_part_can_be_exported(x_seq: Tensor, tmp_path) -> None:
    node = random_node(D, 5)
    graph = export_to_nir(node, x_seq)
    (inner,) = (part for part in graph.nodes.values() if isinstance(part, nir.NIRGraph))
    assert torch.equal(run(import_from_nir(through_file(inner, tmp_path)), x_seq), run(node, x_seq))


@pytest.mark.parametrize("name", NAMES)
def test_dimensions_between_rows_and_features_count_as_rows(name: str) -> None:
    net, x_seq = networks(0)[name], 2 * torch.randn(T, N, 4, D)
    graph = export_to_nir(net, x_seq)
    assert graph.metadata["deviation"] < 1e-5
    torch.testing.assert_close(run(import_from_nir(graph), x_seq), run(net, x_seq), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_any_graph_can_be_imported_in_half_precision(dtype: torch.dtype, x_seq: Tensor) -> None:
    imported = import_from_nir(export_to_nir(networks(0)["all layers"], x_seq), dtype=dtype)
    assert all(p.dtype == dtype for p in imported.parameters())
    assert run(imported, x_seq.to(dtype)).isfinite().all()


@pytest.mark.parametrize("dt", [1e-7, 1.0])
def test_a_changed_subgraph_raises_at_any_dt(dt: float, x_seq: Tensor) -> None:
    graph = export_to_nir(networks(0)["readout"], x_seq, dt)
    import_from_nir(graph)
    inner = next(node for node in graph.nodes.values() if isinstance(node, nir.NIRGraph))
    inner.nodes["mean"].tau *= 1.01
    with pytest.raises(ValueError, match="was changed since its export"):
        import_from_nir(graph)


class Noisy(nn.Module):
    """Module that adds noise in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.noise, self.output_sum = random_linear(D, D), random_linear(D, D), random_node(D, 5)

    def forward(self, n0_a: Tensor) -> Tensor:
        h = self.a(n0_a)
        return self.output_sum(h + self.noise(n0_a) if self.training else h) + n0_a


def test_a_network_is_exported_in_eval_mode(x_seq: Tensor) -> None:
    net = Noisy()
    graph = export_to_nir(net, x_seq)
    assert net.training
    assert graph.metadata["deviation"] == 0
    assert len(graph.nodes) == 5


def test_nan_outputs_raise_instead_of_counting_as_equal(x_seq: Tensor) -> None:
    x_seq[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="but differs by nan"):
        export_to_nir(nn.Sequential(random_linear(D, D)), x_seq)


def test_functions_in_more_must_return_a_node_or_a_module(x_seq: Tensor) -> None:
    with pytest.raises(TypeError, match=r"must turn GELU into a nir.NIRNode, got NoneType"):
        export_to_nir(nn.Sequential(nn.GELU()), x_seq, more={nn.GELU: lambda module: None})
    graph = nir.NIRGraph.from_list(nir.Threshold(np.ones(4)))
    with pytest.raises(TypeError, match=r"must turn Threshold into a torch.nn.Module, got NoneType"):
        import_from_nir(graph, more={nir.Threshold: lambda node: None})
