"""Turns calibration text into token blocks: the built-in set, files, Hub data sets, lists.

Documents are tokenized one after another into a stream that is cut into blocks, so long ones are never dropped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squawq.errors import CalibrationError, ConfigError, DependencyError, TemplateError
from squawq.text.tokenizer import Tokenizer, check_messages

SEPARATOR = "\n=====\n"
DEFAULT_SAMPLES = 128
MIN_BLOCKS = 4
DATE = datetime(2024, 7, 26)  # what templates that print today's date get: equal runs must see equal tokens
PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"PAR1": "Parquet",
}
PIECE = 1 << 16  # characters of a plain text file tokenized at once

Calibration = str | Path | Sequence[str] | Sequence[Sequence[int]] | None


def token_blocks(
    source: Calibration,
    open_tokenizer: Callable[[], Tokenizer],
    *,
    seqlen: int,
    samples: int | None,
    vocab_size: int,
    most: int = DEFAULT_SAMPLES,
) -> Tensor:
    """Token blocks from a calibration source.

    Args:
        source: None for the built-in set, sampled evenly over its languages and kinds. Else a .txt or .jsonl file, a
            Hub data set id, texts, or lists of token ids, read from the start.
        open_tokenizer: Called if `source` has text.
        seqlen: Tokens in a block.
        samples: How many blocks; None takes what there is up to `most`, and at least 4.
        vocab_size: Bound of token ids.
        most: See `samples`.

    Returns:
        int64 [blocks, seqlen].

    Raises:
        CalibrationError: There is too little text, or a row is of the wrong kind.
    """
    wanted = most if samples is None else samples
    least = min(MIN_BLOCKS, most) if samples is None else samples
    stream: list[int] = []
    for ids in _documents(source, open_tokenizer):
        stream.extend(ids)
        if source is not None and len(stream) >= wanted * seqlen:
            break
    blocks = len(stream) // seqlen
    if blocks < least:
        raise CalibrationError(
            f"{_name(source)} gives {len(stream):,} tokens; {least * seqlen:,} are needed "
            f"({least} blocks of {seqlen}). Give more text, or ask for fewer samples or a smaller seqlen."
        )
    del stream[blocks * seqlen :]
    for place, token in enumerate(stream):
        if not 0 <= token < vocab_size:
            raise CalibrationError(
                f"{_name(source)} holds token id {token}; the model knows 0 to {vocab_size - 1} (place {place:,})"
            )
    tokens = torch.tensor(stream, dtype=torch.int64).view(blocks, seqlen)
    if blocks > wanted:
        spread = torch.linspace(0, blocks - 1, wanted).round().long()
        tokens = tokens[spread] if source is None else tokens[:wanted]
    return tokens


def _name(source: Calibration) -> str:
    if source is None:
        return "the built-in calibration set"
    return repr(str(source)) if isinstance(source, str | Path) else "the calibration list"


def _documents(source: Calibration, open_tokenizer: Callable[[], Tokenizer]) -> Iterator[Sequence[int]]:
    if source is None or isinstance(source, str | Path):
        tokenizer = open_tokenizer()
        for number, row in enumerate(_rows(source), 1):
            try:
                yield _encode(row, tokenizer)
            except TemplateError:  # not one chat is at fault: each would take as long
                raise
            except ConfigError as error:
                if source is not None or isinstance(row, str):
                    raise CalibrationError(f"{_name(source)}, row {number}: {error}") from error
                yield tokenizer.encode(_plain(row))  # some templates refuse a system message
    elif isinstance(source, Sequence):
        opened: Tokenizer | None = None  # token ids need none
        for number, given in enumerate(source):
            if isinstance(given, str):
                opened = opened or open_tokenizer()
                yield _encode(given, opened)
            elif (ids := _token_ids(given)) is not None:
                yield ids
            else:
                raise CalibrationError(
                    f"calibration row {number} is {given!r:.60}; it must be a text or a list of token ids"
                )
    else:
        raise ConfigError(f"calibration is {type(source).__name__}; give a file, a Hub data set id, texts or token ids")


def _token_ids(row: object) -> list[int] | None:
    if not isinstance(row, Sequence):
        return None
    ids = [i for i in row if isinstance(i, int) and not isinstance(i, bool)]
    return ids if len(ids) == len(row) else None


def _rows(source: str | Path | None) -> Iterator[str | list[dict[str, str]]]:
    if source is None:
        return builtin_rows()
    return _file_rows(Path(source)) if _is_file(source) else _hub_rows(str(source))


def _encode(row: str | list[dict[str, str]], tokenizer: Tokenizer) -> list[int]:
    if isinstance(row, str):
        return tokenizer.encode(row)
    if tokenizer.chat_template is None:
        return tokenizer.encode(_plain(row))
    return tokenizer.encode_chat(row, generation_prompt=False, now=DATE)


def _plain(chat: list[dict[str, str]]) -> str:
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in chat)


def builtin_rows() -> Iterator[str | list[dict[str, str]]]:
    """The built-in set: texts and chats, in a fixed order."""
    folder = files("squawq") / "calibration_data"
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        text = entry.read_text(encoding="utf-8")
        if entry.name.endswith(".jsonl"):
            yield from (_row(json.loads(line), "the built-in set") for line in text.splitlines() if line.strip())
        elif entry.name.endswith(".txt"):
            yield from split_documents(text)


def builtin_documents(tokenizer: Tokenizer) -> Iterator[Sequence[int]]:
    """Token ids of each document of the built-in set, with the special tokens of the tokenizer or chat template."""
    return _documents(None, lambda: tokenizer)


def split_documents(text: str) -> list[str]:
    """Documents of a text whose separator is a line of five equals signs."""
    return [part.strip() for part in text.split(SEPARATOR) if part.strip()]


def _is_file(source: str | Path) -> bool:
    path = Path(source)
    if path.suffix in (".json", ".csv", ".parquet"):
        raise CalibrationError(f"{str(source)!r}: give a .txt or .jsonl file, or a Hub data set id")
    if path.is_file():
        if not path.stat().st_size:
            raise CalibrationError(f"{str(source)!r} is empty")
        return True
    if path.is_dir():
        raise CalibrationError(f"{str(source)!r} is a folder; give a .txt or .jsonl file in it")
    if isinstance(source, Path) or path.suffix in (".txt", ".jsonl", ".md") or path.exists():
        raise CalibrationError(f"{str(source)!r} is not a file; give a .txt or .jsonl file, or a Hub data set id")
    return False


def read_text(path: Path) -> str:
    """A whole text file. Raises CalibrationError for a missing file or bytes that are not UTF-8."""
    return "".join(_lines(path))


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    raise CalibrationError(f"{str(path)!r} line {number} holds a NUL byte; this is not a text file")
                yield line
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{str(path)!r} {_what_it_is(path)}") from error
    except OSError as error:
        raise CalibrationError(f"{str(path)!r} cannot be read: {error.strerror}") from error


def _what_it_is(path: Path) -> str:
    """Says what a file is that is not UTF-8, or where it stops to be."""
    place = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and (kind := next((k for magic, k in PACKED.items() if line.startswith(magic)), None)):
                return f"is a {kind} file; give the text in it, unpacked"
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"line {number} is not UTF-8 text: {error.reason} (byte {place + error.start:,} of the file)"
            place += len(line)
    return "is not UTF-8 text"


def _file_rows(path: Path) -> Iterator[str | list[dict[str, str]]]:
    if path.suffix == ".jsonl":
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise CalibrationError(f"{str(path)!r} line {number} is not JSON: {error}") from error
                yield _row(value, f"{str(path)!r} line {number}")
        return
    piece: list[str] = []
    size = 0
    for line in _lines(path):
        piece.append(line)
        size += len(line)
        if size >= PIECE:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def _hub_rows(name: str) -> Iterator[str | list[dict[str, str]]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DependencyError("a Hub data set needs the package datasets: pip install datasets") from error
    try:
        splits = load_dataset(name, streaming=True)
        split = "train" if "train" in splits else next(iter(splits))
        for row in splits[split]:
            yield _row(row, name)
    except CalibrationError:
        raise
    except Exception as error:  # the library raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CalibrationError(
            f"{name!r} is not a file here, and could not be read as a Hub data set: {reason}"
        ) from error


def _row(value: Any, where: str) -> str | list[dict[str, str]]:
    """A text or a chat from one row: a string, {"text": ...}, or {"messages": [...]}."""
    text = value.get("text") if isinstance(value, dict) else value
    if isinstance(text, str):
        if any("\ud800" <= sign <= "\udfff" for sign in text):
            raise CalibrationError(f"{where}: holds half of a surrogate pair, which is no character")
        return text
    if isinstance(value, dict) and "messages" in value:
        try:
            return check_messages(value["messages"])
        except ConfigError as error:
            raise CalibrationError(f"{where}: {error}") from error
    keys = ", ".join(sorted(value)) if isinstance(value, dict) else type(value).__name__
    raise CalibrationError(f"{where}: needs a 'text' or 'messages'; has {keys:.100}")
