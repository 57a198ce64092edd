"""Ops under torch.func, forward-mode differentiation and torch.jit.trace; tensors whose storage was freed raise."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from nord_snn.layers import SpikingFeedForward
from nord_snn.neurons import AssociativeLIFNode
from nord_snn.ops import associative_lif, leaky_clamp, resonance

X = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0)).double() * 2


def run(x, backend="auto"):
    """Return the membrane potentials of the neuron op."""
    threshold = torch.full((x.shape[-1],), 0.25, dtype=x.dtype)
    return associative_lif(x, threshold=threshold, beta_mem=0.9, beta_syn=0.5, return_v_seq=True, backend=backend)[1]


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_torch_func_gives_the_derivatives_of_autograd(backend):
    x = X.clone().requires_grad_()
    run(x, backend).square().sum().backward()

    def loss(x):
        return run(x, backend).square().sum()

    torch.testing.assert_close(grad(loss)(X), x.grad)
    torch.testing.assert_close(jacfwd(loss)(X), x.grad)
    torch.testing.assert_close(jvp(loss, (X,), (torch.ones_like(X),))[1], x.grad.sum())
    by_row = vmap(grad(loss), in_dims=1, out_dims=1)(X[:, :, None])
    torch.testing.assert_close(by_row[:, :, 0], x.grad)
    assert jacrev(lambda x: run(x, backend))(X).shape == (*X.shape, *X.shape)
    assert hessian(loss)(X[:2, :1]).isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_traced_layer_gives_the_same_output(backend):
    layer = SpikingFeedForward(8, 16, neuron=lambda n: AssociativeLIFNode(n, n_clusters=4, backend=backend)).eval()
    x = X.float()
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
        assert torch.equal(traced(x + 1), layer(x + 1))


def test_transforms_of_an_explicit_numba_backend_raise_and_name_torch():
    pytest.importorskip("numba")
    with pytest.raises(RuntimeError, match="pass backend='torch'"):
        grad(lambda x: run(x, "numba").sum())(X)
    node = AssociativeLIFNode(8, n_clusters=4, step_mode="m", backend="numba")
    with pytest.raises(RuntimeError, match="pass backend='torch'"):
        torch.jit.trace(node, X.float())


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[1:], lambda x: x.mT.contiguous().mT])
def test_freed_storage_raises(view):
    pytest.importorskip("numba")

    def freed(*shape):
        x = view(torch.ones(*shape))
        x.untyped_storage().resize_(0)
        return x

    ones = torch.ones(8)
    with pytest.raises(ValueError, match="storage was freed"):
        run(freed(5, 3, 8), "numba")
    with pytest.raises(ValueError, match="storage was freed"):
        leaky_clamp(freed(5, 8), leak=ones, floor=-ones, backend="numba")
    q = torch.ones(2, 3, 4, 8)
    with pytest.raises(ValueError, match="storage was freed"):
        resonance(q, q, freed(*((3, 4, 8) if view(q).shape == q.shape else (4, 4, 8))), n_heads=2, top_k=2,
                  temperature=1.0, backend="numba")  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"v": torch.zeros(3, 8)},
        {"v": torch.zeros(3, 8), "i_syn": torch.zeros(3, 8)},
        {"v": torch.zeros(1, 8), "i_syn": torch.zeros(3, 8), "refractory": torch.zeros(3, 8, dtype=torch.int32)},
        {"threshold": torch.ones(2)},
        {"beta_mem": torch.ones(5)},
        {"weight": torch.ones(4, 4)},
        {"weight": torch.ones(3, 3), "gain": torch.ones(3)},
        {"shape": [50, 3, 8]},
    ],
    ids=str,
)
def test_the_registered_op_raises_for_invalid_arguments_of_its_kernel(changes, monkeypatch):
    pytest.importorskip("numba")
    calls = []
    monkeypatch.setattr("nord_snn.ops.lif.op._run", lambda *tensors, **options: calls.append((tensors, options)))
    with pytest.raises(TypeError):  # the patched function returns None
        run(X.float(), "numba")
    (tensors, options), *_ = calls
    names = ("x", "v", "i_syn", "refractory", "threshold", "beta_mem", "beta_syn", "weight", "gain")
    changed = [changes.get(name, tensor) for name, tensor in zip(names, tensors, strict=True)]
    torch.ops.nord_snn.associative_lif(*tensors, **options)
    with pytest.raises(ValueError, match=r"must|pass both"):
        torch.ops.nord_snn.associative_lif(*changed, **options | {k: v for k, v in changes.items() if k in options})


def test_layers_are_exported_to_onnx_through_plain_pytorch(tmp_path):
    """The exporter traces; the graph has the operations of the reference, and no kernel."""
    onnx = pytest.importorskip("onnx")
    layer = SpikingFeedForward(8, 16, neuron=lambda n: AssociativeLIFNode(n, n_clusters=4)).eval()
    torch.onnx.export(layer, (X.float(),), str(tmp_path / "layer.onnx"), dynamo=False)
    graph = onnx.load(tmp_path / "layer.onnx").graph
    assert {"MatMul", "Where"} <= {node.op_type for node in graph.node}
    assert {node.domain for node in graph.node} == {""}
