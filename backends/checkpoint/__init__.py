"""Hugging Face folders: the classes that load them, their tensors, and their quantized formats."""
