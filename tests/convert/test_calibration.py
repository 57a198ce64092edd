"""calibrate_thresholds where no threshold gives the requested firing rate, and where an input or argument is invalid."""

import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nord_snn.convert import calibrate_thresholds
from nord_snn.neurons import AssociativeLIFNode

pytestmark = pytest.mark.quick
X_SEQ = torch.rand(10, 16, 8, generator=torch.Generator().manual_seed(0)) * 3  # input current [T, N, D]


def network(step_mode="m", **options):
    """Return two layers of 32 neurons with thresholds of 0.5, each after a linear map."""
    torch.manual_seed(0)
    make = lambda n: AssociativeLIFNode(n, preset="lif", step_mode=step_mode, **options)  # noqa: E731
    return nn.Sequential(nn.Linear(8, 32), make(32), nn.Linear(32, 32), make(32))


def thresholds(net):
    """Return the list of thresholds of each layer of neurons."""
    return [module.v_threshold.tolist() for module in net.modules() if isinstance(module, AssociativeLIFNode)]


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_a_layer_that_cannot_reach_the_rate_keeps_its_thresholds_with_one_warning(step_mode):
    net = network(step_mode)
    run = {"forward": lambda x_seq: [net(x) for x in x_seq]} if step_mode == "s" else {}
    with pytest.warns(
        UserWarning, match=r"rate=0\.9 cannot be reached by 1: its rate is at most 3\d\.\d\d %, so its"
    ) as seen:
        report = calibrate_thresholds(net, X_SEQ, rate=0.9, **run)
    assert len([one for one in seen if "cannot be reached" in str(one.message)]) == 1
    assert seen[0].filename == __file__
    assert all(one.note and one.scale == 1 and one.after == one.before for one in report)
    assert thresholds(net) == [[0.5] * 32] * 2
    assert "\nnote on 1: its rate is at most 3" in str(report)
    assert max(map(len, str(report).splitlines())) <= 80


def test_a_warning_names_the_highest_rate_that_the_refractory_period_allows():
    node = AssociativeLIFNode(32, None, step_mode="m")  # refractory for two time steps after a spike
    with pytest.warns(UserWarning, match=r"by the node: its rate is at most 33\.33 %, so its thresholds are kept"):
        [row] = calibrate_thresholds(node, 5 + torch.rand(30, 4, 32), rate=0.5)
    assert row.note == "its rate is at most 33.33 %, so its thresholds are kept"
    assert thresholds(node) == [[0.25] * 32]


def test_a_warning_names_the_lowest_rate_if_neurons_fire_at_a_threshold_of_zero():
    node = AssociativeLIFNode(4, preset="lif", threshold=0.0, step_mode="m")
    with pytest.warns(UserWarning, match=r"its rate is at least 100\.00 %"):
        [row] = calibrate_thresholds(node, torch.rand(5, 3, 4))
    assert (row.scale, row.after) == (1, 1)


def test_a_highest_rate_within_the_tolerance_gives_no_warning_and_thresholds_far_above_zero():
    node = AssociativeLIFNode(32, None, threshold=1e3, step_mode="m")
    x_seq = 5 * torch.rand(30, 64, 32, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [row] = calibrate_thresholds(node, x_seq, rate=0.34)
    assert 0.3 < row.after <= 1 / 3
    assert node.v_threshold.min() > 0.01


def test_where_the_rate_jumps_from_0_to_1_the_neurons_fire():
    node = AssociativeLIFNode(4, preset="lif", step_mode="m")
    x_seq = torch.ones(1, 3, 4)  # all neurons fire, or none does
    [row] = calibrate_thresholds(node, x_seq, rate=0.1)
    assert (row.before, row.after) == (1, 1)
    node = AssociativeLIFNode(4, preset="lif", threshold=2.0, step_mode="m")
    [row] = calibrate_thresholds(node, x_seq, rate=0.9)
    assert (row.before, row.after) == (0, 1)


@settings(max_examples=25, deadline=None)
@given(rate=st.floats(0.01, 0.99), threshold=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_the_report_has_the_rate_and_the_thresholds_of_the_network(rate, threshold, seed):
    x_seq = torch.randn(8, 16, 8, generator=torch.Generator().manual_seed(seed))
    node = AssociativeLIFNode(8, preset="lif", threshold=threshold, step_mode="m")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        [row] = calibrate_thresholds(node, x_seq, rate=rate)
    assert node(x_seq, stateless=True).mean().item() == pytest.approx(row.after)
    assert torch.allclose(node.v_threshold, torch.full((8,), threshold) * row.scale)
    assert abs(row.after - rate) <= abs(row.before - rate)
    assert bool(seen) == bool(row.note)
    if row.note:
        assert row.scale == 1
    else:
        assert abs(row.after - rate) < 0.1 * rate + 0.02  # 10 %, and 20 of the 1,024 outputs: the rate changes in jumps


@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_infinity_raises_with_the_layer_and_changes_no_threshold(step_mode, value):
    net = network(step_mode)
    run = {"forward": lambda x_seq: [net(x) for x in x_seq]} if step_mode == "s" else {}
    with torch.no_grad():
        net[2].weight[0, 0] = value  # reached only after the first layer is calibrated
    with pytest.raises(ValueError, match="the input of 3 has NaN or infinity: check the example, and the weights"):
        calibrate_thresholds(net, X_SEQ, rate=0.2, **run)
    assert thresholds(net) == [[0.5] * 32] * 2
    with pytest.raises(ValueError, match="the input of 1 has NaN or infinity"):
        calibrate_thresholds(net, X_SEQ * value, rate=0.2, **run)
    net = network(step_mode)
    with torch.no_grad():
        net[3].v_threshold[0] = value
    with pytest.raises(ValueError, match="the thresholds of 3 must be finite numbers"):
        calibrate_thresholds(net, X_SEQ, rate=0.2, **run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": "a"}, "rate must be a number in (0, 1), got 'a'"),
        ({"rate": [0.1]}, "rate must be a number in (0, 1), got [0.1]"),
        ({"tolerance": "a"}, "tolerance must be a number, 0 or more, got 'a'"),
    ],
)
def test_arguments_of_a_wrong_type_raise(options, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        calibrate_thresholds(network(), X_SEQ, **options)
