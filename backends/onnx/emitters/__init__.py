"""Operators of the graph as nodes of standard ONNX, a file per kind."""
