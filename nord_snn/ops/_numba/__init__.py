"""What all Numba kernels share."""
