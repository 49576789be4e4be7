"""Measures a model folder on a text, alone or against its 16-bit original; neither need fit in memory whole.

Hidden states of all windows go through the layers one after another. Peak memory: one layer, the two models' hidden
states (windows x tokens x hidden_size x 4 bytes each), and the heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squawq.config import ModelConfig
from squawq.errors import CalibrationError, CheckpointError, ConfigError
from squawq.evaluation.metrics import Score
from squawq.families import family_of
from squawq.format.reader import Checkpoint
from squawq.hub.download import resolve
from squawq.kernels import dispatch, reference
from squawq.kernels.devices import check_device
from squawq.nn.decoder import causal_attention
from squawq.nn.linear import Linear
from squawq.nn.loader import Options, load_dense_layer, load_embedding, load_head
from squawq.nn.rope import inverse_frequencies
from squawq.quantization.calibration import read_text, split_documents
from squawq.tokenizer import Tokenizer

DEFAULT_WINDOW = 1024
MAX_TOKENS = 32_768
BATCH_TOKENS = 2048  # tokens that go through a layer at once
LOGITS = 1 << 23  # logits held at once
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Windows:
    """Equal windows over a token stream: ids int64 [windows, window]; each scores its last `stride` tokens (the first
    all but its first)."""

    ids: Tensor
    stride: int

    def scored(self, index: int) -> slice:
        """Positions of a window whose next token is scored."""
        window = self.ids.shape[1]
        first = 0 if index == 0 or self.stride == window else window - self.stride - 1
        return slice(first, window - 1)


def windows_of(ids: Sequence[int], window: int, stride: int) -> Windows:
    """Windows that start `stride` apart; what is left over at the end is dropped.

    Raises ConfigError for a stride that is not 1 to window, CalibrationError when not even one window is full.
    """
    if window < 2 or not 1 <= stride <= window:
        raise ConfigError(
            f"window is {window} and stride {stride}; the window must be at least 2, the stride 1 to window"
        )
    if len(ids) < window:
        raise CalibrationError(f"{len(ids)} tokens of text are read; at least {window} are needed (one window)")
    return Windows(torch.tensor(ids, dtype=torch.int64).unfold(0, window, stride).contiguous(), stride)


def evaluate(
    model: str | Path,
    reference: str | Path | None = None,
    *,
    text: str | Path | None = None,
    ids: Sequence[int] | None = None,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int = MAX_TOKENS,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity of `model` on a text and, with `reference`, mean and 99th percentile KL and top-1 agreement.

    text: a text file (a line of five equals signs separates documents); None for the built-in text, which is apart
    from the calibration set. ids: token ids instead of a text. window: tokens of context, by default the model's
    positions up to 1,024; stride: how far windows are apart, by default half of it. max_tokens: how much is read.
    Returns what `Score.summary` gives plus `window`, `stride` and `kl_by_position` (mean KL at each place).
    Raises SquawqError for anything that cannot work.
    """
    check_device(device)
    checkpoint = Checkpoint(resolve(model))
    other = None if reference is None else Checkpoint(resolve(reference))
    if other is not None and other.config.vocab_size != checkpoint.config.vocab_size:
        raise ConfigError(
            f"the models differ in vocabulary: {checkpoint.config.vocab_size} and {other.config.vocab_size} tokens"
        )
    positions = min(c.config.max_positions for c in (checkpoint, other) if c is not None)
    window = min(DEFAULT_WINDOW, positions) if window is None else window
    if window > positions:
        raise ConfigError(f"window is {window}; the model has {positions} positions")
    if ids is None:
        ids = text_ids(Tokenizer(checkpoint.folder), text)
    if not all(0 <= i < checkpoint.config.vocab_size for i in ids):
        raise CalibrationError(f"the text holds token ids outside 0 to {checkpoint.config.vocab_size - 1}")
    cut = windows_of(ids[:max_tokens], window, max(1, window // 2) if stride is None else stride)
    total = checkpoint.config.num_layers + (0 if other is None else other.config.num_layers)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    states = final_states(checkpoint, cut.ids, device, step)
    other_states = None if other is None else final_states(other, cut.ids, device, step)
    score, by_position = _score(checkpoint, states, other, other_states, cut, device)
    return {**score.summary(), "window": window, "stride": cut.stride, "kl_by_position": by_position}


def text_ids(tokenizer: Tokenizer, text: str | Path | None) -> list[int]:
    """Token ids of a text file's documents, or of the built-in text."""
    if text is None:
        content = (files("squawq") / "evaluation_data" / "evaluation.txt").read_text(encoding="utf-8")
    else:
        content = read_text(Path(text))
    return [i for document in split_documents(content) for i in tokenizer.encode(document)]


@torch.inference_mode()
def final_states(checkpoint: Checkpoint, ids: Tensor, device: str, step: Callable[[], None]) -> Tensor:
    """Hidden states after the last layer, float32 [windows, tokens, hidden], with one layer in memory at a time."""
    config: ModelConfig = checkpoint.config
    states = load_embedding(checkpoint, family_of(config.model_type))[ids].float().to(device)
    frequencies = inverse_frequencies(config.rope, config.head_dim).to(device)
    rotary = reference.rotary(torch.arange(ids.shape[1], device=device), frequencies)
    attend = partial(causal_attention, rotary=rotary)
    batch = max(1, BATCH_TOKENS // ids.shape[1])
    for index in range(config.num_layers):
        layer = load_dense_layer(checkpoint, index, device)
        for start in range(0, len(states), batch):
            part = states[start : start + batch]
            part += layer(part, None, attend)
        del layer
        checkpoint.close()
        step()
    return states


@torch.inference_mode()
def _score(
    checkpoint: Checkpoint,
    states: Tensor,
    other: Checkpoint | None,
    other_states: Tensor | None,
    cut: Windows,
    device: str,
) -> tuple[Score, list[float]]:
    """Heads over the scored positions, a slice of rows at a time."""

    def head_of(of: Checkpoint) -> tuple[Tensor, Linear]:
        return load_head(of, family_of(of.config.model_type), Options(device, packed=False))

    def logits(of: Checkpoint, head: tuple[Tensor, Linear], rows: Tensor) -> Tensor:
        return head[1](dispatch.rms_norm(rows, head[0], of.config.norm_eps))

    head = head_of(checkpoint)
    other_head = None if other is None else head_of(other)
    score = Score()
    sums, counts = torch.zeros(cut.ids.shape[1], dtype=torch.float64), torch.zeros(cut.ids.shape[1])
    rows = max(1, LOGITS // checkpoint.config.vocab_size)
    for index in range(len(cut.ids)):
        span = cut.scored(index)
        for start in range(span.start, span.stop, rows):
            part = slice(start, min(span.stop, start + rows))
            targets = cut.ids[index, part.start + 1 : part.stop + 1].to(device)
            mine = logits(checkpoint, head, states[index, part])
            if not bool(torch.isfinite(mine).all()):
                raise CheckpointError(f"{checkpoint.folder}: the model's logits are not finite; its weights are broken")
            if other is None or other_head is None or other_states is None:
                score.add(mine, targets)
                continue
            score.add(mine, targets, logits(other, other_head, other_states[index, part]))
            sums[part] += score.divergence[-1]
            counts[part] += 1
    by_position = [] if other is None else [float(s / c) for s, c in zip(sums, counts, strict=True) if c]
    return score, by_position
