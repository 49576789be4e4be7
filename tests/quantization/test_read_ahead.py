"""The next layer is read into the system's cache of files while a layer is open."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

import pytest
import torch
from conftest import MakeModel
from safetensors.torch import load_file, save_file

from squawq.errors import CheckpointError
from squawq.families import family_of
from squawq.format import reader
from squawq.format.reader import Checkpoint
from squawq.format.shards import FolderShards, TensorInfo
from squawq.layerwise.blocks import Blocks

LONG = 20  # seconds until a test that waits in vain gives up


class Watched(FolderShards):
    """Remembers which bytes of which files other threads read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.files: set[str] = set()
        self.read: set[int] = set()
        self.stop_at = 1 << 30

    @contextmanager
    def open(self, name: str) -> Iterator[BufferedReader]:
        with super().open(name) as file:
            ahead = threading.current_thread() is not threading.main_thread()
            yield _WatchedFile(file, self, name) if ahead else file  # type: ignore[misc]


class _WatchedFile:
    def __init__(self, file: BufferedReader, shards: Watched, name: str) -> None:
        self._file, self._shards = file, shards
        shards.files.add(name)

    def seek(self, place: int) -> None:
        self._file.seek(place)

    def readinto(self, buffer: memoryview) -> None:
        place = self._file.tell()
        assert self._file.readinto(buffer) == len(buffer)
        self._shards.read |= set(range(place, place + len(buffer)))
        while len(self._shards.read) > self._shards.stop_at:  # a slow disk
            time.sleep(0.001)


def bytes_of(infos: list[TensorInfo]) -> set[int]:
    return {place for info in infos for place in range(info.start, info.start + info.nbytes)}


@pytest.fixture
def watched(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> tuple[Blocks, Watched]:
    """Three layers, each in a file of its own."""
    monkeypatch.setattr(reader, "AHEAD", 1000)
    folder = make_model(num_hidden_layers=3)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for part in ("embed", "layers.0.", "layers.1.", "layers.2.", "model.norm", "lm_head"):
        own = {name: tensor.clone() for name, tensor in state.items() if part in name}
        save_file(own, folder / f"model-{part.strip('.')}.safetensors")
    found = Watched(folder)
    return Blocks(Checkpoint(folder, found), family_of("llama"), "cpu"), found


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_the_next_layer_is_read_ahead(watched: tuple[Blocks, Watched]) -> None:
    """All of its bytes, and nothing else."""
    blocks, found = watched
    expected = bytes_of([info for name, info in blocks.checkpoint.tensors.items() if "layers.1." in name])
    with blocks.open(0):
        wait_for(lambda: found.read >= expected)
    assert found.read == expected
    assert found.files == {"model-layers.1.safetensors"}
    found.files.clear()
    with blocks.open(2):
        pass
    stored = {f"model.layers.0.{name}": tensor for name, tensor in blocks.layers[0].state_dict().items()}
    with blocks.open(0, {name: torch.ones(tensor.shape) for name, tensor in stored.items()}):
        pass
    assert not found.files


def test_reading_ahead_ends_with_the_layer(watched: tuple[Blocks, Watched]) -> None:
    """However slow the disk is."""
    blocks, found = watched
    before = threading.active_count()
    found.stop_at = 5000
    with blocks.open(0):
        wait_for(lambda: len(found.read) > found.stop_at)
        assert threading.active_count() == before + 1
        timer = threading.Timer(0.2, setattr, (found, "stop_at", 1 << 30))
        timer.start()
    assert len(found.read) < 5000 + 2 * 1000
    timer.join()
    assert threading.active_count() == before


def test_a_file_that_cannot_be_read_ahead_is_an_error_when_it_is_read(watched: tuple[Blocks, Watched]) -> None:
    blocks, found = watched
    path = found.folder / "model-layers.1.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with blocks.open(0) as block:
        wait_for(lambda: found.files)
        assert block.weight("mlp.up_proj").any()
    with pytest.raises(CheckpointError, match=r"model-layers.1.safetensors: has changed"), blocks.open(1):
        pass


def test_files_that_have_yet_to_come_are_not_asked_for(
    watched: tuple[Blocks, Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A streamed model keeps only a few of its files: one that came early would drive out one in use."""
    blocks, found = watched
    monkeypatch.setattr(found, "room", lambda: 1)
    with blocks.open(0):
        time.sleep(0.2)
    assert not found.files
