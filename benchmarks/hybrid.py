"""Decode of a hybrid with the layer sizes of Qwen3.5-0.8B, random weights: our engine beside transformers, in turn.

python benchmarks/hybrid.py [--layers 4] [--new-tokens 64] [--rounds 5] [--threads 2]

Prints tokens per second of one stream, the median of the rounds: INT4 by our decoder, and transformers' `generate` in
bfloat16 with its plain torch implementation of the gated delta rule.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

from squawq import QuantConfig, quantize
from squawq.engine.config import EngineConfig
from squawq.engine.loaded_model import LoadedModel
from squawq.engine.request import Request, SamplingParams

PROMPT = 32  # tokens
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}


def make(folder: Path, layers: int) -> None:
    """A 16-bit folder with random weights."""
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(num_hidden_layers=layers, **SIZES)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 4), ("new-tokens", 64), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as place:
        dense, awq = Path(place, "dense"), Path(place, "awq")
        make(dense, args.layers)
        quantize(dense, awq, QuantConfig(method="rtn"), progress=False)
        theirs = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).eval()
        ours = LoadedModel(awq, EngineConfig(device="cpu", threads=args.threads, kv_tokens=4096), text=False)
        ids = torch.randint(2, SIZES["vocab_size"], (PROMPT,)).tolist()
        params = SamplingParams(max_tokens=args.new_tokens, temperature=0, ignore_eos=True)

        def run_ours(number: int) -> None:
            list(ours.engine.generate([Request(str(number), ids, params)]))

        def run_theirs(_: int) -> None:
            count = {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}
            theirs.generate(torch.tensor([ids]), do_sample=False, **count)

        speeds: dict[str, list[float]] = {"squawq, INT4": [], "transformers, bfloat16": []}
        for number in range(args.rounds + 1):  # the first is not counted
            for name, run in zip(speeds, (run_ours, run_theirs), strict=True):
                start = time.perf_counter()
                run(number)
                speeds[name].append(args.new_tokens / (time.perf_counter() - start))
        ours.close()
    for name, found in speeds.items():
        print(f"{name}: {statistics.median(found[1:]):.1f} tokens/s, prompts of {PROMPT} tokens included")


if __name__ == "__main__":
    main()
