"""From a Hugging Face folder to a program."""

from compile_sparse.compiler.capture.folder import ModelFolder, open_folder
from compile_sparse.compiler.capture.huggingface import capture, capture_model

__all__ = ["ModelFolder", "capture", "capture_model", "open_folder"]
