"""Build a model from settings, after checks that it fits into memory and that its backend can run on the device."""

import torch

from nord_snn.models.nord import NordConfig, NordForCausalLM
from nord_snn.models.nord.size import check_memory
from nord_snn.ops import which_backend
from nordlm.cli import shorten
from nordlm.errors import SettingsError
from nordlm.training.settings import Settings

__all__ = ["check_settings", "new_model"]

ADAMW_COPIES = 4  # tensors for each parameter: weight, gradient, and two moments of AdamW


def check_settings(settings: Settings, device: str) -> None:
    """Check that a model can be trained, before its text is read.

    Args:
        settings: settings of the run.
        device: type of the device, such as ``"cpu"``. For training on a GPU only the initial weights are in main memory.

    Raises:
        SettingsError: weights, gradients, moments and the activations of a micro-batch do not fit into main memory; or the
            backend cannot run on the device.
    """
    config = settings.model_config()
    tokens = settings.training.batch_size * settings.block_size
    try:
        check_memory(config, *((ADAMW_COPIES, tokens) if device == "cpu" else (1, 1)))
        check_backend(config, device)
    except (ValueError, RuntimeError) as error:
        raise SettingsError(f"model: {shorten(str(error))}") from error


def check_backend(config: NordConfig, device: str) -> None:
    """Raise a RuntimeError if the backend of the neurons cannot run on a device of type ``device``."""
    if not config.dense:
        x = torch.empty(1, 1, 1, device=device).expand(1, 1, config.hidden_size)
        which_backend(x, config.backend, config.surrogate, config.n_clusters)


def new_model(config: NordConfig) -> NordForCausalLM:
    """Return a model with initial weights.

    Raises:
        SettingsError: the model does not fit into memory, or float32 cannot represent a value of the configuration.
    """
    try:
        return NordForCausalLM(config)
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise SettingsError(f"model: {shorten(str(error))}") from error
