"""Bridges to other libraries: each module imports the library of its name, which no other module of the package imports."""
