"""From a 16-bit checkpoint to an AWQ INT4 one, one decoder layer in memory at a time."""
