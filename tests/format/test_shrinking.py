"""Weight files that are cut off while they are read: one line that says so, whatever reads them, and no result."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, logits
from safetensors.torch import load_file

from squawq.errors import CheckpointError
from squawq.evaluation.run import evaluate
from squawq.export.gguf_architectures import architecture_of
from squawq.export.gguf_tensors import plan, read_entry
from squawq.export.run import export
from squawq.format.reader import Checkpoint
from squawq.format.shards import read_shard
from squawq.nn.loader import Options, load
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path) -> Path:
    """A quantized folder whose norms, biases and head are float32, which nobody needs to convert."""
    out = tmp_path / "awq"
    model = make_model("qwen2", hidden_size=64, intermediate_size=128)
    quantize(model, out, QuantConfig(group_size=32, method="rtn", clip=False))
    return out


def read_all(folder: Path, out: Path) -> None:
    checkpoint = Checkpoint(folder)
    for entry in plan(checkpoint, architecture_of(checkpoint.config)):
        read_entry(checkpoint, entry)


JOBS: dict[str, Callable[[Path, Path], Any]] = {
    "load": lambda folder, out: load(folder),
    "load on torch": lambda folder, out: load(folder, Options(backend="reference")),
    "eval": lambda folder, out: evaluate(folder, ids=list(range(100)), window=32),
    "export": lambda folder, out: export(folder, out, "dense"),
    "gguf": read_all,
}


@pytest.mark.parametrize("job", JOBS)
def test_while_they_are_read(job: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read sees it, not only the opening of a file: a map that was opened before would end the process."""
    count = 0

    def cutting(read: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def cut(*arguments: Any, **options: Any) -> torch.Tensor:
            nonlocal count
            count += 1
            tensor = read(*arguments, **options)
            if count == 5:
                for path in folder.glob("*.safetensors"):
                    os.truncate(path, 0)
            return tensor

        return cut

    for name in ("read", "read_part"):
        monkeypatch.setattr(Checkpoint, name, cutting(getattr(Checkpoint, name)))
    with pytest.raises(CheckpointError, match=r"has changed since its header was read: it had [0-9,]+ bytes, now 0"):
        JOBS[job](folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_after_they_were_read(backend: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded model needs its files no more."""
    options, ids = Options(exact=True, backend=backend), torch.randint(2, 160, (2, 40))
    before = logits(folder, ids, options)
    decoder = load(folder, options)
    for path in folder.glob("*.safetensors"):
        os.truncate(path, 0)
    monkeypatch.setattr("conftest.load", lambda *_: decoder)
    assert torch.equal(logits(folder, ids, options), before)


def test_a_finished_part(folder: Path) -> None:
    """A run that goes on reads its own parts back, which someone may cut off, too."""
    shard = next(folder.glob("*.safetensors"))
    tensors, before = read_shard(shard), load_file(shard)
    before = {name: tensor.clone() for name, tensor in before.items()}
    os.truncate(shard, 0)
    assert tensors.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
    with pytest.raises(CheckpointError, match="damaged"):
        read_shard(shard)
