"""Replacing one matrix product by two thinner ones."""
