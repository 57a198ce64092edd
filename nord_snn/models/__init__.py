"""Whole models, as classes of transformers (extra ``lm``)."""
