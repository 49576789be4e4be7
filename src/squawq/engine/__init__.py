"""The engine: many requests share one model. Start at protocol.py, which says what goes in and out on both sides."""
