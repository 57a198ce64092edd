"""Graphs of the NIR paper (Pedersen et al., 2024), SpikingJelly and snnTorch give the spikes of their equations or library."""

from itertools import pairwise

import pytest
import torch
from helpers import SPIKINGJELLY_2
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d

import nord_snn
from nord_snn.neurons import AssociativeLIFNode, LeakyIntegrator

nir = pytest.importorskip("nir")
np = pytest.importorskip("numpy")
nord_nir = pytest.importorskip("nord_snn.integrations.nir")
export_to_nir, import_from_nir, simulate = nord_nir.export_to_nir, nord_nir.import_from_nir, nord_nir.simulate

RNG = np.random.default_rng(0)


def random_weight(*shape: int, scale: float = 1.0):
    return (scale * RNG.standard_normal(shape)).astype(np.float32)


def chain(*nodes, shape, loops=()):
    """Return a graph of nodes in a row, named "0", "1" ...; ``loops`` has pairs of a node's name and its recurrent map."""
    names = ["input", *(str(place) for place in range(len(nodes))), "output"]
    graph = dict(zip(names, (nir.Input(np.array(shape)), *nodes), strict=False))
    graph["output"] = nir.Output(np.array([7]))
    edges = list(pairwise(names))
    for name, node in loops:
        graph[f"{name}.w_rec"] = node
        edges += [(name, f"{name}.w_rec"), (f"{name}.w_rec", name)]
    return nir.NIRGraph(nodes=graph, edges=edges, type_check=False)


def lif(tau: float, v_leak: float, v_threshold: float):
    return nir.LIF(*(np.full(1, value) for value in (tau, 1.0, v_leak, v_threshold)))


def cuba(n: int, tau_syn: float, tau_mem: float):
    """Return a CubaLIF as snnTorch exports its Synaptic: r and w_in cancel the factors of the time constants; r is float32."""
    fields = {"tau_syn": tau_syn, "tau_mem": tau_mem, "r": np.float32(tau_mem * 1e4), "w_in": tau_syn * 1e4}
    return nir.CubaLIF(
        **{k: np.full(n, v, dtype=np.float64) for k, v in fields.items()}, v_leak=np.zeros(n), v_threshold=np.ones(n)
    )


def conv(weight, stride: int, size: int):
    return nir.Conv2d((size, size), weight, stride, 1, 1, 1, np.zeros(len(weight), dtype=np.float32))


def integrate_and_fire(*shape: int):
    return nir.IF(np.ones(shape, np.float32), np.ones(shape, np.float32))


# --- graphs of the repository of the NIR paper, with random weights


def two_lif():
    """Return two LIF neurons. The second weight is 300 instead of the published 1, so that the second neuron fires."""
    return chain(
        nir.Linear(np.ones((1, 1))),
        lif(0.01, 1.2, 1.0),
        nir.Linear(300 * np.ones((1, 1))),
        lif(0.01, 0.0, 20.0),
        shape=(1,),
    )


def one_lif():
    return chain(nir.Affine(np.ones((1, 1), np.float32), np.zeros(1, np.float32)), lif(0.0025, 0.0, 0.1), shape=(1,))


def spiking_cnn():
    """Return the convolutional network with IF neurons for N-MNIST."""
    pool = nir.SumPool2d(*(np.array([v, v]) for v in (2, 2, 0)))
    nodes = (
        conv(random_weight(16, 2, 5, 5, scale=0.3), 2, 34), integrate_and_fire(16, 16, 16),
        conv(random_weight(16, 16, 3, 3, scale=0.2), 1, 16), integrate_and_fire(16, 16, 16), pool,
        conv(random_weight(8, 16, 3, 3, scale=0.1), 1, 8), integrate_and_fire(8, 8, 8), pool,
        nir.Flatten(np.array([8, 4, 4]), 0, -1),
        nir.Affine(random_weight(256, 128, scale=0.2), np.zeros(256, np.float32)), integrate_and_fire(256),
        nir.Affine(random_weight(10, 256, scale=0.1), np.zeros(10, np.float32)), integrate_and_fire(10),
    )  # fmt: skip
    return chain(*nodes, shape=(2, 34, 34))


def braille_zero():
    """Return the recurrent network for Braille letters whose neurons are reset to zero."""
    return chain(
        nir.Affine(random_weight(38, 12), random_weight(38, scale=0.3)), cuba(38, 1e-3 / 4.5, 1e-3),
        nir.Affine(random_weight(7, 38, scale=0.4), random_weight(7, scale=0.3)), cuba(7, 2e-4, 1e-3 / 4.5),
        shape=(12,), loops=[("1", nir.Affine(random_weight(38, 38, scale=0.3), random_weight(38, scale=0.3)))],
    )  # fmt: skip


def braille_subtract():
    """Return the recurrent network for Braille letters whose neurons subtract the threshold."""
    return chain(
        nir.Linear(random_weight(40, 12)), cuba(40, 4e-4, 1e-3 / 1.5),
        nir.Linear(random_weight(7, 40, scale=0.4)), cuba(7, 1e-3 / 5.5, 1e-3 / 3),
        shape=(12,), loops=[("1", nir.Linear(random_weight(40, 40, scale=0.3)))],
    )  # fmt: skip


#: Graphs of the repository of the NIR paper, with random weights: function that makes the graph, dt, reset, shape of a row.
PUBLISHED = {
    "two_lif_neurons": (two_lif, 1e-3, "value", (1,)),
    "lif_norse": (one_lif, 1e-4, "value", (1,)),
    "cnn_sinabs": (spiking_cnn, 1.0, "value", (2, 34, 34)),
    "cnn_sinabs, subtracting": (spiking_cnn, 1.0, "subtract", (2, 34, 34)),
    "braille_noDelay_bias_zero": (braille_zero, 1e-4, "value", (12,)),
    "braille_noDelay_noBias_subtract": (braille_subtract, 1e-4, "subtract", (12,)),
}


def outputs_of_equations(graph, x_seq: Tensor, dt: float, reset: str) -> Tensor:
    """Return the outputs of the equations in float64; membrane potentials start at v_reset."""
    names = sorted((name for name in graph.nodes if name.isdigit()), key=int)
    spikes: dict[str, Tensor] = {}
    v: dict[str, Tensor] = {}
    i: dict[str, Tensor] = {}
    out = []
    for x in x_seq.double():
        h = x
        for name in names:
            node = graph.nodes[name]
            if hasattr(node, "v_threshold"):
                recurrent_map = graph.nodes.get(f"{name}.w_rec")
                if recurrent_map is not None:
                    h = h + stateless(recurrent_map, spikes.get(name, torch.zeros_like(h)))
                h, v[name], i[name] = fire(node, h, v.get(name), i.get(name), dt, reset)
                spikes[name] = h
            else:
                h = stateless(node, h)
        out.append(h)
    return torch.stack(out)


def stateless(node, h: Tensor) -> Tensor:
    """Return the output of a node without state."""
    if isinstance(node, nir.Flatten):
        return h.flatten(1)
    if isinstance(node, nir.SumPool2d):
        return 4 * avg_pool2d(h, 2)
    weight = torch.from_numpy(node.weight).double()
    bias = torch.from_numpy(getattr(node, "bias", np.zeros(len(weight)))).double()
    if isinstance(node, nir.Conv2d):
        return conv2d(h, weight, bias, int(np.ravel(node.stride)[0]), 1)
    return h @ weight.T + bias


def fire(node, h: Tensor, v: Tensor | None, i: Tensor | None, dt: float, reset: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return spikes, membrane potential and synaptic current of neurons after one time step with input h."""
    field = {
        name: torch.as_tensor(value).double() for name, value in vars(node).items() if isinstance(value, np.ndarray)
    }
    v = field["v_reset"].expand_as(h) if v is None else v
    i = torch.zeros_like(h) if i is None else i
    if isinstance(node, nir.CubaLIF):
        i = i + dt / field["tau_syn"] * (field["w_in"] * h - i)
        h = i
    if isinstance(node, nir.IF):
        v = v + dt * field["r"] * h
    else:
        v = v + dt / field["tau_mem" if isinstance(node, nir.CubaLIF) else "tau"] * (
            field["v_leak"] - v + field["r"] * h
        )
    s = (v > field["v_threshold"]).double()
    return s, torch.where(s > 0, v - field["v_threshold"] if reset == "subtract" else field["v_reset"], v), i


def random_spikes(shape: tuple[int, ...], n_steps: int) -> Tensor:
    """Return random spikes of two rows; those for a single neuron are multiplied by 3, so that it fires."""
    x = (torch.rand(n_steps, 2, *shape, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    return 3 * x if shape == (1,) else x


def run(net: nn.Module, x_seq: Tensor) -> Tensor:
    nord_snn.reset(net)
    with torch.no_grad():
        return net(x_seq)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_graph_gives_the_spikes_of_its_equations(name: str, tmp_path) -> None:
    make, dt, reset, shape = PUBLISHED[name]
    graph, x_seq = make(), random_spikes(shape, 300 if shape == (1,) else 10)
    nir.write(tmp_path / "graph.nir", graph)
    net = import_from_nir(nir.read(tmp_path / "graph.nir", type_check=False), dt, reset=reset)
    expected = outputs_of_equations(graph, x_seq, dt, reset)
    assert 0.01 < expected.mean() < 0.9
    spikes = run(net, x_seq)
    assert torch.equal(spikes.double(), expected)
    assert torch.equal(spikes, simulate(graph, x_seq, dt, reset=reset))
    assert torch.equal(run(net, x_seq), spikes)  # a reset also clears the spikes that are fed back


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_graph_is_exported_and_imported_again_bit_for_bit(name: str, tmp_path) -> None:
    make, dt, reset, shape = PUBLISHED[name]
    x_seq = random_spikes(shape, 40 if shape == (1,) else 8)
    net = import_from_nir(make(), dt, reset=reset)
    graph = export_to_nir(net, x_seq, dt)
    assert graph.metadata["deviation"] == 0
    nir.write(tmp_path / "graph.nir", graph)
    imported = import_from_nir(tmp_path / "graph.nir")
    assert torch.equal(run(imported, x_seq), run(net, x_seq))
    parameters, imported_parameters = ([p for p in x.parameters() if p.requires_grad] for x in (net, imported))
    assert len(parameters) == len(imported_parameters)
    assert all(any(torch.equal(p, q) for q in imported_parameters) for p in parameters)


def test_norse_and_spikingjelly_give_the_same_spikes_for_the_lif_graph_of_the_paper() -> None:
    x_seq = random_spikes((1,), 100)
    spikes = run(import_from_nir(one_lif(), 1e-4), x_seq)
    readers = {"norse.torch": lambda m: m.from_nir(one_lif(), dt=1e-4)}
    if SPIKINGJELLY_2:
        readers["spikingjelly.activation_based.nir_exchange"] = lambda m: m.import_from_nir(one_lif())
    for module, read in readers.items():
        assert torch.equal(stepwise(read(pytest.importorskip(module)), x_seq), spikes)


def stepwise(network: nn.Module, x_seq: Tensor) -> Tensor:
    """Return the outputs of a network that is called with one time step and its state."""
    state, out = None, []
    with torch.no_grad():
        for x in x_seq:
            y, state = network(x, state)
            out.append(y)
    return torch.stack(out)


@pytest.mark.skipif(not SPIKINGJELLY_2, reason="0.0.0.0.14 has no NIR exchange")
@pytest.mark.parametrize("dt", [1e-4, 1e-3])
def test_an_export_of_spikingjelly_gives_the_same_spikes(dt: float) -> None:
    exchange = pytest.importorskip("spikingjelly.activation_based.nir_exchange")
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(2, 4, 3, padding=1), neuron.IFNode(v_threshold=0.5), layer.AvgPool2d(2), layer.Flatten(),
        layer.Linear(64, 20, bias=False), neuron.LIFNode(tau=2.0, v_reset=-0.2, v_threshold=0.3),
        layer.Linear(20, 20), neuron.LIFNode(tau=3.0, decay_input=False, v_threshold=0.6),
        layer.Linear(20, 20), neuron.CUBALIFNode(v_reset=0.0, v_threshold=0.3),
        layer.Linear(20, 10), neuron.ParametricLIFNode(v_threshold=0.1),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    x_seq = 2 * torch.randn(20, 3, 2, 8, 8)
    graph = exchange.export_to_nir(net, x_seq, dt=dt)
    functional.reset_net(net)
    with torch.no_grad():
        expected = net(x_seq)
    assert expected.sum() > 20
    assert torch.equal(run(import_from_nir(graph, dt, strict=False), x_seq), expected)


@pytest.mark.skipif(not SPIKINGJELLY_2, reason="0.0.0.0.14 has no NIR exchange")
def test_at_the_threshold_spikingjelly_fires_and_the_equations_of_nir_do_not() -> None:
    exchange = pytest.importorskip("spikingjelly.activation_based.nir_exchange")
    net = nn.Sequential(layer.Linear(1, 1, bias=False), neuron.IFNode(v_threshold=1.0))
    nn.init.constant_(net[0].weight, 0.5)
    functional.set_step_mode(net, "m")
    x_seq = torch.ones(6, 1, 1)
    graph = exchange.export_to_nir(net, x_seq)
    functional.reset_net(net)
    assert torch.equal(run(import_from_nir(graph, strict=False), x_seq), run(net, x_seq))
    assert run(import_from_nir(graph), x_seq).sum() == simulate(graph, x_seq).sum() == 2
    assert run(net, x_seq).sum() == 3


def snn_neuron(kind: str, mechanism: str, n: int = 15) -> nn.Module:
    """Return neurons of the class ``kind`` of snnTorch with the reset ``mechanism``."""
    snn = pytest.importorskip("snntorch")
    recurrent = kind.startswith("R")
    decays = {"beta": 0.8, **({"alpha": 0.5} if "Synaptic" in kind else {})}
    if not recurrent:  # its exporter needs a decay and a threshold for every neuron
        decays = {name: torch.full((n,), value) for name, value in decays.items()}
    more = {"linear_features": n} if recurrent else {"threshold": torch.full((n,), 0.7)}
    return getattr(snn, kind)(**decays, **more, init_hidden=True, reset_mechanism=mechanism)


#: Class and reset_mechanism of snnTorch -> our reset. snnTorch resets one time step late; for Leaky with "zero" this is equal.
SNNTORCH = {
    ("Leaky", "zero"): "value",
    ("Leaky", "subtract"): "delayed_subtract",
    ("Synaptic", "zero"): "delayed_value",
    ("Synaptic", "subtract"): "delayed_subtract",
    ("RLeaky", "zero"): "delayed_value",
    ("RLeaky", "subtract"): "delayed_subtract",
    ("RSynaptic", "zero"): "delayed_value",
    ("RSynaptic", "subtract"): "delayed_subtract",
}


@pytest.mark.parametrize(("kind", "mechanism"), SNNTORCH)
def test_an_export_of_snntorch_gives_the_same_spikes(kind: str, mechanism: str) -> None:
    exporter = pytest.importorskip("snntorch.export_nir")
    utils = pytest.importorskip("snntorch.utils")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 15), snn_neuron(kind, mechanism))
    graph = exporter.export_to_nir(net, torch.rand(20))
    utils.reset(net)
    x_seq = 2 * torch.randn(30, 4, 20)
    with torch.no_grad():
        expected = torch.stack([net(x) for x in x_seq])
    assert expected.sum() > 100
    imported = import_from_nir(graph, reset=SNNTORCH[kind, mechanism])
    assert torch.equal(run(imported, x_seq), expected)


@pytest.mark.parametrize("reader", ["spikingjelly.activation_based.nir_exchange", "snntorch.import_nir"])
def test_spikingjelly_and_snntorch_read_our_neurons_with_a_hard_reset(reader: str, tmp_path) -> None:
    """Both libraries read graphs with nirtorch."""
    read = pytest.importorskip(reader).import_from_nir
    torch.manual_seed(0)
    lif = AssociativeLIFNode(15, None, preset="lif", tau=2.0, hard_reset=True, v_reset=0.0, beta_syn=0.0, step_mode="m")
    net = nn.Sequential(nn.Linear(20, 15), lif)
    x_seq = 2 * torch.randn(30, 4, 20)
    nir.write(tmp_path / "graph.nir", export_to_nir(net, x_seq))
    assert torch.equal(stepwise(read(nir.read(tmp_path / "graph.nir")), x_seq), run(net, x_seq))


def test_leaky_integrators_are_exported_and_imported_bit_for_bit(tmp_path) -> None:
    torch.manual_seed(0)
    x_seq = torch.randn(12, 3, 4)
    integrators = {
        "LI": LeakyIntegrator(4, beta_mem=torch.tensor([0.5, 0.6, 0.7, 0.8]), v_rest=0.3, step_mode="m"),
        "CubaLI": LeakyIntegrator(4, beta_mem=0.9, beta_syn=0.3, gain=torch.rand(4), step_mode="m"),
        "I": LeakyIntegrator(4, beta_mem=1.0, gain=0.25, step_mode="m"),
    }
    for kind, module in integrators.items():
        graph = export_to_nir(nn.Sequential(nn.Linear(4, 4), module), x_seq)
        assert kind in [type(node).__name__ for node in graph.nodes.values()]
        nir.write(tmp_path / "graph.nir", graph)
        imported = import_from_nir(tmp_path / "graph.nir")
        imported_integrator = next(part for part in imported.modules() if isinstance(part, LeakyIntegrator))
        assert torch.equal(run(imported_integrator, x_seq), run(module, x_seq))
    leaky = export_to_nir(integrators["LI"], x_seq)
    assert import_from_nir(leaky).parts[1].beta_mem.tolist() == integrators["LI"].beta_mem.tolist()


def test_an_integrator_without_a_leak_and_with_a_resting_potential_raises() -> None:
    with pytest.raises(ValueError, match="beta_mem must be below 1 for all, or 1 for all with v_rest 0"):
        export_to_nir(LeakyIntegrator(4, beta_mem=1.0, gain=0.25, v_rest=0.5, step_mode="m"), torch.rand(3, 2, 4))


def test_scalar_constants_get_the_number_of_neurons_from_the_previous_layer() -> None:
    """Older exporters write scalars."""
    lif = nir.LIF(*(np.array(value) for value in (1e-3, 10.0, 0.0, 0.8, 0.0)))
    graph = chain(nir.Linear(random_weight(5, 4)), lif, shape=(4,))
    x_seq = 2 * torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(0))
    net = import_from_nir(graph)
    assert net.parts[2].n_features == 5
    assert torch.equal(run(net, x_seq).double(), outputs_of_equations(graph, x_seq, 1e-4, "value"))
    from nord_snn.integrations.nir.neurons import neurons

    with pytest.raises(ValueError, match=r"'lif' must have constants of shape \[D\], because the shape of its input"):
        neurons("lif", lif, 1e-4, None, reset="value", strict=True, step_mode="m")


def test_every_constant_may_differ_between_neurons() -> None:
    """Each field of the NIR LIF has three values."""
    values = ([1e-3, 2e-3, 5e-3], [5.0, 8.0, 20.0], [0.1, -0.2, 0.3], [0.5, 0.1, 0.4], [0.0, -0.3, 0.1])
    lif = nir.LIF(*(np.array(value) for value in values))
    graph = chain(lif, shape=(3,))
    x_seq = 2 * torch.randn(40, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    net = import_from_nir(graph, dtype=torch.float64)
    expected = outputs_of_equations(graph, x_seq, 1e-4, "value")
    assert (expected.sum((0, 1)) > 3).all()
    assert torch.equal(run(net, x_seq), expected)
    again = export_to_nir(net, x_seq)
    assert torch.equal(run(import_from_nir(again, dtype=torch.float64), x_seq), expected)
