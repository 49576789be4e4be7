"""Quantized folders written for other readers: compressed-tensors, GGUF, dense 16-bit."""
