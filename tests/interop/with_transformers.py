"""transformers' own AWQ integration reads our folder, with gptqmodel's kernels: logits against ours.

    python tests/interop/with_transformers.py [--work FOLDER]

`AutoModelForCausalLM.from_pretrained` as anybody calls it; squawq is not in that environment. gptqmodel wants a newer
torch than the one installed first, and replaces it (several GB). "its choice" is the kernel it takes by itself on this
CPU; with AVX-512 it compiles that at the first use, a minute and a half.
"""

from __future__ import annotations

import sys
from pathlib import Path

from proof import Arrays, Proof, inputs, our_logits, prove

# gptqmodel's AwqTorchLinear by dtype, and the kernel that it chooses.
CASES = {"torch float32": 0.03, "torch float16": 0.05, "torch bfloat16": 0.4, "its choice float16": 0.05}


def theirs(models: Path, case: str) -> Arrays:
    import torch
    from transformers import AutoModelForCausalLM, AwqConfig

    windows, _ = inputs(models)
    kernel, _, dtype = case.rpartition(" ")
    settings = {"quantization_config": AwqConfig(backend="torch_awq")} if kernel == "torch" else {}
    folder = models / "awq"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), device_map="cpu", **settings)
    used = type(model.model.layers[0].self_attn.q_proj).__name__
    if "Awq" not in used or (kernel == "torch" and used != "AwqTorchLinear"):
        sys.exit(f"the linears are {used}")
    with torch.no_grad():
        return {"logits": model(torch.tensor(windows)).logits.float().numpy()}


def ours(models: Path, case: str) -> Arrays:
    return {"logits": our_logits(models / "awq", inputs(models)[0]).numpy()}


PROOF = Proof(
    name="transformers",
    pip=("install torch==2.13.0", "install transformers==5.23.0 accelerate==1.15.0 gptqmodel==7.7.0"),
    versions=("transformers", "gptqmodel", "torch"),
    cases=CASES,
    theirs=theirs,
    ours=ours,
)

if __name__ == "__main__":
    sys.exit(prove(__file__, __doc__, PROOF))
