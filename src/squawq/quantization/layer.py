"""Quantizes a decoder layer: AWQ scales, QEP correction, clipping, GPTQ rounding, check against plain rounding (RTN).

Peak memory beside the layer itself (float32): the Hessians of its inputs, the packed integers, and working memory for
rounding one linear.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from squawq.distributed import Ranks
from squawq.errors import CheckpointError
from squawq.families import expert_of
from squawq.format.groupwise import GroupwiseTensor, fake_quantize, quantize, to_gemm
from squawq.layerwise.blocks import Block
from squawq.layerwise.extra_inputs import ExtraInputs
from squawq.layerwise.plan import Folding, LayerPlan
from squawq.layerwise.tensor_names import all_finite
from squawq.quantization.error_propagation import ActivationRecord, ErrorStatistics, sequential_stages
from squawq.quantization.rounding import LinearQuantizer
from squawq.quantization.search import choose_scales, fold, round_in_place, sampled_rows
from squawq.quantization.states import Replay, Streams
from squawq.quantization.statistics import LayerInputs, capture_modules, clip_quantiles, mean_square, relative_error
from squawq.quantization.token_weights import weights_key
from squawq.report.schema import LayerRow, LinearRow, ScaleRow

PackedLinear = dict[str, Tensor]  # qweight, scales and qzeros, on the CPU


@dataclass(frozen=True)
class LayerResult:
    """A layer's tensors to store, by name in the layer, and its row of the report.

    kept: False if `verify` stores plain rounding in place of the quantized layer, because its loss is lower.
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]
    kept: bool = True


Commit = Callable[[LayerResult], tuple[dict[str, Any], Mapping[str, Tensor]]]


def quantize_layer(block: Block, plan: LayerPlan, streams: Streams, ranks: Ranks, commit: Commit) -> dict[str, Any]:
    """Quantize one decoder layer on calibration text, and run the hidden states through it.

    Every rank runs its own share of the tokens; rank 0 searches and rounds on the sums. Sources: scales and clipping
    AWQ, arXiv 2306.00978; correction QEP, arXiv 2504.09629; rounding GPTQ, arXiv 2210.17323.

    Args:
        block: The 16-bit layer in float32; holds the quantized one afterwards.
        plan: Which of its linears are quantized, and how.
        streams: This rank's hidden states before the layer; afterwards, those after it.
        ranks: Who shares the calibration.
        commit: Stores the result, on rank 0. Returns the report's row, and the stored tensors by their names on disk;
            no tensors after the last layer, or if calibration is not sequential.

    Returns:
        The report's row.
    """
    config, capture, chosen = plan.config, capture_modules(block.groups), LayerQuantization(block, plan)
    stages = [] if streams.quantized is None else sequential_stages(block, plan.converted)
    in_stages = {name for stage in stages for name in stage.linears}
    others: dict[str, list[str]] = {}  # experts' linears; all linears if calibration is not sequential
    for name in plan.converted:
        if name not in in_stages:
            others.setdefault(capture[name], []).append(name)

    # Collect: mean |x| and Hessian of every linear's input in the 16-bit model.
    before, extra = streams.sampled(), streams.sampled_extra()
    record = ActivationRecord.of(block, stages, before.shape[-1], streams.folder, streams.states_memory / 2)
    inputs = LayerInputs(block)
    inputs.collect(streams.reference, streams.reference_extra, streams.sample, record.hooks, others.keys())
    ranks.all_reduce([*inputs.sums, before, *extra.tensors])

    # Scale: AWQ's search, before anything is rounded.
    folding = chosen.folding = ranks.broadcast(partial(chosen.scale, inputs, others.keys())).to(block.device)
    fold(block, plan, folding)
    inputs.statistics = {name: stats for name, stats in inputs.statistics.items() if name in others}

    # Correct, clip, round: linears calibrated on the quantized model's hidden states, in order of execution.
    on_gpu = torch.device(block.device).type == "cuda"  # computes the last module again at once, which saves memory
    replayed = {name for stage in (stages[:-1] if on_gpu else stages) for name in stage.linears}
    replay = Replay(block, replayed, streams.folder, streams.states_memory / 4, extra)
    for index, stage in enumerate(stages):
        assert streams.quantized is not None
        weights = streams.token_weights(weights_key(block.index, stage.capture_module))
        error = ErrorStatistics(block, stage, folding.columns.get(stage.linears[0]), weights)
        with replay.playing():
            error.collect(streams.quantized, streams.quantized_extra, record, replay.hooks(stage.linears))
        ranks.all_reduce(error.sums)
        record.keep(stages[index + 1 :])
        quantizer = LinearQuantizer(error.inputs, config, error)
        packed = ranks.broadcast(partial(chosen.quantize, stage.linears, quantizer))
        del error, quantizer  # free them first: loading takes much memory, too
        chosen.load(packed)
        replay.settle()

    # Clip, round: all others, on the statistics of the 16-bit model.
    for module, linears in others.items():
        stats = inputs.statistics.pop(module)  # large: freed after this use
        if (scales := folding.columns.get(linears[0])) is not None:
            stats.divide(scales)
        quantizer = LinearQuantizer(stats, config)
        packed = ranks.broadcast(partial(chosen.quantize, linears, quantizer))
        del stats, quantizer
        chosen.load(packed)

    # Verify and commit; run the quantized model's hidden states through the layer as stored.
    def verified() -> tuple[bool, dict[str, Any], Mapping[str, Tensor]]:
        result = verify(chosen, before, extra, inputs.after)
        return result.kept, *commit(result)

    kept, row, tensors = ranks.broadcast(verified)
    if tensors:
        streams.advance(block, tensors, replay if kept else None)
    return row


@dataclass
class LayerQuantization:
    """A layer's scales, integers and report so far, each by linear."""

    block: Block
    plan: LayerPlan
    folding: Folding = field(default_factory=Folding)
    packed: dict[str, PackedLinear] = field(default_factory=dict)
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)  # (by plain rounding, as quantized)
    clips: dict[str, list[float]] = field(default_factory=dict)  # see `clip_quantiles`
    scales: list[ScaleRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tokens: Mapping[str, int] = field(default_factory=dict)  # routed to each expert

    @torch.no_grad()
    def scale(self, inputs: LayerInputs, whole: Collection[str]) -> Folding:
        """Choose the scales of all groups; see `choose_scales`."""
        samples = inputs.sample_modules(inspected=not self.plan.config.error_feedback)
        inputs.route_to_rare(samples)
        self.notes, self.tokens = list(inputs.notes()), inputs.tokens
        folding, self.scales = choose_scales(self.block, self.plan, inputs, samples, whole)
        return folding

    @torch.no_grad()
    def quantize(self, linears: Iterable[str], quantizer: LinearQuantizer) -> dict[str, PackedLinear]:
        """Quantize linears of the folded layer that share an input; corrects their weights in place."""
        config, found = self.plan.config, {}
        if quantizer.error is not None:
            self.notes += quantizer.stats.notes(f"{quantizer.error.stage.capture_module}, after quantized layers")
        for name in linears:
            weight = self.block.weight(name)
            part = sampled_rows(weight)
            original = self.folding.original(name, weight[part].clone(), part)
            never_clip = config.method == "awq" and name.endswith(self.plan.family.never_clip)
            integers, limits = quantizer.quantize(weight, config.clip and not never_clip)
            if limits is not None:
                self.clips[name] = clip_quantiles(weight, limits)
            if quantizer.stats.rows:
                self.losses[name] = self._losses(name, original, weight[part], integers.rows(part), part, quantizer)
            found[name] = {kind: tensor.cpu() for kind, tensor in to_gemm(integers).items()}
        self.packed |= found
        return found

    def _losses(
        self,
        name: str,
        original: Tensor,
        weight: Tensor,
        integers: GroupwiseTensor,
        part: slice,
        quantizer: LinearQuantizer,
    ) -> tuple[float, float]:
        """Mean squared error of a linear's sampled outputs by plain rounding and as quantized; tokens as weighted.

        Args:
            name: The linear.
            original: Its sampled rows `part` before folding and correction, float32 [rows, in].
            weight: The same rows that were rounded, float32 [rows, in].
            integers: What they were rounded to.
            part: The sampled rows.
            quantizer: Its `stats` are those of the input.
        """
        config, folding = self.plan.config, self.folding
        rounded = fake_quantize(original, config.group_of(weight.shape[1]), config.zero_point) - original
        found = integers.dequantize() - weight
        if name in folding.columns:
            rounded *= folding.columns[name]
        if name in folding.rows:
            found *= folding.rows[name][part, None]
        scale = 1 / (quantizer.stats.rows * len(original))
        return quantizer.stats.loss(rounded) * scale, quantizer.stats.loss(found) * scale

    def load(self, packed: Mapping[str, PackedLinear]) -> None:
        """Replace weights with their dequantized integers."""
        for name, tensors in packed.items():
            self.block.load_packed(name, **tensors)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the layer to store; linears without packed integers are rounded to nearest."""
        plan, tensors = self.plan, dict[str, Tensor]()
        converted = set(plan.converted)
        for name, tensor in self.block.module.state_dict().items():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and module in converted:
                packed = self.packed.get(module)
                if packed is None:
                    packed = to_gemm(quantize(tensor, plan.config.group_of(tensor.shape[1]), plan.config.zero_point))
                if not all_finite(packed["scales"]):
                    raise CheckpointError(
                        f"tensor {f'{plan.prefix}.{name}'!r} holds values too large for float16 scales; "
                        f"use --skip {module}"
                    )
                tensors |= {f"{module}.{part}": packed[part] for part in packed}
            else:
                tensors[name] = plan.stored(name, tensor)
        return tensors

    def record(
        self,
        kept: bool,
        losses: tuple[float, float] | None = None,
        relative: tuple[float | None, float | None] = (None, None),
    ) -> dict[str, Any]:
        """The layer's row of the report.

        Args:
            kept: Whether the quantized layer is stored; else plain rounding is.
            losses: Mean squared error of the layer's output by plain rounding, and as stored.
            relative: `relative_error` of the same two outputs.
        """
        plan, linears = self.plan, []
        for name, (out_features, in_features) in plan.shapes.items():
            rounded, loss = self.losses.get(name, (None, None))
            linears.append(
                LinearRow(
                    name=name,
                    out_features=out_features,
                    in_features=in_features,
                    tokens=self.tokens.get(expert_of(name) or ""),
                    kept_in_16_bits=plan.kept.get(name),
                    loss_rounded=rounded,
                    loss=loss if kept else rounded,
                    clip=self.clips.get(name) if kept else None,
                )
            )
        before, after = losses or (None, None)
        return LayerRow(
            name=plan.prefix,
            method=plan.config.method if kept else "rtn",
            loss_rounded=before,
            loss=after,
            relative_error_rounded=relative[0],
            relative_error=relative[1],
            scales=self.scales if kept else [],
            linears=linears,
            notes=self.notes,
        ).to_dict()


@torch.no_grad()
def verify(chosen: LayerQuantization, before: Tensor, extra: ExtraInputs, wanted: Tensor) -> LayerResult:
    """Keep the quantized layer if the mean squared error of its output is at most that of plain rounding.

    Args:
        chosen: The quantized layer. Overwrites its block's weights.
        before: Hidden states before the layer (`Streams.sampled`), float32 [sampled blocks, tokens, hidden].
        extra: What the layer reads beside them.
        wanted: The layer's output in the 16-bit model for the same tokens, of the same shape.
    """
    block, plan = chosen.block, chosen.plan
    output = block.run(before, extra=extra)
    loss, error = mean_square(output, wanted), relative_error(output, wanted)
    tensors = chosen.tensors()
    block.reload()
    for name in plan.converted:
        round_in_place(block, plan, name)
    output = block.run(before, extra=extra)
    plain, plain_error = mean_square(output, wanted), relative_error(output, wanted)
    if loss <= plain:  # also false when `loss` is not a number
        return LayerResult(tensors, chosen.record(True, (plain, loss), (plain_error, error)))
    block.reload()
    chosen.notes.append("the search made this layer worse; plain rounding is kept")
    record = chosen.record(False, (plain, plain), (plain_error, plain_error))
    return LayerResult(LayerQuantization(block, plan).tensors(), record, kept=False)


@torch.no_grad()
def round_layer(block: Block, plan: LayerPlan) -> LayerResult:
    """Round a layer to nearest (method "rtn"); needs no calibration."""
    plain = LayerQuantization(block, plan)
    return LayerResult(plain.tensors(), plain.record(False))
