"""The door to a model folder's files: nothing outside of the folder is read, nothing that waits or never ends, and no
JSON that takes more than it is worth."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeModel
from hypothesis import given
from hypothesis import strategies as st

from squawq.demo import demo_model
from squawq.engine.generation_config import GenerationConfig
from squawq.errors import CheckpointError, SquawqError
from squawq.export.run import export
from squawq.format.files import MAX_DEPTH, has_file, parse_json, read_bytes, read_json
from squawq.format.reader import Checkpoint
from squawq.inspection import inspect
from squawq.publish.card import Origin, front_matter, model_card, write_card
from squawq.publish.push import check_folder
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize
from squawq.report.files import add_evaluation
from squawq.text.tokenizer import Tokenizer

SECRET = "token of somebody"


def opened(folder: Path) -> None:
    """A model is opened to be run."""
    tokenizer = Tokenizer(folder)
    _ = tokenizer.chat_template, tokenizer.tool_template
    checkpoint = Checkpoint(folder)
    GenerationConfig(folder, checkpoint.config)
    _ = checkpoint.tensors
    checkpoint.read("model.norm.weight")


def copied(folder: Path) -> None:
    Checkpoint(folder).companions()


READ: dict[str, Callable[[Path], object]] = {
    "config.json": opened,
    "tokenizer.json": opened,
    "tokenizer_config.json": opened,
    "generation_config.json": opened,
    "chat_template.jinja": opened,
    "additional_chat_templates/tool_use.jinja": opened,
    "model.safetensors": opened,
    "LICENSE": copied,
    "quant_config.json": opened,
    "squawq_report.json": lambda folder: add_evaluation(folder, "reference", {}),
    "README.md": lambda folder: front_matter(Origin(source=str(folder))),
}


@pytest.fixture
def folder(make_model: MakeModel) -> Path:
    """A model's folder beside a file that is none of its business."""
    folder = make_model()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(demo_model() / name, folder / name)
    (folder.parent / "secret").write_text(SECRET)
    return folder


@pytest.mark.parametrize("name", READ)
def test_a_link_out_of_the_folder_is_refused(name: str, folder: Path) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(folder.parent / "secret")
    with pytest.raises(CheckpointError) as caught:
        READ[name](folder)
    assert f"{path}: is a link out of its folder, to {folder.parent / 'secret'}" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_folder_inside_that_is_a_link_out(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "tool_use.jinja").write_text(SECRET)
    (folder / "additional_chat_templates").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        _ = Tokenizer(folder).tool_template


def test_a_link_to_the_folder_and_links_within_it_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").rename(folder / "other.json")
    (folder / "generation_config.json").symlink_to("other.json")
    (tmp_path / "named").symlink_to(folder)
    opened(tmp_path / "named")


def test_a_snapshot_of_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    """Its files are links to the blobs beside the snapshots, templates in a folder of their own too."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    blobs.mkdir()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    for path in (p for p in folder.rglob("*") if p.is_file()):
        (blobs / path.name).write_bytes(path.read_bytes())
        name = path.relative_to(folder)
        (snapshot / name).symlink_to(Path(*[".."] * (len(name.parts) + 1), "blobs", path.name))
    opened(snapshot)
    assert Tokenizer(snapshot).tool_template == "tools"
    (snapshot / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        opened(snapshot)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path)])
@pytest.mark.parametrize("name", READ)
def test_what_is_no_file_neither_waits_nor_breaks(make: Callable[[Path], None], name: str, folder: Path) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with suppress(SquawqError):  # and nothing else
        READ[name](folder)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_bytes(folder / name)


def test_a_device_is_not_opened(folder: Path) -> None:
    (folder.parent / "null").symlink_to("/dev/null")
    with pytest.raises(CheckpointError, match="is a link out of its folder, to /dev/null"):
        read_bytes(folder.parent / "null")
    assert not has_file(Path("/dev/null"))
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_bytes(Path("/dev/null"))


@pytest.mark.parametrize(
    "work",
    [
        lambda folder, out: export(folder, out, "compressed-tensors"),
        lambda folder, out: check_folder(folder),
        lambda folder, out: write_card(folder, "me/model"),
        lambda folder, out: model_card(folder, "me/model"),
        lambda folder, out: inspect(folder),
    ],
)
def test_a_command_on_a_folder_with_linked_weights(
    work: Callable[[Path, Path], Any], awq_demo: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(awq_demo, tmp_path / "model"))
    path = next(folder.glob("*.safetensors"))
    path.rename(tmp_path / "weights")
    path.symlink_to(tmp_path / "weights")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        work(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["LICENSE", "model.safetensors"])
def test_quantize_takes_no_secret_along(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=f"{name}: is a link out of its folder"):
        quantize(folder, tmp_path / "out", QuantConfig(method="rtn"))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


BAD_JSON = {
    "deep": b"[" * 200_000,
    "not so deep": b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
    "not a number": b'{"a": NaN}',
    "infinite": b'{"a": -Infinity}',
    "too large for a float": b'{"a": 1e999}',
    "a whole number too large for a float": b'{"a": 1' + b"0" * 400 + b"}",
    "a whole number of 5000 digits": b'{"a": 1' + b"0" * 5000 + b"}",
    "half a character": b'{"a": "\\ud800"}',
    "half a character as a key": b'{"\\udfff": 1}',
    "many values": b'{"a": [' + b"0," * 2**22 + b"0]}",
    "not UTF-8": b'{"a": "\xff"}',
    "a list": b"[]",
    "nothing": b"",
    "larger than any": b" " * (64 * 2**20) + b"{}",
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json(case: str, tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_bytes(BAD_JSON[case])
    with pytest.raises(CheckpointError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
)


@given(VALUES)
def test_good_json_is_read_as_it_is(value: Any) -> None:
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value
