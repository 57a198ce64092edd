"""The version, in one place: the package, its wheel and what it writes into files all read it here."""

__version__ = "0.1.0"
