"""Fidelity, performance, quality, gates and the verdict."""
