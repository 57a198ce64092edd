"""Talk with a trained model, and let it learn from what you type while you do.

    python examples/nord_lm/chat.py --model runs/tiny-0001/model

The model knows no roles: what you type and what it answers is one running text. With ``/stdp on`` it learns from what you type
by reward-modulated STDP (``nordlm/inference/plasticity.py``): the reward is its prediction error on the text that you really
typed. ``/good`` and ``/bad`` reward or punish its last answer. ``/forget`` takes back all of it. ``/live on`` shows what
fires while it answers.
"""

import argparse
import sys

from nordlm.cli import as_text
from nordlm.errors import RecipeError
from nordlm.inference.chat_session import Chat
from nordlm.inference.loading import open_for
from nordlm.inference.plasticity import Plasticity, plasticity_arguments
from nordlm.inference.sampling import sampling_arguments


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sampling_arguments(parser)
    plasticity_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        model, tokenizer = open_for(options)
        plasticity = Plasticity(model, options.synapses, options.rate, options.reward)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    chat = Chat(model, tokenizer, options, plasticity=plasticity)
    chat.say("/help lists the commands, /quit leaves")
    while True:
        try:
            line = as_text(input("> "))
            if line.strip() and not chat.handle(line.strip()):
                return 0
        except KeyboardInterrupt:  # stops an answer, not the conversation
            print()
        except EOFError:
            return 0
        except (ValueError, RuntimeError) as error:  # weights that give no probabilities, say; the conversation goes on
            chat.say(f"that did not work: {' '.join(str(error).split())[:300]}")


if __name__ == "__main__":
    sys.exit(main())
