"""NordForCausalLM: the Nord spiking language model, assembled from the parts of nord_snn.

``embedding -> encoder -> input_lif -> blocks -> readout -> norm -> head``; with spike-fed blocks, whose stream is of
currents, ``embedding -> encoder -> blocks -> stream_norm -> readout -> norm -> head``. Every token position is a row of
neurons that starts from rest in every forward pass; positions meet only in the resonance of the blocks.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from nord_snn.layers import MembraneReadout, MultiScaleTemporalEncoder, NordBlock, SpikeFedBlock
from nord_snn.neurons import AssociativeLIFNode, NeuronFactory, SmoothActivation, fire_from_rest, make_neuron

try:
    from .configuration_nord import NordConfig  # type: ignore[import-not-found]  # shipped beside the weights as remote code
except ImportError:
    from configuration_nord import NordConfig  # beside the scripts

__all__ = ["NordForCausalLM"]

GROWING = (DynamicLayer, DynamicSlidingWindowLayer)
NOT_OFFERED = ("inputs_embeds", "position_ids", "output_hidden_states", "output_attentions")


class NordForCausalLM(PreTrainedModel, GenerationMixin):
    """The Nord language model with its head, as an ordinary causal language model of transformers.

    Args:
        config: a :class:`NordConfig`.

    Example::

        model = NordForCausalLM(NordConfig(vocab_size=2048, hidden_size=128, num_hidden_layers=2, intermediate_size=256))
        loss = model(input_ids=ids, labels=ids).loss            # ids [B, S]
    """

    config: NordConfig
    config_class = NordConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012  # transformers reads it off the class

    def __init__(self, config: NordConfig) -> None:
        # transformers would read the resonance's top_k as the sampler's and start generate() with it.
        top_k = config.__dict__.pop("top_k")
        try:
            super().__init__(config)
        finally:
            config.top_k = top_k
        neuron: NeuronFactory = partial(
            AssociativeLIFNode,
            n_clusters=config.n_clusters,
            cascade_radius=config.cascade_radius,
            cascade_gain=config.cascade_gain,
            threshold=config.threshold,
            beta_mem=config.beta_mem,
            beta_syn=config.beta_syn,
            v_reset=config.v_reset,
            refractory_steps=config.refractory_steps,
            surrogate=config.surrogate,
            alpha=config.alpha,
            backend=config.backend,
        )
        if config.dense:
            neuron = SmoothActivation
        width = config.hidden_size
        self.gradient_checkpointing = False  # transformers switches it on
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.encoder = MultiScaleTemporalEncoder(
            width,
            t_fast=config.t_fast,
            t_slow=config.t_slow,
            fast_scale=config.fast_scale,
            slow_scale=config.slow_scale,
        )
        published = config.block == "nord"
        self.input_lif = make_neuron(neuron, width) if published else nn.Identity()
        self.blocks = nn.ModuleList(_block(config, neuron) for _ in range(config.num_hidden_layers))
        self.stream_norm = nn.Identity() if published else nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.readout = MembraneReadout(width, neuron=neuron)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        # Who spreads a model over devices looks each of these up in it and gives up where one is not there.
        self._no_split_modules = {type(block).__name__ for block in self.blocks}
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits for every position, and the loss if there are labels.

        Tokens meet only in the resonance, so with a cache of key spikes and values the new tokens alone are computed. The
        logits are the same up to and including the token that follows a full window of ``max_position_embeddings``
        positions. Beyond, the oldest leave the cache, and blocks behind the first see further back than without one.

        Args:
            input_ids: token ids ``[B, S]``, S at most ``max_position_embeddings``; with a cache, the new ones.
            attention_mask: 1 for tokens and 0 for padding, which may stand before or behind the tokens of a row;
                ``[B, S]``, or with a cache one column for every position since it was begun. None: all are tokens.
            past_key_values: keys and values of what came before; is appended to.
            labels: ``[B, S]``, the same ids, -100 where nothing is to be predicted; the shift is done here.
            use_cache: return a cache; default: as the configuration says, but not while training or where there are labels.
            logits_to_keep: compute logits for the last that many positions only; 0 for all.
            kwargs: passed on to the loss (``num_items_in_batch``).

        Raises:
            ValueError: wrong rank, too long, padding between tokens, or something is asked for that the model does not have.
            RuntimeError: a gradient through earlier positions in a cache; call it under ``torch.no_grad()``.
        """
        self._check(input_ids, past_key_values, kwargs)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        lengths = self._lengths(input_ids, attention_mask, seen)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        if self._recomputes() and (use_cache or past_key_values is not None):
            raise ValueError("with gradient checkpointing there is no cache: pass use_cache=False")
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        x = fire_from_rest(self.input_lif, self.encoder(self.embed_tokens(input_ids)))  # [T, B, S, D]
        for index, block in enumerate(self.blocks):
            through = partial(block, lengths=lengths)
            if past_key_values is not None:
                remember = partial(past_key_values.update, layer_idx=index)
                through = partial(through, remember=remember, window=self.config.max_position_embeddings)
            x = self._gradient_checkpointing_func(through, x) if self._recomputes() else through(x)
        hidden = self.norm(self.readout(self.stream_norm(x)))  # [B, S, D]
        logits = self.lm_head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None)

    def _assisted_decoding(self, *args: Any, generation_config: GenerationConfig, **kwargs: Any) -> Any:
        """Candidates are tried several at a time, which is exact as long as the window need not slide."""
        if generation_config.max_length > self.config.max_position_embeddings:
            raise ValueError(
                "decoding with an assistant or prompt lookup must end within max_position_embeddings = "
                f"{self.config.max_position_embeddings}, got max_length {generation_config.max_length}"
            )
        return super()._assisted_decoding(*args, generation_config=generation_config, **kwargs)

    def _recomputes(self) -> bool:
        """Whether blocks are computed again in the backward pass instead of kept."""
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What ``forward`` gets next. Without a cache the window slides over what is longer, and all of it is computed."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
        )
        inputs["input_ids"] = inputs["input_ids"][:, -self.config.max_position_embeddings :]
        if inputs.get("attention_mask") is not None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            inputs["attention_mask"] = inputs["attention_mask"][:, -(seen + inputs["input_ids"].shape[1]) :]
        inputs.pop("position_ids", None)  # the model has none
        return inputs

    def _check(self, input_ids: Tensor, past: Cache | None, others: dict[str, Any]) -> None:
        if refused := [name for name in NOT_OFFERED if others.get(name) is not None and others[name] is not False]:
            raise ValueError(f"NordForCausalLM does not offer {', '.join(refused)}")
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(f"input_ids must be integers [B, S], got {list(input_ids.shape)} of {input_ids.dtype}")
        if input_ids.shape[1] == 0:
            raise ValueError("input_ids [B, S] must have at least one position")
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"input_ids have {input_ids.shape[1]} positions, more than "
                f"max_position_embeddings = {self.config.max_position_embeddings}"
            )
        if past is not None:
            layers = past.layers if isinstance(past, DynamicCache) else [past]
            if strange := sorted({type(layer).__name__ for layer in layers if type(layer) not in GROWING}):
                raise ValueError(
                    f"past_key_values must be a DynamicCache, whose layers grow and stay exact, got {strange[0]}"
                )
            for layer in layers:
                window = getattr(layer, "sliding_window", self.config.max_position_embeddings)
                if window != self.config.max_position_embeddings:
                    raise ValueError(
                        f"past_key_values were made for a window of {window} positions, and max_position_embeddings is "
                        f"{self.config.max_position_embeddings}: use DynamicCache(config=model.config)"
                    )

    def _lengths(self, input_ids: Tensor, attention_mask: Tensor | None, seen: int) -> Tensor | None:
        """Positions of each row from its first token on, ``[B]``; None if no row has padding in front."""
        if attention_mask is None or not self.config.resonance:  # without it no position sees another
            return None
        expected = [input_ids.shape[0], seen + input_ids.shape[1]]
        if list(attention_mask.shape) != expected:
            positions = "S" if not seen else f"{seen} cached + S"
            raise ValueError(f"attention_mask must be [B, {positions}] = {expected}, got {list(attention_mask.shape)}")
        tokens = attention_mask != 0
        if tokens.all():
            return None
        begins = tokens[:, 1:] & ~tokens[:, :-1]
        if (begins.sum(1) + tokens[:, 0] > 1).any():
            raise ValueError(
                "padding may stand before or behind the tokens of a row, got some between them "
                "(generate() needs it in front: padding_side='left')"
            )
        first = tokens.int().argmax(1)
        return tokens.shape[1] - first if first.any() else None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Embedding kaiming-uniform with a = sqrt(5), everything else as its own ``reset_parameters`` says."""
        # A module may have got some of its parameters from a checkpoint: those stay.
        loaded = {
            parameter: parameter.clone()
            for parameter in module.parameters(recurse=False)
            if getattr(parameter, "_is_hf_initialized", False)
        }
        if isinstance(module, nn.Embedding):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
        for parameter, value in loaded.items():
            parameter.copy_(value)


def _block(config: NordConfig, neuron: NeuronFactory) -> nn.Module:
    """One block as the configuration has it."""
    sizes = (config.hidden_size, config.num_attention_heads, config.intermediate_size)
    common = {
        "top_k": config.top_k,
        "recency": config.recency,
        "resonance": config.resonance,
        "norm_eps": config.layer_norm_eps,
        "neuron": neuron,
    }
    if config.block == "spike_fed":
        return SpikeFedBlock(*sizes, spiking_values=config.spiking_values, **common)
    return NordBlock(*sizes, residual_scale=0.1 / config.num_hidden_layers, clamp_floor=config.clamp_floor, **common)


AutoConfig.register(NordConfig.model_type, NordConfig, exist_ok=True)
AutoModelForCausalLM.register(NordConfig, NordForCausalLM, exist_ok=True)
# save_pretrained puts these two files beside the weights, for trust_remote_code=True where nord_snn is installed.
NordConfig.register_for_auto_class()
NordForCausalLM.register_for_auto_class("AutoModelForCausalLM")
