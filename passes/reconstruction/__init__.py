"""Repairing what pruning removed, in closed form."""
