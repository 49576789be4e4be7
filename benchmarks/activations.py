"""What rounding activations and the head at run time costs, beside what 4-bit weights cost.

    python benchmarks/activations.py [MODEL] [--text FILE] [--tokens 16384] [--window 512]

MODEL is a 16-bit folder (default: the bundled demo model), quantized here with the defaults. The INT4 folder is run
over the same windows in each way; KL in nats and agreement on the likeliest token are against the first row:
activations in float32 and the head as stored. The last row compares that one with the 16-bit model: quantizing's loss.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from common import print_table
from torch import Tensor

from squawq.demo import demo_model
from squawq.engine.request import Chunk
from squawq.engine.runner import DecoderRunner
from squawq.evaluation.metrics import Score
from squawq.evaluation.run import text_ids
from squawq.nn.loader import Options, load
from squawq.quantization.pipeline import quantize
from squawq.tokenizer import Tokenizer

EXACT = Options(exact=True)
WAYS = {
    "int8 activations, head as stored": Options(head="16-bit"),
    "int8 activations, int8 head (default)": Options(),
    "int8 activations, int4 head": Options(head="int4"),
}


def logits_of(folder: Path, options: Options, windows: Tensor) -> list[Tensor]:
    """Logits [window, vocab] of every window, on the CPU kernels."""
    runner = DecoderRunner(load(folder, options), kv_tokens=windows.shape[1] + 16)
    pages = list(range(runner.num_pages))
    return [torch.from_numpy(runner.run([Chunk(ids, 0, pages, len(ids))])[0]) for ids in windows.tolist()]


def compare(windows: Tensor, found: list[Tensor], base: list[Tensor]) -> dict[str, float]:
    """Perplexity of `found`, and its distance from `base`."""
    score = Score()
    for ids, mine, theirs in zip(windows, found, base, strict=True):
        score.add(mine[:-1], ids[1:], theirs[:-1])
    return score.summary()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=demo_model())
    parser.add_argument("--text", type=Path, default=demo_model() / "held_back.txt")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--window", type=int, default=512)
    args = parser.parse_args()
    ids = text_ids(Tokenizer(args.model), args.text)[: args.tokens]
    windows = torch.tensor(ids[: len(ids) // args.window * args.window]).view(-1, args.window)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "awq"
        quantize(args.model, folder)
        base = logits_of(folder, EXACT, windows)
        exact = compare(windows, base, base)
        rows = [["float32 activations, head as stored", f"{exact['perplexity']:.4f}", "", ""]]
        for name, options in WAYS.items():
            found = compare(windows, logits_of(folder, options, windows), base)
            cells = [f"{found['perplexity']:.4f}", f"{found['kl_mean']:.6f}", f"{found['top1_agreement']:.2%}"]
            rows.append([name, *cells])
        whole = compare(windows, base, logits_of(args.model, EXACT, windows))
        cells = [f"{whole['reference_perplexity']:.4f}", f"{whole['kl_mean']:.6f}", f"{whole['top1_agreement']:.2%}"]
        rows.append(["the 16-bit model (KL and agreement of the first row to it)", *cells])
    title = f"{args.model.name}, {windows.numel():,} tokens in windows of {args.window}"
    print_table(title, ["", "perplexity", "KL", "same likeliest"], rows)


if __name__ == "__main__":
    main()
