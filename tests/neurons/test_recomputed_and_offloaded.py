"""Gradient checkpointing around nodes that hold state, and parameters that are elsewhere between calls."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nord_snn.layers import NordBlock
from nord_snn.neurons import AssociativeLIFNode, LeakyIntegrator

X = 2 * torch.randn(8, 2, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("held", [True, False], ids=["state", "rest"])
@pytest.mark.parametrize("make", [lambda: AssociativeLIFNode(8, n_clusters=4, step_mode="m"),
                                  lambda: LeakyIntegrator(8, step_mode="m")], ids=["neurons", "integrator"])  # fmt: skip
def test_a_state_that_is_gone_is_one_error(make, held, reentrant):
    node, x = make(), X.clone().requires_grad_()
    if held:
        node(x[:4])
    out = checkpoint(node, x[4:], use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="checkpoint a function that begins with reset"):
        out.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_function_that_resets_and_a_call_without_state_are_recomputed_right(reentrant):
    node = AssociativeLIFNode(8, n_clusters=4, step_mode="m")
    grads = []

    def from_rest(x):
        node.reset()
        return torch.cat((node(x[:4]), node(x[4:])))

    for run in (
        from_rest,
        lambda x: checkpoint(from_rest, x, use_reentrant=reentrant),
        lambda x: checkpoint(node, x, use_reentrant=reentrant, stateless=True) if not reentrant else from_rest(x),
    ):
        x = X.clone().requires_grad_()
        run(x).square().mul(torch.arange(8.0)).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload"])
def test_parameters_may_be_offloaded(how, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    block = NordBlock(8, 2, 16, neuron=lambda n: AssociativeLIFNode(n, n_clusters=4)).requires_grad_(False)
    x, device = torch.randn(4, 2, 3, 8), torch.device("cpu")
    expected, names = block(x), list(block.state_dict())
    if how == "cpu_offload":
        accelerate.cpu_offload(block, device)
    else:
        accelerate.disk_offload(block, tmp_path, device)
    assert all(parameter.is_meta for parameter in block.parameters())
    assert torch.equal(block(x), expected)
    assert list(block.state_dict()) == names
