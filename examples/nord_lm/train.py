"""Train a Nord spiking language model.

    python examples/nord_lm/train.py                                    # tiny, on the documentation inside CPython
    python examples/nord_lm/train.py --config small --data books.txt
    accelerate launch examples/nord_lm/train.py --config nord-144m

Every run has its own folder under ``runs/``; ``--resume FOLDER`` continues a run. Ctrl-C saves a checkpoint and stops the run.
"""

import os
import sys
import warnings

from nordlm.script import INTERRUPTED, exit_on_interrupt, run_script

with exit_on_interrupt():
    from nordlm.errors import RecipeError
    from nordlm.training.settings import parse_arguments, settings_from


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    # Silence the tokenizers' warning about forks: the data loader has no worker processes.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator is found.*")
    options = parse_arguments(arguments)

    with exit_on_interrupt():  # late, so that --help does not load them
        import torch
        from nordlm.training.loop import train
        from nordlm.training.processes import is_first_process
        from nordlm.training.runtime import keep_freed_memory
        from transformers.utils import logging

    logging.disable_progress_bar()  # of transformers
    logging.set_verbosity_error()  # no warning about text beyond the context: this model has a sliding window
    if not torch.cuda.is_available():
        keep_freed_memory()
    settings = None
    try:
        settings = settings_from(options)
        return train(settings, options.out, options.resume, options.with_report)
    except (RecipeError, OSError) as error:  # OSError: a full disk
        in_all_processes = settings is None or getattr(error, "shared", False)
        if is_first_process() or not in_all_processes:
            print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before or after the training loop, or a second signal
        print("interrupted; files saved earlier are complete", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(run_script(main, keep_running=True))
