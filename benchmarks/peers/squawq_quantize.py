"""Quantize with squawq in a process of its own, so that both sides of a comparison start alike.

    python squawq_quantize.py MODEL OUT ROWS.json SETTINGS.json

Prints the seconds of `quantize` alone as the last line.
"""

import json
import sys
import time
from pathlib import Path

import transformers  # imported before the clock starts, as on the other side
from transformers.models.llama import modeling_llama

import squawq
from squawq import QuantConfig

assert transformers.__version__
assert modeling_llama.LlamaForCausalLM
model, out, rows_path, settings = sys.argv[1:5]
rows = json.loads(Path(rows_path).read_text())
config = QuantConfig(**json.loads(settings), samples=len(rows), seqlen=len(rows[0]))
quantize = squawq.quantize
started = time.monotonic()
quantize(model, out, config, calibration=None if config.method == "rtn" else rows)
print(f"seconds {time.monotonic() - started:.2f}")
