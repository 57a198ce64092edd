"""Training: settings, the loop, checkpoints, what is shown."""
