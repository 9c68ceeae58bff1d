"""Residual branches: found in the graph, and removed from it."""
