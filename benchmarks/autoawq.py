"""squawq against AutoAWQ 0.2.9: same model, same calibration rows, one run; perplexity, KL and time.

    python benchmarks/autoawq.py --peer PYTHON [--model FOLDER --text FILE] [--rows 64 --seqlen 256]

PYTHON is the interpreter of an environment with `autoawq==0.2.9` (--no-deps), `transformers==4.51.3`, torch 2.13.0,
accelerate and datasets. Without --model the bundled demo model is measured on its held-back stories. The calibration
rows are the built-in set's for the bundled model, the start of --text otherwise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import print_table

import squawq
from squawq.demo import demo_model
from squawq.evaluation.run import text_ids
from squawq.format.reader import Checkpoint
from squawq.quantization.calibration import token_blocks
from squawq.tokenizer import Tokenizer

WINDOW = 256
PEERS = Path(__file__).parent / "peers"


def run(command: list[str]) -> float:
    """Seconds that the child says its quantization took."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[:2])} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.strip().splitlines()[-1].split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="python of the environment with AutoAWQ")
    parser.add_argument("--model", type=Path, default=demo_model())
    parser.add_argument("--text", type=Path, help="calibrated on its start, measured on its last 120 KB")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    args = parser.parse_args()

    tokenizer = Tokenizer(args.model)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source, held_back = None, demo_model() / "held_back.txt"
        if args.text is not None:
            raw = args.text.read_bytes()
            source, held_back = work / "calibration.txt", work / "held_back.txt"
            source.write_bytes(raw[: len(raw) // 2])
            held_back.write_text(raw[-120_000:].decode("utf-8", "ignore"))
        blocks = token_blocks(
            source,
            lambda: tokenizer,
            seqlen=args.seqlen,
            samples=args.rows,
            vocab_size=Checkpoint(args.model).config.vocab_size,
        )
        held_ids = text_ids(tokenizer, held_back)
        (work / "rows.json").write_text(json.dumps(blocks.tolist()))
        common = [str(args.model)]
        rows: list[list[str]] = []
        seconds: dict[str, float] = {}
        for name, settings in (("rounding", {"method": "rtn"}), ("AutoAWQ 0.2.9", None), ("squawq", {})):
            out = str(work / name.replace(" ", "-"))
            if settings is None:
                command = [args.peer, str(PEERS / "autoawq_quantize.py"), *common, out, str(work / "rows.json")]
            else:
                script = str(PEERS / "squawq_quantize.py")
                command = [sys.executable, script, *common, out, str(work / "rows.json"), json.dumps(settings)]
            seconds[name] = run(command)
            scores = squawq.evaluate(out, args.model, ids=held_ids, window=WINDOW, stride=WINDOW, max_tokens=20_000)
            rows.append([name, f"{scores['perplexity']:.4f}", f"{scores['kl_mean']:.5f}", f"{seconds[name]:.1f}"])
        rows.insert(0, ["32 bits", f"{scores['reference_perplexity']:.4f}", "0", ""])
    title = f"{args.model.name}, {args.rows} x {args.seqlen} calibration tokens, {scores['tokens']:,} tokens measured"
    print_table(title, ["", "perplexity", "KL to 32 bits", "seconds"], rows)
    print(f"squawq's time is {seconds['squawq'] / seconds['AutoAWQ 0.2.9']:.3f} of AutoAWQ's")


if __name__ == "__main__":
    main()
