"""AssociativeLIFNode, the SpikingJelly node of the op ``associative_lif``: values, state, arguments, SpikingJelly's tools."""

import copy
import pickle

import pytest
import torch
from helpers import needs_spikingjelly_2
from spikingjelly.activation_based import base, functional, monitor, neuron, surrogate
from torch import nn

import nord_snn
from nord_snn.neurons import AssociativeCascade, AssociativeLIFNode, fire_from_rest, make_neuron
from nord_snn.ops import AssociativeLIFState, associative_lif

pytestmark = pytest.mark.quick


def node(**more):
    """Return a small node in step mode m."""
    return AssociativeLIFNode(8, **{"n_clusters": 4, "step_mode": "m"} | more)


X = 2 * torch.rand(6, 3, 8, generator=torch.Generator().manual_seed(1))


def test_the_node_equals_the_op():
    n = node(store_v_seq=True)
    spikes, v_seq, state = associative_lif(
        X,
        threshold=torch.full((8,), 0.25),
        beta_mem=0.9,
        beta_syn=0.5,
        cascade_weight=n.cascade.weight.sigmoid(),
        cascade_gain=n.cascade.gain,
        return_v_seq=True,
    )
    assert torch.equal(n(X), spikes)
    assert torch.allclose(n.v_seq, v_seq, atol=1e-6)
    assert torch.equal(n.refractory, state.refractory)
    assert 0 < spikes.mean() < 0.4


def test_single_time_steps_equal_the_sequence():
    multi, single = node(store_v_seq=True), node(step_mode="s", store_v_seq=True)
    spikes = torch.stack([single(x) for x in X])
    assert torch.equal(multi(X), spikes)
    assert torch.equal(multi.v_seq, single.v_seq)
    assert torch.equal(multi.v, single.v)


def test_dimensions_between_rows_and_features_are_rows():
    x = X.unsqueeze(2).repeat(1, 1, 5, 1)  # [T, N, 5, D]
    n = node()
    assert torch.equal(n(x)[:, :, 3], node()(X))
    assert n.v.shape == (3, 5, 8)


def test_state_is_carried_until_reset_and_stateless_calls_do_not_change_it():
    n = node()
    first, v = n(X), n.v.clone()
    assert torch.equal(n(X, stateless=True), first)
    assert torch.equal(n.v, v)
    assert not torch.equal(n(X), first)
    for reset in (functional.reset_net, nord_snn.reset):
        reset(n)
        assert n.v == 0.0
        assert torch.equal(n(X), first)


def test_a_changed_batch_shape_raises_while_the_node_has_state():
    n = node()
    n(X)
    with pytest.raises(ValueError, match=r"has state of shape \[3, 8\], but got input of shape \[2, 8\].*reset"):
        n(X[:, :2])
    functional.reset_net(n)
    assert n(X[:, :2]).shape == (6, 2, 8)


@pytest.mark.parametrize(
    ("shape", "step_mode", "message"),
    [
        ((6, 3, 7), "m", r"expects shape \[T, N, \*, D\] with D = 8, got \[6, 3, 7\]"),
        ((6, 8), "m", r"expects shape \[T, N, \*, D\] with D = 8, got \[6, 8\]"),
        ((0, 3, 8), "m", r"\[T, N, \*, D\] with at least one time step, got T = 0"),
        ((8,), "s", r"expects shape \[N, \*, D\] with D = 8, got \[8\]"),
    ],
)
def test_wrong_rank_or_width_raises(shape, step_mode, message):
    with pytest.raises(ValueError, match=message):
        node(step_mode=step_mode)(torch.zeros(shape))


def test_bad_constructor_arguments_raise():
    with pytest.raises(ValueError, match="D = 8 and C = 3"):
        AssociativeLIFNode(8, n_clusters=3)
    with pytest.raises(ValueError, match="unknown surrogate"):
        AssociativeLIFNode(8, n_clusters=None, surrogate="tanh")
    with pytest.raises(ValueError, match="beta_mem must lie in"):
        AssociativeLIFNode(8, n_clusters=None, beta_mem=1.5)
    with pytest.raises(ValueError, match="refractory_steps must be a whole number"):
        AssociativeLIFNode(8, n_clusters=None, refractory_steps=-1)
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        AssociativeLIFNode(8, n_clusters=None, backend="cuda")
    with pytest.raises(ValueError, match="cascade_radius must be at least 0"):
        AssociativeLIFNode(8, n_clusters=4, cascade_radius=-1)
    for v_reset in (None, float("nan"), torch.zeros(())):  # in SpikingJelly None selects the soft reset
        with pytest.raises(TypeError, match=r"v_reset must be a number.*None only with refractory_steps=0"):
            AssociativeLIFNode(8, n_clusters=None, v_reset=v_reset)


def test_spikingjellys_tools_work_on_the_node():
    net = nn.Sequential(nn.Linear(8, 8), node(step_mode="s"))
    functional.set_step_mode(net, "m")
    spikes = monitor.OutputMonitor(net, neuron.BaseNode)
    net(X)
    assert spikes.records[0].shape == (6, 3, 8)
    assert net[1].v.grad_fn is not None
    functional.detach_net(net)
    assert net[1].v.grad_fn is None
    assert isinstance(net[1], neuron.BaseNode)


@needs_spikingjelly_2
def test_functional_forward_takes_and_returns_states():
    n = node()
    forward = base.to_functional_forward(n)
    (whole,), states = forward((X,), (0.0, 0.0, 0))
    (first,), middle = forward((X[:2],), (0.0, 0.0, 0))
    (second,), end = forward((X[2:],), middle)
    assert torch.equal(torch.cat((first, second)), whole)
    assert all(torch.equal(a, b) for a, b in zip(states, end, strict=True))
    assert n.v == 0.0


def test_copies_and_pickles_continue_from_the_same_state():
    n = node()
    n(X.requires_grad_(False))
    functional.detach_net(n)
    for duplicate in (copy.deepcopy(n), pickle.loads(pickle.dumps(n))):
        assert torch.equal(duplicate(X), copy.deepcopy(n)(X))


def test_parameters_for_the_optimizer_have_a_dimension():
    for name, parameter in node().named_parameters():
        assert parameter.ndim >= 1, name
    assert [name for name, _ in node(n_clusters=None).named_parameters()] == [
        "v_threshold",
        "beta_mem_logit",
        "beta_syn_logit",
    ]


def test_every_learnable_parameter_has_a_gradient():
    n = node(store_v_seq=True)
    (n(X).sum() + n.v_seq.sum()).backward()
    for name, parameter in n.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_a_spikingjelly_surrogate_can_be_passed_or_assigned():
    n = node(surrogate=surrogate.ATan())
    spikes = n(X)
    assert torch.equal(spikes, node()(X))
    spikes.sum().backward()
    atan = n.v_threshold.grad.clone()
    n.zero_grad()
    functional.reset_net(n)
    n.surrogate_function = surrogate.Sigmoid()
    n(X).sum().backward()
    assert not torch.allclose(n.v_threshold.grad, atan)


def test_which_backend_returns_the_backend_and_unknown_names_raise():
    n = node(backend="torch")
    assert n.which_backend(X).name == "torch"
    n.backend = "cupy"
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="cupy"):
            n(X)
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        n.backend = "lava"
    assert n.backend == "cupy"


def test_the_backend_attribute_can_be_set_on_every_module():
    """``functional.set_backend`` of SpikingJelly 0.0.0.0.14 sets the backend of every module this way."""
    net = nn.Sequential(nn.Linear(8, 8), node())
    for module in net.modules():
        if hasattr(module, "backend") and "torch" in module.supported_backends:
            module.backend = "torch"
    assert net[1].which_backend(X).name == "torch"


def test_half_precision_modules_keep_their_state_in_float32():
    n = node().to(torch.bfloat16)
    assert n(X.bfloat16()).dtype == torch.bfloat16
    assert n.v.dtype == torch.float32
    beta_mem = torch.tensor(0.9).logit().bfloat16().float().sigmoid()  # the logit is rounded, its sigmoid is not
    silent = node(n_clusters=None, threshold=99.0).to(torch.bfloat16)
    silent(torch.ones(1, 1, 8, dtype=torch.bfloat16))
    assert torch.allclose(silent.v, 1 - beta_mem, atol=1e-6)


def test_reset_parameters_restores_initial_values():
    n = node(threshold=0.5)
    before = copy.deepcopy(n.state_dict())
    with torch.no_grad():
        for parameter in n.parameters():
            parameter.add_(1)
    n.reset_parameters()
    n.cascade.reset_parameters()
    assert all(torch.equal(value, before[name]) for name, value in n.state_dict().items())


def test_cascade_module_starts_as_a_ring():
    cascade = AssociativeCascade(12, n_clusters=6, radius=2)
    assert torch.allclose(cascade.weight[0], torch.tensor([0, 2 / 3, 1 / 3, 0, 1 / 3, 2 / 3]))
    assert torch.equal(cascade.weight, cascade.weight.T)
    spikes = torch.zeros(1, 12)
    spikes[0, [0, 6]] = 1  # all of cluster 0
    current = cascade(spikes)[0]
    assert torch.allclose(current[1], 0.8 * torch.tensor(2 / 3).sigmoid())
    assert torch.equal(current[:6], current[6:])
    assert current[1] > current[2] > current[3]  # decreases with the distance of the clusters
    with pytest.raises(ValueError, match=r"\[\*, D\] with D = 12"):
        cascade(torch.zeros(2, 10))


def test_fire_from_rest_runs_spikingjellys_neurons_and_restores_their_state():
    lif = neuron.LIFNode(step_mode="m")
    first = lif(X)
    v = lif.v.clone()
    assert torch.equal(fire_from_rest(lif, X), first)
    assert torch.equal(lif.v, v)
    container = make_neuron(lambda n: nn.Sequential(nn.Linear(8, 8), neuron.LIFNode(v_threshold=0.2)), 8)
    for rows in (3, 2):  # a container of neurons also starts from rest, with any batch size
        out = fire_from_rest(container, X[:, :rows])
        assert torch.equal(fire_from_rest(container, X[:, :rows]), out)
    assert container[1].v == 0.0
    stateless = nn.ReLU()
    assert torch.equal(fire_from_rest(stateless, X), X)


def test_the_deprecated_name_of_dense_activation_works_and_warns():
    with pytest.warns(FutureWarning, match="SmoothActivation is now called DenseActivation"):
        from nord_snn.neurons import SmoothActivation
    assert SmoothActivation is nord_snn.neurons.DenseActivation
    assert "SmoothActivation" not in nord_snn.neurons.__all__
    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        _ = nord_snn.neurons.Missing


def test_make_neuron_checks_the_factory():
    assert make_neuron(lambda n: neuron.LIFNode(), 8).step_mode == "m"
    with pytest.raises(TypeError, match=r"neuron=lambda n: LIFNode\(\)"):
        make_neuron(neuron.LIFNode, 8)
    with pytest.raises(TypeError, match=r"must return a torch.nn.Module, got str"):
        make_neuron(lambda n: "LIF", 8)
    with pytest.raises(TypeError, match="ReLU must have store_v_seq"):
        make_neuron(lambda n: nn.ReLU(), 8, store_v_seq=True)


@pytest.mark.quick
def test_a_state_that_would_be_ignored_raises() -> None:
    node, x = AssociativeLIFNode(4), torch.zeros(2, 4)
    v, counter = torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.int32)
    with pytest.raises(TypeError, match="state needs new_states"):
        node(x, state=AssociativeLIFState(v, v, counter))
    with pytest.raises(TypeError, match="stateless or new_states"):
        node(x, stateless=True, new_states=[])
    with pytest.raises(ValueError, match=r"state\.i_syn and state\.refractory must be tensors"):
        node(x, state=AssociativeLIFState(v, None, None), new_states=[])
