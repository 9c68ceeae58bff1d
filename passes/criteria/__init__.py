"""Importance scores for pruning, one file per criterion."""
