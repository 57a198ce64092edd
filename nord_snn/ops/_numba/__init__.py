"""Code shared by all Numba kernels."""
