"""Layouts of 4-bit linears on disk: which tensors a linear has in each, of what shape, and how they become AWQ GEMM's.

GEMV has whole words of neighbouring inputs. GEMV_FAST, and llm-awq's second version under another name, weave four rows
into blocks of 64 inputs and keep -zero * scale in place of a zero. GPTQ's words (AutoGPTQ's and GPTQModel's) run along
the inputs, its zeros along the outputs, and its first version stores zeros minus one; so do compressed-tensors' words
(pack-quantized), transposed. Both may name the group of each input (activation order, g_idx). Knows no files; `reader`
reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from squawq.errors import CheckpointError
from squawq.format.groupwise import LEVELS, PER_WORD, pack

Shapes = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
Gemm = tuple[Tensor, Tensor, Tensor | None]
WHOLE = 0.125  # how far from a whole number -zeros / scales may lie: bfloat16 rounds that of 15 by 0.06


def part_group(inputs: slice, in_features: int, group: int) -> int:
    """The group size of some inputs of a linear: the stored one, or a divisor if they begin or end inside a group."""
    start, stop, _ = inputs.indices(in_features)
    return math.gcd(group, start, stop)


def gemm_cuts(part: tuple[slice, slice], in_features: int, out_features: int, group: int) -> list[tuple[slice, slice]]:
    """(rows, columns) of GEMM's qweight, scales and qzeros that hold some (outputs, inputs) of a linear.

    Outputs are cut at multiples of PER_WORD; groups are whole.
    """
    first, last, _ = part[0].indices(out_features)
    start, stop, _ = part[1].indices(in_features)
    words, groups = slice(first // PER_WORD, last // PER_WORD), slice(start // group, -(-stop // group))
    return [(slice(start, stop), words), (groups, slice(first, last)), (groups, words)]


def regroup(gemm: Gemm, inputs: slice, in_features: int, group: int) -> Gemm:
    """GEMM tensors of some inputs with whole stored groups -> the same in groups of `part_group`."""
    qweight, scales, zeros = gemm
    finer = part_group(inputs, in_features, group)
    if finer == group:
        return gemm
    start, stop, _ = inputs.indices(in_features)
    first = start % group // finer
    own = slice(first, first + (stop - start) // finer)
    scales, *more = [
        tensor.repeat_interleave(group // finer, 0)[own] for tensor in (scales, zeros) if tensor is not None
    ]
    return qweight, scales, more[0] if more else None


@dataclass(frozen=True)
class Layout:
    """One layout. words: dtype of the integers. zeros: the name of the tensor that has them, and whether it has words.

    inputs, outputs: what in_features and out_features must be multiples of. shapes: (in, out, group) -> those of the
    integers, scales and zeros. to_gemm: those tensors and the number of groups -> GEMM's qweight, scales and qzeros.
    features: the shape of the integers -> (out, in). integers, scales: the names of these tensors. groups: of the one
    with the group of each input, int32 [in], which a linear may have; sizes: of one that repeats [out, in].
    """

    words: torch.dtype
    zeros: str
    packed_zeros: bool
    inputs: int
    outputs: int
    shapes: Callable[[int, int, int], Shapes]
    to_gemm: Callable[[Tensor, Tensor, Tensor | None, int], Gemm]
    features: Callable[[int, int], tuple[int, int]]
    integers: str = "qweight"
    scales: str = "scales"
    groups: str = ""
    sizes: str = ""

    @property
    def tensors(self) -> tuple[str, ...]:
        """All that may stand in place of a linear's weight."""
        return tuple(filter(None, (self.integers, self.scales, self.zeros, self.groups, self.sizes)))


def padded_words(in_features: int, group: int) -> int:
    """Words of 8 zeros for a row in GEMV's tensors: of groups below 128, filled up to what 8 * 128 inputs have."""
    words, unit = -(-in_features // (group * PER_WORD)), max(1, 128 // group)
    return -(-words // unit) * unit


def _spread(words: Tensor, count: int) -> Tensor:
    """[rows, n, out] words whose nibbles are different inputs -> int32 [rows, count, n, out / 8], a row for each."""
    rows, own, out = words.shape
    flat = words.reshape(-1, out)
    return torch.stack([pack(flat >> (4 * i) & 15).view(rows, own, -1) for i in range(count)], 1)


def _gemm_shapes(inputs: int, out: int, group: int) -> Shapes:
    groups = inputs // group
    return (inputs, out // PER_WORD), (groups, out), (groups, out // PER_WORD)


def _gemv_shapes(inputs: int, out: int, group: int) -> Shapes:
    words = padded_words(inputs, group)
    return (out, inputs // PER_WORD), (out, words * PER_WORD), (out, words)


def _fast_shapes(inputs: int, out: int, group: int) -> Shapes:
    rows = padded_words(inputs, group) * PER_WORD
    return (out // 4, inputs), (rows, out), (rows, out)


def _same(qweight: Tensor, scales: Tensor, zeros: Tensor | None, _groups: int) -> Gemm:
    return qweight, scales, zeros


def _from_gemv(qweight: Tensor, scales: Tensor, zeros: Tensor | None, groups: int) -> Gemm:
    """Nibble i of a row's word c has input 8c + i, and so with zeros and groups."""

    def turned(words: Tensor) -> Tensor:
        return _spread(words.T[:, None], PER_WORD).flatten(0, 2)

    return turned(qweight), scales[:, :groups].T.contiguous(), None if zeros is None else turned(zeros)[:groups]


def _from_fast(qweight: Tensor, scales: Tensor, zeros: Tensor | None, groups: int) -> Gemm:
    """A row of words has four rows' 16 words for each 64 inputs; nibble v of word 8h + w of these has input
    32h + 8v + w, since the kernel takes the eight neighbours of each quarter at once."""
    rows, inputs = qweight.shape
    words = qweight.view(rows, inputs // 64, 4, 2, 8).permute(1, 3, 4, 0, 2)  # [64s, h, w, rows, four]
    integers = _spread(words.reshape(inputs // 32, 8, rows * 4), 4)
    scales = scales[:groups]
    return integers.flatten(0, 2), scales.contiguous(), None if zeros is None else pack(_whole(zeros[:groups], scales))


def _whole(scaled: Tensor, scales: Tensor) -> Tensor:
    """The zeros behind -zero * scale. Raises CheckpointError where they are not whole numbers of 0 to 15."""
    zeros = torch.where(scaled == 0, 0.0, -scaled.float() / scales.float())
    whole = zeros.round()
    fits = ((zeros - whole).abs() <= WHOLE) & (whole >= 0) & (whole <= 15)  # False for NaN
    if not fits.all():
        raise CheckpointError(f"a zero is {zeros[~fits][0].item():g}; squawq reads whole numbers from 0 to 15")
    return whole.to(torch.uint8)


def input_order(groups: Tensor, group: int) -> Tensor | None:
    """The order of inputs in which the members of each group are neighbours, int64 [in]; None: they are already.

    Args:
        groups: Of any integer dtype [in], on the CPU: the group of each input. compressed-tensors has -1 throughout for
            groups of neighbours.

    Raises:
        CheckpointError: A group does not exist or has not `group` members.
    """
    groups, count = groups.long(), len(groups) // group
    if bool((groups == -1).all()):
        return None
    if bad := groups[(groups < 0) | (groups >= count)].tolist()[:1]:
        raise CheckpointError(f"an input is in group {bad[0]}; there are {count}")
    sizes = torch.bincount(groups, minlength=count)
    if bad := torch.nonzero(sizes != group).flatten().tolist()[:1]:
        raise CheckpointError(f"group {bad[0]} has {int(sizes[bad[0]])} inputs; {group} are needed")
    order = groups.argsort(stable=True)
    return None if torch.equal(order, torch.arange(len(order))) else order


def _gptq_shapes(inputs: int, out: int, group: int) -> Shapes:
    groups = inputs // group
    return (inputs // PER_WORD, out), (groups, out), (groups, out // PER_WORD)


def _packed_shapes(inputs: int, out: int, group: int) -> Shapes:
    groups = inputs // group
    return (out, inputs // PER_WORD), (out, groups), (out // PER_WORD, groups)


def _across(out: int, words: int) -> tuple[int, int]:
    return out, words * PER_WORD


def _down(words: int, out: int) -> tuple[int, int]:
    return out, words * PER_WORD


def _gptq_integers(words: Tensor) -> Tensor:
    """Nibble i of a column's word c has input 8c + i."""
    return _spread(words[:, None], PER_WORD).flatten(0, 2)


def _reordered(words: Tensor, add: int = 0) -> Tensor:
    """int32 [rows, n] whose nibbles are neighbours -> in GEMM's order. Raises CheckpointError for a sum beyond 15."""
    values = torch.stack([(words >> (4 * i)) & 15 for i in range(PER_WORD)], -1).flatten(1) + add
    if add and bool((values > LEVELS).any()):
        raise CheckpointError(
            f"a zero is {LEVELS + add} (GPTQ's first version stores it less one); squawq reads zeros from 0 to {LEVELS}"
        )
    return pack(values)


def _from_gptq(add: int) -> Callable[[Tensor, Tensor, Tensor | None, int], Gemm]:
    def to_gemm(qweight: Tensor, scales: Tensor, zeros: Tensor | None, _groups: int) -> Gemm:
        return _gptq_integers(qweight), scales, None if zeros is None else _reordered(zeros, add)

    return to_gemm


def _from_packed(packed: Tensor, scales: Tensor, zeros: Tensor | None, _groups: int) -> Gemm:
    zeros = None if zeros is None else _reordered(zeros.T)
    return _gptq_integers(packed.T), scales.T.contiguous(), zeros


LAYOUTS = {
    "gemm": Layout(torch.int32, "qzeros", True, 1, 8, _gemm_shapes, _same, lambda a, b: (b * PER_WORD, a)),
    "gemv": Layout(torch.int32, "qzeros", True, 8, 8, _gemv_shapes, _from_gemv, _across),
    "gemv_fast": Layout(torch.int16, "qzeros", False, 64, 8, _fast_shapes, _from_fast, lambda a, b: (a * 4, b)),
    "llm-awq": Layout(torch.int16, "scaled_zeros", False, 64, 8, _fast_shapes, _from_fast, lambda a, b: (a * 4, b)),
    "gptq": Layout(torch.int32, "qzeros", True, 8, 8, _gptq_shapes, _from_gptq(1), _down, groups="g_idx"),
    "gptq_v2": Layout(torch.int32, "qzeros", True, 8, 8, _gptq_shapes, _from_gptq(0), _down, groups="g_idx"),
    "pack-quantized": Layout(
        *(torch.int32, "weight_zero_point", True, 8, 8, _packed_shapes, _from_packed, _across),
        integers="weight_packed",
        scales="weight_scale",
        groups="weight_g_idx",
        sizes="weight_shape",
    ),
}
