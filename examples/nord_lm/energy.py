"""What a generated token costs: every product, and joules under published conventions, beside the dense twin.

    python examples/nord_lm/energy.py --config nord-144m
    python examples/nord_lm/energy.py --model runs/tiny-0001/model --context 64

The token is computed with a cache that holds the positions before it. With ``--config`` the weights are the initial ones.
"""

import argparse
import sys
from pathlib import Path

import torch
from data import DataError
from generate import ModelError, load_model, number
from modeling_nord import NordForCausalLM
from settings import CONFIGS, SettingsError, read_config
from torch import Tensor
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from nord_snn._compat.transformers import CACHE, cache_of
from nord_snn.monitor import CONVENTIONS, EnergyProfile, EnergyProfiler

__all__ = ["generated_token", "sentence"]


@torch.no_grad()
def generated_token(model: PreTrainedModel, ids: Tensor) -> EnergyProfile:
    """What the last of ``ids [1, S]`` costs where all before it are in a cache.

    Args:
        model: a causal language model in eval mode; of GPT-2 and its like with ``attn_implementation="eager"``.
        ids: token ids, S at least 2.
    """
    cache = cache_of(model(input_ids=ids[:, :-1], use_cache=True))
    with EnergyProfiler(model) as profiler:
        model(input_ids=ids[:, -1:], use_cache=True, **{CACHE: cache})
    return profiler.profile


def sentence(profile: EnergyProfile) -> str:
    """What follows from the figures."""
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


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--config",
        help="a model of this config, with initial weights: "
        + ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml"))),
    )
    what.add_argument("--model", type=Path, help="folder with a trained model")
    parser.add_argument("--context", type=number(2, kind=int), help="positions in all (default: the model's window)")
    parser.add_argument(
        "--every", action="store_true", help="every product by itself, not those of all blocks together"
    )
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    try:
        model = load_model(options.model) if options.model else _initial(options.config)
    except (ModelError, DataError, SettingsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    longest = model.config.max_position_embeddings
    context = options.context or longest
    if context > longest:
        print(f"error: --context must be at most {longest}, the model's window, got {context}", file=sys.stderr)
        return 1
    ids = torch.randint(model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    profile = generated_token(model.eval(), ids)
    weights = "" if options.model else "initial weights, "
    print(f"One token at the end of {context} random ones, {weights}{model.num_parameters():,} parameters.\n")
    print(profile if options.every else profile.grouped())
    print(f"\n{sentence(profile)}")
    return 0


def _initial(config: str) -> NordForCausalLM:
    set_seed(0)
    return NordForCausalLM(read_config(config).model_config())


if __name__ == "__main__":
    sys.exit(main())
