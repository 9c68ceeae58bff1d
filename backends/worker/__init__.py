"""The measuring process, once for every runtime: its serving loop and its operations on what a backend loads.

A backend derives a worker that opens a folder as a ``model.Model``. Only numpy and the standard library are imported here: a
runtime's own interpreter, where compile-sparse is not installed, runs these files where they lie (``start``).
"""
