"""Numba kernels give correct results in forked processes, in several Python threads, and beside parallel loops of Numba."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import wrong_in_threads

from nord_snn.neurons import AssociativeLIFNode

numba = pytest.importorskip("numba")
from nord_snn.ops._numba.threads import n_threads  # noqa: E402

_FORKS = """
import multiprocessing, torch
from torch.utils.data import DataLoader
from nord_snn.neurons import AssociativeLIFNode
torch.set_num_threads({threads})
node = AssociativeLIFNode(512, step_mode="m", backend="numba").requires_grad_(False)
x = torch.randn(10, 64, 512, generator=torch.Generator().manual_seed(0))
expected = node(x, stateless=True)
def run(i):
    torch.set_num_threads(1)
    return bool((node(x, stateless=True) == expected).all())
class Data:
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return torch.tensor(run(i))
assert all(batch.all() for batch in DataLoader(Data(), batch_size=2, num_workers=2))
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert all(pool.map(run, range(4)))
"""

_TWO_THREADS = """
import os, torch
from nord_snn.ops import associative_lif
torch.set_num_threads(2)
x, threshold, decay = torch.randn(4, 64, 2048), torch.full((2048,), 0.25), torch.tensor([0.9])
def run(backend="numba"):
    return associative_lif(x, threshold=threshold, beta_mem=decay, beta_syn=decay, backend=backend)[0].numpy()
expected = run("torch")
assert (run() == expected).all() and 0 < expected.mean() < 1
"""

_IN_A_FORKED_PROCESS = """
if (child := os.fork()) == 0:
    os._exit(0 if (run() == expected).all() else 3)
assert os.waitpid(child, 0)[1] == 0
"""

_BESIDE_NUMBA = """
import threading, numba, numpy, torch
from nord_snn.neurons import AssociativeLIFNode
@numba.njit(parallel=True, nogil=True)
def loop(a):
    for i in numba.prange(len(a)):
        a[i] += 1
torch.set_num_threads(2)
node = AssociativeLIFNode(512, step_mode="m", backend="numba").requires_grad_(False)
x = torch.randn(10, 64, 512)
expected, finished, wrong = node(x, stateless=True), threading.Event(), []
def run_kernels():
    while not finished.is_set():
        if not torch.equal(node(x, stateless=True), expected):
            wrong.append(1)
threads = [threading.Thread(target=run_kernels) for _ in range(3)]
[thread.start() for thread in threads]
for _ in range(50):
    loop(numpy.zeros(10_000))
finished.set()
[thread.join() for thread in threads]
assert not wrong
"""


def _run(code: str, **environment: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240, env=os.environ | environment)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
@pytest.mark.parametrize("threads", [1, 2])
def test_forked_workers_run_kernels_after_a_call_in_the_parent(threads: int) -> None:
    """Workers of a DataLoader and of a forked pool run a node that the parent process has run."""
    _run(_FORKS.format(threads=threads), NUMBA_NUM_THREADS="2")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_a_forked_process_runs_kernels_on_several_threads() -> None:
    """A forked process cannot use torch's OpenMP threads and starts its own."""
    _run(_TWO_THREADS + _IN_A_FORKED_PROCESS, NUMBA_NUM_THREADS="2")


def test_with_fewer_openmp_threads_than_torch_requests_all_results_are_computed() -> None:
    """OMP_THREAD_LIMIT limits the threads of the process."""
    _run(_TWO_THREADS, OMP_THREAD_LIMIT="1", NUMBA_NUM_THREADS="2")


@pytest.mark.parametrize("layer", ["workqueue"])
def test_kernels_run_beside_parallel_loops_of_numba(layer: str) -> None:
    """Three threads run kernels while another one runs loops on Numba's "workqueue", which only one thread may use at a time."""
    _run(_BESIDE_NUMBA, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2")


def test_kernels_need_no_threading_layer() -> None:
    """Kernels run if Numba has no threading layer; without Numba's compiler the backend is plain PyTorch."""
    code = (
        "import torch; from nord_snn.neurons import AssociativeLIFNode as N;"
        "n = N(64, step_mode='m'); x = torch.ones(2, 3, 64); print(n.which_backend(x).name); n(x)"
    )
    _run(code, NUMBA_THREADING_LAYER="tbb", NUMBA_NUM_THREADS="2")
    _run(code, NUMBA_DISABLE_JIT="1")


@pytest.mark.parametrize("calls", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_four_threads_get_the_results_of_a_single_thread(calls: int) -> None:
    """Each thread calls the node with another input."""
    node = AssociativeLIFNode(64, n_clusters=8, step_mode="m").requires_grad_(False)
    assert not wrong_in_threads(lambda x: node(x, stateless=True), [torch.randn(6, 4, 64) for _ in range(4)], calls)


def test_the_number_of_threads_grows_with_the_number_of_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is at most that of torch, that of Numba, and 1 plus one for each 65,536 elements."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 4)
    assert [n_threads(n) for n in (0, 65_535, 65_536, 10**9, None)] == [1, 1, 2, 4, 4]
