"""Quantize with squawq in its own process, so that all sides of a comparison start alike.

    python squawq_quantize.py MODEL OUT ROWS.json SETTINGS

SETTINGS: QuantConfig's fields as JSON, "device", and "calibration": what `squawq.quantize` gets by that name instead of
the rows, which then only say how many there are and how long. The format has no 3 bits; they are simulated by integers
0..7 stored in 4 bits.
"""

import json
import sys

import transformers  # imported before the clock starts, as on the other sides
from outcome import Clock, read_rows
from transformers.models.llama import modeling_llama

import squawq
from squawq import QuantConfig
from squawq.format import groupwise
from squawq.quantization import rounding

assert transformers.__version__
assert modeling_llama.LlamaForCausalLM
model, out, rows_path, settings = sys.argv[1:5]
rows = read_rows(rows_path)
fields = json.loads(settings)
groupwise.LEVELS = rounding.LEVELS = 2 ** fields.pop("bits", 4) - 1  # type: ignore[attr-defined]
device, calibration = fields.pop("device", "cpu"), fields.pop("calibration", rows)
config = QuantConfig(**{"samples": len(rows), "seqlen": len(rows[0])} | fields)
quantize = squawq.quantize
clock = Clock()
quantize(model, out, config, calibration=None if config.method == "rtn" else calibration, device=device)
clock.stop()
clock.report()
