"""Bridges to other libraries: each module imports the library of its name; no other module of the package imports it."""
