"""Writes docs/models.md: what squawq does with each family.

python tools/docs_models.py docs/models.md

Each column has a test over all families that it says yes to; tests/test_models_page.py names them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from squawq.export.gguf_architectures import ARCHITECTURES
from squawq.families import FAMILIES

HEAD = """# Models

A family is a `model_type` in config.json. A multimodal model's is in its `text_config`: its text model is quantized and
run, its other parts are copied. **Quantize**: `squawq quantize` and `squawq eval`. **Our decoder**:
squawq's own kernels, batch-invariant, on CPUs and on NVIDIA GPUs. **On transformers**: where our decoder does not run a
model, or with `--model-impl transformers`, transformers' model class runs it in the same engine, slower
([inference](explanation/inference.md#families-without-a-decoder)). **Export**: the formats of
[`squawq export`](how-to/export.md).

A config.json may ask for what our decoder does not compute, such as another activation: a warning says so, and the
model runs on transformers' class. gpt-oss takes groups of 64 or 32. In Gemma 4 with per-layer inputs (E2B, E4B), the
per-layer embedding and its projections stay in 16 bits. Another family takes
[one entry](contributing/adding-a-family.md).

| family | quantize | our decoder | on transformers | export |
|---|---|---|---|---|
"""


def page() -> str:
    """The page's text."""
    lines = []
    for name, family in sorted(FAMILIES.items()):
        decoder = "CPU, CUDA" if family.decoder else ""
        formats = ["awq", "gptq", "compressed-tensors", "dense"]
        formats += ["gguf"] if name in ARCHITECTURES else []
        lines.append(f"| `{name}` | yes | {decoder} | yes | {', '.join(formats)} |")
    runs = sum(family.decoder is not None for family in FAMILIES.values())
    return f"{HEAD}{chr(10).join(lines)}\n\n{len(FAMILIES)} families, {runs} of them on our decoder.\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
