"""Whether 2:4 weights reach sparse kernels."""
