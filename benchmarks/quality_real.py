"""Measures a real model for quality.py: calibration and test texts of several kinds, some seeds, and the tables.

Scores are those of `squawq.evaluate`; the 16-bit model runs once for all quantizers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import torch
from common import PeerFailed, quantize_apart
from texts import KINDS, LENGTH, TEST_ROWS, Rows, Texts

import squawq
from squawq.errors import SquawqError
from squawq.evaluation.run import Final, Windows, score_windows
from squawq.families import family_of
from squawq.format.reader import Checkpoint
from squawq.layerwise.blocks import Blocks

NO_CALIBRATION = "none"
SELF = "self"
DEFAULT = "default"  # text and number of rows are left to squawq
MEASURES: dict[str, str] = {  # names in `Score.summary`, and formats
    "kl_mean": ".4f",
    "kl_p99": ".3f",
    "top1_agreement": ".3f",
    "perplexity": ".2f",
}
HEADINGS = ("quantizer", "calibration", "KL, mean", "KL, 99th percentile", "top-1", "perplexity", "seconds")
Figures = dict[str, Any]
Quantizers = Mapping[str, tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Case:
    """One quantization: a quantizer, the kind of its calibration text, and the seed that draws the rows."""

    quantizer: str
    calibration: str
    seed: int

    def __str__(self) -> str:
        return f"{self.quantizer}, {self.calibration}, seed {self.seed}"


def cases(quantizers: Sequence[str], settings: Quantizers, calibrations: Sequence[str], seeds: int) -> Iterator[Case]:
    """Every quantizer with every calibration and seed; rounding to nearest has neither."""
    for quantizer in quantizers:
        if settings[quantizer][1].get("method") == "rtn":
            yield Case(quantizer, NO_CALIBRATION, 0)
        else:
            yield from (Case(quantizer, name, seed) for name in calibrations for seed in range(seeds))


class RealModel:
    """A model with its texts, and the folder with the results."""

    def __init__(self, quantizers: Quantizers, peers: Mapping[str, str], args: argparse.Namespace) -> None:
        self.quantizers, self.peers, self.args = quantizers, peers, args
        self.model: Path = args.real
        self.texts = Texts.of(self.model, args.data)
        there = self.texts.kinds()
        self.tests = {
            kind: self.texts.test(kind, min(most, args.test_rows or most))
            for kind, most in TEST_ROWS.items()
            if kind in there and kind in (args.tests or TEST_ROWS)
        }
        told = [args.rows, args.bits, args.device, self.tests, list(self._weights())]
        key = sha256(json.dumps(told).encode()).hexdigest()[:12]
        self.folder: Path = args.work / f"real-{key}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def _weights(self) -> Iterator[str]:
        for path in sorted(self.model.glob("*.safetensors")):
            with path.open("rb") as file:
                yield file_digest(file, "sha256").hexdigest()

    def rows(self, case: Case) -> Rows:
        """Calibration rows; without text, rows of zeros, which say how many there should be."""
        if case.calibration in KINDS:
            return self.texts.calibration(case.calibration, self.args.rows, case.seed)
        return [[0] * LENGTH] * self.args.rows

    def figures(self, case: Case) -> Figures:
        """Measure a case. `failed` says why there are no figures; `kept` marks those of an earlier run."""
        peer, settings = self.quantizers[case.quantizer]
        file = self.folder / f"{case.quantizer}-{case.calibration}-{case.seed}.json".replace(" ", "-")
        if file.exists() and (self.args.resume or peer != "squawq") and not self.args.fresh:
            found: Figures = json.loads(file.read_text())
            return found | {"kept": True}
        told = {**settings, "bits": self.args.bits, "device": self.args.device}
        if case.calibration not in (*KINDS, NO_CALIBRATION):
            if peer != "squawq":
                return {"failed": f"takes calibration text only, not {case.calibration!r}", "kept": False}
            told |= {"calibration": case.calibration, "seed": case.seed}  # the model's text depends on the seed
            if case.calibration == DEFAULT:
                told |= {"calibration": None, "samples": None}
        try:
            found = self._measured(peer, case, told)
        except PeerFailed as error:
            print(error, file=sys.stderr)
            return {"failed": error.reason, "kept": False}
        except SquawqError as error:  # of a result that cannot be evaluated
            return {"failed": str(error), "kept": False}
        except subprocess.TimeoutExpired:
            return {"failed": f"stopped after {self.args.patience:g} s", "kept": False}
        file.write_text(json.dumps(found))
        return {**found, "kept": False}

    def _measured(self, peer: str, case: Case, told: Mapping[str, Any]) -> Figures:
        out, rows = self.folder / "out", self.folder / "rows.json"
        for rest in self.folder.glob("out*"):  # squawq would resume a run that was stopped, and its time would be wrong
            shutil.rmtree(rest)
        rows.write_text(json.dumps(self.rows(case)))
        outcome = quantize_apart(peer, self.peers[peer], self.model, out, rows, told, self.args.patience)
        mine, scores = self._final(out), {}
        begin = 0
        for kind, test in self.tests.items():
            part = slice(begin, begin := begin + len(test))
            finals = [Final(final.blocks, final.states[part]) for final in (mine, self._reference)]
            found = score_windows(finals, Windows(torch.tensor(test), LENGTH))[0].summary()
            scores[kind] = {name: found[name] for name in (*MEASURES, "reference_perplexity")}
        shutil.rmtree(out)
        return {**outcome, "tests": scores}

    def _final(self, model: Path) -> Final:
        """A model's states of all test rows."""
        checkpoint = Checkpoint(model)
        blocks = Blocks(checkpoint, family_of(checkpoint.config.model_type), self.args.device)
        rows = torch.tensor([row for test in self.tests.values() for row in test])
        return Final(blocks, blocks.last_states(rows))

    @cached_property
    def _reference(self) -> Final:
        return self._final(self.model)

    @cached_property
    def conditions(self) -> str:
        """Where and on what all is measured, for the head of the tables."""
        cuda = self.args.device.startswith("cuda")
        device = torch.cuda.get_device_name(self.args.device) if cuda else "CPU"
        threads = os.environ.get("OMP_NUM_THREADS", "all")
        return (
            f"{self.model.name}, {self.args.bits} bits, groups of 128, calibration with up to {self.args.rows} rows of "
            f"{LENGTH} tokens; {device}, {threads} threads, torch {torch.__version__}, squawq {squawq.__version__}."
        )


def measure_real(quantizers: Quantizers, wanted: Sequence[str], peers: Mapping[str, str], args: Any) -> None:
    """Measure all cases and print a table of every test text in Markdown. Each result is shown on stderr at once."""
    real = RealModel(quantizers, peers, args)
    measured: dict[Case, Figures] = {}
    for case in cases(wanted, quantizers, args.calibrations, args.seeds):
        measured[case] = real.figures(case)
        print(case, json.dumps(measured[case]), file=sys.stderr, flush=True)
    print(real.conditions, "\n")
    print("\n\n".join(table(kind, len(rows), measured) for kind, rows in real.tests.items()))
    if any(found["kept"] for found in measured.values()):
        print("\n\\* of an earlier run")


def table(kind: str, rows: int, measured: Mapping[Case, Figures]) -> str:
    """Markdown: quantizers and calibrations with the mean over seeds, and in brackets the least and the largest."""
    groups: dict[tuple[str, str], list[Figures]] = {}
    for case, found in measured.items():
        groups.setdefault((case.quantizer, case.calibration), []).append(found)
    scores = [found["tests"][kind] for found in measured.values() if "failed" not in found]
    perplexity = f"; perplexity {scores[0]['reference_perplexity']:.2f} in 16 bits" if scores else ""
    lines = [
        f"### {kind}: {rows} rows of {LENGTH} tokens{perplexity}",
        "",
        f"| {' | '.join(HEADINGS)} |",
        "|---|---|" + "---:|" * (len(HEADINGS) - 2),
    ]
    for (quantizer, calibration), group in groups.items():
        cells = _cells(kind, group)
        lines.append(f"| {' | '.join([quantizer, calibration, *cells])} |")
    return "\n".join(lines)


def _cells(kind: str, found: Sequence[Figures]) -> list[str]:
    """Figures of the seeds that did not fail; if there are none, the reason."""
    good = [one for one in found if "failed" not in one]
    if not good:
        return [found[0]["failed"].replace("|", "\\|")[:120], *[""] * (len(HEADINGS) - 3)]
    star = "\\*" if any(one["kept"] for one in good) else ""
    scores = [one["tests"][kind] for one in good]
    cells = [spread([one[name] for one in scores], layout) for name, layout in MEASURES.items()]
    return [*cells, spread([one["seconds"] for one in good], ".1f") + star]


def spread(values: Sequence[float], layout: str) -> str:
    """The mean and, if values differ, the least and the largest: 0.18 (0.17 to 0.19)."""
    least, mean, most = (format(value, layout) for value in (min(values), statistics.fmean(values), max(values)))
    return mean if least == most else f"{mean} ({least} to {most})"
