"""AutoAWQ 0.2.9, the format's author, reads our folder: logits against ours.

    python tests/interop/with_autoawq.py [--work FOLDER]

`AutoAWQForCausalLM.from_quantized(..., fuse_layers=False)` with the transformers it was last tested with. AutoAWQ
refuses to load on a CPU without intel_extension_for_pytorch, so the one function that names the device is replaced; its
WQLinear_GEMM then takes its plain torch path, which rounds activations to float16.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import patch

from proof import Arrays, Proof, inputs, our_logits, our_weights, prove


def theirs(models: Path, case: str) -> Arrays:
    import torch

    from awq import AutoAWQForCausalLM
    from awq.models import base
    from awq.modules.linear import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    windows, _ = inputs(models)
    folder = str(models / "awq")
    with patch.object(base, "get_best_device", return_value="plain torch"):
        model = AutoAWQForCausalLM.from_quantized(folder, fuse_layers=False, device_map={"": "cpu"}).model
    linears = [(name, module) for name, module in sorted(model.named_modules()) if isinstance(module, WQLinear_GEMM)]
    weights = [
        dequantize_gemm(linear.qweight, linear.qzeros, linear.scales.float(), 4, linear.group_size).T.flatten()
        for _, linear in linears
    ]
    with torch.no_grad():
        logits = model(torch.tensor(windows)).logits.float()
    return {"weights": torch.cat(weights).numpy(), "logits": logits.numpy()}


def ours(models: Path, case: str) -> Arrays:
    return {"weights": our_weights(models / "awq"), "logits": our_logits(models / "awq", inputs(models)[0]).numpy()}


PROOF = Proof(
    name="autoawq",
    pip=(
        "install torch==2.13.0",
        "install transformers==4.51.3 accelerate==1.15.0 datasets==5.0.1",
        "install --no-deps autoawq==0.2.9",
    ),
    versions=("autoawq", "transformers", "torch"),
    cases={"float16": 0.05},
    theirs=theirs,
    ours=ours,
)

if __name__ == "__main__":
    sys.exit(prove(__file__, __doc__, PROOF))
