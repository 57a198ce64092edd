"""Train a Nord spiking language model.

    python examples/nord_lm/train.py                                    # tiny, on text that every Python has
    python examples/nord_lm/train.py --config small --data books.txt
    accelerate launch examples/nord_lm/train.py --config nord-144m

Every run gets a folder of its own under ``runs/``; ``--resume FOLDER`` goes on with one. Ctrl-C saves before it stops.
"""

import os
import sys
import warnings

from nordlm.errors import RecipeError
from nordlm.training.settings import parse_arguments, settings_from


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    # Its warning about forks is not for a loader without workers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator is found.*")
    options = parse_arguments(arguments)

    # Only now, since --help needs none of it.
    import torch
    from nordlm.training.loop import INTERRUPTED, train
    from nordlm.training.runtime import keep_freed_memory
    from transformers.utils import logging

    logging.disable_progress_bar()  # of transformers; the panel shows what there is to see
    logging.set_verbosity_error()  # it warns where text grows past the context, over which this model slides
    if not torch.cuda.is_available():
        keep_freed_memory()
    try:
        return train(settings_from(options), options.out, options.resume, options.with_report)
    except (RecipeError, FloatingPointError, OSError) as error:  # OSError: a full disk
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before training has begun, after it has ended, or asked for twice
        print("interrupted; what was saved before is whole", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
