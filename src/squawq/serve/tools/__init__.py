"""Tool calls and structured outputs: the grammars that answers follow, and the parser that reads calls back."""
