"""Estimate the memory of a model before it is built."""

import os
from pathlib import Path

import torch

from nord_snn.models.nord.configuration_nord import NordConfig

__all__ = ["check_memory"]

BYTES = 4  # of a float32
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_memory(config: NordConfig, copies: int = 1, tokens: int = 1) -> None:
    """Raise an error if a model and its largest activation need more main memory than this process may use.

    Args:
        config: configuration of the model.
        copies: numbers stored for each weight: 4 while training with AdamW (weight, gradient, two moments). Default: 1.
        tokens: token positions in one call, over all rows. Default: 1.

    Raises:
        ValueError: they do not fit; the message has the sizes.
    """
    weights = BYTES * copies * _n_weights(config)
    activation = BYTES * tokens * (config.t_fast + config.t_slow) * max(config.hidden_size, config.intermediate_size)
    memory = _memory()
    if weights + activation > memory:
        raise ValueError(
            f"the model does not fit into the memory of {_size(memory)}: its weights need {_size(weights)} (vocab_size "
            f"{config.vocab_size}, hidden_size {config.hidden_size}, intermediate_size {config.intermediate_size}, "
            f"num_hidden_layers {config.num_hidden_layers}) and one layer of neurons {_size(activation)} (t_fast "
            f"{config.t_fast}, t_slow {config.t_slow}, {tokens} token{'s' if tokens > 1 else ''})"
        )


def check_memory_of_device(config: NordConfig) -> None:
    """Run :func:`check_memory` if new modules are made on the CPU."""
    if torch.get_default_device().type == "cpu":
        check_memory(config)


def _n_weights(config: NordConfig) -> int:
    """Return the number of weights in matrices, which are almost all weights."""
    width, ffn_width = config.hidden_size, config.intermediate_size
    vocabulary = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)  # embedding and head
    encoder = width * (width + config.t_fast + config.t_slow)
    block = 4 * width * width * config.resonance + 2 * width * ffn_width + 4 * (config.n_clusters or 0) ** 2
    return vocabulary + encoder + config.num_hidden_layers * block


def _memory() -> int:
    """Return the bytes of main memory that this process may use."""
    if not hasattr(os, "sysconf"):  # Windows
        return 2**63
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = CGROUP_LIMIT.read_text(encoding="ascii").strip()
    except OSError:  # not Linux, or no control groups
        return total
    return min(total, int(limit)) if limit.isdecimal() else total


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.1f} GB"
