"""Scratch memory of the Numba kernels: one buffer per thread, reused by later calls."""

import contextlib
import threading

import pytest
import torch

from nord_snn.neurons import AssociativeLIFNode
from nord_snn.ops import pack_spikes, resonance_cached
from nord_snn.ops._numba.workspace import workspace

pytestmark = pytest.mark.quick

MEGABYTE = 1 << 20


def test_parts_are_aligned_to_64_bytes_and_do_not_overlap() -> None:
    sizes = (1, 64, 0, 65, 300)
    addresses = workspace(*sizes).parts
    assert all(address % 64 == 0 for address in addresses)
    for size, address, following in zip(sizes, addresses, addresses[1:], strict=False):
        assert address + size <= following


def test_a_thread_reuses_its_memory_unless_it_is_large() -> None:
    (first,), owner = workspace(1000)
    (second,), other = workspace(900)
    assert first == second
    assert owner is other
    _, large = workspace(2 * MEGABYTE)
    _, after = workspace(900)
    assert after is owner
    assert large is not owner


def test_threads_have_different_memory() -> None:
    owners = [workspace(100).memory]
    thread = threading.Thread(target=lambda: owners.append(workspace(100).memory))
    thread.start()
    thread.join()
    assert owners[0] is not owners[1]


def test_after_an_error_under_torch_func_later_calls_give_the_same_result() -> None:
    q = (torch.rand(4, 1, 3000, 64) > 0.5).float()
    keys, values = pack_spikes(q, 2), torch.rand(1, 2, 3000, 32)
    node = AssociativeLIFNode(4, preset="lif", step_mode="m")
    x = torch.rand(2, 1, 4)
    expected = node(x)
    node.reset()

    def loss(v: torch.Tensor) -> torch.Tensor:
        return v.sum() + resonance_cached(q[:, :, -1:], keys, values, top_k=2, temperature=1.0).sum()

    with contextlib.suppress(RuntimeError):
        torch.func.grad(loss)(torch.rand(3))
    assert torch.equal(node(x), expected)
