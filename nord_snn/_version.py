"""The version of the package, which its wheel and the files that it writes contain."""

__version__ = "0.1.0"
