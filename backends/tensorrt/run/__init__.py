"""Engines and graphs, run and measured."""
