"""Any transformers model, one decoder layer in memory at a time; used by quantization, evaluation and inspection."""
