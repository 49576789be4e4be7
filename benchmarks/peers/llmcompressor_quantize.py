"""Quantize with llm-compressor; runs in its own environment, which does not have squawq.

    python llmcompressor_quantize.py MODEL OUT ROWS.json SETTINGS    (SETTINGS: {"bits": 4, "gptq": false})

AWQ with duo scaling "both", then rounding to nearest or GPTQ; asymmetric, groups of 128. llm-compressor cannot write
AWQ GEMM, so OUT gets the dequantized weights as a dense float32 folder. It runs on the first GPU that it can see.
"""

import json
import sys

import torch
from compressed_tensors.offload import update_offload_parameter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from outcome import Clock, read_rows, tokenizer_of
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

# Without a GPU, memory cannot be pinned; llm-compressor's AWQ tries it anyway and crashes.
if not torch.cuda.is_available():
    torch.Tensor.pin_memory = lambda self, *_, **__: self  # type: ignore[method-assign]

model_path, out, rows_path, raw = sys.argv[1:5]
settings = json.loads(raw)
rows = torch.tensor(read_rows(rows_path))
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
weights = QuantizationArgs(
    num_bits=settings["bits"], type="int", strategy="group", group_size=128, symmetric=False, dynamic=False
)
groups = {"linears": QuantizationScheme(targets=["Linear"], weights=weights)}
rounding = GPTQModifier if settings["gptq"] else QuantizationModifier
samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
clock = Clock()
oneshot(
    model=model,
    processor=tokenizer_of(model_path),
    dataset=DataLoader(samples, batch_size=8),  # type: ignore[arg-type]  # a list is one
    recipe=[AWQModifier(duo_scaling="both"), rounding(config_groups=groups, ignore=["lm_head"])],
)
clock.stop()
for module in model.modules():
    if (scheme := getattr(module, "quantization_scheme", None)) is not None:
        rounded = fake_quantize(module.weight, module.weight_scale, module.weight_zero_point, scheme.weights)
        update_offload_parameter(module, "weight", rounded.detach())
tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
state = {name: tensor for name, tensor in tensors.items() if not name.endswith(("_scale", "_zero_point"))}
plain = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
plain.load_state_dict(state)
plain.save_pretrained(out)
clock.report()
