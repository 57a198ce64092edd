"""Shared code of the language-model scripts."""
