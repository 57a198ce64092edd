"""Functions that many tests use: expected values, relative errors, small texts and configs, several threads and processes."""

import random
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from spikingjelly.activation_based import functional
from torch import Tensor, distributed

SPIKINGJELLY_2 = hasattr(functional, "invalidate_reset_cache")
needs_spikingjelly_2 = pytest.mark.skipif(not SPIKINGJELLY_2, reason="needs SpikingJelly 2")

DATA = Path(__file__).parent / "data"
TEXT = "the neuron fires and rests while a spike wakes its neighbours under some slow current of time"
WORDS = TEXT.split()

CONFIG: dict[str, dict[str, Any]] = {
    "model": {
        "vocab_size": 300,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 24,
        "n_clusters": 4,
        "t_fast": 3,
        "t_slow": 1,
        "recency": True,
    },
    "training": {
        "steps": 12,
        "batch_size": 4,
        "grad_accum": 2,
        "lr": 0.01,
        "warmup_steps": 2,
        "eval_every": 5,
        "save_every": 4,
        "log_every": 3,
        "eval_blocks": 4,
        "held_out": 0.2,
    },
}

#: Further fields of the section ``model``, for ``write_config``.
MODEL_FIELDS = {
    "block",
    "threshold",
    "refractory_steps",
    "surrogate",
    "spiking_values",
    "dense",
    "tie_word_embeddings",
    "top_k",
}


def load_reference(name: str) -> Any:
    """Load expected values, computed in float64 by an independent implementation of the equations."""
    return torch.load(DATA / f"{name}.pt", weights_only=True)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference divided by the norm of the expected value."""
    return ((got - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def fire_easily(model: torch.nn.Module) -> None:
    """Lower every threshold to 0.02: the layers of such a small model are silent after a few training steps."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("v_threshold"):
                parameter.fill_(0.02)


def make_text(n_words: int = 4000, seed: int = 0) -> str:
    """Return lines of ten words; each word is followed by the next word of ``WORDS`` (three in four times) or the one after."""
    generator = random.Random(seed)
    lines, index = [], 0
    for _ in range(n_words // 10):
        line = []
        for _ in range(10):
            index = (index + generator.choice((1, 1, 1, 2))) % len(WORDS)
            line.append(WORDS[index])
        lines.append(" ".join(line))
    return "\n".join(lines) + "\n"


def write_config(folder: Path, name: str = "test", **changes: Any) -> Path:
    """Write a YAML config for a training run of seconds; ``changes`` are fields of the model or the training."""
    content = {section: dict(fields) for section, fields in CONFIG.items()}
    for field, value in changes.items():
        section = "model" if field in content["model"] or field in MODEL_FIELDS else "training"
        content[section][field] = value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


class Ranks:
    """Run two threads in place of two processes of ``torch.distributed``; a collective waits until both have called it.

    A collective that only one thread calls raises ``threading.BrokenBarrierError`` after ten seconds.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.barrier, self.tensors = threading.Barrier(2, timeout=10), [torch.empty(0), torch.empty(0)]
        self.rank = threading.local()
        monkeypatch.setattr(distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(distributed, "all_reduce", self.all_reduce)

    def all_reduce(self, tensor: torch.Tensor, op: Any = distributed.ReduceOp.SUM) -> None:
        """Replace the tensor of each rank by the sum or the maximum of both."""
        self.tensors[self.rank.number] = tensor
        self.barrier.wait()
        a, b = self.tensors
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        reduced = torch.maximum(a, b) if op == distributed.ReduceOp.MAX else a + b
        self.barrier.wait()
        tensor.copy_(reduced)

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """Return the result of ``function(rank)`` or the error that it raised, for each rank."""

        def call(number: int) -> Any:
            self.rank.number = number
            try:
                return function(number)
            except Exception as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(call, (0, 1)))


def two_processes(script: str, folder: Path) -> None:
    """Run code in two processes at once; ``sys.argv[1:]`` are the rank and a folder that both can use."""
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(rank), str(folder)], stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error.decode()


def wrong_in_threads(function: Callable[[Tensor], Tensor], inputs: list[Tensor], calls: int) -> list[object]:
    """Call a function ``calls`` times in one thread for each input; return its errors, and 1 for each result that is not equal
    to that of a call without other threads.
    """
    expected = [function(x) for x in inputs]
    wrong: list[object] = []

    def run(x: Tensor, right: Tensor) -> None:
        try:
            wrong.extend(1 for _ in range(calls) if not torch.equal(function(x), right))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong
