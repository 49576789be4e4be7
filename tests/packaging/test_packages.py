"""What the wheels of squawq and squawq-demo contain. They are built without the kernels, which takes no compiler."""

from __future__ import annotations

import os
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from scikit_build_core.build import build_sdist, build_wheel
from squawq_demo import FOLDER

from squawq import __version__
from squawq.backends.cpu import library

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "packages" / "demo"
MEGABYTE = 10**6


def wheel(project: Path, out: Path) -> Path:
    """The wheel of a project, without compiled code."""
    before = Path.cwd()
    os.chdir(project)
    try:
        return out / build_wheel(str(out), {"wheel.cmake": "false"})
    finally:
        os.chdir(before)


def metadata(path: Path) -> Message:
    with zipfile.ZipFile(path) as file:
        (name,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_bytes(file.read(name))


def names(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as file:
        return file.namelist()


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel(ROOT, tmp_path_factory.mktemp("squawq"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel(DEMO, tmp_path_factory.mktemp("squawq-demo"))


def test_the_wheel_of_squawq(ours: Path) -> None:
    assert {name.partition("/")[0] for name in names(ours)} == {"squawq", "awq", f"squawq-{__version__}.dist-info"}
    files = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*") if path.is_file()}
    tracked = {name for name in files if "__pycache__" not in name and not name.endswith(".so")}
    assert tracked == {name for name in names(ours) if ".dist-info/" not in name}
    assert not [name for name in names(ours) if name.endswith((".safetensors", ".pyc")) or "test" in Path(name).name]
    kernels = library._find()
    compiled = kernels.stat().st_size if kernels else 0  # it is compressed in a wheel
    assert ours.stat().st_size + compiled < 5 * MEGABYTE


def test_the_wheel_of_the_demo_model(demo: Path) -> None:
    assert demo.name.endswith("-py3-none-any.whl")
    files = {f"squawq_demo/demo_model/{path.name}" for path in FOLDER.iterdir()}
    assert {"squawq_demo/demo_model/model.safetensors", "squawq_demo/demo_model/held_back.txt"} < files
    assert files | {"squawq_demo/__init__.py", "squawq_demo/py.typed"} == {
        name for name in names(demo) if ".dist-info/" not in name
    }
    assert 10 * MEGABYTE < demo.stat().st_size < 16 * MEGABYTE


def test_the_demo_package_has_a_version_of_its_own_and_needs_nothing(demo: Path) -> None:
    found = metadata(demo)
    project = tomllib.loads((DEMO / "pyproject.toml").read_text())["project"]
    assert (found["Name"], found["Version"]) == ("squawq-demo", project["version"])
    assert found.get_all("Requires-Dist") is None
    assert found["License-Expression"] == "CDLA-Sharing-1.0"
    assert [name for name in names(demo) if name.endswith(".dist-info/licenses/LICENSE")]


def test_the_extra_demo_is_the_package(ours: Path) -> None:
    wanted = [
        line for line in metadata(ours).get_all("Requires-Dist", []) if "extra == 'demo'" in line.replace('"', "'")
    ]
    assert [line.partition(">")[0] for line in wanted] == ["squawq-demo"]


def test_the_source_distribution_has_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path = tmp_path / build_sdist(str(tmp_path))
    assert path.stat().st_size < 5 * MEGABYTE
    with tarfile.open(path) as file:
        found = {name.partition("/")[2] for name in file.getnames()}
    assert {"pyproject.toml", "CMakeLists.txt", "csrc/dispatch.cpp", "src/squawq/__init__.py", "LICENSE"} <= found
    weights = {name for name in found if name.endswith(".safetensors") and "/golden/" not in name}
    assert not weights | {name for name in found if name.startswith("packages/")}
