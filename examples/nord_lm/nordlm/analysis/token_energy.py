"""Count operations and energy of one generated token, and those of the dense twin (the same products once, with real numbers)."""

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
        model: a causal language model in eval mode; GPT-2 and similar models need ``attn_implementation="eager"``.
        ids: token ids, S at least 2.
    """
    cache = cache_of(model(input_ids=ids[:, :-1], use_cache=True))
    with EnergyProfiler(model) as profiler:
        model(input_ids=ids[:, -1:], use_cache=True, **{CACHE: cache})
    return profiler.profile


def energy_sentence(profile: EnergyProfile) -> str:
    """Return a summary of the profile in three sentences."""
    without_memory, sram, dram = (
        profile.joules_under(name) / profile.twin_joules_under(name)
        for name in ("45nm-fp32", "45nm-fp32-sram", "45nm-fp32-dram")
    )
    with_real_inputs = [product for product in profile.products if product.macs]
    repeated = (
        sum(product.dense for product in with_real_inputs if product.steps == profile.time_steps > 1) / profile.dense
    )
    from_spikes = 1 - sum(product.dense for product in with_real_inputs) / profile.dense
    once = 1 - from_spikes - repeated
    joules_of_additions = profile.acs * CONVENTIONS["45nm-fp32"].ac
    without_spikes = (profile.joules - joules_of_additions) / profile.twin_joules
    quantised = profile.joules_under("45nm-int8") / profile.quantised_twin_joules
    return (
        f"A generated token costs {without_memory:.2f} times the energy of its dense twin without memory, {sram:.2f} times with "
        f"all memory in SRAM, {dram:.2f} times with all memory in DRAM, and {quantised:.1f} times the energy of the quantised "
        f"twin with 8-bit weights in both. Of the multiply-accumulates, counted at every time step, {from_spikes:.0%} have "
        f"spikes as input, {repeated:.0%} have real numbers as input at each of {profile.time_steps} time steps, and {once:.0%} "
        f"have real numbers as input once. Even without any spike a token would cost {without_spikes:.2f} times the twin's "
        "energy without memory."
    )
