"""The rows of a weight change must be different indices; refractory_steps must be a number that can be counted."""

import pytest
import torch

from nord_snn.learning_rules.plastic import PlasticPart
from nord_snn.neurons import AssociativeLIFNode


@pytest.mark.parametrize("rows", [[0, 0], [0, -3], [3, 0], [-4, 0], [0.0, 1.0], [True, False]])
def test_rows_that_are_not_different_indices_raise_and_change_no_weight(rows):
    fc = torch.nn.Linear(2, 3, bias=False)
    before = fc.weight.clone()
    with pytest.raises((TypeError, ValueError), match="rows must be"):
        PlasticPart(fc).apply(torch.ones(2, 2), rows=torch.tensor(rows))
    assert torch.equal(fc.weight, before)


@pytest.mark.parametrize("rows", [[0, 2], [-1, 0]])
def test_the_change_is_added_to_the_given_rows_only(rows):
    fc = torch.nn.Linear(2, 3, bias=False)
    before = fc.weight.clone()
    PlasticPart(fc).apply(torch.ones(2, 2), rows=torch.tensor(rows))
    torch.testing.assert_close((fc.weight - before)[rows], torch.ones(2, 2))
    assert torch.equal(fc.weight[1], before[1])


@pytest.mark.parametrize("steps", [-1, 2.5, True, float("nan"), float("inf"), 2**24 + 1, 2**31 - 1, 2**31, 10**30])
def test_a_refractory_period_that_cannot_be_counted_raises(steps):
    with pytest.raises(ValueError, match="refractory_steps must be"):
        AssociativeLIFNode(4, n_clusters=None, refractory_steps=steps)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_the_longest_refractory_period_decreases_by_one_in_each_time_step(backend):
    node = AssociativeLIFNode(4, n_clusters=None, refractory_steps=2**24, backend=backend)
    assert [node(torch.full((1, 4), 9.0)).sum().item() for _ in range(4)] == [4, 0, 0, 0]
    assert node.refractory.unique().tolist() == [2**24 - 3]
