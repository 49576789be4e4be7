"""Compares quantizers on the same model and calibration tokens: KL to the 16-bit model, perplexity, time, memory.

    python benchmarks/quality.py --work FOLDER [--data ../shared/data] [--mixed FOLDER] [--peer autoawq=PYTHON ...]
                                 [--models demo twin ...] [--quantizers squawq AutoAWQ ...] [--bits 3] [--device cuda]
                                 [--fresh]
    python benchmarks/quality.py --work FOLDER --real MODEL [--seeds 3] [--calibrations built-in wiki default ...]
                                 [--tests wiki mixture ...] [--patience SECONDS] [--resume] [... as above]

PYTHON is the interpreter of a peer's own environment (benchmarks/peers/README.md); peers that are not given are
skipped. FOLDER keeps the peers' results and figures by model and tokens. A second run measures only squawq again and
marks the kept figures with a star; --fresh measures everything again, for times from one run. Every result is
evaluated by `squawq.evaluate` on text that is not in the calibration. The format has no 3 bits, so there the peers
write dequantized weights, and squawq's are integers 0..7 stored in 4 bits. All models but the mixed one are calibrated
on the stories in --data, or on the built-in set. The demo model, its twin and the mixed one were trained on their
calibration text.

--real measures a pretrained model of any family instead, by `texts.py`'s kinds of text: every calibration with every
test, and with several seeds, which decide the calibration rows. Figures are means over the seeds, with the least and
the largest in brackets. MODEL is a 16-bit folder, such as a download of Gemma 3 270M from the Hub, with its tokenizer,
or with the texts as token rows in rows.json (`texts.py`). A calibration that is no kind of text is handed to
`squawq.quantize` as it is, with the seed; "default" leaves the text and its length to squawq. A quantizer that fails
has the reason in its row. --resume keeps squawq's figures too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from common import print_table, quantize_apart
from outliers import make_twin
from quality_real import DEFAULT, SELF, measure_real
from texts import BUILT_IN, KINDS, TEST_ROWS

import squawq
from squawq.demo import demo_model
from squawq.evaluation.run import text_ids
from squawq.format.reader import Checkpoint
from squawq.quantization.calibration import Calibration, token_blocks
from squawq.text.tokenizer import Tokenizer

WINDOW = 256
BASELINE = "AutoAWQ"
# name: the peer, whose script in peers/ is run, and what the script is told besides the bits
QUANTIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rounding": ("squawq", {"method": "rtn"}),
    "squawq awq": ("squawq", {"method": "awq"}),
    "squawq": ("squawq", {}),
    BASELINE: ("autoawq", {}),
    "AutoRound 50": ("autoround", {"iters": 50, "awq": False}),
    "AutoRound 200": ("autoround", {"iters": 200, "awq": False}),
    "AutoRound awq + 50": ("autoround", {"iters": 50, "awq": True}),
    "AutoRound awq + 200": ("autoround", {"iters": 200, "awq": True}),
    "AutoRound best": ("autoround", {"iters": 1000, "awq": False}),
    "AutoRound awq + best": ("autoround", {"iters": 1000, "awq": True}),
    "llm-compressor AWQ": ("llmcompressor", {"gptq": False}),
    "llm-compressor AWQ + GPTQ": ("llmcompressor", {"gptq": True}),
}


@dataclass(frozen=True)
class Subject:
    """A model to quantize, its calibration text and its evaluation text."""

    folder: Path
    calibration: Calibration
    held_back: Path


def subjects(names: list[str], data: Path, mixed: Path | None, work: Path) -> dict[str, Subject]:
    """The models by name; the outlier twin is made in `work`."""
    stories = data / "tinystories-text" / "tinystories_train_2MiB.txt"
    calibration = stories.read_bytes().decode("utf-8", "ignore").split("<|endoftext|>") if stories.exists() else None
    told = partial(Subject, calibration=calibration, held_back=demo_model() / "held_back.txt")
    twin = work / "twin"
    if "twin" in names and not twin.exists():
        make_twin(demo_model(), twin, channels=6, factor=30.0)
    found = {"demo": told(demo_model()), "twin": told(twin), "babyllama": told(data / "babyllama-tok361" / "hf-g128")}
    if mixed is not None:
        found["mixed"] = Subject(mixed, mixed / "calibration.txt", mixed / "held_back.txt")
    return {name: found[name] for name in names}


class Bench:
    """One model with its tokens, and the folder with its results."""

    def __init__(self, subject: Subject, name: str, args: argparse.Namespace) -> None:
        self.model, self.args = subject.folder, args
        tokenizer = Tokenizer(self.model)
        vocab = Checkpoint(self.model).config.vocab_size
        blocks = token_blocks(
            subject.calibration, lambda: tokenizer, seqlen=args.seqlen, samples=args.rows, vocab_size=vocab
        )
        rows = json.dumps(blocks.tolist())
        self.held_back = text_ids(tokenizer, subject.held_back)[: args.tokens]
        weights = b"".join(path.read_bytes() for path in sorted(self.model.glob("*.safetensors")))
        key = sha256(weights + rows.encode() + json.dumps(self.held_back).encode()).hexdigest()[:12]
        self.folder = args.work / f"{name}-{key}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = self.folder / "rows.json"
        self.rows.write_text(rows)

    def figures(self, name: str, peers: dict[str, str]) -> dict[str, Any]:
        """Results of one quantizer; `kept` marks those measured in an earlier run."""
        environment, settings = QUANTIZERS[name]
        out = self.folder / f"{name.replace(' ', '-')}-{self.args.bits}{self.args.device.replace('cpu', '')}"
        kept = out.with_suffix(".json")
        settings = settings | {"bits": self.args.bits, "device": self.args.device}
        if environment != "squawq" and kept.exists() and not self.args.fresh:
            found: dict[str, Any] = json.loads(kept.read_text())
            return found | {"kept": True}
        shutil.rmtree(out, ignore_errors=True)
        outcome = quantize_apart(environment, peers[environment], self.model, out, self.rows, settings)
        device = self.args.device
        scores = squawq.evaluate(out, self.model, ids=self.held_back, window=WINDOW, stride=WINDOW, device=device)
        figures = outcome | {k: scores[k] for k in ("kl_mean", "perplexity", "reference_perplexity", "tokens")}
        kept.write_text(json.dumps(figures))
        return {**figures, "kept": False}


def show(name: str, measured: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Print the table of one model."""
    base = measured.get(BASELINE)
    rows = []
    for quantizer, found in measured.items():
        star = "*" if found["kept"] else ""
        rows.append(
            [
                quantizer,
                f"{found['kl_mean']:.5f}",
                f"{found['kl_mean'] / base['kl_mean']:.3f}" if base else "",
                f"{found['perplexity']:.4f}",
                f"{found['seconds']:.1f}{star}",
                f"{found['seconds'] / base['seconds']:.3f}" if base else "",
                f"{found['peak_bytes'] / 2**30:.2f}{star}",
            ]
        )
    any_of_them = next(iter(measured.values()))
    title = (
        f"{name}, {args.bits} bits, {args.rows} x {args.seqlen} calibration tokens, {any_of_them['tokens']:,} tokens "
        f"measured (perplexity {any_of_them['reference_perplexity']:.4f} in 16 bits), "
        f"{os.environ.get('OMP_NUM_THREADS', 'all')} threads"
    )
    headings = ["", "KL", f"of {BASELINE}'s", "perplexity", "seconds", f"of {BASELINE}'s", "peak GiB"]
    print_table(title, headings, rows)
    if any(found["kept"] for found in measured.values()):
        print("* of an earlier run")
    others = {name: found for name, found in measured.items() if QUANTIZERS[name][0] != "squawq"}
    if "squawq" in measured and others:
        best = min(others, key=lambda name: float(others[name]["kl_mean"]))
        share = measured["squawq"]["kl_mean"] / others[best]["kl_mean"]
        print(f"squawq's KL is {share:.3f} of the best peer's ({best})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="keeps the peers' folders and figures")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--mixed", type=Path, help="the model that tools/train_mixed.py made")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--models", nargs="+", choices=("demo", "twin", "babyllama", "mixed"), default=["demo", "twin"])
    parser.add_argument("--quantizers", nargs="+", choices=QUANTIZERS, default=list(QUANTIZERS))
    parser.add_argument("--bits", type=int, choices=(3, 4), default=4)
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for quantizing and evaluating")
    parser.add_argument("--rows", type=int, help="calibration rows; by default 64, of --real 128")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=20_000, help="held-back tokens to measure on")
    parser.add_argument("--fresh", action="store_true", help="keep nothing of earlier runs")
    real = parser.add_argument_group("a real model")
    real.add_argument("--real", type=Path, metavar="MODEL", help="a pretrained model's folder")
    real.add_argument("--seeds", type=int, default=1, help="how many draws of calibration rows")
    real.add_argument(
        "--calibrations",
        nargs="+",
        default=[BUILT_IN, "wiki"],
        metavar="KIND",
        help=f"of {', '.join(KINDS)}; {DEFAULT} leaves the choice to squawq, "
        f"anything else (such as {SELF}) is handed to it",
    )
    real.add_argument("--tests", nargs="+", choices=TEST_ROWS, metavar="KIND", help=f"of {', '.join(TEST_ROWS)}")
    real.add_argument("--test-rows", type=int, help="at most so many of a kind")
    real.add_argument("--patience", type=float, help="stop a quantizer after this many seconds")
    real.add_argument("--resume", action="store_true", help="keep squawq's figures of an earlier run too")
    args = parser.parse_args()
    args.rows = args.rows or (64 if args.real is None else 128)
    if "mixed" in args.models and args.mixed is None:
        parser.error("--models mixed needs --mixed FOLDER")
    peers = dict(peer.split("=", 1) for peer in args.peer) | {"squawq": sys.executable}
    wanted = [name for name in args.quantizers if QUANTIZERS[name][0] in peers]
    if args.real is not None:
        measure_real(QUANTIZERS, wanted, peers, args)
        return
    for name, subject in subjects(args.models, args.data, args.mixed, args.work).items():
        bench = Bench(subject, name, args)
        measured = {}
        for quantizer in wanted:
            measured[quantizer] = bench.figures(quantizer, peers)
            print(name, quantizer, json.dumps(measured[quantizer]), file=sys.stderr, flush=True)
        show(name, measured, args)


if __name__ == "__main__":
    main()
