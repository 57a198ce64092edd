"""Convert checkpoints of the published Nord code to our model and back.

Checkpoints are read with ``weights_only=True``: nothing in them is executed. "Published" names and files are those of the
published code of the Nord language model.
"""

import os
import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nord_snn.models.nord.configuration_nord import NordConfig
from nord_snn.models.nord.modeling_nord import NordForCausalLM

__all__ = [
    "PUBLISHED_TOKENIZER",
    "config_from_original",
    "load_original",
    "our_name",
    "published_name",
    "to_original",
    "weights_from_original",
]

ZIP_START = b"PK\x03\x04"
#: Published field of a configuration -> field of :class:`NordConfig`.
CONFIG_FIELDS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "T": "t_fast",
    "T_slow": "t_slow",
    "n_clusters": "n_clusters",
    "cascade_radius": "cascade_radius",
    "cascade_gain": "cascade_gain",
    "v_threshold": "threshold",
    "tau_mem": "beta_mem",
    "tau_syn": "beta_syn",
    "v_reset": "v_reset",
    "refractory_t": "refractory_steps",
    "surrogate_alpha": "alpha",
    "resonance_top_k": "top_k",
    "clamp_floor": "clamp_floor",
}

#: Published name and our name, each one or more segments (between dots) of the name of a parameter.
NAMES = (
    ("encoder.embed", "embed_tokens"),
    ("encoder.temporal_proj", "encoder.projection"),
    ("encoder.drive_scale", "encoder.fast_scale"),
    ("readout_lif", "readout.lif"),
    ("readout_ema_raw", "readout.decay_logit"),
    ("readout_norm", "norm"),
    ("gamma_attn", "resonance_gain"),
    ("gamma_ffn", "ffn_gain"),
    ("leak_raw", "leak_logit"),
    *((f"W_{letter}", f"{letter}_proj") for letter in "qkvo"),
    ("resonance_temp", "temperature"),
    ("threshold", "v_threshold"),
    ("beta_mem_raw", "beta_mem_logit"),
    ("beta_syn_raw", "beta_syn_logit"),
    ("neighbor_weights", "cascade.weight"),
    ("cluster_gain", "cascade.gain"),
)
#: Last segments of published parameters without dimensions; ours have shape [1].
SCALARS = {"drive_scale", "slow_scale", "readout_ema_raw", "resonance_temp", "beta_mem_raw", "beta_syn_raw"}
PUBLISHED_TOKENIZER = "meta-llama/Llama-3.2-1B"
#: Buffers of the published ``persistent_mem=True``: the state after the last batch, which is not converted.
STORED_STATE = re.compile(r"\._(v_mem|i_syn)_state$")


def load_original(path: str | Path) -> NordForCausalLM:
    """Return the model of a published checkpoint.

    Args:
        path: a ``.pt`` file with ``config`` and ``model_state_dict``, as the published training script writes it.

    Raises:
        ValueError: the file is missing or not a checkpoint, or its tensors do not fit its configuration.
    """
    checkpoint = _read_checkpoint(Path(path))
    try:
        model = NordForCausalLM(config_from_original(checkpoint["config"]))
        model.load_state_dict(weights_from_original(checkpoint["model_state_dict"]))
    except Exception as error:  # the file may contain any values and tensors
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: expected tensors that fit the configuration of the file ({reason})") from error
    return model


def config_from_original(published: dict[str, Any]) -> NordConfig:
    """Return our configuration for a published one, without the fields that configure training."""
    missing = sorted(
        field for field in ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff") if field not in published
    )
    if missing:
        raise ValueError(f"the configuration in the checkpoint must have {', '.join(missing)}")
    fields = {field: published[name] for name, field in CONFIG_FIELDS.items() if name in published}
    if wrong := [name for name, value in fields.items() if not isinstance(value, int | float | None)]:
        raise ValueError(f"{wrong[0]} must be a number, got {type(fields[wrong[0]]).__name__}")
    return NordConfig(**fields)


def our_name(published: str) -> str:
    """Return our name of a published parameter."""
    return _rename(published, NAMES)


def published_name(ours: str) -> str:
    """Return the published name of a parameter of our model."""
    return _rename(ours, ((our, published) for published, our in NAMES))


def _rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\g<1>{new}", name)
    return name


def weights_from_original(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return our state dict for a published one: with our names, scalars of shape [1], and no buffers."""
    weights: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for name, tensor in published.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            raise ValueError(f"{name!r} must be the name of a dense tensor, got {type(tensor).__name__}")
        if STORED_STATE.search(name):
            continue
        if name.endswith(".cluster_ids"):
            _check_clusters(name, tensor, published)
            continue
        ours = our_name(name)
        if ours in names:
            raise ValueError(f"{names[ours]} and {name} are two names of the same parameter, {ours}")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{name} must have finite floating-point numbers only, got {_describe(tensor)}")
        names[ours], weights[ours] = name, tensor.reshape(1) if tensor.ndim == 0 else tensor
    return weights


def _describe(tensor: Tensor) -> str:
    """Return why a tensor is not one of finite floating-point numbers."""
    if not tensor.is_floating_point():
        return f"numbers of type {tensor.dtype}"
    return f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} that are NaN or infinite"


def to_original(model: NordForCausalLM, tokenizer_id: str = PUBLISHED_TOKENIZER) -> dict[str, Any]:
    """Return a checkpoint that the published code can load.

    Args:
        model: the model; without recency, which the published code does not have.
        tokenizer_id: name or folder of the tokenizer; the published chat program loads it.

    Raises:
        ValueError: the published code does not support the model's configuration.
    """
    config = model.config
    unsupported = {
        "recency": config.recency,
        f"block = {config.block}": config.block != "published",
        "dense": config.dense,
        "resonance = False": not config.resonance,
        "n_clusters = None": config.n_clusters is None,
        "layer_norm_eps other than 1e-5": config.layer_norm_eps != 1e-5,
        "surrogate other than nord_atan": config.surrogate != "nord_atan",
    }
    if reasons := [name for name, is_set in unsupported.items() if is_set]:
        raise ValueError(
            f"the published code does not support {', '.join(reasons)}: this model cannot be converted to it"
        )
    weights = {}
    for name, tensor in model.state_dict().items():
        published = published_name(name)
        scalar = published.rpartition(".")[2] in SCALARS
        weights[published] = (
            tensor.detach().float().cpu().reshape(()) if scalar else tensor.detach().float().cpu().clone()
        )
        if published.endswith(".threshold"):
            ids = torch.arange(tensor.shape[0]) % (config.n_clusters or 1)
            weights[published.removesuffix("threshold") + "cluster_ids"] = ids
    fields = {name: getattr(config, field) for name, field in CONFIG_FIELDS.items()}
    fields |= {"tokenizer_id": tokenizer_id, "persistent_mem": False}
    return {"step": 0, "loss": 0.0, "config": fields, "model_state_dict": weights}


def _check_clusters(name: str, ids: Tensor, published: dict[str, Tensor]) -> None:
    gain = published.get(name.replace("cluster_ids", "cluster_gain"))
    if not isinstance(gain, Tensor) or gain.ndim != 1 or ids.ndim != 1:
        raise ValueError(f"{name} must be a vector beside a vector of gains")
    n_clusters = gain.shape[0]
    if not torch.equal(ids.long(), torch.arange(ids.shape[0]) % n_clusters):
        raise ValueError(
            f"{name} must be the neuron's index modulo {n_clusters}, the only layout that the cascade supports"
        )


def _read_checkpoint(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: expected a published checkpoint such as nord_final.pt, got no such file")
    _check_archive(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"{path}: expected a checkpoint of plain tensors; nothing in it was executed ({type(error).__name__})"
        ) from error
    if not isinstance(checkpoint, dict) or not {"config", "model_state_dict"} <= checkpoint.keys():
        raise ValueError(f"{path}: expected a dictionary with 'config' and 'model_state_dict'")
    if not all(isinstance(checkpoint[name], dict) for name in ("config", "model_state_dict")):
        raise ValueError(f"{path}: expected 'config' and 'model_state_dict' to be dictionaries")
    return checkpoint


def _check_archive(path: Path) -> None:
    """Compare the records of a checkpoint with their checksums, which ``torch.load`` does not.

    ``torch.save`` has written zip archives since PyTorch 1.6. Earlier files have no checksums.
    """
    try:
        # O_NONBLOCK: reading some files of /proc would block, for example kmsg.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            start = file.read(4)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if not start:
        raise ValueError(f"{path}: the file is empty; expected a published checkpoint such as nord_final.pt")
    if start != ZIP_START:
        return
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("its records are longer than the file")
            damaged = packed[0] if packed else archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: damaged ({' '.join(str(error).split())[:200]})") from error
    if damaged is not None:
        raise ValueError(f"{path}: damaged, {damaged} differs from its checksum")
