"""AssociativeLIFNode in place of other neurons: lazy number of neurons, channels, SpikingJelly's arguments, ``like()``."""

import copy
import io
import pickle
import re

import pytest
import torch
from helpers import relative_error
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.nn.parameter import UninitializedParameter

from nord_snn._compat.spikingjelly import is_release_2
from nord_snn.neurons import PRESETS, AssociativeLIFNode

IMAGES = 2 * torch.rand(4, 2, 6, 3, 5, generator=torch.Generator().manual_seed(0))


def lazy(**more):
    """Return a node whose number of neurons is inferred in the first call."""
    return AssociativeLIFNode(step_mode="m", **more)


# ---- the number of neurons


@pytest.mark.parametrize(
    ("shape", "width", "channel_dim"), [((4, 2, 7), 7, None), ((4, 2, 3, 7), 7, None), ((4, 2, 6, 3, 5), 6, 1)]
)
def test_the_number_of_neurons_is_inferred_in_the_first_call(shape, width, channel_dim):
    node = lazy()
    assert node.n_features is None
    node(torch.rand(shape))
    assert type(node) is AssociativeLIFNode
    assert (node.n_features, node.channel_dim, len(node.v_threshold)) == (width, channel_dim, width)


def test_an_optimizer_made_before_the_first_call_trains_the_thresholds():
    node = lazy()
    optimizer = torch.optim.SGD(node.parameters(), lr=0.1)
    node(IMAGES).sum().backward()
    before = node.v_threshold.detach().clone()
    optimizer.step()
    assert not torch.equal(node.v_threshold, before)


@pytest.mark.parametrize("clusters", [None, "auto", 3])
@pytest.mark.parametrize(("saved_called", "loaded_called"), [(True, True), (True, False), (False, False)])
def test_state_dicts_load_before_and_after_the_first_call(clusters, saved_called, loaded_called):
    """The parameters of a node that was called load into one that was not, as with nn.LazyLinear."""
    nodes = lazy(n_clusters=clusters), lazy(n_clusters=clusters)
    for node, called in zip(nodes, (saved_called, loaded_called), strict=True):
        if called:
            node(IMAGES)
            functional.reset_net(node)
    if saved_called:
        with torch.no_grad():
            for parameter in nodes[0].parameters():
                parameter.add_(0.01)
    file = io.BytesIO()
    torch.save(nodes[0].state_dict(), file)
    file.seek(0)
    nodes[1].load_state_dict(torch.load(file, weights_only=saved_called))
    assert torch.equal(nodes[0](IMAGES), nodes[1](IMAGES))
    assert [len(p) for p in nodes[1].parameters()] == [len(p) for p in nodes[0].parameters()]


def test_loaded_parameters_of_another_number_of_neurons_raise_in_the_first_call():
    trained, other = lazy(), lazy()
    trained(IMAGES)
    other.load_state_dict(trained.state_dict())
    with pytest.raises(ValueError, match="the loaded parameters are those of 6 neurons, the first input has 7"):
        other(torch.rand(4, 2, 7))


@pytest.mark.parametrize("called", [False, True])
def test_copies_before_and_after_the_first_call_give_the_same_spikes(called):
    node = lazy(n_clusters="auto")
    if called:
        node(IMAGES)
        functional.reset_net(node)
        pickled = pickle.loads(pickle.dumps(node))
        assert torch.equal(pickled(IMAGES), node(IMAGES))
        functional.reset_net(node)
    other = copy.deepcopy(node)
    assert type(other) is type(node)
    assert torch.equal(other(IMAGES), node(IMAGES))


def test_before_the_first_call_parameters_are_uninitialized():
    node = lazy(n_clusters="auto")
    assert isinstance(node.v_threshold, UninitializedParameter)
    assert isinstance(node.cascade.gain, UninitializedParameter)
    assert "n_features=None" in repr(node)


def test_a_threshold_of_another_number_of_neurons_raises_in_the_first_call():
    with pytest.raises(ValueError, match="has values for 5 neurons, the first input has 6"):
        lazy(threshold=torch.rand(5))(IMAGES)
    node = lazy(threshold=torch.arange(1.0, 7.0))
    node(IMAGES)
    assert node.v_threshold.tolist() == [1, 2, 3, 4, 5, 6]


def test_clusters_that_do_not_divide_the_number_of_neurons_raise_in_the_first_call():
    with pytest.raises(ValueError, match="D = 6 and C = 4"):
        lazy(n_clusters=4)(IMAGES)
    node = lazy(n_clusters="auto")
    node(IMAGES)
    assert node.cascade.n_clusters == 6
    assert AssociativeLIFNode(100, n_clusters="auto").cascade.n_clusters == 50


# ---- channels


@pytest.mark.parametrize("clusters", [None, 3])
@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_channel_dim_1_equals_the_last_dimension_of_the_transposed_input(clusters, step_mode):
    constants = {"n_clusters": clusters, "step_mode": step_mode, "threshold": torch.rand(6) + 0.1, "preset": "nord"}
    channels_first = AssociativeLIFNode(6, channel_dim=1, store_v_seq=True, **constants)
    channels_last = AssociativeLIFNode(6, store_v_seq=True, **constants)
    for x in [IMAGES] if step_mode == "m" else IMAGES:
        dim = x.ndim - 3
        spikes = channels_first(x)
        assert spikes.stride() == x.stride()
        assert torch.equal(spikes, channels_last(x.movedim(dim, -1)).movedim(-1, dim))
    assert torch.equal(channels_first.v_seq, channels_last.v_seq.movedim(-1, 2))
    assert torch.equal(channels_first.v, channels_last.v.movedim(-1, 1))


def test_outputs_keep_the_memory_format_of_the_input():
    x = IMAGES.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (4, 2))
    node = AssociativeLIFNode(6, None, channel_dim=1, step_mode="m")
    spikes = node(x)
    assert spikes.stride() == x.stride()
    functional.reset_net(node)
    assert torch.equal(spikes, node(IMAGES))


def test_an_image_whose_width_equals_the_number_of_neurons_raises_without_channel_dim():
    with pytest.raises(ValueError, match="12 channels: pass channel_dim=1"):
        AssociativeLIFNode(12, None, step_mode="m")(torch.rand(3, 2, 12, 12, 12))
    with pytest.raises(ValueError, match="12 channels: pass channel_dim=1"):
        AssociativeLIFNode(12, None)(torch.rand(2, 12, 8, 8))
    AssociativeLIFNode(12, None, step_mode="m", channel_dim=-1)(torch.rand(3, 2, 12, 12, 12))
    with pytest.raises(ValueError, match=r"D at dimension 1 of a time step.*with D = 5, got"):
        AssociativeLIFNode(5, None, channel_dim=1, step_mode="m")(IMAGES)
    with pytest.raises(ValueError, match="with D at channel_dim=3 of a time step"):
        AssociativeLIFNode(5, None, channel_dim=3, step_mode="m")(torch.rand(3, 2, 5))


# ---- constants


def test_the_default_preset_depends_on_the_arguments():
    published, without_arguments = AssociativeLIFNode(64), AssociativeLIFNode()
    assert (published.refractory_steps, published.cascade.n_clusters) == (2, 64)
    assert (without_arguments.refractory_steps, without_arguments.cascade, without_arguments.beta_syn_logit) == (
        0,
        None,
        None,
    )
    assert AssociativeLIFNode(64, tau=2.0).refractory_steps == 0
    assert AssociativeLIFNode(64, preset="lif").v_threshold[0] == PRESETS["lif"]["threshold"]
    with pytest.raises(ValueError, match="unknown preset 'none'"):
        AssociativeLIFNode(64, preset="none")


def test_the_arguments_of_spikingjellys_nodes_are_accepted():
    node = AssociativeLIFNode(
        6,
        tau=4.0,
        v_threshold=1.5,
        v_reset=None,
        surrogate_function=surrogate.Sigmoid(3.0),
        detach_reset=True,
        decay_input=False,
    )
    assert node.beta_mem.item() == pytest.approx(0.75)
    assert node.v_threshold.tolist() == [1.5] * 6
    assert (node.dynamics.charge, node.dynamics.detach_reset) == ("sum", True)
    assert node.which_backend(torch.rand(2, 6)).name in ("numba", "torch")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"v_reset": 0.0}, ValueError, "v_reset=0.0 would have no effect.*pass hard_reset=True"),
        ({"tau": 2.0, "beta_mem": 0.5}, TypeError, "tau and beta_mem are the same constant"),
        ({"v_threshold": 1.0, "threshold": 0.5}, TypeError, "v_threshold and threshold are the same constant"),
        ({"tau": 0.5}, ValueError, "tau must be at least 1 time step, got 0.5"),
        ({"hard_reset": True}, TypeError, "v_reset must be a number"),
        ({"refractory_steps": 2}, TypeError, "v_reset must be a number"),
        ({"learnable": ("tau",)}, ValueError, r"learnable must be names of .*got 'tau'"),
        ({"n_clusters": "all"}, TypeError, "n_clusters must be a number, 'auto' or None, got 'all'"),
        ({"n_clusters": True}, TypeError, "n_clusters must be a number, 'auto' or None, got True"),
        ({"n_clusters": 0}, ValueError, "n_clusters must be 1 or more, 'auto' or None, got 0"),
        ({"n_clusters": -1, "n_features": 4}, ValueError, "n_clusters must be 1 or more, 'auto' or None, got -1"),
        ({"learnable": "threshold"}, TypeError, r"learnable must be a collection of names, such as \['threshold'\]"),
        ({"v_thresh": 1.0}, TypeError, "unexpected keyword argument"),
        (
            {"n_features": 3, "threshold": torch.ones(2)},
            ValueError,
            r"threshold must be a number or a tensor \[D\] = \[3\], got \[2\]",
        ),
        (
            {"beta_mem": torch.tensor([0.5, 1.0])},
            ValueError,
            r"beta_mem must lie in \(0, 1\), got values from 0.5 to 1",
        ),
        (
            {"beta_syn": torch.tensor([0.0, 0.5])},
            ValueError,
            r"beta_syn must lie in \(0, 1\), got values from 0 to 0.5",
        ),
        ({"n_features": 4, "n_clusters": 2, "beta_syn": 0.0}, ValueError, "a cascade adds to the synaptic current"),
    ],
)
def test_arguments_that_contradict_each_other_raise(arguments, error, message):
    with pytest.raises(error, match=message):
        AssociativeLIFNode(**arguments)


def test_a_first_input_without_a_row_dimension_raises():
    with pytest.raises(ValueError, match=r"expects \[N, \*, D\], got \[5\]"):
        AssociativeLIFNode()(torch.rand(5))
    with pytest.raises(ValueError, match=r"expects \[T, N, \*, D\], got \[3, 5\]"):
        AssociativeLIFNode(step_mode="m")(torch.rand(3, 5))


@pytest.mark.parametrize("clusters", [None, 2])
def test_passed_states_give_the_spikes_of_stored_states(clusters):
    node = AssociativeLIFNode(4, clusters, threshold=0.1)
    states = node.get_memories("v", "i_syn", "refractory")
    x_seq = torch.rand(6, 3, 4)
    for x in x_seq:
        (spikes,), states = node.single_step_functional_forward((x,), states)
        stored = node.get_memories("v", "i_syn", "refractory")
        assert torch.equal(node(x), spikes)
        assert all(a is not b for a, b in zip(node.get_memories("v", "i_syn", "refractory"), stored, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(states, node.get_memories("v", "i_syn", "refractory"), strict=True))
    node.reset()
    assert node.get_memories("v", "i_syn", "refractory") == (0.0, 0.0, 0)


def test_repr_names_arguments_that_differ_from_the_published_neuron():
    node = AssociativeLIFNode(4, None, channel_dim=1, hard_reset=True, v_reset=0.0)
    assert "channel_dim=1" in repr(node)
    assert "hard_reset=True" in repr(node)
    assert "hard_reset" not in repr(AssociativeLIFNode(4, None))


def test_each_neuron_may_have_its_own_decay():
    betas = torch.tensor([0.2, 0.5, 0.8])
    node = AssociativeLIFNode(3, None, beta_mem=betas, step_mode="m")
    assert torch.allclose(node.beta_mem, betas)
    assert node.beta_syn.shape == (3,)
    node(torch.rand(5, 2, 3)).sum().backward()
    assert (node.beta_mem_logit.grad != 0).all()
    for j in range(3):
        single = AssociativeLIFNode(1, None, beta_mem=betas[j].item(), step_mode="m")
        x = torch.rand(9, 2, 3)
        functional.reset_net(node)
        assert torch.equal(node(x)[..., j], single(x[..., j : j + 1])[..., 0])
    assert AssociativeLIFNode(3, None, own_decays=True).beta_mem.shape == (3,)


def test_only_learnable_parameters_require_a_gradient():
    node = AssociativeLIFNode(3, None, learnable=("beta_mem",))
    assert [name for name, p in node.named_parameters() if p.requires_grad] == ["beta_mem_logit"]


# ---- like


LIKE = [
    (neuron.IFNode, {}),
    *((neuron.LIFNode, {"tau": tau, "decay_input": d}) for tau in (2.0, 3.0) for d in (True, False)),
    *((neuron.ParametricLIFNode, {"init_tau": 3.0, "decay_input": d}) for d in (True, False)),
]


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("v_reset", [None, 0.0, -0.2])
@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize(("kind", "options"), LIKE)
def test_like_gives_the_spikes_and_gradients_of_spikingjelly(kind, options, detach_reset, v_reset, backend):
    if backend == "numba":
        pytest.importorskip("numba")
    torch.manual_seed(0)
    original = kind(
        v_reset=v_reset, detach_reset=detach_reset, step_mode="m", surrogate_function=surrogate.ATan(), **options
    )
    original.store_v_seq = True
    node = AssociativeLIFNode.like(original, backend=backend)
    inputs = [(1.5 * torch.randn(20, 4, 64) + 0.3).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    expected, spikes = original(inputs[0]), node(inputs[1])
    assert torch.equal(spikes, expected)
    assert 0.02 < expected.mean() < 0.9
    same_formula = kind is neuron.IFNode or (kind is neuron.LIFNode and (is_release_2 or options["decay_input"]))
    if v_reset is None and same_formula:
        assert torch.equal(node.v_seq, original.v_seq)
    assert torch.allclose(node.v_seq, original.v_seq, atol=1e-6)
    weight = torch.rand_like(expected)
    for y in (expected, spikes):
        (y * weight).sum().backward()
    assert relative_error(inputs[1].grad, inputs[0].grad) < 1e-5
    assert [p.requires_grad for p in node.parameters()] == [False] + [True] * (kind is neuron.ParametricLIFNode)
    if kind is neuron.ParametricLIFNode:  # the logit of 1 - 1 / tau is -w
        assert relative_error(-node.beta_mem_logit.grad, original.w.grad.reshape(1)) < 1e-4


def test_like_gives_the_output_of_a_convolutional_network_bit_for_bit():
    torch.manual_seed(0)
    original = nn.Sequential(
        layer.Conv2d(3, 8, 3, padding=1), layer.BatchNorm2d(8), neuron.LIFNode(tau=2.0, v_reset=None),
        layer.MaxPool2d(2, 2), layer.Flatten(), layer.Linear(128, 10), neuron.IFNode(v_reset=None),
    )  # fmt: skip
    replaced = copy.deepcopy(original)
    for i in (2, 6):
        replaced[i] = AssociativeLIFNode.like(original[i])
    x = torch.rand(4, 2, 3, 8, 8)
    for net in (original, replaced):
        functional.set_step_mode(net, "m")
    assert torch.equal(replaced(x), original(x))
    assert replaced[2].channel_dim == 1


def test_like_raises_for_neurons_that_it_does_not_know():
    class LIFSubclass(neuron.LIFNode):
        pass

    for node in (LIFSubclass(), nn.ReLU(), neuron.GatedLIFNode(T=4) if hasattr(neuron, "GatedLIFNode") else nn.ReLU()):
        with pytest.raises(TypeError, match=r"like\(\) supports spikingjelly's IFNode, .*got "):
            AssociativeLIFNode.like(node)


def test_like_raises_for_a_threshold_that_is_a_tensor():
    node = neuron.LIFNode()
    node.v_threshold = torch.ones(3)
    with pytest.raises(TypeError, match=r"like\(\) needs a threshold that is a number, got a tensor"):
        AssociativeLIFNode.like(node)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"inhibition": True}, "inhibition=True, in which neurons of a layer silence each other"),
        ({"graded_spikes_factor": 2.0}, "graded_spikes_factor: its outputs are not zeros and ones"),
        ({"state_quant": lambda x: x}, "state_quant: AssociativeLIFNode does not quantise its membrane potential"),
        ({"learn_beta": True, "reset_mechanism": "subtract"}, "a learnable beta with reset_mechanism='subtract'"),
        ({"beta": torch.tensor([0.5, 0.9])}, "reset_mechanism='subtract' unless beta is one number above 0"),
    ],
)
def test_like_raises_for_options_of_snntorch_that_it_cannot_match(options, sentence):
    snntorch = pytest.importorskip("snntorch")
    with pytest.raises(TypeError, match=re.escape(f"like() cannot match {sentence}")):
        AssociativeLIFNode.like(snntorch.Leaky(**{"beta": 0.9, **options}))


def run_snntorch(node, x):
    """Return the spikes of a neuron of snnTorch for a sequence."""
    states = node.reset_mem()
    states, spikes = states if isinstance(states, tuple) else (states,), []
    for step in x:
        spike, *states = node(step, *states)
        spikes.append(spike)
    return torch.stack(spikes)


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("kind", ["Leaky", "Synaptic", "Lapicque"])
@pytest.mark.parametrize("delay", [True, False])
def test_like_gives_the_spikes_of_snntorch(kind, reset, delay):
    snntorch = pytest.importorskip("snntorch")
    torch.manual_seed(0)
    options = {"reset_mechanism": reset, "beta": 0.9}
    options |= {"alpha": 0.7} if kind == "Synaptic" else {}
    options |= {"R": 1.0, "time_step": 0.02} if kind == "Lapicque" else {"reset_delay": delay}
    original = getattr(snntorch, kind)(**options)
    x = (0.8 * torch.randn(40, 4, 16) + 0.2) * (20 if kind == "Lapicque" else 1)
    if reset == "subtract" and not delay and kind != "Lapicque":
        with pytest.raises(TypeError, match="cannot match reset_delay=False with reset_mechanism='subtract'"):
            AssociativeLIFNode.like(original)
        return
    node = AssociativeLIFNode.like(original)
    expected = run_snntorch(original, x)
    spikes = torch.stack([node(step) for step in x])
    assert torch.equal(spikes, expected)
    assert 0.02 < expected.mean() < 0.9


def test_the_preset_lif_stores_only_the_membrane_potential():
    node, whole = AssociativeLIFNode(6, preset="lif"), AssociativeLIFNode(6, preset="lif", step_mode="m")
    x = torch.randn(5, 2, 6)
    with torch.no_grad():
        spikes = torch.stack([node(step) for step in x])
        assert torch.equal(spikes, whole(x))
    assert node.i_syn == 0.0
    assert node.refractory == 0
    assert torch.equal(torch.as_tensor(node.v), torch.as_tensor(whole.v))
    published = AssociativeLIFNode(6, n_clusters=None)
    published(x[0])
    assert isinstance(published.i_syn, torch.Tensor)


@pytest.mark.parametrize("shape", [(4, 2, 6, 1, 1), (4, 2, 6, 3, 5)])
def test_spikes_and_gradients_have_the_strides_of_the_input(shape):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        node = AssociativeLIFNode(6, preset="lif", channel_dim=1, step_mode="m")
        images = torch.rand(shape).flatten(0, 1).contiguous(memory_format=memory_format)
        x = images.unflatten(0, shape[:2]).requires_grad_()
        spikes = node(x)
        assert spikes.stride() == x.stride()
        (gradient,) = torch.autograd.grad(spikes, x, torch.rand(shape).as_strided(x.shape, x.stride()))
        assert gradient.stride() == x.stride()


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 1.2])  # snnTorch clips a decay to [0, 1]
@pytest.mark.parametrize("kind", ["Leaky", "Synaptic"])
def test_like_gives_the_spikes_of_snntorch_at_decays_of_0_and_1(kind, beta, reset):
    snntorch = pytest.importorskip("snntorch")
    if (beta, reset) == (0.0, "subtract"):
        return
    torch.manual_seed(0)
    original = getattr(snntorch, kind)(
        beta=beta, reset_mechanism=reset, **({"alpha": 0.7} if kind == "Synaptic" else {})
    )
    node, x = AssociativeLIFNode.like(original), 0.8 * torch.randn(40, 4, 16)
    expected = run_snntorch(original, x)
    assert torch.equal(torch.stack([node(step) for step in x]), expected)
    assert 0.02 < expected.mean() < 0.9


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("Leaky", {"beta": 1.0, "learn_beta": True, "reset_mechanism": "zero"}, "a membrane decay in (0, 1) where it is learned"),
        ("Leaky", {"beta": torch.tensor([0.5, 1.5]), "reset_mechanism": "zero"}, "between neurons, got values from 0.5 to 1.5"),
        ("Leaky", {"beta": float("nan"), "reset_mechanism": "zero"}, "a membrane decay in (0, 1)"),
        ("Synaptic", {"beta": 0.5, "alpha": 1.0}, "a synaptic decay alpha below 1, and above 0 where it is learned"),
        ("Synaptic", {"beta": 0.5, "alpha": 0.0, "learn_alpha": True}, "a synaptic decay alpha below 1, and above 0"),
        ("Lapicque", {"R": 1.0, "C": 1.0, "time_step": 3.0}, "a membrane decay 1 - time_step / (R * C) in [0, 1], got -2"),
    ],
)  # fmt: skip
def test_like_raises_for_constants_of_snntorch_that_it_cannot_match(kind, options, sentence):
    snntorch = pytest.importorskip("snntorch")
    with pytest.raises(TypeError, match=re.escape(sentence)):
        AssociativeLIFNode.like(getattr(snntorch, kind)(**options))


def test_like_raises_for_a_decay_of_parametric_lif_that_is_rounded_to_1():
    original = neuron.ParametricLIFNode()
    original.w.data.fill_(-60.0)
    with pytest.raises(TypeError, match=r"1 - sigmoid\(w\) in \(0, 1\), got 1"):
        AssociativeLIFNode.like(original)


def test_learnable_of_like_must_be_true_or_false():
    with pytest.raises(TypeError, match=r"learnable of like\(\) must be True or False, got 'threshold'"):
        AssociativeLIFNode.like(neuron.LIFNode(), learnable="threshold")
