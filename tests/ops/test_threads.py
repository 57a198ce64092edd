"""Numba's threads: as many as torch has, for one caller at a time, also after an error."""

import threading

import pytest
import torch

numba = pytest.importorskip("numba")
threads = pytest.importorskip("nord_snn.ops._numba.threads")

pytestmark = pytest.mark.quick


def is_free() -> bool:
    """Return whether another thread could run a kernel."""
    acquired = []

    def enter() -> None:
        acquired.append(threads._caller_lock.acquire(timeout=1))
        if acquired[0]:
            threads._caller_lock.release()

    other = threading.Thread(target=enter)
    other.start()
    other.join()
    return acquired[0]


def test_a_kernel_runs_on_the_threads_of_torch_and_restores_them(monkeypatch):
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 4)
    monkeypatch.setattr(numba, "get_num_threads", lambda: 3)
    requested = []
    monkeypatch.setattr(numba, "set_num_threads", requested.append)
    before = torch.get_num_threads()
    with threads.as_many_threads_as_torch() as n:
        assert n == min(before, 4)
        torch.set_num_threads(before + 1)  # as Numba's start of its own threads may
        assert not is_free()
    assert requested == [n]
    assert torch.get_num_threads() == before
    assert is_free()


def test_an_interrupted_start_and_a_failing_kernel_leave_kernels_runnable(monkeypatch):
    def interrupted(n: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(numba, "get_num_threads", lambda: -1)
        patched.setattr(numba, "set_num_threads", interrupted)
        with pytest.raises(KeyboardInterrupt), threads.as_many_threads_as_torch():
            pass
    assert is_free()
    with pytest.raises(ZeroDivisionError), threads.as_many_threads_as_torch():
        1 / 0  # noqa: B018
    assert is_free()
