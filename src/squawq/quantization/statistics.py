"""Calibration statistics of a linear's input: mean |x| and the Hessian X'X (Gram matrix), summed over tokens.

Of wide inputs only the diagonal blocks of the Gram matrix are kept. Knows no model and no files.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from squawq.layerwise.tensor_names import all_finite
from squawq.quantization.search import gram_loss

MAX_GRAM = 16_384  # inputs up to which the Gram matrix is whole: 1 GiB
BOUNDARY = 256  # wider ones are cut at multiples of the largest group size, so that a group lies in one block
ROWS = 4096  # inputs summed at once: a long sum of short ones loses less in float32, and copies stay small
PANEL = 256  # rows computed up to the same column: the upper triangle is not computed twice


def token_errors(found: Tensor, wanted: Tensor) -> Tensor:
    """Relative error of each token, float32 [..., tokens], for `found` and `wanted` [..., tokens, features].

    Each token counts the same: the first of a text often has activations a thousand times as large as the others'.
    """
    unit = wanted.abs().amax(-1, keepdim=True).clamp(min=1e-30)  # float32's squares end at 1e19
    size, lost = ((values / unit).square().sum(-1) for values in (wanted, found.float() - wanted))
    return (lost / size.clamp(min=1e-30)).sqrt()


def mean_square(a: Tensor, b: Tensor) -> float:
    """Mean squared difference of float32 [..., features], summed in float64."""
    return float((a - b).square().mean(-1).cpu().mean(dtype=torch.float64))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of `token_errors`."""
    return float(token_errors(found, wanted).square().mean().sqrt())


def gram_spans(features: int) -> list[slice]:
    """Inputs that share a block of the Gram matrix: all, or parts of at most MAX_GRAM, as equal as BOUNDARY allows."""
    blocks, pieces = -(-features // MAX_GRAM), -(-features // BOUNDARY)
    cuts = [min(features, pieces * index // blocks * BOUNDARY) for index in range(blocks + 1)]
    return [slice(start, stop) for start, stop in pairwise(cuts)]


def _panels(gram: Tensor) -> list[slice]:
    return [slice(start, min(start + PANEL, len(gram))) for start in range(0, len(gram), PANEL)]


class InputStatistics:
    """Sums over all calibration tokens of one input [tokens, features], in float32 and float64.

    Memory: features^2 float32, for wide inputs a half, a third ... of that. Tokens with a non-finite value are left out
    and counted in `dropped`.
    """

    def __init__(self, features: int, device: str) -> None:
        exact = torch.float32 if device.startswith("mps") else torch.float64  # which Apple's GPUs do not have
        self.spans = gram_spans(features)
        self.absolute = torch.zeros(features, dtype=exact, device=device)
        self._sums = [torch.zeros(s.stop - s.start, s.stop - s.start, device=device) for s in self.spans]
        self._mirrored = True  # else the Gram matrices are right up to their diagonals
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)

    @property
    def sums(self) -> list[Tensor]:
        """All that `update` adds to; an all-reduce of these gives the sums over all ranks' tokens."""
        self._mirrored = False
        return [self._counts, self.absolute, *self._sums]

    @property
    def _grams(self) -> list[Tensor]:
        if not self._mirrored:
            for gram in self._sums:
                for rows in _panels(gram):
                    gram[: rows.start, rows] = gram[rows, : rows.start].T
            self._mirrored = True
        return self._sums

    @property
    def rows(self) -> int:
        """Tokens summed."""
        return int(self._counts[0])

    @property
    def dropped(self) -> int:
        """Tokens left out."""
        return int(self._counts[1])

    def update(self, x: Tensor) -> None:
        """Add inputs [..., features] of any floating dtype."""
        for piece in torch.split(x.reshape(-1, x.shape[-1]), ROWS):
            self._add(piece.float())

    def _add(self, x: Tensor) -> None:
        if not all_finite(x):
            finite = torch.isfinite(x).all(-1)
            self._counts[1] += (~finite).sum()
            x = x[finite]
        self._counts[0] += len(x)
        self.absolute += x.abs().sum(0)
        for span, gram in zip(self.spans, self._sums, strict=True):
            part = x[:, span]
            for rows in _panels(gram):
                gram[rows, : rows.stop].addmm_(part[:, rows].T, part[:, : rows.stop])
        self._mirrored = False

    @property
    def mean_absolute(self) -> Tensor:
        """Mean |x|, float32 [features]."""
        return (self.absolute / max(1, self.rows)).float()

    @property
    def has_signal(self) -> bool:
        """Whether any input was ever finite and not zero."""
        return self.rows > 0 and bool((self.absolute > 0).any()) and all(map(all_finite, self._grams))

    @property
    def gram(self) -> Tensor:
        """The whole Gram matrix float32 [features, features], of inputs that are not too wide."""
        (gram,) = self._grams
        return gram

    def gram_of(self, span: slice) -> Tensor:
        """The Gram matrix's diagonal block of one of `spans`, float32 [span, span]."""
        return self._grams[self.spans.index(span)]

    @property
    def energy(self) -> Tensor:
        """The Gram matrix's diagonal, float32 [features]."""
        return torch.cat([gram.diagonal() for gram in self._sums])

    def notes(self, name: str) -> list[str]:
        """What is out of the ordinary, for the report."""
        found = [f"{name}: {self.dropped} inputs were not finite and are left out"] if self.dropped else []
        return found if self.has_signal else [*found, f"{name}: no calibration signal; rounded to nearest"]

    def loss(self, difference: Tensor) -> float:
        """tr(D H D'): summed squared output error of a weight difference D float32 [rows, features]."""
        return sum(gram_loss(difference[:, span], gram) for span, gram in zip(self.spans, self._grams, strict=True))

    def gram_blocks(self, group: int) -> Tensor:
        """The Gram matrix's diagonal blocks, float32 [groups, group, group]."""
        grams = self._grams if group <= BOUNDARY else [self._whole()]
        return torch.stack([g[i : i + group, i : i + group] for g in grams for i in range(0, len(g), group)])

    def divide(self, scales: Tensor) -> None:
        """Become the statistics of the inputs divided by `scales` float32 [features]."""
        self.absolute /= scales
        for span, gram in zip(self.spans, self._grams, strict=True):
            gram /= scales[span]
            gram /= scales[span, None]

    def _whole(self) -> Tensor:
        """For groups of a whole row: the Gram matrix, with zeros between the spans."""
        if len(self.spans) == 1:
            return self.gram
        whole = self.absolute.new_zeros(len(self.absolute), len(self.absolute), dtype=torch.float32)
        for span, gram in zip(self.spans, self._grams, strict=True):
            whole[span, span] = gram
        return whole
