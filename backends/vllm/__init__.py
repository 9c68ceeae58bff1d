"""vLLM: checkpoints that it serves, measured inside it, in an interpreter of its own.

Nothing is imported here: vLLM's own processes import ``plugin`` from this package.
"""
