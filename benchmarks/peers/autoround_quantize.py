"""Quantize with AutoRound (Intel, PyPI auto-round); runs in its own environment, which does not have squawq.

    python autoround_quantize.py MODEL OUT ROWS.json SETTINGS

SETTINGS: {"bits": 4, "iters": 200, "awq": true, "amp": false, "device": "cuda"}. Asymmetric, groups of 128; 4 bits are
exported as auto_awq, others as a dense folder of the dequantized weights.
"""

import json
import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.algorithms.transforms.awq.config import AWQConfig
from outcome import Clock, read_rows, tokenizer_of
from transformers import AutoModelForCausalLM

BATCH = 8

model_path, out, rows_path, raw = sys.argv[1:5]
settings = json.loads(raw)
rows = torch.tensor(read_rows(rows_path))
steps = [SignRoundConfig(iters=settings["iters"], **settings.get("sign_round", {}))]
if settings["awq"]:
    steps.insert(0, AWQConfig(**settings.get("awq_config", {})))
rounder = AutoRound(
    model=AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
    tokenizer=tokenizer_of(model_path),
    scheme="W4A16",
    bits=settings["bits"],
    group_size=128,
    sym=False,
    alg_configs=steps,
    dataset=list(torch.split(rows, BATCH)),
    nsamples=len(rows),
    seqlen=rows.shape[1],
    batch_size=BATCH,
    device_map=settings.get("device", "cpu"),
    amp=settings.get("amp", True),
    low_cpu_mem_usage=False,
)
clock = Clock()
rounder.quantize()
clock.stop()
# Of a float32 source AutoRound 0.16 would put norms and dense weights back as they were, undoing its own work.
rounder.model.name_or_path = rounder.model.config.name_or_path = ""
rounder.save_quantized(out, format="auto_awq" if settings["bits"] == 4 else "fake")
assert Path(out).is_dir()
clock.report()
