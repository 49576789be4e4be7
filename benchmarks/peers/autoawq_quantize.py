"""Quantize with AutoAWQ 0.2.9 on a CPU; runs in AutoAWQ's own environment, which does not have squawq.

    python autoawq_quantize.py MODEL OUT ROWS.json    (rows of equal length, lists of token ids)

Prints the seconds of `quantize` alone as the last line.
"""

import json
import sys
import time

import torch

# On a CPU `.cpu()` returns the live tensor, and AutoAWQ's search, which relies on a copy, goes silently wrong.
live_cpu = torch.Tensor.cpu
torch.Tensor.cpu = lambda self, *a, **k: live_cpu(self, *a, **k).clone()  # type: ignore[method-assign]

from awq import AutoAWQForCausalLM  # noqa: E402

model_path, out, rows_path = sys.argv[1:4]
with open(rows_path) as file:  # noqa: PTH123
    rows = json.load(file)
model = AutoAWQForCausalLM.from_pretrained(model_path, device_map="cpu", torch_dtype=torch.float32, use_cache=False)
config = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
started = time.monotonic()
model.quantize(None, quant_config=config, calib_data=rows, max_calib_samples=len(rows), max_calib_seq_len=len(rows[0]))
seconds = time.monotonic() - started
model.save_quantized(out)
print(f"seconds {seconds:.2f}")
