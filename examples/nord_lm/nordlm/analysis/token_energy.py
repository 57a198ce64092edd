"""Count the operations and the energy of one generated token, and compare them with the dense twin."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nord_snn._compat.transformers import CACHE, cache_of
from nord_snn.monitor import CONVENTIONS, EnergyProfile, EnergyProfiler

__all__ = [
    "energy_sentence",
    "profile_generated_token",
]


@torch.no_grad()
def profile_generated_token(model: PreTrainedModel, ids: Tensor) -> EnergyProfile:
    """Profile the last token of ``ids [1, S]``, with all tokens before it in a cache.

    Args:
        model: a causal language model in eval mode; of GPT-2 and its like with ``attn_implementation="eager"``.
        ids: token ids, S at least 2.
    """
    cache = cache_of(model(input_ids=ids[:, :-1], use_cache=True))
    with EnergyProfiler(model) as profiler:
        model(input_ids=ids[:, -1:], use_cache=True, **{CACHE: cache})
    return profiler.profile


def energy_sentence(profile: EnergyProfile) -> str:
    """Summarize the profile in two sentences."""
    plain, sram, dram = (
        profile.joules_under(name) / profile.twin_joules_under(name)
        for name in ("45nm-fp32", "45nm-fp32-sram", "45nm-fp32-dram")
    )
    by_numbers = [product for product in profile.products if product.macs]
    repeated = sum(product.dense for product in by_numbers if product.steps == profile.time_steps > 1) / profile.dense
    fed = 1 - sum(product.dense for product in by_numbers) / profile.dense
    once = 1 - fed - repeated
    additions = profile.acs * CONVENTIONS["45nm-fp32"].ac
    silent = (profile.joules - additions) / profile.twin_joules
    quantised = profile.joules_under("45nm-int8") / profile.quantised_twin_joules
    return (
        f"A generated token costs {plain:.2f} times the energy of its dense twin without memory, {sram:.2f} times with all "
        f"memory in SRAM, {dram:.2f} times with all of it in DRAM, and {quantised:.1f} times that of the quantised twin with "
        f"weights of 8 bits in both. Of the multiply-accumulates spikes feed {fed:.0%}, {repeated:.0%} see numbers at each of "
        f"{profile.time_steps} steps, and {once:.0%} see numbers once; even if no neuron fired, it would be {silent:.2f} times "
        "the twin's energy without memory."
    )
