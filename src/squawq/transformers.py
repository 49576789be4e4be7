"""`import squawq.transformers`, and transformers loads and runs AWQ GEMM checkpoints with squawq: ours and AutoAWQ's.

This line replaces transformers' own "awq" quantizer, which needs gptqmodel, in this process. What it registers is in
`integrations/`; here is nothing else.
"""

from __future__ import annotations

from squawq.integrations.quantizer import register

register()
