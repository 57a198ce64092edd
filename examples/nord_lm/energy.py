"""Estimate the energy of a generated token, for each matrix product, and compare it with the dense twin.

    python examples/nord_lm/energy.py --config nord-144m
    python examples/nord_lm/energy.py --model runs/tiny-0001/model --context 64

The dense twin computes the same products once, with real numbers instead of spikes. All positions before the token are in a
cache. With ``--config`` the model has initial weights.
"""

import argparse
import sys

from nordlm.script import exit_on_interrupt, run_script

with exit_on_interrupt():
    import torch
    from nordlm.analysis.token_energy import energy_sentence, profile_generated_token
    from nordlm.cli import file_name, number
    from nordlm.errors import RecipeError
    from nordlm.inference.loading import load_model
    from nordlm.training.building import check_backend, new_model
    from nordlm.training.settings import CONFIGS, read_config
    from transformers import set_seed
    from transformers.utils import logging

    from nord_snn.models.nord import NordForCausalLM


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--config",
        help="config of a model with initial weights: "
        + ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml"))),
    )
    source.add_argument("--model", type=file_name, help="folder with a trained model")
    parser.add_argument(
        "--context",
        type=number(2, kind=int),
        help="number of positions, including the token (default: the model's context)",
    )
    parser.add_argument(
        "--every", action="store_true", help="list every product separately instead of summing over transformer blocks"
    )
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    try:
        model = load_model(options.model) if options.model else _initial_model(options.config)
        check_backend(model.config, "cpu")
    except (RecipeError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    longest = model.config.max_position_embeddings
    context = options.context or longest
    if context > longest:
        print(f"error: --context must be at most {longest}, the model's context, got {context}", file=sys.stderr)
        return 1
    ids = torch.randint(model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    profile = profile_generated_token(model.eval(), ids)
    weights = "" if options.model else "initial weights, "
    print(f"The last of {context} random tokens, {weights}{model.num_parameters():,} parameters.\n")
    print(profile if options.every else profile.grouped())
    print(f"\n{energy_sentence(profile)}")
    return 0


def _initial_model(config: str) -> NordForCausalLM:
    set_seed(0)
    return new_model(read_config(config).model_config())


if __name__ == "__main__":
    sys.exit(run_script(main))
