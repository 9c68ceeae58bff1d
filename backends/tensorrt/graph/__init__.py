"""The program as strongly typed ONNX for TensorRT."""
