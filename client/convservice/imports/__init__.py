"""Networks from elsewhere: an ONNX file, a PyTorch module."""
