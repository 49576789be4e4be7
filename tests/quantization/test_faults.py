"""What goes wrong while a model is quantized: full disks, sources that are damaged or change.

Each ends with a clear error or a run that can be gone on with, and never with a wrong OUT.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import MakeModel
from results import settled
from safetensors.torch import load_file, save_file

import squawq
from squawq.errors import CheckpointError, OutputError
from squawq.quant_config import QuantConfig

Rows = list[list[int]]
SHARD = "model.safetensors"


def quantize(folder: Path, out: Path, rows: Rows) -> dict[str, Any]:
    return squawq.quantize(folder, out, QuantConfig(group_size=32, seqlen=32, samples=8, n_grid=4), calibration=rows)


@pytest.mark.parametrize("moment", range(1, 15))
def test_no_room_at_any_write(
    moment: int, make_model: MakeModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of a run comes by the same way; one after another finds the disk full. The 14th is OUT itself."""
    folder, out, count = make_model(), tmp_path / "out", 0
    replace = os.replace

    def full(a: Path, b: Path) -> None:
        nonlocal count
        count += 1
        if count == moment:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OutputError, match="No space left on device"):
            quantize(folder, out, rows)
    assert not out.exists()
    assert not list(tmp_path.glob("out.partial/.squawq-*"))
    quantize(folder, out, rows)
    quantize(folder, tmp_path / "straight", rows)
    assert settled(out) == settled(tmp_path / "straight")


def test_a_file_that_the_system_cuts_off(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    """A real limit, met inside safetensors: the error says what is needed and that nothing is lost."""
    folder, out = make_model(intermediate_size=256), tmp_path / "out"
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, before[1]))  # the embedding fits, a layer does not
        with pytest.raises(
            OutputError, match=r"00002-of-00004.safetensors cannot be written: .*File too large.*It needs"
        ):
            quantize(folder, out, rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not out.exists()
    quantize(folder, out, rows)


def test_room_is_asked_for_before_work_starts(
    make_model: MakeModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=60_000))
    with pytest.raises(OutputError, match=r"needs about 0.\d MB more, and its disk has 0.1 MB free; make room"):
        quantize(folder, tmp_path / "out", rows)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_size_asked_for_is_the_size_that_comes(
    make_model: MakeModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from squawq.quantization.job import Job

    asked: list[int] = []
    monkeypatch.setattr(Job, "require_room", lambda self, size, scratch: asked.append(size))
    report = quantize(make_model(intermediate_size=88), tmp_path / "out", rows)
    assert asked == [report["bytes"]]


def cut_in_header(path: Path) -> None:
    os.truncate(path, 100)


def cut_in_data(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [cut_in_header, cut_in_data, Path.unlink])
def test_a_source_that_is_damaged(
    damage: Callable[[Path], None], make_model: MakeModel, rows: Rows, tmp_path: Path
) -> None:
    folder = make_model()
    damage(folder / SHARD)
    with pytest.raises(CheckpointError, match=r"damaged|has no \*.safetensors"):
        quantize(folder, tmp_path / "out", rows)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(struct.pack("<f", 1.0))


def replace(path: Path) -> None:
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("change", [shrink, overwrite, replace])
def test_a_source_that_changes_during_the_run(
    change: Callable[[Path], None], make_model: MakeModel, rows: Rows, tmp_path: Path
) -> None:
    """After the first layer. Reading a map of a file that shrank would kill the process."""
    folder, out = make_model(), tmp_path / "out"

    class Changing:
        def generating(self, what: str, done: int, total: int) -> None: ...

        def start(self, layers: int, tokens: int, resumed: int, runs_in: str) -> None: ...
        def tuning(self, step: int, steps: int) -> None: ...
        def layer(self, record: object) -> None:
            change(folder / SHARD)

        def read_back(self, layers: int) -> None: ...

    config = QuantConfig(group_size=32, seqlen=32, samples=8, n_grid=4)
    with pytest.raises(CheckpointError, match="has changed since its header was read"):
        squawq.quantize(folder, out, config, calibration=rows, observer=Changing())
    assert not out.exists()
    if change is overwrite:
        with pytest.raises(OutputError, match="another source"):
            quantize(folder, out, rows)


NAMES = ["embed_tokens", "layers.0.input_layernorm", "layers.1.mlp.down_proj", "layers.1.self_attn.k_proj", "norm"]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", [*(f"model.{name}.weight" for name in NAMES), "lm_head.weight"])
def test_one_value_that_is_not_finite(
    name: str, value: float, make_model: MakeModel, rows: Rows, tmp_path: Path
) -> None:
    folder = make_model()
    state = {key: tensor.clone() for key, tensor in load_file(folder / SHARD).items()}
    state[name].view(-1)[7] = value
    save_file(state, folder / SHARD)
    with pytest.raises(CheckpointError, match=f"{name}' holds 1 values that are not finite"):
        quantize(folder, tmp_path / "out", rows)
    assert not (tmp_path / "out").exists()


def test_a_tensor_of_integers(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    folder, name = make_model(), "model.layers.1.mlp.up_proj.weight"
    state = load_file(folder / SHARD)
    save_file({**state, name: torch.zeros(96, 64, dtype=torch.int8)}, folder / SHARD)
    with pytest.raises(CheckpointError, match=f"{name}' is torch.int8; floating point is needed"):
        quantize(folder, tmp_path / "out", rows)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
