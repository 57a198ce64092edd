"""Training: settings, loop, checkpoints, progress."""
