"""Nodes under gradient checkpointing, and with parameters that accelerate has offloaded to CPU memory or disk."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nord_snn.layers import NordBlock
from nord_snn.neurons import AssociativeLIFNode, LeakyIntegrator

X = 2 * torch.randn(8, 2, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("has_state", [True, False], ids=["state", "rest"])
@pytest.mark.parametrize("make", [lambda: AssociativeLIFNode(8, n_clusters=4, step_mode="m"),
                                  lambda: LeakyIntegrator(8, step_mode="m")], ids=["neurons", "integrator"])  # fmt: skip
def test_recomputation_from_a_state_that_has_changed_raises(make, has_state, reentrant):
    node, x = make(), X.clone().requires_grad_()
    if has_state:
        node(x[:4])
    out = checkpoint(node, x[4:], use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="checkpoint a function that begins with reset"):
        out.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_function_that_resets_and_a_stateless_call_have_the_right_gradient(reentrant):
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


@pytest.mark.parametrize("method", ["cpu_offload", "disk_offload"])
def test_a_block_with_offloaded_parameters_gives_the_same_output(method, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    block = NordBlock(8, 2, 16, neuron=lambda n: AssociativeLIFNode(n, n_clusters=4)).requires_grad_(False)
    x, device = torch.randn(4, 2, 3, 8), torch.device("cpu")
    expected, names = block(x), list(block.state_dict())
    if method == "cpu_offload":
        accelerate.cpu_offload(block, device)
    else:
        accelerate.disk_offload(block, tmp_path, device)
    assert all(parameter.is_meta for parameter in block.parameters())
    assert torch.equal(block(x), expected)
    assert list(block.state_dict()) == names
