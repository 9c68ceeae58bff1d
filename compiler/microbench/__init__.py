"""Measure what a GPU gains from fewer bits and from 2:4 zeros, on the GEMMs of one model.

Needs torch with CUDA and nothing else. Not run on a GPU by us yet: what it measures is unverified, see ``docs/probe.md``.
"""

from compile_sparse.compiler.microbench.probe import probe_model

__all__ = ["probe_model"]
