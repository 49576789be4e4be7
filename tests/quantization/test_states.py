"""Hidden states in memory or in a file: the same bytes, no file left, and a full disk that says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from conftest import MakeModel
from results import settled

import squawq
from squawq.errors import OutputError
from squawq.quant_config import QuantConfig
from squawq.quantization import statistics
from squawq.quantization.states import Sample, Spool, hidden_states

resource = pytest.importorskip("resource")
CONFIG = QuantConfig(group_size=32, seqlen=32, samples=8)


@pytest.fixture
def small_disk() -> Iterator[int]:
    """No file may grow beyond 4 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield 4096
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_file_holds_the_states_and_has_no_name(tmp_path: Path) -> None:
    shape = (3, 5, 7)
    states = hidden_states(shape, tmp_path / "new", "cpu", in_memory=0)
    assert (states.shape, states.dtype) == (shape, torch.float32)
    expected = torch.arange(105.0).view(shape)
    states[:2] = expected[:2]
    states[2:] = expected[2:]
    assert torch.equal(states, expected)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_file_takes_its_disk_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk that shows at the first write into a mapping kills the process."""
    sizes = []

    def memmap(file: BinaryIO, *arguments: Any, **options: Any) -> Any:
        sizes.append(Path(f"/dev/fd/{file.fileno()}").stat().st_size)
        return original(file, *arguments, **options)

    original = np.memmap
    monkeypatch.setattr(np, "memmap", memmap)
    monkeypatch.setattr("squawq.quantization.states.ZEROS", bytes(100))
    hidden_states((3, 5, 7), tmp_path, "cpu", in_memory=0)
    assert sizes == [420]


def test_what_fits_stays_in_memory(small_disk: int, tmp_path: Path) -> None:
    states = hidden_states((1, 2048, 1), tmp_path, "cpu", in_memory=8192 / 2**30)
    assert states.shape == (1, 2048, 1)
    with pytest.raises(OutputError, match=r"need 0\.0 GB of disk there: File too large.*--states-memory"):
        hidden_states((1, 2048, 1), tmp_path, "cpu", in_memory=8191 / 2**30)


def test_a_full_disk_ends_a_run_that_may_go_on(
    make_model: MakeModel, rows: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(shape: tuple[int, int, int], folder: Path, device: str, in_memory: float) -> torch.Tensor:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        return hidden_states(shape, folder, device, in_memory)

    folder, before = make_model(), resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr("squawq.quantization.states.hidden_states", full)
    try:
        with pytest.raises(OutputError, match="File too large"):
            squawq.quantize(folder, tmp_path / "out", CONFIG, calibration=rows, states_memory=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("in_memory", [0.0, 200 / 2**30, 1.0])
def test_a_spool_gives_back_what_was_added(in_memory: float, tmp_path: Path) -> None:
    pieces = [torch.randn(2, 3, 4), torch.randn(5, 8).to(torch.bfloat16), torch.randn(8, 6).T, torch.randn(1)]
    spool = Spool(tmp_path / "new", in_memory)
    for number, piece in enumerate(pieces, start=1):
        spool.add(piece)
        for found, expected in zip(spool, pieces[:number], strict=True):  # also between two that are added
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
    first, second = iter(spool), iter(spool)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(spool.drain(), pieces, strict=True))
    assert list(tmp_path.rglob("*")) == ([] if in_memory == 1 else [tmp_path / "new"])


def test_a_spool_on_a_full_disk(small_disk: int, tmp_path: Path) -> None:
    spool = Spool(tmp_path, 4096 / 2**30)
    spool.add(torch.zeros(1024))
    spool.add(torch.zeros(1024))
    with pytest.raises(OutputError, match=r"File too large.*--states-memory"):
        spool.add(torch.zeros(1024))


def test_both_ways_give_the_same_bytes(make_model: MakeModel, rows: list[list[int]], tmp_path: Path) -> None:
    folder = make_model()
    for name, states_memory in (("memory", 1), ("file", 0)):
        squawq.quantize(folder, tmp_path / name, CONFIG, calibration=rows, states_memory=states_memory)
    assert settled(tmp_path / "file") == settled(tmp_path / "memory")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "memory", "model"]


def test_the_sample_is_the_same_however_blocks_are_shared() -> None:
    states = torch.arange(7.0)[:, None, None].expand(7, 2, 3)
    whole = Sample.spread(7, 300, slice(0, 7)).of(states)
    assert whole[:, 0, 0].tolist() == [0, 3, 6]
    shared = [Sample.spread(7, 300, share).of(states[share]) for share in (slice(0, 2), slice(2, 7))]
    assert torch.equal(shared[0] + shared[1], whole)
    assert Sample.spread(7, 2048, slice(0, 7)).of(states).shape == (1, 2, 3)


def test_thinned_statistics_stand_for_all_places() -> None:
    """One token in so many, but not the same places of every block."""
    found: list[torch.Tensor] = []

    class Seen:
        def update(self, x: torch.Tensor) -> None:
            found.append(x[:, 0])

    update = statistics._thinned(Seen(), 9)  # type: ignore[arg-type]
    for start in range(0, 4096, 256):
        update(torch.arange(start, start + 256.0).view(4, 64, 1))
    assert torch.equal(torch.cat(found), torch.arange(0, 4096.0, 9))
