"""Quantized checkpoints of other tools: which there are, and what their tensors stand for."""
