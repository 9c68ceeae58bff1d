"""The built-in targets, one YAML file each."""

from pathlib import Path

__all__ = ["folder"]


def folder() -> Path:
    """Folder of the built-in target files (entry point of ``compile_sparse.targets``)."""
    return Path(__file__).parent
