"""``torch.ops.nord_snn.*`` called with wrong arguments raises an error with a short message; the process does not crash."""

import subprocess
import sys

import pytest
import torch

from nord_snn.ops import associative_lif, leaky_clamp

RAW = """
import faulthandler, itertools, torch, warnings
warnings.simplefilter("ignore")
import nord_snn.ops
from nord_snn.ops import pack_spikes

def spikes(*shape):
    return (torch.rand(*shape) < 0.5).float()

zeros, ones, ops = torch.zeros, torch.ones, torch.ops.nord_snn
lif = dict(
    x=torch.randn(4, 3, 8), v=zeros(3, 8), i_syn=zeros(3, 8), refractory=zeros(3, 8, dtype=torch.int32),
    threshold=ones(8) / 4, beta_mem=torch.tensor([0.9]), beta_syn=torch.tensor([0.5]), weight=torch.rand(4, 4), gain=ones(4),
    v_reset=-0.1, refractory_steps=2, surrogate="atan", alpha=2.0, charge="average", tau=0.0, v_rest=0.0, hard_reset=False,
    reset_scale=1.0, detach_reset=False, keep_v=True, membrane_only=False, backend="numba", logits=False, shape=[4, 3, 8],
    step=[3, 8],
)
lif_back = {"grad_spikes": torch.randn(4, 3, 8), "other_grads": [None, None, None]} | lif | {"parameters": True}
del lif_back["keep_v"]
clamp = dict(x=torch.randn(5, 8), branch=torch.randn(5, 8), gain=ones(8), leak=ones(8) / 2, floor=-ones(8), backend="numba")
q = spikes(2, 1, 5, 8)
attention = dict(q=q, k=q, v=torch.randn(1, 5, 8), temperature=torch.tensor(0.5), recency=ones(2), n_heads=2, top_k=3,
                 causal=True, save_weights=True, backend="numba")
_, selected, lowest_score, weights = ops.resonance(**attention)  # what the backward pass needs
saved = dict(keys=selected, worst=lowest_score, weights=weights)
attention_back = {"grad": torch.randn(1, 5, 8)} | attention | saved | dict(needs_spike_grad=True)
del attention_back["save_weights"]
cached = dict(q=q, keys=pack_spikes(q, 2), values=torch.randn(1, 2, 5, 4), top_k=3, temperature=torch.tensor(0.5),
              recency=ones(2), lengths=torch.tensor([4]), window=5, backend="numba")

def shrunk(x, n_bytes):
    x = x.clone()
    x.untyped_storage().resize_(n_bytes)
    return x

def view_without_storage(x):  # the second half of a storage that then loses this half
    both = torch.stack([x, x])
    view = both[1]
    both.untyped_storage().resize_(x.nbytes)
    return view

def wrong(x):
    yield from ((name, value) for name, value in (
        ("empty", x[:0] if x.ndim else x.new_zeros(0)), ("larger", torch.cat([x, x], -1) if x.ndim else x[None].repeat(3)),
        ("one more", x[None]),
        ("flat", x.flatten()), ("cut", x[..., :1] if x.ndim else x), ("int64", x.long()), ("float64", x.double()),
        ("complex", x.to(torch.complex64)), ("bool", x.bool()), ("meta", x.to("meta")), ("sparse", x.to_sparse()),
        ("freed", shrunk(x, 0)), ("shrunk", shrunk(x, x.element_size() * x.numel() // 2)),
        ("huge", x.expand(10**6, *x.shape) if x.ndim else x),
        ("view without storage", view_without_storage(x)),
    ))

calls = dict(associative_lif=lif, associative_lif_backward=lif_back, leaky_clamp=clamp,
             leaky_clamp_backward={"grad": torch.randn(5, 8)} | clamp, resonance=attention,
             resonance_backward=attention_back, resonance_cached=cached)
options = {"n_heads": [0, -1, 3, 10**9], "top_k": [0, -5, 2**62], "window": [0, -1], "backend": ["torch", "auto", "x", "triton"],
           "shape": [[], [4, 3], [4, 3, 0], [-4, 3, 8], [400, 3, 8], [4, 8, 3]], "step": [[], [8], [300, 8]], "charge": ["x"],
           "surrogate": ["x"], "refractory_steps": [-1]}
n_errors = 0
for name, arguments in calls.items():
    getattr(ops, name)(**arguments)
    for argument, right in arguments.items():
        values = list(wrong(right)) if isinstance(right, torch.Tensor) else [(str(x), x) for x in options.get(argument, [])]
        if argument == "keys" and name == "resonance_backward":
            values += [("positions beyond", right + 1000), ("positions before", right - 1000)]
        for what, value in values:
            try:
                getattr(ops, name)(**arguments | {argument: value})
            except (TypeError, ValueError, NotImplementedError) as error:
                assert "\\n" not in str(error) and len(str(error)) < 400, (name, argument, what, error)
                n_errors += 1
            except RuntimeError as error:  # the dispatcher of torch, for tensors on several devices or without storage
                assert "nord_snn" in str(error) or "storage" in str(error) or "data" in str(error), (name, argument, what, error)
                n_errors += 1
            else:
                must_raise = ("freed", "shrunk", "view without storage", "empty", "complex", "huge")
                assert what not in must_raise or right.numel() <= 1, (name, argument, what)
print(n_errors)
"""


def test_wrong_arguments_raise_and_do_not_crash_the_process() -> None:
    """Each tensor of each registered op, both passes, in another shape, dtype, layout or device, or without its data."""
    pytest.importorskip("numba")
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", RAW], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 300


@pytest.mark.parametrize("n_bytes", [0, 4, 40])
def test_a_tensor_with_too_little_storage_raises(n_bytes: int) -> None:
    """A contiguous tensor whose storage has fewer bytes than its elements need."""
    pytest.importorskip("numba")
    x, threshold = torch.ones(5, 3, 8), torch.ones(8)
    x.untyped_storage().resize_(n_bytes)
    with pytest.raises(ValueError, match="storage was freed"):
        associative_lif(x, threshold=threshold, beta_mem=0.9, beta_syn=0.5, backend="numba")
    leak = torch.ones(16)
    leak.untyped_storage().resize_(n_bytes)
    with pytest.raises(ValueError, match="storage was freed"):
        leaky_clamp(torch.ones(2, 16), leak=leak, floor=torch.ones(16), backend="numba")


def test_views_that_negate_are_read_as_their_values() -> None:
    """The imaginary part of a conjugate is a view whose stored elements have the other sign."""
    x = torch.complex(torch.zeros(4, 3, 8), torch.randn(4, 3, 8)).conj().imag
    assert x.is_neg()
    results = [
        associative_lif(x, threshold=torch.full((8,), 0.1), beta_mem=0.5, beta_syn=0.5, backend=backend)[2].v
        for backend in ("auto", "torch")
    ]
    torch.testing.assert_close(*results)
