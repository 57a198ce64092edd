"""Names of transformers that it renames or calls private. Knows 5.23 and 5.24.

5.24 renames the keyword ``past_key_values`` of ``forward``, ``prepare_inputs_for_generation`` and of outputs to ``cache``. A
model takes both names here, and hands the cache on under the one that the installed release uses.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

__all__ = [
    "CACHE",
    "CausalLM",
    "cache_from",
    "cache_of",
    "causal_lm_output",
    "check_growing_cache",
    "refuse_unknown_keywords",
    "register_causal_lm",
]

#: What the installed release calls the cache.
CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)

#: Layers of a ``DynamicCache`` that keep what they are given, all of it or the newest. Others round it or change it in place.
_GROWING = (DynamicLayer, DynamicSlidingWindowLayer)


def cache_from(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Return the cache that was passed under either name.

    Raises:
        TypeError: it was passed under both.
    """
    if cache is not None and past_key_values is not None:
        raise TypeError(
            f"past_key_values is the old name of cache: pass one of them; generate() of this transformers takes {CACHE}"
        )
    return past_key_values if cache is None else cache


def causal_lm_output(loss: Tensor | None, logits: Tensor, cache: Cache | None) -> CausalLMOutputWithPast:
    """Return the output of a causal language model, its cache under the name of the installed release."""
    return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})


def cache_of(output: CausalLMOutputWithPast) -> Cache | None:
    """Return the cache in an output of any release."""
    return output.get(CACHE)


def check_growing_cache(cache: Any, window: int) -> None:
    """Check that a cache keeps what it is given, for as many positions as the model has.

    Raises:
        ValueError: it is of another kind, or was made for another window.
    """
    layers = cache.layers if isinstance(cache, DynamicCache) else [cache]
    for layer in layers:
        if type(layer) not in _GROWING:
            raise ValueError(
                f"{CACHE} must be a DynamicCache, whose layers grow and stay exact, got {type(layer).__name__}"
            )
        if getattr(layer, "sliding_window", window) != window:
            raise ValueError(
                f"{CACHE} was made for a window of {layer.sliding_window} positions, and max_position_embeddings is "
                f"{window}: use DynamicCache(config=model.config)"
            )


def refuse_unknown_keywords(owner: str, keywords: dict[str, Any], not_offered: dict[str, str]) -> None:
    """Raise for every keyword but those that are known, not offered, and switched off (None or False).

    Args:
        owner: who was called, for the message.
        keywords: what was passed beside the arguments that the owner takes.
        not_offered: keywords that transformers' models may take, and why this one does not.

    Raises:
        ValueError: something is asked for that is not offered.
        TypeError: nobody knows the keyword.
    """
    for name, value in keywords.items():
        if name not in not_offered:
            raise TypeError(f"{owner} does not know the keyword {name!r}")
        if value is not None and value is not False:
            raise ValueError(f"{owner} does not offer {name}: {not_offered[name]}")


def register_causal_lm(model_type: str, name: str) -> None:
    """Enter a class among the causal language models: by its name ``Trainer`` knows that labels are shifted."""
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = name


class CausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model of transformers, with public names in place of the underscored ones that it reads.

    Class attributes:
        tied_weights: parameters that are one where the configuration ties word embeddings, ``{name: name of the other}``.
    """

    tied_weights: ClassVar[dict[str, str]] = {}
    #: Lets ``Trainer`` pass ``num_items_in_batch``; without it, it would look for ``**kwargs``.
    accepts_loss_kwargs = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Hand the tied weights on; transformers reads them off the class."""
        super().__init_subclass__(**kwargs)
        cls._tied_weights_keys = cls.tied_weights

    def keep_whole(self, modules: Iterable[nn.Module]) -> None:
        """Name the kinds of modules that a device map or FSDP must not split; each must occur in the model."""
        self._no_split_modules = {type(module).__name__ for module in modules}

    def initialize(self, module: nn.Module) -> None:
        """Give a module's own parameters their initial values."""
        raise NotImplementedError

    def check_assisted_length(self, length: int) -> None:
        """Raise if candidates of an assistant cannot be tried up to this length, prompt included."""

    def recompute(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Call ``function`` under gradient checkpointing, as ``gradient_checkpointing_enable`` has set it up."""
        return self._gradient_checkpointing_func(function, x)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # A module may have got some of its parameters from a checkpoint: those stay.
        loaded = {
            parameter: parameter.clone()
            for parameter in module.parameters(recurse=False)
            if getattr(parameter, "_is_hf_initialized", False)
        }
        self.initialize(module)
        for parameter, value in loaded.items():
            parameter.copy_(value)

    def _assisted_decoding(self, *args: Any, generation_config: GenerationConfig, **kwargs: Any) -> Any:
        self.check_assisted_length(generation_config.max_length)
        return super()._assisted_decoding(*args, generation_config=generation_config, **kwargs)
