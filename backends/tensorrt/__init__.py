"""TensorRT: strongly typed ONNX, engines where a builder can make them, and their measurement."""
