"""Construct the models of the studies: variants of a config, and a GPT-2 of the same size."""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from nordlm.training.building import new_model
from nordlm.training.loop import model_config
from nordlm.training.model_card import parameter_counts
from nordlm.training.settings import Settings, SettingsError
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from nord_snn.layers import SpikeFedResonance

__all__ = [
    "MODEL_MAKERS",
    "Maker",
    "gpt2",
    "nord",
    "variant",
    "without_norms",
    "without_stream_norm",
    "without_these_norms",
]

Maker = Callable[[Settings, PreTrainedTokenizerBase], PreTrainedModel]

#: Fields for the size of a model. A config with only these fields is the published Nord model of that size. They include
#: n_clusters, because the total current of a cascade grows with it: with 64 clusters the neurons of a narrow model saturate.
SIZES = {
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "n_clusters",
    "tie_word_embeddings",
    "top_k",
    "vocab_size",
}


#: Fields that change a model to its dense twin.
DENSE = {"dense": True, "t_fast": 1, "t_slow": 0}


def nord(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Construct the model of the config."""
    return new_model(model_config(settings, tokenizer))


def variant(**changes: Any) -> Maker:
    """Return a maker for the config with changed fields."""

    def make(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        return nord(replace(settings, model=settings.model | changes), tokenizer)

    return make


def published(keep: Collection[str] = (), **changes: Any) -> Maker:
    """Return a maker for the published model with the sizes of the config, the fields in ``keep``, and ``changes``."""

    def make(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        fields = {name: value for name, value in settings.model.items() if name in SIZES or name in keep}
        return nord(replace(settings, model=fields | changes), tokenizer)

    return make


def spike_fed(**changes: Any) -> Maker:
    """Return a maker for the spike-fed model of the config with changed fields.

    Raises:
        SettingsError: the config has another ``block``.
    """

    def make(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        if settings.model.get("block") != "spike_fed":
            raise SettingsError(f"{settings.name}: expected a config with block: spike_fed in its section model")
        return variant(**changes)(settings, tokenizer)

    return make


def gpt2(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Construct a GPT-2 with as many parameters (without embedding and head) as the config's model.

    The width of its feed-forwards is the integer that gives the nearest number. The position embedding is counted.

    Raises:
        SettingsError: a GPT-2 with feed-forwards of width 1 has more parameters.
    """
    config = model_config(settings, tokenizer)
    with torch.device("meta"):
        target = parameter_counts(new_model(config))[1]

    def gpt2_config(n_inner: int) -> GPT2Config:
        return GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_position_embeddings,
            n_embd=config.hidden_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_inner=n_inner,
            tie_word_embeddings=config.tie_word_embeddings,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )

    with torch.device("meta"):
        fewest, second = (parameter_counts(GPT2LMHeadModel(gpt2_config(n)))[1] for n in (1, 2))
    n_inner = 1 + round((target - fewest) / (second - fewest))
    if n_inner < 1:
        raise SettingsError(
            f"a GPT-2 of this width has at least {fewest:,} parameters, expected at most the {target:,} of Nord"
        )
    return GPT2LMHeadModel(gpt2_config(n_inner))


def without_norms(model: PreTrainedModel) -> None:
    """Remove the norms after linear maps and mixing in spike-fed blocks; scale the currents after the mixing by four."""

    def times_four(module: nn.Module, inputs: Any) -> tuple[Tensor]:
        return (4 * inputs[0],)

    for layer in model.blocks.modules():
        for norm in {"norm_h", "norm_q", "norm_k", "norm_v", "norm_o"} & dict(layer.named_children()).keys():
            setattr(layer, norm, nn.Identity())
        if isinstance(layer, SpikeFedResonance):
            layer.norm_o.register_forward_pre_hook(times_four)


def without_stream_norm(model: PreTrainedModel) -> None:
    """Remove the norm before the readout."""
    model.stream_norm = nn.Identity()


def without_these_norms(model: PreTrainedModel) -> None:
    """Remove the norms of :func:`without_norms` and :func:`without_stream_norm`.

    The norms before the first neurons of each half of a block remain.
    """
    without_norms(model)
    without_stream_norm(model)


def dense_plain(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Construct the dense twin without the norms that only the neurons need; its loss is lower without them."""
    model = spike_fed(spiking_values=False, **DENSE)(settings, tokenizer)
    without_these_norms(model)
    return model


#: Makers of the models of ``compare.py``, by name.
MODEL_MAKERS: dict[str, Maker] = {
    "published": published(),
    "recency": published(recency=True),
    "spike-fed": spike_fed(spiking_values=False),
    "spiking-values": spike_fed(spiking_values=True),
    "dense-twin": spike_fed(spiking_values=False, **DENSE),
    "dense-plain": dense_plain,
    "gpt2": gpt2,
}
