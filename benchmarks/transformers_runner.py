"""Compares squawq's engine on transformers' model class with transformers' own generate(): decode speed on a CPU.

    python benchmarks/transformers_runner.py [MODEL] [--folder DIR] [--rounds 5] [--prompt-tokens 64] [--new-tokens 48]

MODEL is a folder of any family, 16-bit or AWQ; default: random AWQ weights of Llama-3.2-1B's shape, made in --folder
(a temporary one) and reused. Each round runs `squawq.bench` with model_impl="transformers" and then generate(), after
`import squawq.transformers` and without do_fuse, with one stream and with eight. generate()'s model stays loaded, in
float32, the fastest dtype on most CPUs; the bench loads its own each time. Figures are medians; the ratio is the median
of the rounds' ratios. Where our decoder runs the model, its speed is measured in each round, too.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import torch
from common import print_table
from fused import SHAPE, arguments, generate
from llamacpp import run

from squawq.backends.cpu import library
from squawq.bench import bench
from squawq.decoder_support import decoder_declines
from squawq.format.reader import Checkpoint

STREAMS = (1, 8)
GREEDY = {"do_sample": False}


def main() -> None:
    args = arguments(__doc__, new_tokens=48)
    from transformers import AutoModelForCausalLM, GenerationConfig

    import squawq.transformers  # noqa: F401

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.model or (args.folder or Path(temporary)) / f"{SHAPE}-awq"
        if not args.model and not folder.exists():
            run([sys.executable, str(Path(__file__).parent / "checkpoints.py"), SHAPE, str(folder)])
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.generation_config = GenerationConfig()
        impls = ("transformers", *(() if decoder_declines(Checkpoint(folder).config) else ("squawq",)))
        prompt, new = args.prompt_tokens, args.new_tokens
        rows = []
        for streams in STREAMS:
            generate(model, streams, prompt, new, GREEDY)  # warm up threads and pages
            rounds = []
            for _ in range(args.rounds):
                ours = [
                    bench(folder, prompt_tokens=prompt, new_tokens=new, streams=streams, device="cpu", model_impl=impl)
                    for impl in impls
                ]
                reached = [figures["decode_tok_s"] for figures in ours]
                rounds.append((*reached, generate(model, streams, prompt, new, GREEDY)[0]))
            medians = [f"{statistics.median(column):.1f} tok/s" for column in zip(*rounds, strict=True)]
            ratio = statistics.median(speeds[0] / speeds[-1] for speeds in rounds)
            rows.append([f"{streams} streams", *medians, f"{ratio:.2f}"])
    names = [f"engine, model_impl {impl}" for impl in impls]
    title = f"{folder.name}, {library.threads()} threads, {library.isa()}"
    print_table(title, ["", *names, "generate()", "transformers / generate()"], rows, width=130)


if __name__ == "__main__":
    main()
