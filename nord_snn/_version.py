"""The version number: the package, its wheel and the files that it writes read it from here."""

__version__ = "0.1.0"
