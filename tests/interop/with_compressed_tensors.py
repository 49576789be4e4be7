"""compressed-tensors reads our AWQ folder by its own AutoAWQ converter, and our export: weights and logits.

    python tests/interop/with_compressed_tensors.py [--work FOLDER]

Its `convert_checkpoint` makes a compressed-tensors folder of our AWQ folder; that and `squawq export --format
compressed-tensors` are then loaded by transformers with `CompressedTensorsConfig(dequantize=True)`. Weights come out in
the float16 of the scales: they must be ours rounded to float16, bit for bit. Logits are computed in float32 from them
and compared with our dense export's.
"""

from __future__ import annotations

import sys
from pathlib import Path

from proof import Arrays, Proof, export_both, inputs, our_logits, our_weights, prove

CONVERTED, EXPORTED = "their converter", "our export"


def theirs(models: Path, case: str) -> Arrays:
    import torch
    from compressed_tensors.entrypoints.convert import AutoAWQConverter, convert_checkpoint
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    windows, _ = inputs(models)
    folder = models / "compressed-tensors"
    if case == CONVERTED:
        folder = models / "converted"
        converter = AutoAWQConverter.from_pretrained(str(models / "awq"))
        convert_checkpoint(models / "awq", folder, converter, max_workers=1, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    weights = [
        module.weight.flatten()
        for name, module in sorted(model.named_modules())
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    flat = torch.cat(weights).detach()
    with torch.no_grad():
        logits = model.float()(torch.tensor(windows)).logits
    return {"weights": flat.numpy(), "logits": logits.numpy()}


def ours(models: Path, case: str) -> Arrays:
    import numpy as np

    weights = our_weights(models / "awq").astype(np.float16)
    return {"weights": weights, "logits": our_logits(models / "dense", inputs(models)[0]).numpy()}


PROOF = Proof(
    name="compressed_tensors",
    pip=(
        "install torch==2.13.0",
        "install transformers==5.23.0 accelerate==1.15.0 compressed-tensors==0.20.0",
    ),
    versions=("compressed-tensors", "transformers", "torch"),
    cases={CONVERTED: 0.03, EXPORTED: 0.03},
    theirs=theirs,
    ours=ours,
    prepare=export_both,
)

if __name__ == "__main__":
    sys.exit(prove(__file__, __doc__, PROOF))
