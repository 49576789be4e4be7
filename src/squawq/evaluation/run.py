"""squawq.evaluate: perplexity of a model folder on a text, and KL divergence from its 16-bit original.

Hidden states of all windows go through transformers' own layers one after another, their weights dequantized: any
family that can be quantized can be measured. Peak memory: one layer, the two models' hidden states (windows x tokens x
hidden_size x 4 bytes each), and the heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squawq.backends.devices import check_device, pick_device
from squawq.errors import CalibrationError, CheckpointError, ConfigError
from squawq.evaluation.metrics import Score
from squawq.families import family_of
from squawq.format.reader import Checkpoint
from squawq.hub.download import resolve
from squawq.layerwise.blocks import Blocks
from squawq.quantization.calibration import read_text, split_documents
from squawq.showing import Record
from squawq.text.tokenizer import Tokenizer

DEFAULT_WINDOW = 1024
MAX_TOKENS = 32_768
BUILT_IN = "the built-in text (general prose in eight languages)"
MAX_LOSS = 700.0  # nats a token; exp of more is infinite as a float
LOGITS = 1 << 23  # logits held at once
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Windows:
    """Sliding windows over a token stream: ids int64 [windows, window]. A window scores its last `stride` tokens, the
    first one all but its first token."""

    ids: Tensor
    stride: int

    def scored(self, index: int) -> slice:
        """Positions of a window whose next token is scored."""
        window = self.ids.shape[1]
        first = 0 if index == 0 or self.stride == window else window - self.stride - 1
        return slice(first, window - 1)


def windows_of(ids: Sequence[int], window: int, stride: int) -> Windows:
    """Windows that start `stride` tokens apart; an incomplete one at the end is dropped.

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
    """Perplexity of a model on a text and, with a reference, KL divergence and top-1 agreement.

    Args:
        model: A folder or a Hub id.
        reference: The 16-bit model.
        text: A text file (a line of five equals signs separates documents); None for the built-in text, which shares
            nothing with the calibration set.
        ids: Token ids instead of a text.
        window: Tokens of context, by default the model's positions up to 1,024.
        stride: Tokens between two windows, by default half a window.
        max_tokens: How much of the text is read.
        device: "cpu", "cuda", "cuda:1" ... or "auto".
        progress: Called with the layers done and the layers in all.

    Returns:
        `Score.summary`, and `text` (its name), `window`, `stride` and `kl_by_position` (mean KL at each position).

    Raises:
        SquawqError: For anything that cannot work.
    """
    device = pick_device(device)
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
    name = "given token ids"
    if ids is None:
        ids, name = text_ids(Tokenizer(checkpoint.folder), text), BUILT_IN if text is None else Path(text).name
    if not all(0 <= i < checkpoint.config.vocab_size for i in ids):
        raise CalibrationError(f"the text holds token ids outside 0 to {checkpoint.config.vocab_size - 1}")
    cut = windows_of(ids[:max_tokens], window, max(1, window // 2) if stride is None else stride)
    total = checkpoint.config.num_layers + (0 if other is None else other.config.num_layers)
    done = 0

    def step(_: int) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    opened = [Blocks(c, family_of(c.config.model_type), device) for c in (checkpoint, other) if c is not None]
    finals = [Final(blocks, blocks.last_states(cut.ids, step)) for blocks in opened]
    score, by_position = score_windows(finals, cut)
    found = {**score.summary(), "text": name, "window": window, "stride": cut.stride, "kl_by_position": by_position}
    return Record(found)


def text_ids(tokenizer: Tokenizer, text: str | Path | None) -> list[int]:
    """Token ids of a text file's documents, or of the built-in text."""
    if text is None:
        content = (files("squawq") / "evaluation_data" / "evaluation.txt").read_text(encoding="utf-8")
    else:
        content = read_text(Path(text))
    return [i for document in split_documents(content) for i in tokenizer.encode(document)]


@dataclass(frozen=True)
class Final:
    """A model and its last layer's output, float32 [windows, tokens, hidden]."""

    blocks: Blocks
    states: Tensor


@torch.inference_mode()
def score_windows(finals: Sequence[Final], cut: Windows) -> tuple[Score, list[float]]:
    """Score all windows of a model and, after it, of its reference, some rows of logits at a time.

    Returns:
        The score, and the mean KL at each position.

    Raises:
        CheckpointError: A model's logits are not finite, or its perplexity overflows.
    """
    heads = [final.blocks.logits() for final in finals]
    score = Score()
    sums, counts = torch.zeros(cut.ids.shape[1], dtype=torch.float64), torch.zeros(cut.ids.shape[1])
    rows = max(1, LOGITS // finals[0].blocks.checkpoint.config.vocab_size)
    for index in range(len(cut.ids)):
        span = cut.scored(index)
        for start in range(span.start, span.stop, rows):
            part = slice(start, min(span.stop, start + rows))
            targets = cut.ids[index, part.start + 1 : part.stop + 1].to(finals[0].states.device)
            mine, *theirs = (
                head(final.states[index : index + 1, part])[0] for head, final in zip(heads, finals, strict=True)
            )
            for final, logits in zip(finals, (mine, *theirs), strict=True):
                if not bool(torch.isfinite(logits).all()):
                    folder = final.blocks.checkpoint.folder
                    raise CheckpointError(f"{folder}: the model's logits are not finite; its weights are broken")
            score.add(mine, targets, *theirs)
            if theirs:
                sums[part] += score.divergence[-1]
                counts[part] += 1
    for final, loss in zip(finals, (score.loss, score.reference_loss)[: len(finals)], strict=True):
        if loss / score.tokens >= MAX_LOSS:
            raise CheckpointError(
                f"{final.blocks.checkpoint.folder}: loses {loss / score.tokens:.4g} nats a token, and its perplexity "
                "overflows; its weights are broken"
            )
    by_position = [float(s / c) for s, c in zip(sums, counts, strict=True) if c]
    return score, by_position
