"""Engines: built, recorded and explained."""
