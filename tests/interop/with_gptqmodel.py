"""GPTQModel loads `squawq export --format gptq`: weights and logits.

    python tests/interop/with_gptqmodel.py [--work FOLDER]

Its torch kernel multiplies the identity by each 4-bit linear in float16: the weights must be ours rounded to float16,
bit for bit. Logits are compared with our dense export's.
"""

from __future__ import annotations

import sys
from pathlib import Path

from proof import Arrays, Proof, inputs, our_logits, our_weights, prove

EXPORTED = "our export"


def theirs(models: Path, case: str) -> Arrays:
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    windows, _ = inputs(models)
    model = GPTQModel.load(str(models / "gptq"), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model
    linears = [module for _, module in sorted(model.named_modules()) if isinstance(module, BaseQuantLinear)]
    with torch.no_grad():
        weights = [linear(torch.eye(linear.in_features, dtype=torch.float16)).T.flatten() for linear in linears]
        logits = model(torch.tensor(windows)).logits.float()
    return {"weights": torch.cat(weights).numpy(), "logits": logits.numpy()}


def ours(models: Path, case: str) -> Arrays:
    import numpy as np

    weights = our_weights(models / "awq").astype(np.float16)
    return {"weights": weights, "logits": our_logits(models / "dense", inputs(models)[0]).numpy()}


def prepare(models: Path) -> None:
    from squawq.export.run import export

    for name in ("gptq", "dense"):
        export(models / "awq", models / name, name)


PROOF = Proof(
    name="gptqmodel",
    pip=("install torch==2.14.1 setuptools wheel numpy", "install --no-build-isolation gptqmodel==7.7.0"),
    versions=("gptqmodel", "transformers", "torch"),
    cases={EXPORTED: 0.1},
    theirs=theirs,
    ours=ours,
    prepare=prepare,
)

if __name__ == "__main__":
    sys.exit(prove(__file__, __doc__, PROOF))
