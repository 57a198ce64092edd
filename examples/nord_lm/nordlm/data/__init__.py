"""Data: sources of text, tokenization, sequences of tokens."""
