"""Every reader of a model folder's files, as the commands call them, for fuzzers: whatever lies in a file, a reader
gives a SquawqError or a result. Knows no fuzzer; tests/fuzz/test_fuzz.py and tools/fuzz.py drive it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from squawq import quantize
from squawq.config import ModelConfig
from squawq.demo import demo_model
from squawq.engine.generation_config import GenerationConfig
from squawq.errors import SquawqError
from squawq.export.run import export
from squawq.format.files import read_json
from squawq.format.reader import Checkpoint
from squawq.inspection import inspect, missing
from squawq.memory import peak_memory
from squawq.nn.loader import load
from squawq.publish.card import Origin, front_matter, model_card
from squawq.quant_config import QuantConfig
from squawq.quantization.prepare import prepare
from squawq.report.page import render
from squawq.text.tokenizer import Tokenizer

SECONDS = 120  # for all readers of a file, on a busy machine: only a hang takes longer
MEMORY = 2**30  # by which reading a file may raise the process's peak
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
    """Into a place that is gone afterwards: from a quantized folder it may succeed."""
    with TemporaryDirectory(dir=folder.parent) as place:
        export(folder, Path(place) / "out", form)


def _gguf(folder: Path) -> None:
    _export(folder, "gguf")


COMMANDS: dict[str, list[Reader]] = {
    "config.json": [
        inspect,
        load,
        lambda folder: prepare(folder, folder.parent / "never", QuantConfig(method="rtn"), None, "cpu", False),
        lambda folder: _export(folder, "compressed-tensors"),
        _gguf,
        lambda folder: model_card(folder, "me/model"),
    ],
    "quant_config.json": [inspect, load],
    "generation_config.json": [_generation],
    "tokenizer_config.json": [_tokenizer],
    "tokenizer.json": [_tokenizer, _gguf],
    "chat_template.jinja": [_tokenizer],
    "model.safetensors.index.json": [_tensors],
    "model.safetensors": [_tensors],
    "squawq_report.json": [
        lambda folder: render(read_json(folder / "squawq_report.json"), "OUT"),
        lambda folder: model_card(folder, "me/model"),
    ],
    "README.md": [lambda folder: front_matter(Origin(source=str(folder)))],
}


def quantized_folder(folder: Path) -> Path:
    """A small AWQ model in `folder`, its weights in one file, with everything that the readers read."""
    source = folder.parent / "source"
    source.mkdir()
    words = Tokenizers(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(["the cat sat"], trainers.BpeTrainer(vocab_size=264, initial_alphabet=alphabet))
    words.save(str(source / "tokenizer.json"))
    for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        shutil.copyfile(demo_model() / name, source / name)
    raw = tiny_config(hidden_size=32, intermediate_size=64, num_attention_heads=2, vocab_size=words.get_vocab_size())
    (source / "config.json").write_text(json.dumps(raw))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, source / "model.safetensors")
    quantize(source, folder, QuantConfig(method="rtn", group_size=32), progress=False)
    shards = list(folder.glob("*.safetensors"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    for path in (*shards, folder / "model.safetensors.index.json"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(source / "config.json", folder / "good.json")
    return folder


def read(folder: Path, name: str, data: bytes) -> None:
    """Run every reader of the file `name` with this content, which is gone afterwards."""
    path = folder / name
    began, memory = time.monotonic(), peak_memory() or 0
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
    if (took := time.monotonic() - began) > SECONDS:
        raise AssertionError(f"{name}: read for {took:.0f} s")
    if (grown := (peak_memory() or 0) - memory) > MEMORY:
        raise AssertionError(f"{name}: {grown:,} bytes more in memory")
