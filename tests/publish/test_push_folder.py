"""What `squawq push` looks at before it asks the Hub: which folders are whole, and hold nothing that is not theirs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from squawq.demo import demo_model
from squawq.errors import CheckpointError, ConfigError, OutputError, SquawqError
from squawq.publish.push import check_folder


@pytest.fixture
def folder(awq_demo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(awq_demo, tmp_path / "demo-awq"))


def test_a_folder_as_it_should_be(folder: Path) -> None:
    assert check_folder(folder) == sorted(path.name for path in folder.iterdir())


def stray(folder: Path) -> None:
    (folder / "passwords.txt").touch()


def private_key(folder: Path) -> None:
    (folder / "tokenizer_private.key").touch()


def environment(folder: Path) -> None:
    (folder / "vocab.env").touch()


def linked_licence(folder: Path) -> None:
    (folder.parent / "secret").write_text("secret")
    (folder / "LICENSE").symlink_to("../secret")


def linked_shard(folder: Path) -> None:
    name = "model-00002-of-00010.safetensors"
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)


def another_layout(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"version": "gemm"', '"version": "gemv"'))


def unfinished(folder: Path) -> None:
    (folder / "squawq_job.json").write_text("{}")


def tensor_lost(folder: Path) -> None:
    (folder / "model-00002-of-00010.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()


def cut(folder: Path) -> None:
    path = folder / "model-00002-of-00010.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def inside(folder: Path) -> None:
    (folder / "runs").mkdir()


@pytest.mark.parametrize(
    ("spoil", "error", "reason"),
    [
        (stray, OutputError, "not part of the model: passwords.txt"),
        (inside, OutputError, "not part of the model: runs"),
        (private_key, OutputError, "not part of the model: tokenizer_private.key"),
        (environment, OutputError, "not part of the model: vocab.env"),
        (linked_licence, CheckpointError, "LICENSE: is a link out of its folder"),
        (linked_shard, CheckpointError, "00002-of-00010.safetensors: is a link out of its folder"),
        (another_layout, ConfigError, r"holds awq \(gemv\)"),
        (unfinished, CheckpointError, "not finished"),
        (tensor_lost, CheckpointError, "is incomplete: 9 tensors are missing, such as model.layers.0.self_attn.q_proj"),
        (cut, CheckpointError, "damaged"),
        (no_tokenizer, CheckpointError, "no tokenizer"),
    ],
)
def test_a_folder_that_is_not_sent(folder: Path, spoil: object, error: type[SquawqError], reason: str) -> None:
    assert callable(spoil)
    spoil(folder)
    with pytest.raises(error, match=reason):
        check_folder(folder)


def test_a_folder_of_the_hubs_cache_is_sent(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--me--demo" / "snapshots" / "01", tmp_path / "models--me--demo" / "blobs"
    snapshot.mkdir(parents=True)
    folder.rename(blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert check_folder(snapshot) == sorted(path.name for path in blobs.iterdir())


def test_what_a_killed_run_left_is_not_sent(folder: Path) -> None:
    names = check_folder(folder)
    (folder / ".squawq-tmp-ab12cd_9").mkdir()
    assert check_folder(folder) == names


def test_a_16_bit_folder_is_not_sent() -> None:
    with pytest.raises(ConfigError, match="not quantized"):
        check_folder(demo_model())
