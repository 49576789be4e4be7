"""Measures the peak memory of quantization for few and for many layers.

    python benchmarks/memory.py [--shape llama-3.1-8b] [--layers 2 6] [--vocab N] [--samples 16 --seqlen 512]
        [--states-memory GIB] [--folder DIR]

Writes random-weight checkpoints of the model's layer shapes (bfloat16, one shard per layer) to a temporary folder and
quantizes each in its own process. The figure is the process's peak resident memory (ru_maxrss). The baseline is the
size of the whole model's 16-bit checkpoint, which a quantizer that loads it needs at least. The vocabulary is the
model's own; --vocab 1024 saves the disk space of embedding and head. Disk: the layers and a third more. 2 layers of the
70B shapes with a small vocabulary take about 5 GB, of the 405B shapes about 17 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from checkpoints import SHAPES, Shape, write_checkpoint
from common import print_table

CHILD = """
import json, random, resource, sys, time
import squawq
from squawq import QuantConfig
model, out = sys.argv[1:3]
samples, seqlen, vocab = map(int, sys.argv[3:6])
random.seed(0)
rows = [[random.randrange(vocab) for _ in range(seqlen)] for _ in range(samples)]
started = time.monotonic()
config = QuantConfig(samples=samples, seqlen=seqlen)
squawq.quantize(model, out, config, calibration=rows, states_memory=float(sys.argv[6]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak, "seconds": time.monotonic() - started}))
"""


def measured(shape: Shape, layers: int, arguments: tuple[float, ...], parent: Path | None) -> tuple[int, float]:
    """Peak memory in bytes, and seconds, for a checkpoint of `layers` layers. Exits if the quantizer fails."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        model = Path(folder) / "model"
        write_checkpoint(model, shape, layers, quantized=False)
        command = [sys.executable, "-c", CHILD, str(model), str(Path(folder) / "out"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak"], found["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--vocab", type=int, help="default: the model's")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--states-memory", type=float, default=1.0, help="GiB of hidden states kept in memory")
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes")
    args = parser.parse_args()

    model = SHAPES[args.shape]
    shape = replace(model, vocab=args.vocab or model.vocab)
    whole = model.nbytes()
    rows, peaks = [], []
    for layers in args.layers:
        arguments = args.samples, args.seqlen, shape.vocab, args.states_memory
        peak, seconds = measured(shape, layers, arguments, args.folder)
        peaks.append(peak)
        sizes = f"{peak / 2**30:.2f} GiB", f"{whole / 2**30:.0f} GiB", f"{peak / whole:.1%}"
        rows.append([str(layers), *sizes, f"{seconds / layers:.0f} s"])
        print(f"{layers} layers: {peak / 2**30:.2f} GiB, {seconds:.0f} s", file=sys.stderr, flush=True)
    title = f"{args.shape} layer shapes, {args.samples} x {args.seqlen} calibration tokens"
    headings = ["layers measured", "peak memory", f"all {model.layers} layers in 16 bits", "share", "time per layer"]
    print_table(title, headings, rows)
    print(f"largest peak / smallest: {max(peaks) / min(peaks):.3f}")


if __name__ == "__main__":
    main()
