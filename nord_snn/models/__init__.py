"""Whole models as classes of transformers; they need ``pip install "nord-snn[lm]"``."""
