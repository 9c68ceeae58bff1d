"""Replacing one GEMM by two thinner ones."""
