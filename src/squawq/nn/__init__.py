"""Our own decoder for Llama-like families, over 16-bit and AWQ weights alike."""
