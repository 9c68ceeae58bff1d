"""Programs of the decoders whose attention is raised."""

from tests.onnxruntime.conftest import program_of

__all__ = ["program_of"]
