"""Synaptic operations (SOPs = firing rate x T x FLOPs), metrics of NeuroBench (Yik et al., 2025), ScriptModules and padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import neuron
from torch import nn
from torch.nn.utils import prune

from nord_snn.layers import NordBlock
from nord_snn.monitor import CONVENTIONS, profile_energy
from nord_snn.neurons import AssociativeLIFNode

pytestmark = pytest.mark.quick


def random_integers(*shape, high=5):
    return torch.randint(0, high, shape).float()


def test_integer_inputs_count_as_sops_and_as_macs_but_not_as_acs():
    net, x = nn.Linear(20, 7, bias=False), random_integers(6, 3, 20)
    profile = profile_energy(net, x)
    assert (profile.macs, profile.acs) == (6 * 3 * 20 * 7, 0)
    assert (profile.sop_macs, profile.sops) == (0, int(x.sum()) * 7)
    x[0, 0, 0] = 0.5
    profile = profile_energy(net, x)
    assert (profile.sop_macs, profile.sops) == (profile.macs, 0)
    x[0, 0, 0] = float("inf")
    assert profile_energy(net, x).sops == 0


def test_negative_integers_count_as_subtractions():
    x = random_integers(6, 3, 20) - 2
    assert profile_energy(nn.Linear(20, 7), x).sops == int(x.abs().sum()) * 7


def test_a_sum_of_spikes_over_time_costs_the_additions_of_all_time_steps():
    """For the input ``spikes.sum(0)`` SOPs equal the additions for the spikes of all time steps."""
    net, spikes = nn.Linear(20, 7, bias=False), (torch.rand(6, 3, 20) < 0.3).float()
    steps, summed = profile_energy(net, spikes), profile_energy(net, spikes.sum(0))
    assert summed.sops == steps.acs == steps.sops
    rate, flops = spikes.mean().item(), 3 * 20 * 7
    assert steps.sops == pytest.approx(rate * 6 * flops)  # firing rate x T x FLOPs


@settings(max_examples=25, deadline=None)
@given(
    groups=st.sampled_from([1, 2]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    transposed=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_convolutions_count_the_windows_of_each_input(groups, stride, padding, transposed, seed):
    """Checks SOPs, NeuroBench's effective MACs (input and weight are not zero), and dense MACs without padding."""
    torch.manual_seed(seed)
    conv_class = nn.ConvTranspose2d if transposed else nn.Conv2d
    net = conv_class(4, 6, 3, stride=stride, padding=padding, groups=groups, bias=False)
    with torch.no_grad():
        net.weight[torch.rand(net.weight.shape) < 0.3] = 0.0
    x = random_integers(2, 4, 7, 6, high=4)
    profile = profile_energy(net, x)
    (product,) = profile.products

    def summed(values, weights):
        conv = conv_class(4, 6, 3, stride=stride, padding=padding, groups=groups, bias=False).double()
        with torch.no_grad():
            conv.weight.copy_(weights)
            return int(conv(values.double()).sum().round())

    ones = torch.ones_like(net.weight)
    assert profile.sops == summed(x, ones)
    assert product.effective_macs == summed((x != 0), (net.weight != 0))
    assert product.unpadded == summed(torch.ones_like(x), ones)
    assert product.unpadded <= product.dense
    assert profile_energy(net, (x > 0).float()).acs == summed((x > 0), ones)


def test_for_spikes_sops_equal_acs_and_for_real_numbers_sop_macs_equal_macs():
    net = NordBlock(16, 2, 32, neuron=lambda n: AssociativeLIFNode(n, n_clusters=4))
    profile = profile_energy(net, 5 * torch.randn(6, 2, 7, 16))
    assert profile.acs > 0
    for product in profile.products:
        assert (product.sop_macs, product.sops) == (product.macs, product.acs), product.name


class AddedShortcut(nn.Module):
    """The ADD shortcut of SEW-ResNet (Fang et al., 2021): sums of spikes, which are integers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = neuron.IFNode(step_mode="m"), neuron.IFNode(step_mode="m")
        self.linear, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 3, bias=False)

    def forward(self, x):
        spikes = self.first(x)
        return self.head(spikes + self.second(4 * self.linear(spikes)))


def test_added_shortcuts_count_as_sops_and_the_table_has_both_counts():
    profile = profile_energy(AddedShortcut(), 3 * torch.rand(6, 2, 8))
    products = {product.name: product for product in profile.products}
    assert products["linear"].macs == products["linear"].sop_macs == 0
    assert (products["head"].macs, products["head"].acs) == (6 * 2 * 8 * 3, 0)
    assert products["head"].sop_macs == 0
    assert products["head"].sops > 0
    for name, price in CONVENTIONS.items():
        expected = profile.sop_macs * price.mac + profile.sops * price.ac
        assert profile.sop_joules_under(name) == pytest.approx(expected)
        assert f"{profile.sop_joules_under(name):.3g} |\n" in str(profile)
    header = str(profile).splitlines()[0]
    assert header.index("| MACs | ACs |") < header.index("| MACs (SOP convention) | SOPs |")
    assert f"| {profile.sop_macs:,} | {profile.sops:,} |" in str(profile)
    assert profile.grouped().sops == profile.sops
    widths = {line.count("|") for line in str(profile).split("\n\n")[0].splitlines()}
    assert widths == {9}
    with pytest.raises(ValueError, match="unknown convention 'joule'"):
        profile.sop_joules_under("joule")


def test_neurobench_metrics_of_a_linear_map_equal_those_by_hand():
    """The example is from NeuroBench's documentation of synaptic operations: 4 of 9 are effective."""
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU())
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.3, 0, -3.2], [0, 1.2, -5.1], [-1.1, 2.7, 0]]))
    metrics = profile_energy(net, torch.tensor([[0.0, 1.3, -1.0]])).to_neurobench(samples=1)
    assert metrics == {
        "Footprint": 9 * 4,
        "ConnectionSparsity": round(3 / 9, 4),
        "ActivationSparsity": 0.0,  # outputs of the ReLU: 3.2, 6.66 and 3.51
        "SynapticOperations": {"Effective_MACs": 4.0, "Effective_ACs": 0.0, "Dense": 9.0},
    }
    ternary = profile_energy(net, torch.tensor([[0.0, 1.0, -1.0]])).to_neurobench(samples=1)
    assert ternary["SynapticOperations"] == {"Effective_MACs": 0.0, "Effective_ACs": 4.0, "Dense": 9.0}


def test_neurobench_metrics_of_a_spiking_network_equal_those_by_hand():
    net = nn.Sequential(nn.Linear(8, 6), neuron.IFNode(step_mode="m"), nn.Linear(6, 3))
    recorded = []
    net[1].register_forward_hook(lambda module, inputs, output: recorded.append(output))
    metrics = profile_energy(net, 5 * torch.rand(4, 2, 8)).to_neurobench(samples=2)
    (spikes,) = recorded
    assert metrics["Footprint"] == 4 * (8 * 6 + 6 + 6 * 3 + 3)
    assert metrics["ActivationSparsity"] == pytest.approx(1 - spikes.mean().item())
    assert metrics["SynapticOperations"] == {
        "Effective_MACs": 4 * 8 * 6,
        "Effective_ACs": spikes.sum().item() * 3 / 2,
        "Dense": 4 * (8 * 6 + 6 * 3),
    }


@pytest.mark.parametrize("permanent", [False, True])
def test_neurobench_metrics_of_pruned_weights_equal_those_by_hand(permanent):
    net = nn.Sequential(nn.Linear(8, 6, bias=False))
    prune.l1_unstructured(net[0], "weight", amount=12)
    if permanent:
        prune.remove(net[0], "weight")
    profile = profile_energy(net, torch.ones(5, 8))
    metrics = profile.to_neurobench(samples=5)
    assert [product.kind for product in profile.products] == ["linear"]
    assert metrics["ConnectionSparsity"] == 0.25
    assert metrics["SynapticOperations"] == {"Effective_MACs": 0.0, "Effective_ACs": 36.0, "Dense": 48.0}


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, None])
def test_samples_must_be_a_number_of_samples(wrong):
    with pytest.raises(ValueError, match="samples must be a positive integer"):
        profile_energy(nn.Linear(4, 3), torch.rand(2, 4)).to_neurobench(samples=wrong)


def test_the_footprint_is_measured_before_the_run_unless_parameters_are_lazy():
    snntorch = pytest.importorskip("snntorch")
    net = nn.Sequential(nn.Linear(4, 3), snntorch.Leaky(beta=0.9, init_hidden=True))
    before = sum(x.numel() * x.element_size() for x in (*net.parameters(), *net.buffers()))
    assert profile_energy(net, torch.rand(5, 4)).footprint == before  # the run creates membrane potentials
    lazy = nn.Sequential(nn.LazyLinear(3), AssociativeLIFNode(None, None, step_mode="m"))
    profile = profile_energy(lazy, torch.rand(5, 2, 4))
    assert [(product.kind, product.dense) for product in profile.products] == [("linear", 5 * 2 * 4 * 3)]
    assert profile.footprint == sum(x.numel() * x.element_size() for x in (*lazy.parameters(), *lazy.buffers()))
    assert profile.elementwise == 0


def test_a_network_without_weights_and_activations_has_no_sparsity():
    metrics = profile_energy(nn.Identity(), torch.rand(2, 4)).to_neurobench(samples=2)
    assert (metrics["ConnectionSparsity"], metrics["ActivationSparsity"], metrics["Footprint"]) == (0.0, 0.0, 0)


def scripted(module, x):
    return torch.jit.script(module)


def traced(module, x):
    return torch.jit.trace(module, x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("make", [scripted, traced])
def test_the_notes_name_script_modules_whose_products_are_counted(make):
    inner, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), torch.rand(5, 8)
    first = nn.Linear(8, 8)
    net, plain = nn.Sequential(first, make(inner, x)), nn.Sequential(first, inner)
    expected = profile_energy(plain, x)
    for _ in range(4):  # TorchScript optimises a function after its first calls
        profile = profile_energy(net, x)
        for figure in ("dense", "macs", "acs", "elementwise", "sop_macs", "bytes"):
            assert getattr(profile, figure) == getattr(expected, figure), figure
    (note,) = profile.notes
    assert note.startswith("ScriptModules: '1'. Hooks do not run inside them")
    assert str(profile).endswith(note)
    assert profile_energy(make(inner, x), x).notes[0].startswith("ScriptModules: the network.")
    assert expected.notes == []
    assert not any(module._forward_hooks for module in net.modules())


class Masked(nn.Module):
    """Network with the keyword ``attention_mask``, as Hugging Face's models have."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(9, 8), nn.Linear(8, 4)

    def forward(self, input_ids, attention_mask=None):
        return self.linear(self.embedding(input_ids))


def test_padding_is_counted_and_a_note_has_its_number_of_positions():
    net, ids, mask = Masked(), torch.arange(10).reshape(2, 5) % 9, torch.ones(2, 5, dtype=torch.long)
    full = profile_energy(net, ids, attention_mask=mask)
    assert full.notes == []
    mask[1, :3] = 0
    padded = profile_energy(net, ids, attention_mask=mask)
    assert padded.dense == full.dense == 2 * 5 * 8 * 4
    assert padded.notes[0].startswith("Padding: 3 of 10 positions of attention_mask.")
    assert profile_energy(net, ids[:, 4:], attention_mask=mask).notes == []  # padded positions are in the cache
