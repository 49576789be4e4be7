"""Every reader of a model folder's files, as the commands call them, for fuzzers: whatever lies in a file, a reader
gives a SquawqError or a result. Knows no fuzzer; tests/fuzz/test_fuzz.py and tools/fuzz.py drive it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from squawq.config import ModelConfig
from squawq.engine.generation_config import GenerationConfig
from squawq.errors import SquawqError
from squawq.export.run import export
from squawq.format.files import read_json
from squawq.format.reader import Checkpoint
from squawq.hub.card import Origin, front_matter, model_card
from squawq.inspection import inspect, missing
from squawq.nn.loader import load
from squawq.quant_config import QuantConfig
from squawq.quantization.work import prepare
from squawq.report.page import render
from squawq.tokenizer import Tokenizer

Reader = Callable[[Path], object]


def _generation(folder: Path) -> None:
    raw = json.loads((Path(folder) / "good.json").read_text())
    found = GenerationConfig(folder, ModelConfig.from_dict(raw))
    found.sampling_defaults()


def _tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    tokenizer.decode(tokenizer.encode("Hello 1"))
    if tokenizer.chat_template is not None:
        tokenizer.render([{"role": "user", "content": "Hello"}])


def _tensors(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    for name in checkpoint.tensors:
        checkpoint.read(name)
    missing(checkpoint)


def _export(folder: Path, form: str) -> None:
    export(folder, folder.parent / "never", form)


COMMANDS: dict[str, list[Reader]] = {
    "config.json": [
        inspect,
        load,
        lambda folder: prepare(folder, folder.parent / "never", QuantConfig(method="rtn"), None, "cpu", False),
        lambda folder: _export(folder, "compressed-tensors"),
        lambda folder: model_card(folder, "me/model"),
    ],
    "quant_config.json": [inspect, load],
    "generation_config.json": [_generation],
    "tokenizer_config.json": [_tokenizer],
    "model.safetensors.index.json": [_tensors],
    "model.safetensors": [_tensors],
    "squawq_report.json": [
        lambda folder: render(read_json(folder / "squawq_report.json")),
        lambda folder: model_card(folder, "me/model"),
    ],
    "README.md": [lambda folder: front_matter(Origin(source=str(folder)))],
}


def read(folder: Path, name: str, data: bytes) -> None:
    """Run every reader of the file `name` with this content, which is gone afterwards."""
    path = folder / name
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(data)
    try:
        for command in COMMANDS[name]:
            with suppress(SquawqError):
                command(folder)
    finally:
        path.unlink()
        if before is not None:
            path.write_bytes(before)
