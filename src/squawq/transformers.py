"""`import squawq.transformers`, and transformers loads and runs AWQ GEMM checkpoints with squawq: ours and AutoAWQ's.

This line replaces transformers' own "awq" quantizer, which needs gptqmodel, in this process. GPTQ, AutoRound and
compressed-tensors models are loaded by squawq where the package that transformers needs for them is not installed. What
is registered is in `integrations/`; here is nothing else.
"""

from __future__ import annotations

from squawq.integrations import quantizer, stored

quantizer.register()
stored.register()
