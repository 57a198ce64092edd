"""Private and renamed names of transformers. Supports 5.23 and 5.24.

5.24 renames the keyword ``past_key_values`` of ``forward``, ``prepare_inputs_for_generation`` and of outputs to ``cache``. A
model accepts both names here, and returns the cache under the name that the installed release uses.
"""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

__all__ = [
    "CACHE",
    "CausalLM",
    "cache_from",
    "cache_of",
    "causal_lm_output",
    "check_growing_cache",
    "config_fields",
    "config_keywords",
    "generation_defaults",
    "nearest",
    "refuse_unknown_keywords",
    "register_causal_lm",
]

#: Keyword of the cache in the installed release.
CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)

#: Layers of a ``DynamicCache`` that store all or the newest keys and values unchanged. Others quantise or overwrite them.
_GROWING = (DynamicLayer, DynamicSlidingWindowLayer)


def cache_from(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Return the cache that was passed under either name.

    Raises:
        TypeError: a cache was passed under both names.
    """
    if cache is not None and past_key_values is not None:
        raise TypeError(
            f"pass either cache or past_key_values, its old name: generate() of this transformers release takes {CACHE}"
        )
    return past_key_values if cache is None else cache


def causal_lm_output(loss: Tensor | None, logits: Tensor, cache: Cache | None) -> CausalLMOutputWithPast:
    """Return the output of a causal language model, with the cache under the name of the installed release."""
    return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})


def cache_of(output: CausalLMOutputWithPast) -> Cache | None:
    """Return the cache of an output, under the name of the installed release."""
    return output.get(CACHE)


def check_growing_cache(cache: Any, window: int) -> None:
    """Check that a cache stores keys and values unchanged, for as many positions as the model's window.

    Raises:
        ValueError: the cache changes keys and values, for example by quantisation, or has another window.
    """
    layers = cache.layers if isinstance(cache, DynamicCache) else [cache]
    for layer in layers:
        if type(layer) not in _GROWING:
            raise ValueError(
                f"{CACHE} must be a DynamicCache whose layers store keys and values unchanged, got {type(layer).__name__}"
            )
        if getattr(layer, "sliding_window", window) != window:
            raise ValueError(
                f"{CACHE} must have a window of max_position_embeddings = {window} positions, got {layer.sliding_window}: use "
                "DynamicCache(config=model.config)"
            )


@cache
def config_keywords() -> frozenset[str]:
    """Return the keywords that ``PreTrainedConfig`` takes beside its fields: its properties, and entries of ``config.json``.

    Properties such as ``_attn_implementation`` are keywords without the underscore.
    """
    properties = {
        name.removeprefix("_")
        for name in dir(PreTrainedConfig)
        if isinstance(member := inspect.getattr_static(PreTrainedConfig, name), property) and member.fset is not None
    }
    entries = {"_name_or_path", "_commit_hash", "auto_map", "model_type", "quantization_config", "tokenizer_class"}
    return frozenset(properties | entries) - {"rope_scaling"}  # our models have no rotary position encoding


@cache
def config_fields() -> frozenset[str]:
    """Return the fields that every configuration of transformers has."""
    return frozenset(field.name for field in dataclasses.fields(PreTrainedConfig))


def generation_defaults() -> dict[str, Any]:
    """Return the defaults of ``generate``'s parameters; ``PreTrainedConfig`` discards keywords with these names."""
    return GenerationConfig._get_default_generation_params()


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``": did you mean X?"`` with X the known name most like ``name``, or an empty string if none is like it."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f": did you mean {close[0]}?" if close else ""


def refuse_unknown_keywords(
    owner: str, keywords: dict[str, Any], not_offered: dict[str, str], known: Iterable[str] = ()
) -> None:
    """Raise an error for every keyword, except those of ``not_offered`` that are None or False.

    Args:
        owner: name of the model or function, for the message.
        keywords: the additional keyword arguments that were passed.
        not_offered: keywords of other transformers models, each with the reason why this model does not support it.
        known: keywords that exist, for the message.

    Raises:
        ValueError: a keyword of ``not_offered`` is neither None nor False.
        TypeError: a keyword is unknown.
    """
    for name, value in keywords.items():
        if name not in not_offered:
            raise TypeError(f"{owner} got an unknown keyword {name!r}{nearest(name, known)}")
        if value is not None and value is not False:
            raise ValueError(f"{owner} does not support {name}: {not_offered[name]}")


def register_causal_lm(model_type: str, name: str) -> None:
    """Register a class as a causal language model: ``Trainer`` shifts labels for registered names."""
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = name


def _has_generation_config(path: Any, options: dict[str, Any]) -> bool:
    """Return whether a folder, or a repository that was downloaded before, has a ``generation_config.json``."""
    location = {name: options[name] for name in ("cache_dir", "revision", "subfolder") if options.get(name) is not None}
    try:
        return cached_file(path, GENERATION_CONFIG_NAME, **location, local_files_only=True) is not None
    except OSError:
        return False


class CausalLM(PreTrainedModel, GenerationMixin):
    """Base class of causal language models, with public names for the private names that transformers reads.

    Class attributes:
        tied_weights: ``{name: name of the parameter that it shares}``, if the configuration ties word embeddings.
    """

    tied_weights: ClassVar[dict[str, str]] = {}
    generation_config: Any
    #: Makes ``Trainer`` pass ``num_items_in_batch``; otherwise it checks the signature for ``**kwargs``.
    accepts_loss_kwargs = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Set the class attribute from which transformers reads tied weights."""
        super().__init_subclass__(**kwargs)
        cls._tied_weights_keys = cls.tied_weights

    def set_no_split_modules(self, modules: Iterable[nn.Module]) -> None:
        """Set the classes of modules that a device map or FSDP must not split; each must occur in the model."""
        self._no_split_modules = {type(module).__name__ for module in modules}

    def initialize(self, module: nn.Module) -> None:
        """Initialise the parameters of a module, without those of submodules."""
        raise NotImplementedError

    def check_assisted_length(self, length: int) -> None:
        """Raise an error if assisted decoding up to this length, prompt included, is not possible."""

    def adjust_generation_fn(
        self, generation_config: Any, from_auto_class: Any, from_pipeline: Any, path: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Load ``generation_config.json``, without keywords of ``from_pretrained`` that are fields of the model.

        ``from_pretrained`` passes its keywords to the configuration and to the generation config, and some fields of the model
        have the name of a parameter of ``generate``. Without ``generation_config.json`` transformers would read all of
        ``config.json`` as generation config; here the generation config of the new model is kept.
        """
        fields = {field.name for field in dataclasses.fields(self.config)}
        shared = (generation_defaults().keys() & fields) - {"use_cache"}  # has the same meaning in both
        initial = self.generation_config
        options = {name: value for name, value in kwargs.items() if name not in shared}
        super().adjust_generation_fn(generation_config, from_auto_class, from_pipeline, path, *args, **options)
        if generation_config is None and path is not None and not _has_generation_config(path, options):
            self.generation_config = initial

    def recompute(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Call ``function`` under gradient checkpointing, with the settings of ``gradient_checkpointing_enable``."""
        return self._gradient_checkpointing_func(function, x)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Restores parameters that were loaded from a checkpoint.
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
