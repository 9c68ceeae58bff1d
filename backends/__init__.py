"""Serving runtimes: one folder per backend, and the built-in targets."""
