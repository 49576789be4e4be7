"""Quantize with squawq in a process of its own, so that all sides of a comparison start alike.

python squawq_quantize.py MODEL OUT ROWS.json SETTINGS    (SETTINGS: QuantConfig's fields as JSON)
"""

import json
import sys

import transformers  # imported before the clock starts, as on the other sides
from outcome import Clock, read_rows
from transformers.models.llama import modeling_llama

import squawq
from squawq import QuantConfig

assert transformers.__version__
assert modeling_llama.LlamaForCausalLM
model, out, rows_path, settings = sys.argv[1:5]
rows = read_rows(rows_path)
config = QuantConfig(**json.loads(settings), samples=len(rows), seqlen=len(rows[0]))
quantize = squawq.quantize
clock = Clock()
quantize(model, out, config, calibration=None if config.method == "rtn" else rows)
clock.stop()
clock.report()
