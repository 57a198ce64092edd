"""NordConfig: sizes, constants and variant of a Nord language model."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

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


@strict
class NordConfig(PreTrainedConfig):
    """Configuration of :class:`NordForCausalLM`. The defaults are the published model of 144,334,525 parameters.

    Fields that other configurations of transformers have too (``hidden_size`` and others) have the same names. Other fields:

    Args:
        t_fast: fast time steps of the encoder.
        t_slow: slow time steps of the encoder.
        fast_scale: initial strength of the fast path.
        slow_scale: initial strength of the slow path.
        n_clusters: clusters of every neuron layer; must divide ``hidden_size`` and ``intermediate_size``; None for no cascade.
        cascade_radius: initial range of the cascades, in neighbouring clusters on each side.
        cascade_gain: initial gain of the cascades.
        threshold: initial threshold of every neuron.
        beta_mem: initial membrane decay.
        beta_syn: initial synaptic decay.
        v_reset: membrane potential while refractory.
        refractory_steps: refractory period after a spike, in time steps.
        surrogate: name of the surrogate derivative.
        alpha: sharpness of the surrogate derivative.
        resonance: False builds a control model without resonance, in which no position attends to another.
        top_k: keys selected per query in the resonance.
        recency: whether scores decrease with distance; the published model has no position information.
        clamp_floor: initial floor of the leaky clamps of the published block; the spike-fed block has no clamps.
        block: ``"published"`` (or ``"nord"``, its earlier name), or ``"spike_fed"``, whose linear maps receive spikes only.
        spiking_values: whether the values of a spike-fed resonance are spikes.
        dense: build the dense twin, with GELU in place of all neurons and one time step.
        backend: backend of the neurons, see ``nord_snn.ops.associative_lif``.

    Raises:
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
        """Check all values before a model is built."""
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
        for field in ("t_slow", "cascade_radius", "refractory_steps"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must be at least 0, got {getattr(self, field)}")
        for field in ("beta_mem", "beta_syn"):
            if not 0 < getattr(self, field) < 1:
                raise ValueError(f"{field} must lie in (0, 1), got {getattr(self, field)}")
        resolve_surrogate(self.surrogate, self.alpha)
        if self.backend != "auto" and self.backend not in BACKENDS:
            raise ValueError(f"backend must be 'auto' or one of {list(BACKENDS)}, got {self.backend!r}")
        check_heads(self.hidden_size, self.num_attention_heads)
        if self.n_clusters is not None:
            check_clusters(self.hidden_size, self.n_clusters)
            check_clusters(self.intermediate_size, self.n_clusters)
