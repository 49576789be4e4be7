"""Matrix products over 16-bit and 4-bit weights. `dispatch` is the only face."""
