"""The models that are set beside each other: one config, with fields changed, or a GPT-2 of its size."""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from nordlm.training.loop import model_config
from nordlm.training.model_card import parameter_counts
from nordlm.training.settings import Settings, SettingsError
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from nord_snn.layers import SpikeFedResonance
from nord_snn.models.nord import NordForCausalLM

__all__ = ["KINDS", "Maker", "gpt2", "nord", "variant", "without_norms", "without_stream_norm", "without_these_norms"]

Maker = Callable[[Settings, PreTrainedTokenizerBase], PreTrainedModel]

#: Fields that say how large a model is and what it keeps. With none but these a config is the published model of that size. The
#: clusters are among them because the cascade's total gain grows with their number: the published 64 saturate a small width.
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


#: Fields that make a model its own dense twin.
DENSE = {"dense": True, "t_fast": 1, "t_slow": 0}


def nord(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model of the config."""
    return NordForCausalLM(model_config(settings, tokenizer))


def variant(**changes: Any) -> Maker:
    """The model of the config with fields changed."""

    def make(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        return nord(replace(settings, model=settings.model | changes), tokenizer)

    return make


def published(keep: Collection[str] = (), **changes: Any) -> Maker:
    """The published model in the sizes of the config, and in what else is to be kept of it, with fields changed."""

    def make(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        kept = {name: value for name, value in settings.model.items() if name in SIZES or name in keep}
        return nord(replace(settings, model=kept | changes), tokenizer)

    return make


def spike_fed(**changes: Any) -> Maker:
    """The spike-fed model of the config, with fields changed.

    Raises:
        SettingsError: the config's blocks are others.
    """

    def make(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        if settings.model.get("block") != "spike_fed":
            raise SettingsError(f"{settings.name}: expected a config with block: spike_fed in its section model")
        return variant(**changes)(settings, tokenizer)

    return make


def gpt2(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A GPT-2 with as many parameters without embedding and head, to within one neuron of its feed-forwards.

    Its table of positions counts among these.

    Raises:
        SettingsError: its attention alone has more.
    """
    config = model_config(settings, tokenizer)
    with torch.device("meta"):
        wanted = parameter_counts(NordForCausalLM(config))[1]

    def of(n_inner: int) -> GPT2Config:
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
        one, two = (parameter_counts(GPT2LMHeadModel(of(n)))[1] for n in (1, 2))
    n_inner = 1 + round((wanted - one) / (two - one))
    if n_inner < 1:
        raise SettingsError(f"a GPT-2 of this width has {one:,} parameters at least, more than the {wanted:,} of Nord")
    return GPT2LMHeadModel(of(n_inner))


def without_norms(model: PreTrainedModel) -> None:
    """Spike-fed blocks whose neurons behind a linear map get its currents as they are, and those behind the mixing four times."""

    def four_times(module: nn.Module, inputs: Any) -> tuple[Tensor]:
        return (4 * inputs[0],)

    for layer in model.blocks.modules():
        for norm in {"norm_h", "norm_q", "norm_k", "norm_v", "norm_o"} & dict(layer.named_children()).keys():
            setattr(layer, norm, nn.Identity())
        if isinstance(layer, SpikeFedResonance):
            layer.norm_o.register_forward_pre_hook(four_times)


def without_stream_norm(model: PreTrainedModel) -> None:
    """A readout that gets the stream as it is."""
    model.stream_norm = nn.Identity()


def without_these_norms(model: PreTrainedModel) -> None:
    """Both: norms before the first neurons of each half of a block are left."""
    without_norms(model)
    without_stream_norm(model)


def dense_plain(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The dense twin without the norms that stand there for the neurons' sake: it is better off without them."""
    model = spike_fed(spiking_values=False, **DENSE)(settings, tokenizer)
    without_these_norms(model)
    return model


#: What ``compare.py`` trains, by name.
KINDS: dict[str, Maker] = {
    "published": published(),
    "recency": published(recency=True),
    "spike-fed": spike_fed(spiking_values=False),
    "spiking-values": spike_fed(spiking_values=True),
    "dense-twin": spike_fed(spiking_values=False, **DENSE),
    "dense-plain": dense_plain,
    "gpt2": gpt2,
}
