"""NordForCausalLM: the Nord spiking language model, assembled from the layers of nord_snn.

``embedding -> encoder -> input_lif -> blocks -> readout -> norm -> head``; with spike-fed blocks, whose residual stream is
currents, ``embedding -> encoder -> blocks -> stream_norm -> readout -> norm -> head``. The neurons of each token position start
from rest in every forward pass. Only the resonance of the blocks combines positions.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from nord_snn._compat.torch import assert_in_graph
from nord_snn._compat.transformers import (
    CACHE,
    CausalLM,
    cache_from,
    causal_lm_output,
    check_growing_cache,
    refuse_unknown_keywords,
    register_causal_lm,
)
from nord_snn.layers import MembraneReadout, MultiScaleTemporalEncoder, NordBlock, SequenceCache, SpikeFedBlock
from nord_snn.models.nord.checksums import check_checksums, write_checksums
from nord_snn.models.nord.configuration_nord import NordConfig
from nord_snn.models.nord.size import check_memory_of_device
from nord_snn.neurons import AssociativeLIFNode, DenseActivation, NeuronFactory, fire_from_rest, make_neuron
from nord_snn.ops.checks import as_count

__all__ = ["NordForCausalLM"]

_NO_PACKING = "each row is one sequence, packing is not supported"
#: File saved with the weights -> the auto class and the class that it imports, for ``trust_remote_code=True`` in a process
#: that has not imported ``nord_snn.models.nord``.
REMOTE_CODE = {
    "configuration_nord": ("AutoConfig", "NordConfig"),
    "modeling_nord": ("AutoModelForCausalLM", "NordForCausalLM"),
}
#: Keywords of other causal language models that this model does not support, each with the reason.
NOT_OFFERED = {
    "position_ids": "it has no position encoding; the attention mask marks the first token of a row",
    "token_type_ids": "it has one kind of token",
    "output_hidden_states": "its residual stream has time steps; put forward hooks on model.blocks",
    "output_attentions": "scores are not stored",
    "output_router_logits": "it has no experts",
    "is_causal": "it is always causal",
    "cu_seq_lens_q": _NO_PACKING,
    "cu_seq_lens_k": _NO_PACKING,
    "max_length_q": _NO_PACKING,
    "max_length_k": _NO_PACKING,
    "seq_idx": _NO_PACKING,
}


#: Keywords of ``forward``; the nearest is named in the error about a misspelt keyword.
KEYWORDS = (
    "input_ids",
    "attention_mask",
    "past_key_values",
    "labels",
    "use_cache",
    "logits_to_keep",
    "cache",
    "inputs_embeds",
    "num_items_in_batch",
)


class NordForCausalLM(CausalLM):
    """The Nord language model with its head, as a causal language model of transformers.

    Args:
        config: a :class:`NordConfig`.

    Raises:
        ValueError: the weights do not fit into the memory of the device on which they are created.

    Example::

        model = NordForCausalLM(NordConfig(vocab_size=2048, hidden_size=128, num_hidden_layers=2, intermediate_size=256))
        loss = model(input_ids=ids, labels=ids).loss            # ids [B, S]
    """

    config: NordConfig
    config_class = NordConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    tied_weights: ClassVar[dict[str, str]] = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self, config: NordConfig) -> None:
        check_memory_of_device(config)
        # transformers would use the top_k of the resonance as the default top_k of sampling in generate().
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
            neuron = DenseActivation
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
        published = config.block == "published"
        self.input_lif = make_neuron(neuron, width) if published else nn.Identity()
        self.blocks = nn.ModuleList(_make_block(config, neuron) for _ in range(config.num_hidden_layers))
        self.stream_norm = nn.Identity() if published else nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.readout = MembraneReadout(width, neuron=neuron)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.set_no_split_modules(self.blocks)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits of every position, and the loss if labels are passed.

        Only the resonance combines positions, so with a cache of key spikes and values only the new tokens are computed. For
        the first ``max_position_embeddings`` tokens the logits equal those without a cache. After that, the oldest positions
        are removed from the cache. The keys that stay were computed when these positions were still there, except those of the
        first block, which depend on their own token alone; so the logits differ from those of a call with the last
        ``max_position_embeddings`` tokens and no cache.

        Args:
            input_ids: token ids ``[B, S]``, S at most ``max_position_embeddings``; with a cache, the new tokens only.
            attention_mask: 1 for tokens and 0 for padding, which must be before or after the tokens of a row; ``[B, S]``, or
                with a cache one column for every position since its start. None: no padding.
            past_key_values: name of ``cache`` up to transformers 5.23.
            labels: token ids ``[B, S]``, usually ``input_ids``; -100 excludes a position from the loss. The model shifts them.
            use_cache: return a cache. Default: ``config.use_cache``, but False in training mode and with labels.
            logits_to_keep: compute logits for this number of last positions only, 0 for all positions, or for the positions in
                a tensor of integers.
            cache: keys and values of earlier positions; those of the new positions are appended.
            inputs_embeds: embeddings ``[B, S, D]`` in place of ``input_ids``.
            num_items_in_batch: the loss is the sum over labels divided by this number; transformers' ``Trainer`` passes it when
                it accumulates gradients. None: the number of labels.
            others: keywords of other transformers models that this model does not support; they must be None or False.

        Raises:
            TypeError: a keyword is unknown, a cache is passed under both names, or both or none of ``input_ids`` and
                ``inputs_embeds`` are passed.
            ValueError: an input has the wrong shape or dtype or is too long, padding is between tokens, or a keyword is not
                supported.
            RuntimeError: a gradient is required with a cache; call the model under ``torch.no_grad()``.
        """
        refuse_unknown_keywords(type(self).__name__, others, NOT_OFFERED, KEYWORDS)
        cache = cache_from(cache, past_key_values)
        embedded = self._embed(input_ids, inputs_embeds)
        if cache is not None:
            check_growing_cache(cache, self.config.max_position_embeddings)
        n_cached = cache.get_seq_length() if cache is not None else 0
        lengths = self._sequence_lengths(embedded, attention_mask, n_cached)
        _check_labels(labels, embedded)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        if self._uses_checkpointing() and (use_cache or cache is not None):
            raise ValueError("gradient checkpointing needs use_cache=False and no cache")
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        x = fire_from_rest(self.input_lif, self.encoder(embedded))  # [T, B, S, D]
        for index, block in enumerate(self.blocks):
            run = partial(block, cache=self._block_cache(cache, index, lengths))
            x = self.recompute(run, x) if self._uses_checkpointing() else run(x)
        hidden = self.norm(self.readout(self.stream_norm(x)))  # [B, S, D]
        logits = self.lm_head(hidden[:, _positions_to_keep(logits_to_keep, labels)])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return causal_lm_output(loss, logits, cache if use_cache else None)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save configuration, weights and their checksums, and two files of Python code for ``trust_remote_code=True``.

        These files import ``NordConfig`` and this class from nord-snn, which must be installed.
        """
        if kwargs.get("is_main_process", True):
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            for file, (_, name) in REMOTE_CODE.items():
                text = f'"""Made by nord-snn, which must be installed."""\n\nfrom nord_snn.models.nord import {name}\n'
                (folder / f"{file}.py").write_text(text, encoding="utf-8")
        self.config.auto_map = {auto: f"{file}.{name}" for file, (auto, name) in REMOTE_CODE.items()}
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            del self.config.auto_map
        if kwargs.get("is_main_process", True):
            write_checksums(Path(save_directory))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does, and compare the files of a local folder with their checksums.

        Raises:
            ValueError: a file was damaged or changed after the model was saved.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        folder = Path(pretrained_model_name_or_path or "", kwargs.get("subfolder") or "")
        # With output_loading_info, missing and unexpected weights are reported instead of raised.
        has_errors = isinstance(loaded, tuple) and any(loaded[1].values())
        if pretrained_model_name_or_path is not None and folder.is_dir() and not has_errors:
            check_checksums(folder)  # after loading, whose errors about weights that do not fit say more
        return loaded

    def check_assisted_length(self, length: int) -> None:
        """Raise a ValueError if a sequence would exceed the window.

        Assisted decoding checks several tokens in one call, which is inexact once the cache loses its oldest positions.
        """
        if length > self.config.max_position_embeddings:
            raise ValueError(
                "decoding with an assistant or prompt lookup must end within max_position_embeddings = "
                f"{self.config.max_position_embeddings}, got max_length {length}"
            )

    def _uses_checkpointing(self) -> bool:
        """Return whether the backward pass recomputes the blocks (gradient checkpointing)."""
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the next arguments of ``forward``. Without a cache the input is the last tokens that fit into the window."""
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        name = "input_ids" if inputs.get("inputs_embeds") is None else "inputs_embeds"
        inputs[name] = inputs[name][:, -self.config.max_position_embeddings :]
        mask, cache = inputs.get("attention_mask"), inputs.get(CACHE)
        if mask is not None:
            n_cached = cache.get_seq_length() if cache is not None else 0
            if name == "input_ids" and not n_cached and mask.ndim == 2 and mask.shape[1] != input_ids.shape[1]:
                raise ValueError(
                    f"attention_mask must have the shape of input_ids, {list(input_ids.shape)}, got {list(mask.shape)}"
                )
            inputs["attention_mask"] = mask[:, -(n_cached + inputs[name].shape[1]) :]
        return inputs

    def _block_cache(self, cache: Cache | None, index: int, lengths: Tensor | None) -> SequenceCache:
        """Return the cache of one block, with the sequence lengths."""
        if cache is None:
            return SequenceCache(lengths)
        return SequenceCache(lengths, partial(cache.update, layer_idx=index), self.config.max_position_embeddings)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Check the input and return its embeddings ``[B, S, D]``."""
        if (input_ids is None) == (inputs_embeds is None):
            raise TypeError("pass either input_ids [B, S] or inputs_embeds [B, S, D]")
        name, x = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
        assert x is not None
        if input_ids is not None and (x.ndim != 2 or x.is_floating_point()):
            raise ValueError(f"input_ids must be integers [B, S], got {list(x.shape)} of {x.dtype}")
        width = self.config.hidden_size
        if inputs_embeds is not None and (x.ndim != 3 or x.shape[2] != width or not x.is_floating_point()):
            raise ValueError(
                f"inputs_embeds must be floating [B, S, D] with D = {width}, got {list(x.shape)} of {x.dtype}"
            )
        if x.shape[1] == 0:
            raise ValueError(f"{name} must have at least one position, got {list(x.shape)}")
        if x.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"{name} must have at most max_position_embeddings = {self.config.max_position_embeddings} positions, "
                f"got {x.shape[1]}"
            )
        return self.embed_tokens(x) if inputs_embeds is None else x

    def _sequence_lengths(self, embedded: Tensor, attention_mask: Tensor | None, n_cached: int) -> Tensor | None:
        """Return the number of positions of each row from its first token on, ``[B]``; None if no row begins with padding."""
        if attention_mask is None or not self.config.resonance:  # without resonance no position attends to padding
            return None
        expected = [embedded.shape[0], n_cached + embedded.shape[1]]
        if list(attention_mask.shape) != expected:
            positions = "S" if not n_cached else f"{n_cached} cached + S"
            raise ValueError(f"attention_mask must be [B, {positions}] = {expected}, got {list(attention_mask.shape)}")
        tokens = attention_mask != 0
        others = (tokens & (attention_mask != 1)).any()  # NaN is one as well
        starts = tokens[:, 1:] & ~tokens[:, :-1]
        has_gap = (starts.sum(1) + tokens[:, 0] > 1).any()
        message = (
            "padding must be before or after the tokens of a row, got padding between tokens "
            "(generate() needs it before the tokens: padding_side='left')"
        )
        values = "attention_mask must be 1 for tokens and 0 for padding, got other values"
        first = tokens.int().argmax(1)
        if torch.compiler.is_compiling():  # no branch depends on the mask
            assert_in_graph(~others, values)
            assert_in_graph(~has_gap, message)
            return tokens.shape[1] - first
        if others:
            raise ValueError(values)
        if has_gap:
            raise ValueError(message)
        return tokens.shape[1] - first if first.any() else None

    def initialize(self, module: nn.Module) -> None:
        """Initialise an embedding kaiming-uniform with a = sqrt(5), other modules with their ``reset_parameters``."""
        if isinstance(module, nn.Embedding):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]


def _check_labels(labels: Tensor | None, embedded: Tensor) -> None:
    """Raise a ValueError if labels are not integers ``[B, S]``: another shape with as many values would be paired wrongly."""
    if labels is None:
        return
    if (
        labels.shape != embedded.shape[:2]
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
    ):
        raise ValueError(
            f"labels must be integers [B, S] = {list(embedded.shape[:2])}, got {list(labels.shape)} of {labels.dtype}"
        )


def _positions_to_keep(logits_to_keep: int | Tensor, labels: Tensor | None) -> slice | Tensor:
    """Return the index of the positions whose logits are computed."""
    all_positions = not isinstance(logits_to_keep, Tensor) and logits_to_keep == 0
    if labels is not None and not all_positions:
        raise ValueError(f"labels need logits of every position, logits_to_keep=0, got {logits_to_keep}")
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.ndim != 1 or logits_to_keep.is_floating_point() or logits_to_keep.is_complex():
            raise ValueError(
                f"logits_to_keep must be a number or a tensor of positions [K], got {list(logits_to_keep.shape)} of "
                f"{logits_to_keep.dtype}"
            )
        return logits_to_keep
    as_count(logits_to_keep, "logits_to_keep", 0)
    return slice(-logits_to_keep, None) if logits_to_keep else slice(None)


def _make_block(config: NordConfig, neuron: NeuronFactory) -> nn.Module:
    """Make one block of the configured kind."""
    sizes = (config.hidden_size, config.num_attention_heads, config.intermediate_size)
    common: dict[str, Any] = {
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
register_causal_lm(NordConfig.model_type, NordForCausalLM.__name__)
