"""The kernels, in plain Triton."""
