"""Inference: loading, sampling, chat, learning while reading."""
