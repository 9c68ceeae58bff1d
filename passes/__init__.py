"""Transformations of a program, one file per pass."""
