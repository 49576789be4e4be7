"""Compares transformers' generate() on a fused model with squawq's engine: decode speed and memory.

    python benchmarks/fused.py [MODEL] [--folder DIR] [--rounds 5] [--prompt-tokens 64] [--new-tokens 96]

MODEL is an AWQ folder; default: random weights of Llama-3.2-1B's shape, made in --folder (a temporary one) and reused.
Each round runs `squawq.bench` and then generate(); generate()'s model stays loaded, the bench loads its own each time.
Figures are medians; the ratio is the median of the rounds' ratios. Rows: greedy and sampled decoding, eight rows at
once, and a model that is not fused. The time generate() spends outside of forward is measured, too.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import print_table
from llamacpp import run

from squawq.backends.cpu import library
from squawq.bench import bench

SHAPE = "llama-3.2-1b"
CASES: dict[str, tuple[bool, int, dict[str, Any]]] = {  # fused, rows, how
    "greedy, 1 row": (True, 1, {"do_sample": False}),
    "sampled, 1 row": (True, 1, {"do_sample": True, "top_k": 50, "temperature": 0.7}),
    "greedy, 8 rows": (True, 8, {"do_sample": False}),
    "greedy, 1 row, without do_fuse": (False, 1, {"do_sample": False}),
}


class Clock:
    """Records times as generate()'s streamer (for every token) and as the model's forward."""

    def __init__(self, model: Any) -> None:
        self.marks: list[float] = []
        self.inside: list[float] = []
        self._forward = model.forward
        model.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = self._forward(*args, **kwargs)
        self.inside.append(time.perf_counter() - started)
        self.marks.append(time.perf_counter())
        return result


def generate(model: Any, rows: int, prompt: int, new: int, how: dict[str, Any]) -> tuple[float, float]:
    """Tokens per second after the first, and milliseconds per step outside of forward."""
    ids = torch.randint(2, model.config.vocab_size, (rows, prompt), generator=torch.Generator().manual_seed(0))
    clock = Clock(model)
    try:
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, **how)
    finally:
        del model.forward
    seconds = clock.marks[-1] - clock.marks[0]
    return rows * (new - 1) / seconds, (seconds - sum(clock.inside[1:])) / (new - 1) * 1e3


def resident() -> float:
    """Peak resident GiB of this process (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    return int(found[1]) / 2**20 if found else float("nan")


def arguments(description: str | None, new_tokens: int) -> argparse.Namespace:
    """Of a comparison with generate(); ends the process if there are no native kernels."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--folder", type=Path, help="keeps the random model; default: a temporary one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=new_tokens)
    args = parser.parse_args()
    if library.load() is None:
        sys.exit("the native kernels are not built here, or SQUAWQ_ISA=torch is set")
    return args


def main() -> None:
    args = arguments(__doc__, new_tokens=96)
    from transformers import AutoModelForCausalLM, AwqConfig, GenerationConfig

    import squawq.transformers  # noqa: F401

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.model or (args.folder or Path(temporary)) / f"{SHAPE}-awq"
        if not args.model and not folder.exists():
            run([sys.executable, str(Path(__file__).parent / "checkpoints.py"), SHAPE, str(folder)])
        room = args.prompt_tokens + args.new_tokens
        models, memory = {}, 0.0
        for fused in (True, False):
            how_to_run = AwqConfig(bits=4, do_fuse=True, fuse_max_seq_len=room) if fused else AwqConfig(bits=4)
            found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, quantization_config=how_to_run)
            found.generation_config = GenerationConfig()
            models[fused] = found
            memory = resident() if fused else memory
        rows = []
        for name, (fused, streams, how) in CASES.items():
            model = models[fused]
            sizes = args.prompt_tokens, args.new_tokens
            generate(model, streams, *sizes, how)  # warm up threads and pages
            rounds = []
            for _ in range(args.rounds):
                ours = bench(folder, prompt_tokens=sizes[0], new_tokens=sizes[1], streams=streams)["decode_tok_s"]
                rounds.append((ours, *generate(model, streams, *sizes, how)))
            engine, reached, outside = (statistics.median(column) for column in zip(*rounds, strict=True))
            ratio = statistics.median(theirs / ours for ours, theirs, _ in rounds)
            rows.append([name, f"{engine:.1f} tok/s", f"{reached:.1f} tok/s", f"{outside:.2f} ms", f"{ratio:.3f}"])
    title = f"{folder.name}, {library.threads()} threads, {library.isa()}; peak of loading {memory:.2f} GiB"
    print_table(title, ["", "engine", "generate()", "a step outside of forward", "ratio"], rows)


if __name__ == "__main__":
    main()
