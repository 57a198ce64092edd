"""Turn a published Nord checkpoint into a folder that ``AutoModelForCausalLM.from_pretrained`` opens.

    python examples/nord_lm/convert_original.py nord_final.pt converted/

The model opens there with ``trust_remote_code=True`` where nord_snn is installed, since the modelling files lie beside
the weights, or without it once ``modeling_nord`` has been imported. Checkpoints are read with ``weights_only=True``:
nothing in them is executed. The folder holds safetensors and a ``config.json``; the tokenizer (``meta-
llama/Llama-3.2-1B`` for the published weights) is not part of a checkpoint.
"""

import argparse
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import torch
from configuration_nord import NordConfig
from modeling_nord import NordForCausalLM
from torch import Tensor

__all__ = ["config_from_original", "load_original", "weights_from_original"]

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

# Published name -> ours, as whole path segments, applied in this order.
NAMES = (
    (r"^encoder\.embed\.", "embed_tokens."),
    (r"^encoder\.temporal_proj\.", "encoder.projection."),
    (r"^encoder\.drive_scale$", "encoder.fast_scale"),
    (r"^readout_lif\.", "readout.lif."),
    (r"^readout_ema_raw$", "readout.decay_logit"),
    (r"^readout_norm\.", "norm."),
    (r"\.gamma_attn$", ".resonance_gain"),
    (r"\.gamma_ffn$", ".ffn_gain"),
    (r"\.leak_raw$", ".leak_logit"),
    (r"\.W_([qkvo])\.", r".\1_proj."),
    (r"\.resonance_temp$", ".temperature"),
    (r"\.threshold$", ".v_threshold"),
    (r"\.beta_(mem|syn)_raw$", r".beta_\1_logit"),
    (r"\.neighbor_weights$", ".cascade.weight"),
    (r"\.cluster_gain$", ".cascade.gain"),
)
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


def weights_from_original(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict for a published one: other names, scalars of shape [1], no buffers."""
    weights = {}
    for name, tensor in published.items():
        if MEMBRANES.search(name):
            continue
        if name.endswith(".cluster_ids"):
            _check_clusters(name, tensor, published)
            continue
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        weights[name] = tensor.reshape(1) if tensor.ndim == 0 else tensor
    return weights


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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a checkpoint of plain tensors, nothing in it was executed ({reason})") from error
    if not isinstance(checkpoint, dict) or not {"config", "model_state_dict"} <= checkpoint.keys():
        raise ValueError(f"{path}: expected a dictionary with 'config' and 'model_state_dict'")
    return checkpoint


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="published .pt file")
    parser.add_argument("out", type=Path, help="folder to write, which must not exist or be empty")
    options = parser.parse_args(arguments)
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        sys.exit(f"error: {options.out} exists and is not an empty folder")
    try:
        model = load_original(options.checkpoint)
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        model.save_pretrained(options.out)
    except Exception as error:  # a full or read-only disk, by whoever writes
        sys.exit(f"error: {options.out} could not be written ({' '.join(str(error).split())[:200]})")
    print(f"{options.out}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
