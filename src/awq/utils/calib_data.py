"""AutoAWQ's calibration arguments to token blocks: squawq's built-in set, files, Hub data sets, texts, token ids.

Documents run into one stream that is cut into blocks, so that long ones count too. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from squawq.errors import CalibrationError, DependencyError
from squawq.quantization.calibration import Calibration, token_blocks
from squawq.text.tokenizer import Tokenizer

PILEVAL = ("mit-han-lab/pile-val-backup", "validation")
FILES = (".txt", ".jsonl", ".md", ".json", ".csv", ".parquet")


def calibration_blocks(
    source: Calibration,
    tokenizer: Any,
    folder: Path,
    *,
    split: str,
    text_column: str,
    samples: int,
    seqlen: int,
    vocab_size: int,
) -> list[list[int]]:
    """At most `samples` blocks of `seqlen` token ids.

    source: see `squawq.quantization.calibration.token_blocks`; "pileval" is AutoAWQ's name for a data set of the Hub.
    tokenizer: transformers', or None for the one in `folder`. split, text_column: of a data set of the Hub.
    Raises CalibrationError when there is too little text, DependencyError when a data set needs a missing package.
    """
    with TemporaryDirectory(prefix="squawq-") as copy:
        if tokenizer is not None:
            tokenizer.save_pretrained(copy)
        opened: list[Tokenizer] = []

        def open_tokenizer() -> Tokenizer:
            if not opened:
                opened.append(Tokenizer(folder if tokenizer is None else copy))
            return opened[0]

        if isinstance(source, str) and not Path(source).exists() and Path(source).suffix not in FILES:
            name, part = PILEVAL if source == "pileval" else (source, split)
            source = _enough(_hub_texts(name, part, text_column), open_tokenizer(), samples * seqlen)
        elif isinstance(source, Sequence) and not isinstance(source, str):
            source = [row.strip() if isinstance(row, str) else row for row in source]  # type: ignore[assignment]
        blocks = token_blocks(source, open_tokenizer, seqlen=seqlen, samples=None, vocab_size=vocab_size, most=samples)
    rows: list[list[int]] = blocks.tolist()
    return rows


def _enough(texts: Iterator[str], tokenizer: Tokenizer, wanted: int) -> list[list[int]]:
    """Token ids of the first texts that together have `wanted` of them."""
    found: list[list[int]] = []
    for text in texts:
        found.append(tokenizer.encode(text))
        wanted -= len(found[-1])
        if wanted <= 0:
            break
    return found


def _hub_texts(name: str, split: str, column: str) -> Iterator[str]:
    """Texts of a data set in AutoAWQ's order, shuffled with seed 42; streamed, so that only what is read is fetched."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DependencyError(
            f"calib_data {name!r} is a data set of the Hub and needs the package datasets: "
            "pip install datasets; or leave calib_data out for the built-in set"
        ) from error
    try:
        for row in load_dataset(name, split=split, streaming=True).shuffle(seed=42):
            if not isinstance(row.get(column), str):
                raise CalibrationError(f"{name!r} has no texts in column {column!r}; it has {', '.join(sorted(row))}")
            if text := row[column].strip():
                yield text
    except CalibrationError:
        raise
    except Exception as error:  # the library raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CalibrationError(
            f"calib_data {name!r} is not a file here, and could not be read as a data set of the Hub: {reason}. "
            "Leave calib_data out for the built-in set."
        ) from error
