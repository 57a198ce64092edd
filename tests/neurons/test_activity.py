"""A layer that is silent or saturated in the first three training batches warns once."""

import warnings

import pytest
import torch

from nord_snn.neurons import AssociativeLIFNode, NeuronActivityWarning


def train(node, x, batches):
    """Call and reset a node for each of several batches."""
    for _ in range(batches):
        node(x)
        node.reset()


def make_node(threshold, **more):
    """Return eight neurons with a threshold."""
    return AssociativeLIFNode(8, preset="lif", threshold=threshold, step_mode="m", **more)


@pytest.mark.quick
@pytest.mark.parametrize(("threshold", "state"), [(1e6, "silent"), (-1e6, "saturated: they fired in 100 %")])
def test_silent_and_saturated_neurons_warn_once_after_three_batches_and_name_a_remedy(threshold, state):
    node = make_node(threshold)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(node, torch.rand(4, 2, 8), 2)
    with pytest.warns(NeuronActivityWarning, match=rf"AssociativeLIFNode\(8\).*{state}.*calibrate_thresholds"):
        train(node, torch.rand(4, 2, 8), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(node, torch.rand(4, 2, 8), 5)


@pytest.mark.quick
def test_single_time_steps_until_a_reset_are_one_batch():
    node = make_node(1e6)
    node.step_mode = "s"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            for x in torch.rand(4, 2, 8):
                node(x)
            node.reset()
    node(torch.rand(2, 8))
    with pytest.warns(NeuronActivityWarning, match="silent"):
        node.reset()


@pytest.mark.quick
def test_neurons_that_fire_and_networks_that_do_not_train_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(make_node(0.4), torch.rand(4, 2, 8), 5)
        train(make_node(1e6).eval(), torch.rand(4, 2, 8), 5)
        with torch.no_grad():
            train(make_node(1e6), torch.rand(4, 2, 8), 5)


@pytest.mark.quick
def test_each_stateless_call_is_one_batch():
    node = make_node(1e6)
    for _ in range(2):
        node(torch.rand(4, 2, 8), stateless=True)
    with pytest.warns(NeuronActivityWarning, match="silent"):
        node(torch.rand(4, 2, 8), stateless=True)
