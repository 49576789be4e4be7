"""Checks the arguments of a fused model's forward and turns them into rows of tokens.

What our decoder does not support is a ConfigError here, before anything runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from squawq.errors import ConfigError
from squawq.integrations.fused_cache import FusedCache

WHOLE = (torch.int64, torch.int32)
QUIET = {"cache_position", "num_items_in_batch", "return_dict"}  # arguments that change nothing here
Mask = NDArray[np.bool_] | None


def check_arguments(config: Any, input_ids: Any, inputs_embeds: Any, kwargs: dict[str, Any]) -> None:
    """Raise ConfigError for arguments that our decoder does not support."""
    if input_ids is None or inputs_embeds is not None:
        raise ConfigError("a fused model takes input_ids, not inputs_embeds; load it without do_fuse for those")
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in WHOLE:
        kind = getattr(input_ids, "dtype", type(input_ids).__name__)
        raise ConfigError(f"input_ids is {kind}; it must be a tensor of torch.int64 or torch.int32")
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ConfigError(f"input_ids has shape {tuple(input_ids.shape)}; it must be [rows, tokens], with some of both")
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.pop(name, None) or getattr(config, name, False):
            raise ConfigError(f"{name} is set; a fused model has none to give: load it without do_fuse for that")
    given = [name for name, value in kwargs.items() if value is not None and value is not False]
    if unknown := [name for name in given if name not in QUIET]:
        raise ConfigError(f"a fused model's forward has no argument {unknown[0]!r}")


def _check_mask(mask: Any) -> None:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        given = f"has shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
        raise ConfigError(f"attention_mask {given}; a fused model takes a tensor [rows, columns] of 0 and 1")


def least_pads(mask: Any) -> int:
    """Pad tokens of the longest row of generate's mask. Raises ConfigError if a row has no token."""
    if mask is None:
        return 0
    _check_mask(mask)
    counts: list[int] = mask.bool().sum(1).tolist()
    if 0 in counts:
        raise ConfigError(f"row {counts.index(0)} of attention_mask has no token, so that there is nothing to go on")
    columns: int = mask.shape[1]
    return columns - max(counts)


def new_columns(mask: Any, ids: Tensor, past: FusedCache) -> Mask:
    """Mask of the new columns, bool [rows, tokens], True for tokens; None if there are no pads."""
    if mask is None:
        return None
    _check_mask(mask)
    rows, tokens = ids.shape
    if mask.shape != (rows, past.width + tokens):
        raise ConfigError(
            f"attention_mask has shape {tuple(mask.shape)}; a fused model takes {(rows, past.width + tokens)}, "
            f"{past.width} columns of the cache and {tokens} new ones"
        )
    whole = mask.cpu().numpy().astype(bool)
    old = whole[:, : past.width].sum(1).tolist()
    if past.width and old != past.lengths:
        raise ConfigError("attention_mask hides tokens that are in the cache, or shows pad tokens that are not")
    new: NDArray[np.bool_] = whole[:, past.width :]
    return None if new.all() else new


def used_tokens(ids: Tensor, mask: Mask, vocab_size: int) -> list[list[int]]:
    """Each row's tokens without pads. Raises ConfigError for one that is not in the vocabulary."""
    numbers = ids.cpu().numpy()
    used = numbers if mask is None else numbers[mask]
    if used.size and not 0 <= used.min() <= used.max() < vocab_size:
        raise ConfigError(f"input_ids holds a token beyond 0 to {vocab_size - 1}, the vocabulary")
    shown = np.ones_like(numbers, dtype=bool) if mask is None else mask
    return [row[kept].tolist() for row, kept in zip(numbers, shown, strict=True)]


def kept_columns(keep: Any, width: int, mask: Mask) -> tuple[int, Tensor | None]:
    """Decode logits_to_keep: the first column whose logits are needed, and the chosen ones counted from it (None: all).

    Raises ConfigError if a column is not in input_ids, or only the last is kept and a row ends in a pad.
    """
    chosen = None
    if isinstance(keep, Tensor):
        chosen = keep.cpu()
        if chosen.dtype not in WHOLE or chosen.dim() != 1 or not chosen.numel():
            raise ConfigError(f"logits_to_keep is a tensor {list(keep.shape)} of {keep.dtype}; it must list columns")
        if not bool(((-width <= chosen) & (chosen < width)).all()):
            raise ConfigError(f"logits_to_keep is {keep.tolist()}; columns of input_ids are -{width} to {width - 1}")
        chosen = chosen % width
        first = int(chosen.min())
        chosen = chosen - first
    elif isinstance(keep, bool) or not isinstance(keep, int) or keep < 0:
        raise ConfigError(f"logits_to_keep is {keep!r}; it must be how many last columns, 0 for all, or a tensor")
    else:
        first = max(0, width - keep) if keep else 0
    if mask is not None and first == width - 1 and bool((mask.any(1) & ~mask[:, -1]).any()):
        raise ConfigError("a row ends in a pad token, and nothing follows from that; pad on the left")
    return first, chosen


def check_positions(given: Tensor, starts: Sequence[int], counts: Sequence[int], mask: Mask) -> None:
    """Raise ConfigError unless each token's position is its place in its row."""
    for index, count in enumerate(counts):
        row = given[index % len(given)].tolist()
        row = row if mask is None else np.asarray(row)[mask[index]].tolist()
        if row != list(range(starts[index], starts[index] + count)):
            raise ConfigError(
                f"position_ids of row {index} are not {starts[index]} to {starts[index] + count - 1}, which is where "
                "its tokens stand without pad tokens; leave position_ids out"
            )
