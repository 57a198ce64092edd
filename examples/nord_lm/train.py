"""Train a Nord spiking language model.

    python examples/nord_lm/train.py                                    # tiny, on the documentation inside CPython
    python examples/nord_lm/train.py --config small --data books.txt
    accelerate launch examples/nord_lm/train.py --config nord-144m

Every run gets its own folder under ``runs/``; ``--resume FOLDER`` continues one. Ctrl-C saves a checkpoint and stops.
"""

import os
import sys
import warnings

from nordlm.errors import RecipeError
from nordlm.training.settings import parse_arguments, settings_from


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    # Silence the tokenizers' warning about forks: the data loader has no worker processes.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator is found.*")
    options = parse_arguments(arguments)

    # Import late, so that --help does not load them.
    import torch
    from nordlm.training.loop import INTERRUPTED, train
    from nordlm.training.runtime import keep_freed_memory
    from transformers.utils import logging

    logging.disable_progress_bar()  # of transformers
    logging.set_verbosity_error()  # it warns about text beyond the context, which this model handles with a sliding window
    if not torch.cuda.is_available():
        keep_freed_memory()
    try:
        return train(settings_from(options), options.out, options.resume, options.with_report)
    except (RecipeError, FloatingPointError, OSError) as error:  # OSError: a full disk
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before or after the training loop, or a second signal
        print("interrupted; files saved earlier are complete", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
