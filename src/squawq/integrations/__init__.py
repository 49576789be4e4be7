"""Other libraries load and run our checkpoints: transformers."""
