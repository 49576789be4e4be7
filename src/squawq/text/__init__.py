"""Text and token ids: tokenizer, chat templates, and the sandboxed child processes that run untrusted ones."""
