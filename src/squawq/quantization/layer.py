"""Quantizes one decoder layer: AWQ scales, QEP correction, clipping, GPTQ rounding, a check against plain rounding.

Peak memory above the layer itself (float32): the Hessians of its inputs, the packed integers, and what rounding one
linear takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from squawq.distributed import Ranks
from squawq.format.groupwise import GroupwiseTensor, fake_quantize, to_gemm
from squawq.layerwise.blocks import Block
from squawq.layerwise.plan import LayerPlan
from squawq.quantization.error_propagation import ActivationRecord, ErrorStatistics, sequential_stages
from squawq.quantization.inputs import LayerInputs, capture_modules
from squawq.quantization.linear import LinearQuantizer
from squawq.quantization.records import clip_quantiles
from squawq.quantization.replay import Replay
from squawq.quantization.result import LayerQuantization, LayerResult, PackedLinear
from squawq.quantization.scales import choose_scales, fold, round_in_place
from squawq.quantization.search import sampled_rows
from squawq.quantization.statistics import mean_square, relative_error
from squawq.quantization.streams import Streams

Commit = Callable[[LayerResult], tuple[dict[str, Any], Mapping[str, Tensor]]]


def quantize_layer(block: Block, plan: LayerPlan, streams: Streams, ranks: Ranks, commit: Commit) -> dict[str, Any]:
    """Quantize one decoder layer on calibration text, and run the hidden states through it.

    Every rank runs its own share of the tokens; rank 0 searches and rounds on the sums. Sources: scales and clipping
    AWQ, arXiv 2306.00978; correction QEP, arXiv 2504.09629; rounding GPTQ, arXiv 2210.17323.

    Args:
        block: The 16-bit layer in float32; holds the quantized one afterwards.
        plan: Which of its linears are quantized, and how.
        streams: This rank's hidden states before the layer; afterwards, those behind it.
        ranks: Who shares the calibration.
        commit: Stores the result, on rank 0. Returns the report's row, and the stored tensors by their names on disk,
            empty if the quantized stream ends here.

    Returns:
        The report's row.
    """
    config, capture, chosen = plan.config, capture_modules(block.groups), LayerQuantization()
    stages = [] if streams.quantized is None else sequential_stages(block, plan.converted)
    in_stages = {name for stage in stages for name in stage.linears}
    others: dict[str, list[str]] = {}  # the linears of experts, and all where calibration is not sequential
    for name in plan.converted:
        if name not in in_stages:
            others.setdefault(capture[name], []).append(name)

    # Collect: mean |x| and Hessian of every linear's input in the 16-bit model.
    before = streams.sampled()
    record = ActivationRecord.of(block, stages, before.shape[-1], streams.folder, streams.states_memory / 2)
    inputs = LayerInputs(block)
    inputs.collect(streams.reference, streams.sample, record.hooks, others.keys())
    ranks.all_reduce([*inputs.sums, before])

    # Scale: AWQ's search, before anything is rounded.
    folding = ranks.broadcast(partial(choose_scales, block, plan, inputs, others.keys(), chosen)).to(block.device)
    chosen.folding = folding
    fold(block, plan, folding)
    inputs.keep(others.keys())

    # Correct, clip, round: linears behind quantized ones, in order of execution.
    replay = Replay(block, in_stages, streams.folder, streams.states_memory / 4)
    for index, stage in enumerate(stages):
        assert streams.quantized is not None
        error = ErrorStatistics(block, stage, folding.columns.get(stage.linears[0]))
        with replay.playing():
            error.collect(streams.quantized, record, replay.hooks(stage.linears))
        ranks.all_reduce(error.sums)
        record.keep(stages[index + 1 :])
        quantizer = LinearQuantizer(error.inputs, config, error)
        packed = ranks.broadcast(partial(_quantize_linears, block, plan, stage.linears, quantizer, chosen))
        del error, quantizer  # large, and so is what loading takes
        _load(block, packed)
        replay.settle()

    # Clip, round: all others, on the statistics of the 16-bit model.
    for module, linears in others.items():
        stats = inputs.take(module)
        if (scales := folding.columns.get(linears[0])) is not None:
            stats.divide(scales)
        quantizer = LinearQuantizer(stats, config)
        packed = ranks.broadcast(partial(_quantize_linears, block, plan, linears, quantizer, chosen))
        del stats, quantizer
        _load(block, packed)

    # Verify and commit; the quantized stream goes through the layer as it is stored.
    def verified() -> tuple[bool, dict[str, Any], Mapping[str, Tensor]]:
        result = verify(block, plan, chosen, before, inputs.after)
        return result.kept, *commit(result)

    kept, row, tensors = ranks.broadcast(verified)
    if tensors:
        streams.advance(block, tensors, replay if kept else None)
    return row


@torch.no_grad()
def _quantize_linears(
    block: Block, plan: LayerPlan, linears: Iterable[str], quantizer: LinearQuantizer, chosen: LayerQuantization
) -> dict[str, PackedLinear]:
    """Packed integers of linears of the folded layer that share an input; their weights become the corrected ones."""
    if quantizer.error is not None:
        chosen.notes += quantizer.stats.notes(f"{quantizer.error.stage.capture_module}, behind quantized layers")
    for name in linears:
        weight = block.weight(name)
        part = sampled_rows(weight)
        original = chosen.folding.original(name, weight[part].clone(), part)
        never_clip = plan.config.method == "awq" and name.endswith(plan.family.never_clip)
        integers, limits = quantizer.quantize(weight, plan.config.clip and not never_clip)
        if limits is not None:
            chosen.clips[name] = clip_quantiles(weight, limits)
        if quantizer.stats.rows:
            chosen.losses[name] = _losses(name, original, weight, part, integers, quantizer, chosen)
        chosen.packed[name] = {kind: tensor.cpu() for kind, tensor in to_gemm(integers).items()}
    return {name: chosen.packed[name] for name in linears}


def _losses(
    name: str,
    original: Tensor,
    weight: Tensor,
    part: slice,
    integers: GroupwiseTensor,
    quantizer: LinearQuantizer,
    chosen: LayerQuantization,
) -> tuple[float, float]:
    """Mean squared error of a linear's sampled outputs by plain rounding and as quantized.

    Args:
        name: Of the linear.
        original: Its sampled rows before folding and correction, float32 [rows, in].
        weight: The weight that was rounded, float32 [out, in].
        part: Which rows are sampled.
        integers: What it was rounded to.
        quantizer: Has the statistics of the input.
        chosen: Has the scales.
    """
    folding, config = chosen.folding, quantizer.config
    rounded = fake_quantize(original, config.group_of(weight.shape[1]), config.zero_point) - original
    found = integers.rows(part).dequantize() - weight[part]
    if name in folding.columns:
        rounded *= folding.columns[name]
    if name in folding.rows:
        found *= folding.rows[name][part, None]
    scale = 1 / (quantizer.stats.rows * len(original))
    return quantizer.stats.loss(rounded) * scale, quantizer.stats.loss(found) * scale


def _load(block: Block, packed: Mapping[str, PackedLinear]) -> None:
    for name, tensors in packed.items():
        block.load_packed(name, **tensors)


@torch.no_grad()
def verify(block: Block, plan: LayerPlan, chosen: LayerQuantization, before: Tensor, wanted: Tensor) -> LayerResult:
    """Keep the quantized layer if its output is no further from the 16-bit model's than that of plain rounding.

    Args:
        block: The quantized layer; afterwards, one rounded to nearest or the 16-bit one.
        plan: Its plan.
        chosen: What the layer holds.
        before: Hidden states that it is judged on, float32 [blocks, tokens, hidden].
        wanted: The 16-bit model's output for the same tokens.
    """
    found = block.run(before)
    loss, error = mean_square(found, wanted), relative_error(found, wanted)
    tensors = chosen.tensors(block, plan)
    block.reload()
    for name in plan.converted:
        round_in_place(block, plan, name)
    found = block.run(before)
    plain, plain_error = mean_square(found, wanted), relative_error(found, wanted)
    if loss <= plain:  # also false when `loss` is not a number
        return LayerResult(tensors, chosen.record(block, plan, True, (plain, loss), (plain_error, error)))
    block.reload()
    chosen.notes.append("the search made this layer worse; plain rounding is kept")
    record = chosen.record(block, plan, False, (plain, plain), (plain_error, plain_error))
    return LayerResult(LayerQuantization().tensors(block, plan), record, kept=False)


@torch.no_grad()
def round_layer(block: Block, plan: LayerPlan) -> LayerResult:
    """Round a layer to nearest (method "rtn"); needs no calibration."""
    nothing = LayerQuantization()
    return LayerResult(nothing.tensors(block, plan), nothing.record(block, plan, False))
