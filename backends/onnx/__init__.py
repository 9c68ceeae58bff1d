"""From a program to a standard ONNX graph. Backends that read ONNX extend it with a dialect of their own."""
