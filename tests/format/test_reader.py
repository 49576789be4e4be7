"""Damaged and lying files: each gives a typed error that names the file and, where there is one, the tensor."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from squawq.errors import CheckpointError
from squawq.format.reader import Checkpoint
from squawq.format.shards import DeviceReader, read_header


def write_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_HEADERS: dict[str, tuple[Any, bytes, int | None, str]] = {
    "header longer than the file": ({}, b"", 10**9, "damaged"),
    "header of 2^63 bytes": ({}, b"", 2**63, "damaged"),
    "no JSON": (b"nonsense!", b"", None, "cannot be read"),
    "a list": ([1, 2], b"", None, "not an object"),
    "deep nesting": (b"[" * 100_000, b"", None, "cannot be read"),
    "shape of 2^62": ({"w": entry([2**31, 2**31], 0, 16)}, bytes(16), None, "'w'"),
    "negative size": ({"w": entry([-4], 0, 16)}, bytes(16), None, "'w'"),
    "fractional size": ({"w": entry([4.0], 0, 16)}, bytes(16), None, "'w'"),
    "unknown dtype": ({"w": entry([4], 0, 16, "F4")}, bytes(16), None, "'w'"),
    "bytes and shape disagree": ({"w": entry([5], 0, 16)}, bytes(16), None, "'w'"),
    "offsets backwards": ({"w": entry([4], 16, 0)}, bytes(16), None, "'w'"),
    "overlap": ({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, bytes(24), None, "overlap"),
    "gap": ({"a": entry([4], 0, 16), "b": entry([4], 20, 36)}, bytes(36), None, "gap"),
    "data cut off": ({"w": entry([4], 0, 16)}, bytes(9), None, "need 16 bytes"),
    "data left over": ({"w": entry([4], 0, 16)}, bytes(20), None, "need 16 bytes"),
    "entry of another kind": ({"w": 7}, b"", None, "'w'"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers(case: str, tmp_path: Path) -> None:
    header, data, length, message = BAD_HEADERS[case]
    path = write_file(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_typed_error_or_a_header(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(data)
    with suppress(CheckpointError):
        read_header(path)


def test_good_header(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3, 4), "b": torch.zeros(2, dtype=torch.int32)}, tmp_path / "m.safetensors")
    header = read_header(tmp_path / "m.safetensors")
    assert header["a"].shape == (3, 4)
    assert header["b"].dtype == torch.int32
    assert header["a"].nbytes == 48


def break_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "layers as text": ({"num_hidden_layers": "two"}, "num_hidden_layers"),
    "no type": ({"model_type": None}, "model_type"),
    "other quantization": ({"quantization_config": {"quant_method": "hqq", "bits": 4}}, "'hqq'; squawq reads awq"),
    "eight bits": ({"quantization_config": {"quant_method": "awq", "bits": 8}}, "bits is 8"),
    "other layout": ({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "marlin"}}, "'gemv_fast'"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_configs(case: str, make_model: MakeModel) -> None:
    folder = make_model()
    changes, message = CONFIGS[case]
    break_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


def folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def folder_with_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_outside(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_of_missing_file(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_of_missing_tensor(folder: Path) -> None:
    index = {"weight_map": {"ghost": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (folder_without_weights, "no \\*.safetensors"),
        (folder_with_pickle, "pytorch_model.bin"),
        (index_outside, "not the name"),
        (index_of_missing_file, "missing"),
        (index_of_missing_tensor, "ghost"),
        (cut_file, "need .* bytes"),
    ],
)
def test_bad_folders(damage: Callable[[Path], None], message: str, make_model: MakeModel) -> None:
    folder = make_model()
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        _ = Checkpoint(folder).tensors
    assert str(folder) in str(caught.value)


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model folder"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint(tmp_path)


def test_missing_and_misshapen_tensor(make_model: MakeModel) -> None:
    checkpoint = Checkpoint(make_model())
    with pytest.raises(CheckpointError, match="'ghost' is missing"):
        checkpoint.read("ghost")
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' has shape \[64\]"):
        checkpoint.read("model.norm.weight", (65,))


def test_companions(make_model: MakeModel) -> None:
    folder = make_model()
    wanted = {"tokenizer.json", "vocab.json", "merges.txt", "chat_template.jinja", "LICENSE", "LICENSE.txt", "NOTICE"}
    for name in (*wanted, "tokenizer_private.key", "vocab.env", "LICENSE.key", "chat_template.py", "held_back.txt"):
        (folder / name).touch()
    assert {path.name for path in Checkpoint(folder).companions()} - {"generation_config.json"} == wanted


def test_a_companion_that_is_a_link(make_model: MakeModel) -> None:
    """Out of the folder is refused; into it, and from a snapshot of the Hub's cache to its blobs, is not."""
    folder = make_model()
    (folder.parent / "secret").write_text("secret")
    (folder / "LICENSE.txt").touch()
    (folder / "LICENSE").symlink_to("LICENSE.txt")
    assert folder / "LICENSE" in Checkpoint(folder).companions()
    (folder / "NOTICE").symlink_to("../secret")
    with pytest.raises(CheckpointError, match="NOTICE: is a link out of its folder"):
        list(Checkpoint(folder).companions())
    (folder / "NOTICE").unlink()
    snapshot = folder.parent / "snapshots" / "0123"
    snapshot.parent.mkdir()
    folder.rename(snapshot)
    (folder.parent / "blobs").mkdir()
    (folder.parent / "blobs" / "4567").touch()
    (snapshot / "NOTICE").symlink_to("../../blobs/4567")
    assert snapshot / "NOTICE" in Checkpoint(snapshot).companions()
    (snapshot / "USE_POLICY.md").symlink_to("../../secret")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        list(Checkpoint(snapshot).companions())


LEGACY = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMV"}
GPTQMODELS = {"bits": 4, "group_size": 64, "method": "awq", "quant_method": "awq", "format": "gemv", "zero_point": True}


@pytest.mark.parametrize(("name", "written"), [("quant_config.json", LEGACY), ("quantize_config.json", GPTQMODELS)])
@pytest.mark.parametrize("changes", [{}, {"quantization_config": None}])
def test_legacy_quant_config(
    name: str, written: dict[str, Any], changes: dict[str, Any], make_model: MakeModel
) -> None:
    folder = make_model()
    (folder / name).write_text(json.dumps(written))
    break_config(folder, **changes)
    config = Checkpoint(folder).config
    assert config.quant is not None
    assert (config.quant.group_size, config.quant.bits, config.quant.zero_point) == (64, 4, True)
    assert config.layout == "gemv"


def test_gptqs_own_legacy_config(make_model: MakeModel) -> None:
    """AutoGPTQ's files name no method."""
    folder = make_model()
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 128, "desc_act": False}))
    config = Checkpoint(folder).config
    assert config.quant is not None
    assert (config.quant_method, config.layout, config.quant.group_size) == ("gptq", "gptq", 128)


def test_read_through_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model: MakeModel) -> None:
    """As on the way to a GPU: tensors smaller and larger than a buffer, and empty ones."""
    monkeypatch.setattr("squawq.format.shards.CHUNK", 96)
    tensors = {"a": torch.randn(5, 7), "b": torch.arange(200, dtype=torch.int32), "c": torch.zeros(0, 3).half()}
    tensors["d"] = torch.randn(3).bfloat16()
    folder = tmp_path / "buffers"
    folder.mkdir()
    (folder / "config.json").write_bytes((make_model() / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint(folder, read_data=DeviceReader(torch.device("cpu")))
    for name, tensor in tensors.items():
        found = checkpoint.read(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    assert torch.equal(checkpoint.read("a", index=3), tensors["a"][3])
    os.truncate(folder / "model.safetensors", 500)
    with pytest.raises(CheckpointError, match="has changed since its header was read"):
        checkpoint.read("b")
