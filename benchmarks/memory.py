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

import torch
from common import print_table
from safetensors.torch import save_file

from squawq.config import ModelConfig
from squawq.nn.loader import linear_shapes

SHAPES = {
    "llama-3.2-1b": (2048, 8192, 32, 8),
    "llama-3.1-8b": (4096, 14336, 32, 8),
    "llama-3.1-70b": (8192, 28672, 64, 8),
}
CHILD = """
import json, random, resource, sys, time
import squawq
from squawq import QuantConfig
model, out, samples, seqlen = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
random.seed(0)
rows = [[random.randrange(128256) for _ in range(seqlen)] for _ in range(samples)]
started = time.monotonic()
squawq.quantize(model, out, QuantConfig(samples=samples, seqlen=seqlen), calibration=rows)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak, "seconds": time.monotonic() - started}))
"""


def write_checkpoint(folder: Path, shape: tuple[int, int, int, int], layers: int) -> int:
    """A random Llama checkpoint; returns its bytes."""
    hidden, inner, heads, kv_heads = shape
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, dtype=torch.bfloat16) * 0.02

    shard, total = 0, 0

    def write(tensors: dict[str, torch.Tensor]) -> None:
        nonlocal shard, total
        shard += 1
        path = folder / f"model-{shard:05d}-of-{layers + 2:05d}.safetensors"
        save_file(tensors, path)
        total += path.stat().st_size

    write({"model.embed_tokens.weight": matrix(128256, hidden)})
    for index in range(layers):
        sizes = linear_shapes(ModelConfig.from_dict(config))
        layer = {f"model.layers.{index}.{name}.weight": matrix(*size) for name, size in sizes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            layer[f"model.layers.{index}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        write(layer)
    write({"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16), "lm_head.weight": matrix(128256, hidden)})
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes")
    args = parser.parse_args()

    rows, peaks = [], []
    for layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            model = Path(folder) / "model"
            size = write_checkpoint(model, SHAPES[args.shape], layers)
            started = time.monotonic()
            command = [sys.executable, "-c", CHILD, str(model), str(Path(folder) / "out")]
            done = subprocess.run([*command, str(args.samples), str(args.seqlen)], capture_output=True, text=True)
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
