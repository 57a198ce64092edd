"""Code that the language-model scripts share."""
