"""Inference: loading, sampling, chat, learning from the text that is read."""
