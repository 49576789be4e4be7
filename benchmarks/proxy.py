"""Measures how well the proxy loss chooses scales: RTN error by the Hessian, against the output error of the module.

    python benchmarks/proxy.py [--model FOLDER] [--rows 64 --seqlen 256]

For every group of linears with an inspected module (q/k/v in attention, gate/up in the MLP), both losses are computed
for all candidates. Columns: the module's loss with the proxy's first choice and with the choice of --method awq (the
module's choice among the proxy's best few), each relative to the minimum over all candidates, which AutoAWQ's search
finds by running the module for each; and the rank of the best candidate in the proxy's order.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from unittest.mock import patch

from common import print_table
from torch import Tensor

import squawq
from squawq import QuantConfig
from squawq.demo import demo_model
from squawq.quantization import search as chooser  # the module that calls best_scales
from squawq.quantization.search import ScaleCandidate, best_scales, sampled_rows, scaled_difference

Found = dict[int, list[tuple[float, float, int]]]  # by number of linears: first choice, final choice, place of best


def judging(found: Found) -> Callable[..., ScaleCandidate]:
    """`best_scales` that also computes the module's loss of every candidate."""

    def judge(
        candidates: list[ScaleCandidate],
        weights: Sequence[Tensor],
        loss: Callable[[Tensor], float],
        group: int,
        zero_point: bool,
        inspect: Callable[[ScaleCandidate], float] | None = None,
    ) -> ScaleCandidate:
        chosen = best_scales(candidates, weights, loss, group, zero_point, inspect)
        if inspect is not None:
            rows = [weight[sampled_rows(weight)] for weight in weights]
            proxies = [
                sum(
                    len(weight) / len(row) * loss(scaled_difference(row, candidate.scales, group, zero_point))
                    for weight, row in zip(weights, rows, strict=True)
                )
                for candidate in candidates
            ]
            losses = [inspect(candidate) for candidate in candidates]
            order = sorted(range(len(candidates)), key=proxies.__getitem__)
            best = min(range(len(candidates)), key=losses.__getitem__)
            own = next(i for i, candidate in enumerate(candidates) if candidate is chosen)
            row = losses[order[0]] / losses[best], losses[own] / losses[best], order.index(best) + 1
            found.setdefault(len(weights), []).append(row)
        return chosen

    return judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model())
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    args = parser.parse_args()
    found: Found = {}
    with tempfile.TemporaryDirectory() as folder, patch.object(chooser, "best_scales", judging(found)):
        squawq.quantize(
            args.model, Path(folder) / "out", QuantConfig(method="awq", samples=args.rows, seqlen=args.seqlen)
        )
    names = {3: "q, k, v", 2: "gate, up"}
    if not found:
        sys.exit("no group of linears was inspected: the search no longer calls the best_scales that is replaced here")
    rows = [
        [
            names.get(linears, str(linears)),
            str(len(judged)),
            *(f"{median(r[k] for r in judged):.3f} / {max(r[k] for r in judged):.3f}" for k in (0, 1)),
            f"{median(r[2] for r in judged):g} / {max(r[2] for r in judged)}",
        ]
        for linears, judged in found.items()
    ]
    headings = ["linears", "layers", "first by proxy", "choice of --method awq", "place of the best"]
    print_table(
        f"{args.model.name}: module's loss relative to the best of all candidates, median / worst", headings, rows
    )


if __name__ == "__main__":
    main()
