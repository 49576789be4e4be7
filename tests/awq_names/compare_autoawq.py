"""Our `awq` against AutoAWQ's: words, integers and weights of random tensors, bit for bit.

    python tests/awq_names/compare_autoawq.py --peer PYTHON

PYTHON is the interpreter of an environment with autoawq==0.2.9 (--no-deps), torch, transformers, accelerate, datasets.
Both interpreters run `results` below; ours then compares. Weights are rounded beforehand, as AutoAWQ's search leaves
them: one half a step beyond the range makes a 16 or -1, which AutoAWQ packs over its neighbour and ours clamps.
Not collected by pytest.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHAPES = ((64, 32, 16), (256, 128, 128), (96, 160, 32))  # in, out (a multiple of 32, or AutoAWQ drops columns), group


def results() -> dict[str, Any]:
    """Name to tensor, by whichever `awq` is installed."""
    import torch

    from awq.modules.linear import WQLinear_GEMM
    from awq.utils import packing_utils as packing

    generator = torch.Generator().manual_seed(7)
    found: dict[str, Any] = {}
    for rows, out, group in SHAPES:
        for dtype in (torch.float16, torch.float32):
            weight = torch.randn(out, rows, generator=generator) * 0.1
            low, high = (f(weight.view(out, -1, group), -1) for f in (torch.amin, torch.amax))
            scales = ((high - low) / 15).half()
            zeros = (-low / scales.float()).round().clamp(0, 15)
            grouped = weight.view(out, -1, group)
            integers = (grouped / scales[..., None].float()).round().add(zeros[..., None]).clamp(0, 15)
            weight = ((integers - zeros[..., None]) * scales[..., None].float()).view(out, rows)
            linear = torch.nn.Linear(rows, out).to(dtype)
            linear.weight.data = weight.to(dtype)
            linear.bias.data = torch.randn(out, generator=generator).to(dtype)
            made = WQLinear_GEMM.from_linear(linear, 4, group, False, scales.T.to(dtype), zeros.T.to(dtype)).eval()
            exllama = packing.unpack_reorder_pack(made.qweight, made.qzeros, 4)
            raw = packing.unpack_awq(made.qweight, made.qzeros, 4)
            x = torch.randn(2, 3, rows, generator=generator).half()
            own = {
                **made.state_dict(),
                "exllama_qweight": exllama[0],
                "exllama_qzeros": exllama[1],
                "raw_integers": raw[0],
                "raw_zeros": raw[1],
                "integers": packing.reverse_awq_order(*raw, 4)[0],
                "zeros": packing.reverse_awq_order(*raw, 4)[1],
                "weight": packing.dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, group),
                "output": made(x),
            }
            found |= {f"{rows}x{out} g{group} {dtype} {name}": tensor.contiguous() for name, tensor in own.items()}
    return found


def main() -> int:
    import torch
    from safetensors.torch import load_file, save_file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="python of the environment with AutoAWQ")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        save_file(results(), args.write)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "theirs.safetensors")
        subprocess.run([args.peer, __file__, "--write", str(file)], check=True)
        theirs = load_file(file)
    ours = results()
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    different = [n for n, t in ours.items() if t.dtype != theirs[n].dtype or not torch.equal(t, theirs[n])]
    for name in different:
        print("differs:", name)
    print(f"{len(ours)} tensors compared, {len(different)} differ")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
