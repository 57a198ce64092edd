"""Fixtures that run GPU kernels on the CPU, in Triton's interpreter or compiled as C++, and that detect unwritten memory."""

import ctypes
import importlib
import importlib.util
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from nord_snn.ops._numba import workspace

TRITON = "nord_snn.ops.lif.triton"
CUPY = "nord_snn.ops.lif.cupy"


@pytest.fixture
def memory_full_of_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill allocated memory with NaN, so that elements that a kernel does not write are detected."""

    def filled_array(out: np.ndarray) -> np.ndarray:
        if out.dtype == np.uint8:
            out.fill(0xFF)  # NaN, read as floats
        return out

    def filled(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_filled(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = allocate(*args, **kwargs)
            return out.fill_(torch.nan if out.is_floating_point() else 99 if out.dtype.itemsize < 4 else -12345)

        return allocate_filled

    numpy_empty = np.empty
    monkeypatch.setattr(np, "empty", lambda *args, **kwargs: filled_array(numpy_empty(*args, **kwargs)))
    monkeypatch.setattr(workspace, "_of_thread", threading.local())  # no memory of an earlier call
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@pytest.fixture(scope="session")
def interpreted() -> ModuleType:
    """Load the Triton kernels for the interpreter into a separate module; ``nord_snn`` keeps the compiled kernels."""
    pytest.importorskip("triton", reason="Triton is not installed")
    spec = importlib.util.spec_from_file_location("interpreted_triton", importlib.util.find_spec(TRITON).origin)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def interpreter(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the interpreted kernels; functions that they call are interpreted as well."""
    triton = importlib.import_module("triton")
    interpreter_module = importlib.import_module("triton.runtime.interpreter")

    def call_and_restore(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Interpret a function that a kernel calls, and restore ``triton.language`` afterwards."""
        scope = interpreter_module._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        finally:
            scope.restore()

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(interpreter_module.InterpretedFunction, "__call__", call_and_restore)
    for name in ("sum", "zeros"):  # Triton's own kernels, decorated when Triton was imported
        function = getattr(triton.language, name)
        if isinstance(function, triton.JITFunction):
            monkeypatch.setattr(triton.language, name, interpreter_module.InterpretedFunction(function.fn))
    return interpreted


@pytest.fixture(scope="session")
def emulate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    """Return a replacement of ``_launch`` that compiles the CUDA kernels as C++ and runs them on the CPU."""
    kernels = importlib.import_module(CUPY)
    compiler = next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C++ compiler is installed, so the CUDA source cannot be run on the CPU")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    built: dict[Any, Any] = {}

    def build(kernel: str, options: tuple[str, ...], source: str) -> Any:
        path = folder / f"{len(built)}.cpp"
        path.write_text(f'#include "cuda_on_cpu.h"\n{source}\nLAUNCHABLE({kernel})\n')
        flags = ["-O0", "-std=c++17", "-ffp-contract=off", "-w", "-shared", "-fPIC", f"-I{Path(__file__).parent}"]
        process = subprocess.run(
            [compiler, *flags, *options, str(path), "-o", str(path.with_suffix(".so"))],
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        return getattr(ctypes.CDLL(str(path.with_suffix(".so"))), f"launch_{kernel}")

    def launch(
        kernel: str, options: tuple[str, ...], device: torch.device, grid: int, block: int, args: list[Any]
    ) -> None:
        key = (kernel, options, kernels._SOURCES[kernel])
        if key not in built:
            built[key] = build(*key)
        assert grid >= 1
        assert 1 <= block <= 1024
        values = []
        for value in args:
            if isinstance(value, float):
                values.append(ctypes.c_double(value))
            else:
                pointer = value.data_ptr() if isinstance(value, torch.Tensor) else value or 0
                values.append(ctypes.c_longlong(pointer))
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        assert built[key](grid, block, addresses) == 0, "the threads of a block passed different numbers of barriers"

    return launch
