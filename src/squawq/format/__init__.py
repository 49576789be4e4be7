"""Checkpoints on disk: AWQ GEMM integers, nibble order, safetensors shards."""
