"""Collects calibration statistics of the inputs of a layer's linears: mean |x| and the Hessian X'X (Gram matrix).

`InputStatistics` has the sums over all tokens of one input, `LayerInputs` those of a layer's inputs. Linears that share
an input share its statistics; each expert has its own, of the tokens routed to it. Of inputs wider than MAX_GRAM only
diagonal blocks of the Gram matrix are kept. Peak memory: the Hessians of the layer's inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor

from squawq.families import ScalingGroup, expert_of
from squawq.layerwise.blocks import Block, InputHook
from squawq.layerwise.extra_inputs import ExtraInputs
from squawq.layerwise.tensor_names import all_finite
from squawq.quantization.states import Sample

MAX_GRAM = 16_384  # features up to which the Gram matrix is whole: 1 GiB
BOUNDARY = 256  # wider ones are cut at multiples of this, the largest group size: a group lies in one block
ROWS = 4096  # tokens per matrix product: a sum of partial sums is more exact in float32, and copies stay small
PANEL = 256  # Gram rows per matrix product: only the lower triangle is computed, then mirrored
SCALING_TOKENS = 4096  # enough to choose scales
MIN_TOKENS = 256  # an expert that saw fewer is calibrated on all sampled tokens instead
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
SAMPLED = 1 << 20  # values that are enough for the inner quantiles


def token_errors(found: Tensor, wanted: Tensor) -> Tensor:
    """Relative error ||found - wanted|| / ||wanted|| of each token: float32 [..., tokens] for [..., tokens, features].

    Relative, because the first token of a text often has activations a thousand times as large as the others'.
    """
    unit = wanted.abs().amax(-1, keepdim=True).clamp(min=1e-30)  # float32 overflows on squares of 1e19 and more
    size, lost = ((values / unit).square().sum(-1) for values in (wanted, found.float() - wanted))
    return (lost / size.clamp(min=1e-30)).sqrt()


def mean_square(a: Tensor, b: Tensor) -> float:
    """Mean squared difference of float32 [..., features], summed in float64."""
    return float((a - b).square().mean(-1).cpu().mean(dtype=torch.float64))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Root mean square over tokens of `token_errors`."""
    return float(token_errors(found, wanted).square().mean().sqrt())


def gram_spans(features: int) -> list[slice]:
    """Slices of features, one a diagonal block of the Gram matrix: at most MAX_GRAM, as equal as BOUNDARY allows."""
    blocks, pieces = -(-features // MAX_GRAM), -(-features // BOUNDARY)
    cuts = [min(features, pieces * index // blocks * BOUNDARY) for index in range(blocks + 1)]
    return [slice(start, stop) for start, stop in pairwise(cuts)]


def _panels(gram: Tensor) -> list[slice]:
    return [slice(start, min(start + PANEL, len(gram))) for start in range(0, len(gram), PANEL)]


def gram_loss(difference: Tensor, gram: Tensor) -> float:
    """tr(D H D'): summed squared output error of a weight difference D [rows, in], for a Hessian H = X'X [in, in]."""
    return float(((difference @ gram) * difference).sum(-1).cpu().sum(dtype=torch.float64))


def quantiles(values: Tensor) -> list[float]:
    """QUANTILES of values of any shape; the inner ones of at most 2 * SAMPLED of them, evenly spaced."""
    flat = values.flatten().float()
    inner = torch.quantile(flat[:: max(1, len(flat) // SAMPLED)], torch.tensor(QUANTILES[1:-1], device=flat.device))
    return [round(float(value), 6) for value in (flat.min(), *inner, flat.max())]


def clip_quantiles(weight: Tensor, limits: tuple[Tensor, Tensor]) -> list[float]:
    """QUANTILES over groups of clipped range / full range. weight [out, in]; limits (low, high) [out, groups]."""
    low, high = limits
    least, most = weight.view(*low.shape, -1).aminmax(dim=-1)
    full = most - least
    return quantiles(torch.where(full > 0, (high - low) / full, torch.ones_like(full)))


class InputStatistics:
    """Sums over all calibration tokens of one input [tokens, features], in float32 and float64.

    Memory: features^2 float32, divided by the number of `spans`. Tokens with a non-finite value are left out and
    counted in `dropped`.
    """

    def __init__(self, features: int, device: str) -> None:
        exact = torch.float32 if device.startswith("mps") else torch.float64  # MPS has no float64
        self.spans = gram_spans(features)
        self.absolute = torch.zeros(features, dtype=exact, device=device)
        self._sums = [torch.zeros(s.stop - s.start, s.stop - s.start, device=device) for s in self.spans]
        self._mirrored = True  # False: the Gram matrices are valid in their lower triangles alone
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
        """Whether some input was not zero, and all Gram matrices are finite."""
        return self.rows > 0 and bool((self.absolute > 0).any()) and all(map(all_finite, self._grams))

    @property
    def gram(self) -> Tensor:
        """The whole Gram matrix, float32 [features, features], of inputs with a single span."""
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
        """Warnings for the report."""
        found = [f"{name}: {self.dropped} inputs were not finite and are left out"] if self.dropped else []
        return found if self.has_signal else [*found, f"{name}: no calibration signal; rounded to nearest"]

    def loss(self, difference: Tensor) -> float:
        """tr(D H D'): summed squared output error of a weight difference D float32 [rows, features]."""
        return sum(gram_loss(difference[:, span], gram) for span, gram in zip(self.spans, self._grams, strict=True))

    def gram_blocks(self, group: int) -> Tensor:
        """The Gram matrix's diagonal blocks of `group` features, float32 [groups, group, group]."""
        grams = self._grams if group <= BOUNDARY else [self._whole()]
        return torch.stack([g[i : i + group, i : i + group] for g in grams for i in range(0, len(g), group)])

    def divide(self, scales: Tensor) -> None:
        """Change to the statistics of inputs divided by `scales` float32 [features], in place."""
        self.absolute /= scales
        for span, gram in zip(self.spans, self._grams, strict=True):
            gram /= scales[span]
            gram /= scales[span, None]

    def _whole(self) -> Tensor:
        """For group_size -1: the whole Gram matrix, with zeros outside its diagonal blocks."""
        if len(self.spans) == 1:
            return self.gram
        whole = self.absolute.new_zeros(len(self.absolute), len(self.absolute), dtype=torch.float32)
        for span, gram in zip(self.spans, self._grams, strict=True):
            whole[span, span] = gram
        return whole


def capture_modules(groups: Sequence[ScalingGroup]) -> dict[str, str]:
    """Module whose hook captures a linear's input, by linear; an expert's linears have their own."""
    found: dict[str, str] = {}
    first: dict[object, str] = {}
    for number, group in enumerate(groups):
        for name in group.linears:
            expert = expert_of(name)
            found[name] = first.setdefault((number, expert), name) if expert else group.capture_module
    return found


class LayerInputs:
    """Statistics of one layer's inputs in the 16-bit run.

    Attributes:
        statistics: By the module whose hook captures the input.
        before: Hidden states before the layer, float32 [sampled blocks, tokens, hidden].
        extra: What the layer reads beside those.
        after: Hidden states after the layer.
        tokens: How many tokens were routed to each expert, by its name.
    """

    def __init__(self, block: Block) -> None:
        self.block, self.groups = block, block.groups
        self.tokens: dict[str, int] = {}
        self.rare: list[str] = []
        self.statistics: dict[str, InputStatistics] = {}
        self._capture = capture_modules(block.groups)

    def collect(
        self,
        states: Tensor,
        extra: ExtraInputs,
        sample: Sample,
        hooks: Mapping[str, InputHook] = MappingProxyType({}),
        whole: Collection[str] | None = None,
    ) -> None:
        """Run this rank's hidden states through the layer.

        Args:
            states: float32 [blocks, tokens, hidden], replaced with the layer's output.
            extra: What the layer reads beside them; receives what later layers read.
            sample: Blocks that losses are measured on.
            hooks: Further input hooks.
            whole: Capture modules whose statistics cover all tokens, None: all modules. Those of others are for scales
                alone and cover about SCALING_TOKENS.
        """
        self.before, self.extra = sample.of(states), extra.each(sample.of)
        modules = dict.fromkeys(
            module for g in self.groups for module in (g.capture_module, *(self._capture[n] for n in g.linears))
        )
        self.statistics = {name: self._empty(name) for name in modules}
        step = max(1, sample.tokens // SCALING_TOKENS) | 1  # odd: else it takes the same positions of every block
        full = self.statistics if whole is None else whole
        own = {n: s.update if n in full else _thinned(s, step) for n, s in self.statistics.items()}
        with self.block.input_hooks(own), self.block.input_hooks(hooks):
            self.block.run(states, in_place=True, extra=extra)
        self.after = sample.of(states)

    @property
    def sums(self) -> list[Tensor]:
        """All that was collected; an all-reduce of these gives the statistics of all ranks' tokens."""
        return [self.before, self.after, *self.extra.tensors, *(t for s in self.statistics.values() for t in s.sums)]

    def sample_modules(self, inspected: bool) -> dict[str, Tensor]:
        """Inputs of modules that hold experts and, if `inspected`, of those that scales are judged by.

        Returns:
            float32 [sampled blocks, tokens, hidden] by module; "" is the layer.
        """
        names = {n for group in self.groups for n in (group.inspect if inspected else "", group.input) if n}
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        if seen:
            with self.block.input_hooks({name: pieces.append for name, pieces in seen.items()}):
                self.block.run(self.before, extra=self.extra)
        return {"": self.before} | {name: torch.cat(pieces) for name, pieces in seen.items()}

    def route_to_rare(self, samples: Mapping[str, Tensor]) -> None:
        """Collect again for experts that saw fewer than MIN_TOKENS: from all `samples`, see `sample_modules`."""
        moe_of = {expert_of(name): group.input for group in self.groups if group.input for name in group.linears}
        for expert, moe in moe_of.items():
            if expert is None:
                continue
            modules = {module for name, module in self._capture.items() if expert_of(name) == expert}
            self.tokens[expert] = max(self.statistics[name].rows for name in modules)
            if self.tokens[expert] < MIN_TOKENS:
                self.rare.append(expert)
                fresh = {name: self._empty(name) for name in modules}
                with self.block.input_hooks({name: s.update for name, s in fresh.items()}), torch.no_grad():
                    self.block.module.get_submodule(expert)(samples[moe].flatten(0, -2))
                self.statistics |= fresh

    def _empty(self, module: str) -> InputStatistics:
        features = self.before.shape[-1] if module not in self._capture else self.block.weight(module).shape[1]
        return InputStatistics(features, self.block.device)

    def notes(self) -> Iterable[str]:
        """Warnings for the report."""
        for name, stats in self.statistics.items():
            yield from stats.notes(name)
            if stats.has_signal and (dead := int((stats.absolute == 0).sum())):
                yield f"{name}: {dead} input channels without signal keep scale 1"
        if self.rare:
            few, all_ = len(self.rare), len(self.tokens)
            yield f"{few} of {all_} experts saw fewer than {MIN_TOKENS} tokens; calibrated on all sampled tokens"


def _thinned(statistics: InputStatistics, step: int) -> InputHook:
    """A hook that adds every `step`-th token, counted across batches."""
    ahead = 0

    def update(x: Tensor) -> None:
        nonlocal ahead
        rows = x.reshape(-1, x.shape[-1])
        statistics.update(rows[ahead::step])
        ahead = (ahead - len(rows)) % step

    return update
