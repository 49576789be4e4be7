"""A finished model's way to its place: whole or not at all, and what is finished is never lost."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeModel

from awq import AutoAWQForCausalLM
from awq.models.saving import save
from squawq.errors import CheckpointError, OutputError
from squawq.format.shards import INDEX

NAMES = [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What lies in the temporary folder; `save` does not look into tensors."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_text(f"ours {name}")
    (folder / INDEX).write_text(json.dumps({"weight_map": {f"tensor {name}": name for name in NAMES}}))
    (folder / "config.json").write_text('{"model_type": "llama"}\n')
    return folder


def full_disk(monkeypatch: pytest.MonkeyPatch, *, links: bool) -> None:
    """No space for the third file; links: on the same file system."""
    link, copy, calls = Path.hardlink_to, shutil.copyfile, []

    def hardlink_to(self: Path, target: Path) -> None:
        if not links:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        calls.append(target)
        if len(calls) >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        link(self, target)

    def copyfile(path: Path, target: Path) -> Any:
        calls.append(target)
        if len(calls) >= 3:
            target.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return copy(path, target)

    monkeypatch.setattr(Path, "hardlink_to", hardlink_to)
    monkeypatch.setattr(shutil, "copyfile", copyfile)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("second", ["out", "elsewhere"])
def test_a_failure_loses_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool, second: str
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    for folder in (out, elsewhere):
        folder.mkdir()
        for name in NAMES:  # every model of so many layers has these
            (folder / name).write_text("another model's")
    with monkeypatch.context() as patch:
        full_disk(patch, links=links)
        with pytest.raises(OutputError, match="No space left"):
            save(source, out, "5GB", move=True)
    assert not (out / "config.json").exists()
    assert not list(out.glob(".*"))
    assert sorted(path.name for path in source.glob("*.safetensors")) == NAMES
    save(source, tmp_path / second, "5GB", move=True)
    for name in NAMES:
        assert (tmp_path / second / name).read_text() == f"ours {name}"
    assert not list(source.glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="gone"):
        save(source, tmp_path / "third", "5GB", move=True)


def test_moving_on_one_file_system_copies_nothing(source: Path, tmp_path: Path) -> None:
    before = {name: (source / name).stat().st_ino for name in NAMES}
    save(source, tmp_path / "out", "5GB", move=True)
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in NAMES} == before


def test_a_copy_leaves_the_source_and_takes_what_the_index_names(source: Path, tmp_path: Path) -> None:
    (source / "adapter.safetensors").write_text("another's")
    out = tmp_path / "out"
    out.mkdir()
    (out / "quant_config.json").write_text("{}")  # of a model that was here
    save(source, out, "5GB", move=False)
    assert sorted(path.name for path in out.iterdir()) == sorted([*NAMES, INDEX, "config.json"])
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert not (out / NAMES[0]).samefile(source / NAMES[0])


def test_what_goes_along_and_no_link_out_of_the_folder(source: Path, tmp_path: Path) -> None:
    for name in ("generation_config.json", "LICENSE", "NOTICE.txt", "tokenizer.json", "LICENSE.key"):
        (source / name).write_text(name)
    save(source, tmp_path / "out", "5GB", move=False)
    beside = {path.name for path in (tmp_path / "out").iterdir()} - {*NAMES, INDEX, "config.json"}
    assert beside == {"generation_config.json", "LICENSE", "NOTICE.txt"}
    (tmp_path / "secret").write_text("secret")
    (source / "LICENSE").unlink()
    (source / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="LICENSE: is a link out of its folder"):
        save(source, tmp_path / "other", "5GB", move=False)
    assert not (tmp_path / "other").exists()


def test_a_forked_child_leaves_the_temporary_folder(
    make_model: MakeModel, rows: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "work"))
    model = AutoAWQForCausalLM.from_pretrained(make_model(num_hidden_layers=1))
    model.quantize(None, {"q_group_size": 32}, rows, apply_clip=False, max_calib_samples=2, max_calib_seq_len=16)
    mine = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: mine + 1)  # what a child sees
    del model
    gc.collect()
    assert len(list((tmp_path / "work").glob("squawq-*/awq/*.safetensors"))) == 3
