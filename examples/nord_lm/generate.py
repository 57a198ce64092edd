"""Continue a prompt with a trained model.

python examples/nord_lm/generate.py "The list type"
python examples/nord_lm/generate.py --model runs/tiny-0001/model --temperature 0.7 --top-p 0.9 "import os"
"""

import argparse
import sys

from nordlm.script import exit_on_interrupt, run_script

with exit_on_interrupt():
    import torch
    from nordlm.cli import replace_invalid_utf8
    from nordlm.errors import RecipeError
    from nordlm.inference.loading import open_from_options
    from nordlm.inference.sampling import GENERATION_ERRORS, add_sampling_options, generate_arguments
    from transformers import TextStreamer

MAX_PROMPT_BYTES = 1 << 20  # of standard input, which could be endless


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompt", nargs="?", default="", help="text to continue; '-' reads it from standard input")
    add_sampling_options(parser)
    options = parser.parse_args(arguments)
    try:
        model, tokenizer = open_from_options(options)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    prompt = replace_invalid_utf8(options.prompt)
    if prompt == "-":
        content = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        if len(content) > MAX_PROMPT_BYTES:
            print(f"error: expected a prompt of at most {MAX_PROMPT_BYTES:,} bytes", file=sys.stderr)
            return 1
        prompt = content.decode("utf-8", "replace")
    ids = tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"] or [
        tokenizer.eos_token_id
    ]
    if len(ids) > model.config.max_position_embeddings:
        print(
            f"note: only the last {model.config.max_position_embeddings} tokens of the prompt are used", file=sys.stderr
        )
    try:
        model.generate(
            torch.tensor([ids], device=model.device),
            max_new_tokens=options.max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
            **generate_arguments(options.temperature, options.top_k, options.top_p, options.repetition_penalty),
        )
    except KeyboardInterrupt:
        print()
        return 130
    except GENERATION_ERRORS as error:  # for example weights with NaN
        print(f"error: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
