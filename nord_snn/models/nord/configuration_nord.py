"""NordConfig: sizes, constants and variant of a Nord language model."""

import difflib
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from nord_snn._compat.transformers import config_fields, config_keywords, generation_defaults, nearest
from nord_snn.ops.cascade import check_clusters
from nord_snn.ops.checks import check_heads
from nord_snn.ops.dispatch import BACKENDS
from nord_snn.ops.surrogate import resolve_surrogate

__all__ = ["NordConfig"]

POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "max_position_embeddings",
    "t_fast",
    "top_k",
)
#: Upper limits, so that a damaged configuration raises an error instead of building blocks or running time steps for hours.
UPPER_LIMITS = {"num_hidden_layers": 1000, "t_fast": 65_536, "t_slow": 65_536}
FLOAT32_MAX = torch.finfo(torch.float32).max
DTYPES = ("float32", "float64", "float16", "bfloat16")


@strict
class NordConfig(PreTrainedConfig):
    """Configuration of :class:`NordForCausalLM`. The defaults are the published Nord model of 144,334,525 parameters.

    Fields that most configurations of transformers have, such as ``hidden_size``, have the names and meanings of transformers.
    Other fields:

    Args:
        t_fast: number of fast time steps of the encoder.
        t_slow: number of slow time steps of the encoder, which follow the fast ones.
        fast_scale: initial factor of the input current in fast time steps.
        slow_scale: initial factor of the input current in slow time steps.
        n_clusters: clusters of every layer of neurons; must divide ``hidden_size`` and ``intermediate_size``; None: no cascade.
        cascade_radius: initial range of the cascades, in neighbouring clusters on each side.
        cascade_gain: initial gain of the cascades.
        threshold: initial threshold of every neuron.
        beta_mem: initial membrane decay per time step, in (0, 1).
        beta_syn: initial synaptic decay per time step, in (0, 1).
        v_reset: membrane potential while refractory.
        refractory_steps: refractory period after a spike, in time steps.
        surrogate: name of the surrogate derivative, from :data:`nord_snn.ops.SURROGATES`.
        alpha: sharpness of the surrogate derivative.
        resonance: False: a control model without resonance (attention), in which no position attends to another.
        top_k: number of keys selected per query in the resonance.
        recency: whether scores decrease with distance; the published model has no position information.
        clamp_floor: initial floor of the leaky clamps of the published block; the spike-fed block has no clamps.
        block: ``"published"`` (or ``"nord"``, its earlier name), or ``"spike_fed"``, whose linear maps receive spikes only.
        spiking_values: whether the values of a spike-fed resonance are spikes.
        dense: build the dense twin, with GELU in place of all neurons and one time step.
        backend: backend of the neurons, see ``nord_snn.ops.associative_lif``.

    Raises:
        TypeError: a keyword is not a field.
        ValueError: a value is out of its range, or widths, heads and clusters do not fit together.
    """

    model_type = "nord"

    vocab_size: int = 128256
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 1024
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    t_fast: int = 8
    t_slow: int = 2
    fast_scale: float = 15.0
    slow_scale: float = 5.0
    n_clusters: int | None = 64
    cascade_radius: int = 3
    cascade_gain: float = 0.8
    threshold: float = 0.25
    beta_mem: float = 0.9
    beta_syn: float = 0.5
    v_reset: float = -0.1
    refractory_steps: int = 2
    surrogate: str = "nord_atan"
    alpha: float = 4.0
    resonance: bool = True
    top_k: int = 64
    recency: bool = False
    clamp_floor: float = -0.1
    block: str = "published"
    spiking_values: bool = False
    dense: bool = False
    backend: str = "auto"

    @property
    def sliding_window(self) -> int:
        """Return the window of a cache, under the name that the caches of transformers read."""
        return self.max_position_embeddings

    def __post_init__(self, **kwargs: Any) -> None:
        """Check all names and values before a model is built."""
        self._check_keywords(kwargs)
        self._check_common_fields(kwargs)
        super().__post_init__(**kwargs)
        for field in ("output_hidden_states", "output_attentions"):
            if getattr(self, field, False):
                raise ValueError(f"{field} is not supported: put forward hooks on model.blocks")
        if self.block == "nord":
            self.block = "published"
        if self.block not in ("published", "spike_fed"):
            raise ValueError(f"block must be 'published' or 'spike_fed', got {self.block!r}")
        if self.spiking_values and self.block != "spike_fed":
            raise ValueError(
                "spiking_values=True needs block='spike_fed': the values of the published block are means over time"
            )
        if self.clamp_floor != NordConfig.clamp_floor and self.block != "published":
            raise ValueError("clamp_floor needs block='published': no other block has a leaky clamp")
        if self.dense and (self.t_fast, self.t_slow) != (1, 0):
            raise ValueError(
                f"dense=True needs one time step, t_fast=1 and t_slow=0, got {self.t_fast} and {self.t_slow}"
            )
        for field in POSITIVE:
            if not 1 <= getattr(self, field) < 2**31:
                raise ValueError(f"{field} must be at least 1 and less than 2^31, got {getattr(self, field)}")
        for field, limit in UPPER_LIMITS.items():
            if getattr(self, field) > limit:
                raise ValueError(f"{field} must be at most {limit}, got {getattr(self, field)}")
        for field in ("t_slow", "cascade_radius", "refractory_steps"):
            if not 0 <= getattr(self, field) < 2**31:
                raise ValueError(f"{field} must be at least 0 and less than 2^31, got {getattr(self, field)}")
        for field in NordConfig.__annotations__:
            value = getattr(self, field)
            if isinstance(value, float) and not abs(value) <= FLOAT32_MAX:
                raise ValueError(f"{field} must be finite in float32, got {value}")
        if self.layer_norm_eps < 0:
            raise ValueError(f"layer_norm_eps must be at least 0, got {self.layer_norm_eps}")
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, field)
            for token in ids if isinstance(ids, list) else [ids]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(f"{field} must be less than vocab_size = {self.vocab_size}, got {token}")
        for field in ("beta_mem", "beta_syn"):
            if not 0 < getattr(self, field) < 1:
                raise ValueError(f"{field} must lie in (0, 1), got {getattr(self, field)}")
        resolve_surrogate(self.surrogate, self.alpha)
        if self.backend != "auto" and self.backend not in BACKENDS:
            raise ValueError(f"backend must be 'auto' or one of {list(BACKENDS)}, got {self.backend!r}")
        check_heads(self.hidden_size, self.num_attention_heads, "num_attention_heads")
        if self.n_clusters is not None:
            check_clusters(self.hidden_size, self.n_clusters)
            check_clusters(self.intermediate_size, self.n_clusters)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration of a dictionary; keywords override its entries.

        Keywords that are not fields are ignored, because they may be those of a tokenizer (``padding_side``).

        Raises:
            TypeError: an entry is not a field, or a keyword is almost the name of a field.
        """
        own = [field.name for field in fields(cls)]
        for name in kwargs.keys() - own:
            close = difflib.get_close_matches(name, own, 1, cutoff=0.85)
            if close and close[0] != f"{name}_id":  # eos_token is a keyword of a tokenizer
                raise TypeError(f"{cls.__name__} has no field {name!r}: did you mean {close[0]}?")
        return super().from_dict(config_dict, **kwargs)

    def _check_keywords(self, kwargs: dict[str, Any]) -> None:
        """Check the keywords that are not fields; transformers would store any keyword."""
        own, generation = {field.name for field in fields(self)}, generation_defaults()
        for name, value in kwargs.items():
            if name in generation:
                if value is not None and value != generation[name]:
                    raise TypeError(
                        f"{name} is a parameter of generate(), got {value!r} in the configuration of the model"
                    )
            elif name not in config_keywords():
                raise TypeError(f"{type(self).__name__} has no field {name!r}{nearest(name, own)}")

    def _check_common_fields(self, kwargs: dict[str, Any]) -> None:
        """Check the fields of every configuration of transformers; this model supports few of their values."""
        expected: dict[str, tuple[Any, ...]] = {
            "is_encoder_decoder": (False,),
            "chunk_size_feed_forward": (0,),
            "model_type": (None, self.model_type),
            "attn_implementation": (None, "eager"),
            "experts_implementation": (None, "eager"),
            "per_layer_config": (None,),
            "allow_global_per_layer_attribute_access": (None, False),
            "serialize_explicit_per_layer_config": (None, False),
        }
        values = {name: getattr(self, name) for name in config_fields()} | kwargs
        for name, allowed in expected.items():
            if not any(values.get(name) is value or values.get(name) == value for value in allowed):
                raise ValueError(f"{name} must be {allowed[-1]!r} for this model, got {values[name]!r}")
        kinds = {"return_dict": bool, "transformers_version": str, "problem_type": str, "tokenizer_class": str}
        for name, kind in kinds.items():
            if not isinstance(values.get(name), kind | None):
                raise TypeError(f"{name} must be a {kind.__name__} or None, got {values[name]!r}")
        for name in ("dtype", "torch_dtype"):
            value = values.get(name)
            known = value in DTYPES if isinstance(value, str) else value in (None, *(getattr(torch, d) for d in DTYPES))
            if not known:
                raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, got {value!r}")
        for name in ("id2label", "label2id", "quantization_config", "auto_map"):
            if (
                values.get(name) is not None
                and not isinstance(values[name], dict)
                and not hasattr(values[name], "to_dict")
            ):
                raise ValueError(f"{name} must be a dictionary, got {values[name]!r}")
        if not all(str(key).isdecimal() for key in values["id2label"] or {}):
            raise ValueError(f"the keys of id2label must be numbers, got {list(values['id2label'])}")
        names = values["architectures"]
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"architectures must be a list of names, got {names!r}")
        n_labels = values.get("num_labels")
        if n_labels is not None and (type(n_labels) is not int or not 0 <= n_labels < 2**16):
            raise ValueError(f"num_labels must be from 0 to {2**16 - 1}, got {n_labels!r}")
