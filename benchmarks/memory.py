"""Peak memory of quantizing: the same for few layers and for many.

    python benchmarks/memory.py [--shape llama-3.1-8b] [--layers 2 6] [--samples 16 --seqlen 512] [--folder DIR]

Writes random-weight checkpoints of the model's layer shapes (bfloat16, one shard a layer, the real vocabulary) into a
temporary folder and quantizes each in a process of its own; the figure is the kernel's high-water mark of its resident
memory (ru_maxrss). The baseline in the same run: what the 16-bit checkpoint alone takes, which a quantizer that loads
the model needs at least. Needs some 5 GB of disk for the 8B shapes with 6 layers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from checkpoints import SHAPES, write_checkpoint
from common import print_table

CHILD = """
import json, random, resource, sys, time
import squawq
from squawq import QuantConfig
model, out = sys.argv[1:3]
samples, seqlen, vocab = map(int, sys.argv[3:])
random.seed(0)
rows = [[random.randrange(vocab) for _ in range(seqlen)] for _ in range(samples)]
started = time.monotonic()
squawq.quantize(model, out, QuantConfig(samples=samples, seqlen=seqlen), calibration=rows)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak, "seconds": time.monotonic() - started}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes")
    args = parser.parse_args()

    shape = SHAPES[args.shape]
    rows, peaks = [], []
    for layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            model = Path(folder) / "model"
            size = write_checkpoint(model, shape, layers, quantized=False)
            started = time.monotonic()
            command = [sys.executable, "-c", CHILD, str(model), str(Path(folder) / "out")]
            command += map(str, (args.samples, args.seqlen, shape.vocab))
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            found = json.loads(done.stdout.splitlines()[-1])
            peaks.append(found["peak"])
            rows.append(
                [
                    str(layers),
                    f"{size / 2**30:.2f} GiB",
                    f"{found['peak'] / 2**30:.2f} GiB",
                    f"{found['seconds'] / layers:.0f} s",
                ]
            )
            print(f"{layers} layers: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            shutil.rmtree(model)
    title = f"{args.shape} layer shapes, {args.samples} x {args.seqlen} calibration tokens"
    print_table(title, ["layers", "16-bit checkpoint", "peak memory", "time per layer"], rows)
    print(f"largest peak / smallest: {max(peaks) / min(peaks):.3f}")


if __name__ == "__main__":
    main()
