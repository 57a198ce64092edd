"""NordConfig: everything that decides what a Nord language model computes."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

__all__ = ["NordConfig"]


@strict
class NordConfig(PreTrainedConfig):
    """Configuration of :class:`NordForCausalLM`. The defaults are the published model of 144,334,525 parameters.

    Names that the hub has are the hub's. The others:

    Args:
        t_fast: fast time steps of the encoder.
        t_slow: slow time steps of the encoder.
        fast_scale: initial strength of the fast path.
        slow_scale: initial strength of the slow path.
        n_clusters: clusters of every neuron layer; must divide ``hidden_size`` and ``intermediate_size``.
        cascade_radius: neighbours on each side that a cascade starts with.
        cascade_gain: initial gain of the cascades.
        threshold: initial threshold of every neuron.
        beta_mem: initial membrane decay.
        beta_syn: initial synaptic decay.
        v_reset: membrane while refractory.
        refractory_steps: steps of rest after a spike.
        surrogate: name of the surrogate derivative.
        alpha: its sharpness.
        resonance: False builds the control in which positions never meet.
        top_k: keys kept per query in the resonance.
        recency: whether scores fall with distance; the published model has no positions at all.
        clamp_floor: initial floor of the leaky clamps.
        block: kind of block; ``"nord"``.
        backend: backend of the neurons, see ``nord_snn.ops.associative_lif``.

    Raises:
        ValueError: widths, heads and clusters do not fit together.
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
    use_cache: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    t_fast: int = 8
    t_slow: int = 2
    fast_scale: float = 15.0
    slow_scale: float = 5.0
    n_clusters: int = 64
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
    block: str = "nord"
    backend: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuse sizes that do not fit together, before anything is built."""
        super().__post_init__(**kwargs)
        if self.block != "nord":
            raise ValueError(f"block must be 'nord', got {self.block!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size, got {self.num_attention_heads} heads "
                f"for a width of {self.hidden_size}"
            )
        for field in ("hidden_size", "intermediate_size"):
            if getattr(self, field) % self.n_clusters:
                raise ValueError(
                    f"{field} must be a multiple of n_clusters, got {getattr(self, field)} and {self.n_clusters}"
                )
