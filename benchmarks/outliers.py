"""Measures what AWQ recovers, on the demo model and its outlier twin.

    python benchmarks/outliers.py [--channels 6 --factor 30] [--text STORIES.txt]

Compared are rounding to nearest, AWQ, AWQ with clipping, and squawq's default method. The twin computes the same
function: in every layer, the norm weights of a few channels are multiplied by the factor, and the matching columns of
the next linears are divided by it. Large models develop such outlier channels in training. Calibration uses the
built-in set, or the start of --text; KL is measured on the demo model's held-out stories.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import print_table
from safetensors.torch import load_file, save_file

import squawq
from squawq import QuantConfig
from squawq.demo import demo_model

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "rounding": {"method": "rtn"},
    "AWQ": {"method": "awq", "clip": False},
    "AWQ + clip": {"method": "awq"},
    "squawq": {},
}


def make_twin(model: Path, twin: Path, channels: int, factor: float) -> None:
    """Write the twin of a checkpoint, in float32 so that both compute the same function."""
    shutil.copytree(model, twin)
    state = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(0)
    for name in list(state):
        norm = name.removesuffix(".weight").rpartition(".")[2]
        if norm in READERS:
            picked = torch.randperm(len(state[name]), generator=generator)[:channels]
            state[name][picked] *= factor
            for linear in READERS[norm]:
                state[name.replace(norm, linear)][:, picked] /= factor
    save_file(state, twin / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=6)
    parser.add_argument("--factor", type=float, default=30.0)
    parser.add_argument("--text", type=Path, help="calibration text; default: the built-in set")
    args = parser.parse_args()

    demo = demo_model()
    held_back = demo / "held_back.txt"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        twin = Path(folder) / "outlier twin"
        make_twin(demo, twin, args.channels, args.factor)
        for name, model in (("demo model", demo), ("outlier twin", twin)):
            for setting, changes in SETTINGS.items():
                out = Path(folder) / f"{name} {setting}"
                config = QuantConfig(samples=64, seqlen=256, **changes)
                squawq.quantize(model, out, config, calibration=args.text)
                scores = squawq.evaluate(out, model, text=held_back, window=256, stride=256)
                rows.append(
                    [
                        name,
                        setting,
                        f"{scores['reference_perplexity']:.3f}",
                        f"{scores['perplexity']:.3f}",
                        f"{scores['kl_mean']:.5f}",
                        f"{scores['top1_agreement']:.2%}",
                    ]
                )
    headings = ["model", "method", "perplexity, 16-bit", "INT4", "KL", "same likeliest token"]
    print_table(f"{scores['tokens']:,} tokens, {args.channels} channels times {args.factor:g}", headings, rows)


if __name__ == "__main__":
    main()
