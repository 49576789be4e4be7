"""Mixtures of experts on a GPU: launches the kernels of expert_kernels.py. No step waits for the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from squawq.backends.cuda import expert_kernels, int4, launch, tiles
from squawq.backends.cuda.launch import Sums, pdl
from squawq.backends.layer_ops import MixtureOfExperts, Routing

SCANNED = 1024  # pairs that a program looks at together


def declines(layer: MixtureOfExperts) -> str | None:
    """Why these kernels do not run a layer."""
    weights = layer.gate_up, layer.down
    if not all(isinstance(weight, int4.Int4Weight) for weight in weights):
        return "its experts are not in INT4"
    return None if isinstance(layer.router, int4.Int4Weight | launch.DenseWeight) else "its router has no kernel"


@dataclass
class ExpertSpace:
    """Where a step keeps what lies between the kernels, for some number of rows: flat, and used by every layer."""

    logits: Tensor
    ids: Tensor
    shares: Tensor
    order: Tensor
    owners: Tensor
    used: Tensor
    wide: Tensor
    narrow: Tensor
    down: Tensor
    out: Tensor


def expert_space(
    layers: list[MixtureOfExperts], rows: int, dtype: torch.dtype, device: torch.device, *, split: bool
) -> ExpertSpace:
    """Room for `rows` rows of any of these layers. split: as in `run`."""

    def most(count: str) -> int:
        return max(_numbers(layer, rows, split)[count] for layer in layers)

    def empty(count: str, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(most(count), dtype=kind, device=device)

    whole = torch.int32
    integers = empty("pairs", whole), empty("pairs"), empty("order", whole), empty("tiles", whole)
    used = torch.zeros(1, dtype=whole, device=device)
    return ExpertSpace(
        empty("logits"), *integers, used, empty("wide"), empty("narrow", dtype), empty("down"), empty("out")
    )


def _numbers(layer: MixtureOfExperts, rows: int, split: bool) -> dict[str, int]:
    """How many numbers `run` keeps of each kind."""
    routing, hidden, inner = layer.routing, layer.router.shape[1], layer.down.shape[1]
    pairs = rows * routing.top_k
    most = {tokens: tiles.most_tiles(pairs, routing.experts, tokens) for tokens in tiles.TOKENS}
    wide, down = (splits(layer, split, weight) for weight in (0, 1))
    assert isinstance(layer.router, int4.Int4Weight | launch.DenseWeight)
    return {
        "logits": launch.splits(layer.router) * rows * layer.router.shape[0],
        "pairs": pairs,
        "tiles": max(most.values()),
        "order": max(tokens * count for tokens, count in most.items()),
        "wide": wide * pairs * 2 * inner,
        "narrow": pairs * inner,
        "down": down * pairs * hidden,
        "out": rows * hidden,
    }


def splits(layer: MixtureOfExperts, split: bool, index: int) -> int:
    """Into how many parts the inputs of gate and up (0) or down (1) are cut, by the shapes alone."""
    weight = (layer.gate_up, layer.down)[index]
    out = weight.shape[0] // layer.routing.experts * layer.routing.top_k
    return tiles.split_count(out, -(-weight.shape[1] // int4.BLOCK)) if split else 1


def run(
    x: Tensor,
    layer: MixtureOfExperts,
    shared: Sums | None,
    space: ExpertSpace,
    *,
    split: bool,
    dependent: bool = False,
) -> Sums:
    """The experts' output of x [rows, hidden], in the activations' dtype, as float32 [1, rows, hidden] in space.out.

    Args:
        shared: The shared expert's output, if the layer has one; without a bias.
        split: Cut the inputs of products into parts, so that few rows make enough programs.
    """
    routing, router = layer.routing, layer.router
    rows, hidden = x.shape
    pairs, inner, outputs = rows * routing.top_k, layer.down.shape[1], router.shape[0]
    assert isinstance(router, int4.Int4Weight | launch.DenseWeight)

    def part(flat: Tensor, *shape: int) -> Tensor:
        return flat[: torch.Size(shape).numel()].view(shape)

    logits = launch.matmul(x, router, part(space.logits, launch.splits(router), rows, outputs), dependent)
    _choose(logits.parts, routing, space, dependent)
    tile = tiles.tile(-(-pairs // routing.experts), 2 * inner, x.device)
    expert_kernels.group_kernel[(routing.experts,)](
        space.ids, space.order, space.owners, space.used, pairs, routing.experts, tile.tokens,
        triton.next_power_of_2(routing.experts), min(SCANNED, triton.next_power_of_2(pairs)), dependent,
        num_warps=4, **pdl(dependent),
    )  # fmt: skip
    wide = part(space.wide, splits(layer, split, 0), pairs, 2 * inner)
    _multiply(x, layer, 0, routing.top_k, tile, space, wide, dependent)
    narrow = part(space.narrow, pairs, inner)
    launch.activation_mul(Sums(wide), layer.activation, narrow, dependent)
    down = part(space.down, splits(layer, split, 1), pairs, hidden)
    _multiply(narrow, layer, 1, 1, tile, space, down, dependent)
    out, width = part(space.out, 1, rows, hidden), min(1024, triton.next_power_of_2(hidden))
    expert_kernels.combine_kernel[(rows, triton.cdiv(hidden, width))](
        down, space.shares, down if shared is None else shared.parts, logits.parts, out, rows, hidden, len(down),
        routing.top_k, 0 if shared is None else len(shared.parts), layer.shared == "gated", len(logits.parts), outputs,
        width, dependent, num_warps=4, **pdl(dependent),
    )  # fmt: skip
    return Sums(out)


def _choose(logits: Tensor, routing: Routing, space: ExpertSpace, dependent: bool) -> None:
    count, rows, outputs = logits.shape
    bias = routing.bias
    expert_kernels.choose_kernel[(rows,)](
        logits, logits if bias is None else bias, space.ids, space.shares, rows, routing.scale, count, outputs,
        routing.experts, routing.top_k, routing.scoring == "sigmoid", routing.renormalize, bias is not None,
        routing.groups, routing.top_groups, triton.next_power_of_2(routing.experts),
        triton.next_power_of_2(routing.top_k), dependent, num_warps=4, **pdl(dependent),
    )  # fmt: skip


def _multiply(
    x: Tensor, layer: MixtureOfExperts, index: int, each: int, tile: tiles.Tile, space: ExpertSpace, out: Tensor,
    dependent: bool,
) -> None:  # fmt: skip
    """Gate and up (index 0) or down (1) of each pair's expert into out, float32 [splits, pairs, outputs]."""
    weight = (layer.gate_up, layer.down)[index]
    assert isinstance(weight, int4.Int4Weight)
    count, pairs, n = out.shape
    blocks, k = weight.words.shape[0], weight.shape[1]
    most = tiles.most_tiles(pairs, layer.routing.experts, tile.tokens)
    expert_kernels.grouped_matmul_kernel[(triton.cdiv(n, tile.outputs), count, most)](
        x, weight.words, weight.grids, space.order, space.owners, space.used, out, pairs, n, k, weight.shape[0], blocks,
        triton.cdiv(blocks, count), each, weight.group, k % int4.BLOCK != 0, tile.tokens, tile.outputs, tile.stages,
        dependent, int4.INTERPRETED, num_warps=tile.warps, num_stages=tile.stages, **pdl(dependent),
    )  # fmt: skip
