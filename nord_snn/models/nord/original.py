"""Published Nord checkpoints: into our model and back.

Checkpoints are read with ``weights_only=True``: nothing in them is executed. Source: the published code of Nord, whose names
and layout these are.
"""

import pickle
import re
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

# Published name and ours, whole segments of a path.
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
#: Without dimensions there, of shape [1] here.
SCALARS = {"drive_scale", "slow_scale", "readout_ema_raw", "resonance_temp", "beta_mem_raw", "beta_syn_raw"}
PUBLISHED_TOKENIZER = "meta-llama/Llama-3.2-1B"
MEMBRANES = re.compile(r"\._(v_mem|i_syn)_state$")  # of persistent_mem=True: the state of the last batch, no weights


def load_original(path: str | Path) -> NordForCausalLM:
    """The model of a published checkpoint.

    Args:
        path: a ``.pt`` file with ``config`` and ``model_state_dict``, as the published training script writes it.

    Raises:
        ValueError: the file is missing, no checkpoint, or its tensors do not fit its configuration.
    """
    checkpoint = _read(Path(path))
    try:
        model = NordForCausalLM(config_from_original(checkpoint["config"]))
        model.load_state_dict(weights_from_original(checkpoint["model_state_dict"]))
    except Exception as error:  # values and tensors of any kind may stand in the file
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: its tensors and its configuration do not fit together ({reason})") from error
    return model


def config_from_original(published: dict[str, Any]) -> NordConfig:
    """Our configuration for a published one; fields that only concern its training run are left aside."""
    missing = sorted(
        field for field in ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff") if field not in published
    )
    if missing:
        raise ValueError(f"the configuration in the checkpoint lacks {', '.join(missing)}")
    return NordConfig(**{ours: published[theirs] for theirs, ours in CONFIG_FIELDS.items() if theirs in published})


def our_name(published: str) -> str:
    """The name of a published parameter here."""
    return _renamed(published, NAMES)


def published_name(ours: str) -> str:
    """The published name of a parameter."""
    return _renamed(ours, ((here, there) for there, here in NAMES))


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\g<1>{new}", name)
    return name


def weights_from_original(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict for a published one: other names, scalars of shape [1], no buffers."""
    weights = {}
    for name, tensor in published.items():
        if MEMBRANES.search(name):
            continue
        if name.endswith(".cluster_ids"):
            _check_clusters(name, tensor, published)
            continue
        weights[our_name(name)] = tensor.reshape(1) if tensor.ndim == 0 else tensor
    return weights


def to_original(model: NordForCausalLM, tokenizer_id: str = PUBLISHED_TOKENIZER) -> dict[str, Any]:
    """A checkpoint that the published code opens.

    Args:
        model: the model; without recency, which the published code does not have.
        tokenizer_id: name or folder of the tokenizer, which the published chat loads by it.

    Raises:
        ValueError: the model has, or lacks, something that the published code cannot do without, or with.
    """
    config = model.config
    foreign = {
        "recency": config.recency,
        f"block = {config.block}": config.block != "published",
        "dense": config.dense,
        "resonance = False": not config.resonance,
        "n_clusters = None": config.n_clusters is None,
        "layer_norm_eps other than 1e-5": config.layer_norm_eps != 1e-5,
        "surrogate other than nord_atan": config.surrogate != "nord_atan",
    }
    if found := [name for name, there in foreign.items() if there]:
        raise ValueError(f"the published code has no {', no '.join(found)}: this model cannot be expressed in it")
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
    fields = {theirs: getattr(config, ours) for theirs, ours in CONFIG_FIELDS.items()}
    fields |= {"tokenizer_id": tokenizer_id, "persistent_mem": False}
    return {"step": 0, "loss": 0.0, "config": fields, "model_state_dict": weights}


def _check_clusters(name: str, ids: Tensor, published: dict[str, Tensor]) -> None:
    n_clusters = published[name.replace("cluster_ids", "cluster_gain")].shape[0]
    if not torch.equal(ids.long(), torch.arange(ids.shape[0]) % n_clusters):
        raise ValueError(f"{name} is not neuron number modulo {n_clusters}, the only layout that the cascade knows")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a published checkpoint such as nord_final.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"{path}: not a checkpoint of plain tensors, nothing in it was executed ({type(error).__name__})"
        ) from error
    if not isinstance(checkpoint, dict) or not {"config", "model_state_dict"} <= checkpoint.keys():
        raise ValueError(f"{path}: expected a dictionary with 'config' and 'model_state_dict'")
    return checkpoint
