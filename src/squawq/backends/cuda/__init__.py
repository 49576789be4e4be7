"""NVIDIA GPUs: Triton kernels, and a CUDA graph for each decode step."""
