"""calibrate_thresholds where a rate cannot be reached, jumps, or has no meaning."""

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
X_SEQ = torch.rand(10, 16, 8, generator=torch.Generator().manual_seed(0)) * 3


def network(step_mode="m", **options):
    torch.manual_seed(0)
    make = lambda n: AssociativeLIFNode(n, preset="lif", step_mode=step_mode, **options)  # noqa: E731
    return nn.Sequential(nn.Linear(8, 32), make(32), nn.Linear(32, 32), make(32))


def thresholds(net):
    return [module.v_threshold.tolist() for module in net.modules() if isinstance(module, AssociativeLIFNode)]


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_a_layer_that_cannot_reach_the_rate_keeps_its_thresholds(step_mode):
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


def test_the_highest_rate_of_a_refractory_period_is_named():
    node = AssociativeLIFNode(32, None, step_mode="m")  # silent for two time steps after a spike
    with pytest.warns(UserWarning, match=r"by the node: its rate is at most 33\.33 %, so its thresholds are kept"):
        [row] = calibrate_thresholds(node, 5 + torch.rand(30, 4, 32), rate=0.5)
    assert row.note == "its rate is at most 33.33 %, so its thresholds are kept"
    assert thresholds(node) == [[0.25] * 32]


def test_the_lowest_rate_of_thresholds_at_zero_is_named():
    node = AssociativeLIFNode(4, preset="lif", threshold=0.0, step_mode="m")
    with pytest.warns(UserWarning, match=r"its rate is at least 100\.00 %"):
        [row] = calibrate_thresholds(node, torch.rand(5, 3, 4))
    assert (row.scale, row.after) == (1, 1)


def test_a_highest_rate_within_the_tolerance_is_reached_at_thresholds_of_the_order_of_the_input():
    node = AssociativeLIFNode(32, None, threshold=1e3, step_mode="m")
    x_seq = 5 * torch.rand(30, 64, 32, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [row] = calibrate_thresholds(node, x_seq, rate=0.34)
    assert 0.3 < row.after <= 1 / 3
    assert node.v_threshold.min() > 0.01


def test_a_rate_that_jumps_over_the_target_does_not_end_in_silence():
    node = AssociativeLIFNode(4, preset="lif", step_mode="m")
    x_seq = torch.ones(1, 3, 4)  # all neurons fire, or none does
    [row] = calibrate_thresholds(node, x_seq, rate=0.1)
    assert (row.before, row.after) == (1, 1)
    node = AssociativeLIFNode(4, preset="lif", threshold=2.0, step_mode="m")
    [row] = calibrate_thresholds(node, x_seq, rate=0.9)
    assert (row.before, row.after) == (0, 1)


@settings(max_examples=25, deadline=None)
@given(rate=st.floats(0.01, 0.99), threshold=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_the_report_says_what_the_network_does(rate, threshold, seed):
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
        assert abs(row.after - rate) < 0.1 * rate + 0.02  # a spike in a thousand neurons and time steps, and ties


@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_end_in_one_sentence_and_change_nothing(step_mode, value):
    net = network(step_mode)
    run = {"forward": lambda x_seq: [net(x) for x in x_seq]} if step_mode == "s" else {}
    with torch.no_grad():
        net[2].weight[0, 0] = value  # found after the first layer is calibrated
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
def test_arguments_of_another_type_are_named(options, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        calibrate_thresholds(network(), X_SEQ, **options)
