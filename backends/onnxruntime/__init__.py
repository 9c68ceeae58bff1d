"""ONNX Runtime: a folder with ``model.onnx`` that plain ONNX Runtime and onnxruntime-genai load."""

from compile_sparse.backends.onnxruntime.backend import OnnxRuntimeBackend

__all__ = ["OnnxRuntimeBackend"]
