"""What is left of a model: perplexity, and divergence from the 16-bit one."""
