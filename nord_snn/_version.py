"""The version number of the package, of its wheel and of the files that it writes."""

__version__ = "0.1.0"
