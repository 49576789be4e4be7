"""Quantize with AutoAWQ 0.2.9; runs in AutoAWQ's own environment, which does not have squawq.

python autoawq_quantize.py MODEL OUT ROWS.json SETTINGS    (SETTINGS: {"bits": 4, "device": "cuda"})

With other than 4 bits OUT is a dense folder.
"""

import json
import sys

import torch
from outcome import Clock, read_rows

# On a CPU `.cpu()` returns the live tensor. AutoAWQ's search relies on a copy and would be wrong without any error.
live_cpu = torch.Tensor.cpu
torch.Tensor.cpu = lambda self, *a, **k: live_cpu(self, *a, **k).clone()  # type: ignore[method-assign]

from awq import AutoAWQForCausalLM  # noqa: E402

model_path, out, rows_path, raw = sys.argv[1:5]
rows = read_rows(rows_path)
settings = json.loads(raw)
bits, device = settings["bits"], settings.get("device", "cpu")
model = AutoAWQForCausalLM.from_pretrained(model_path, device_map=device, torch_dtype=torch.float32, use_cache=False)
config = {"zero_point": True, "q_group_size": 128, "w_bit": bits, "version": "GEMM"}
clock = Clock()
model.quantize(
    None,
    quant_config=config,
    calib_data=rows,
    max_calib_samples=len(rows),
    max_calib_seq_len=len(rows[0]),
    export_compatible=bits != 4,  # scales and ranges alone: AutoAWQ packs four bits only
)
if bits != 4:
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            fake = model.quantizer.pseudo_quantize_tensor  # type: ignore[attr-defined]  # `quantize` made it
            module.weight.data = fake(module.weight.data)[0]
clock.stop()
if bits == 4:
    model.save_quantized(out)
else:
    model.model.save_pretrained(out)
clock.report()
