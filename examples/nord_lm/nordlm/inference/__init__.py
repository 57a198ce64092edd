"""Trained models: loading, sampling, talking, learning while reading."""
