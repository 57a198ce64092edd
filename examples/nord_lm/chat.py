"""Chat with a trained model, which can learn from your text by STDP.

    python examples/nord_lm/chat.py --model runs/tiny-0001/model

The model has no chat template: your lines and its answers are one continuous text. After ``/stdp on`` the model learns from each
of your lines, before it answers, by reward-modulated STDP (spike-timing-dependent plasticity). The rewards are computed from the
errors of its prediction of the line (``nordlm/inference/plasticity.py``). ``/good`` and ``/bad`` reward and punish its last
answer. ``/forget`` reverts all learned changes. ``/live on`` shows the firing rates during an answer.
"""

import argparse
import sys

from nordlm.script import exit_on_interrupt, run_script

with exit_on_interrupt():
    from nordlm.cli import replace_invalid_utf8
    from nordlm.errors import RecipeError
    from nordlm.inference.chat_session import Chat
    from nordlm.inference.loading import open_from_options
    from nordlm.inference.plasticity import Plasticity, add_plasticity_options
    from nordlm.inference.sampling import GENERATION_ERRORS, add_sampling_options


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_sampling_options(parser)
    add_plasticity_options(parser)
    options = parser.parse_args(arguments)
    try:
        model, tokenizer = open_from_options(options)
        plasticity = Plasticity(model, options.synapses, options.learning_rate, options.reward)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    chat = Chat(model, tokenizer, options, plasticity=plasticity)
    chat.say("/help lists the commands, /quit leaves")
    while True:
        try:
            line = replace_invalid_utf8(input("> "))
            if line.strip() and not chat.handle(line.strip()):
                return 0
        except KeyboardInterrupt:  # stops the answer, not the chat
            print()
        except EOFError:
            return 0
        except GENERATION_ERRORS as error:  # for example weights with NaN
            chat.say(f"error: {' '.join(str(error).split())[:300]}")


if __name__ == "__main__":
    sys.exit(run_script(main))
