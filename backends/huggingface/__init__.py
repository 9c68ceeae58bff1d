"""Hugging Face checkpoints: a folder that ``from_pretrained`` loads."""

from compile_sparse.backends.huggingface.backend import HuggingFaceBackend

__all__ = ["HuggingFaceBackend"]
