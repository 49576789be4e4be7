"""Links where squawq writes: what they lead to is somebody else's, and stays as it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MakeModel

from awq.models.saving import save
from squawq.errors import SquawqError
from squawq.evaluation.plots import check_plot
from squawq.export.run import export
from squawq.format.files import TEMPORARY, write_text
from squawq.publish.card import write_card
from squawq.quant_config import QuantConfig
from squawq.quantization.job import JOB, SCRATCH
from squawq.quantization.pipeline import quantize
from squawq.report.files import REPORT, add_evaluation


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """A folder with a file of somebody's."""
    folder = tmp_path / "others"
    folder.mkdir()
    (folder / "kept").write_text("mine")
    return folder


def untouched(others: Path) -> bool:
    return [p.name for p in others.iterdir()] == ["kept"] and (others / "kept").read_text() == "mine"


@pytest.mark.parametrize("name", ["out.partial", f"out.partial/{SCRATCH}"])
def test_quantize(name: str, make_model: MakeModel, others: Path, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(others)
    with pytest.raises(SquawqError, match=rf"{name} is a link to .*others"):
        quantize(make_model(), tmp_path / "out", QuantConfig(method="rtn", group_size=32))
    assert untouched(others)


def test_export(awq_demo: Path, others: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").symlink_to(others)
    with pytest.raises(SquawqError, match=r"out.partial is a link to .*others"):
        export(awq_demo, tmp_path / "out", "dense")
    assert untouched(others)


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo])
def test_a_partial_that_is_no_folder(make: Callable[[Path], None], make_model: MakeModel, tmp_path: Path) -> None:
    make(tmp_path / "out.partial")
    with pytest.raises(SquawqError, match=r"out.partial exists and squawq did not make it"):
        quantize(make_model(), tmp_path / "out", QuantConfig(method="rtn", group_size=32))


def test_a_job_that_is_a_fifo(make_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    os.mkfifo(tmp_path / "out.partial" / JOB)
    with pytest.raises(SquawqError, match=r"out.partial exists and squawq did not make it"):
        quantize(make_model(), tmp_path / "out", QuantConfig(method="rtn", group_size=32))


@pytest.mark.parametrize("work", ["report", "card", "text", "save"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_temporary_folder_that_came_along(
    work: str, inside: bool, awq_demo: Path, others: Path, tmp_path: Path
) -> None:
    """A downloaded folder may hold what looks like a temporary folder of ours: no link of it is followed."""
    folder = Path(shutil.copytree(awq_demo, tmp_path / "model"))
    theirs = folder / f"{TEMPORARY}abcdefgh"
    if inside:
        theirs.mkdir()
        for name in (REPORT, "README.md", "x.txt", "config.json"):
            (theirs / name).symlink_to(others / "kept")
    else:
        theirs.symlink_to(others)
    run: dict[str, Callable[[], object]] = {
        "report": lambda: add_evaluation(folder, "reference", {}),
        "card": lambda: write_card(folder, "me/model"),
        "text": lambda: write_text(folder / "x.txt", "text"),
        "save": lambda: save(awq_demo, folder, "5GB", move=False),
    }
    run[work]()
    assert untouched(others)


def test_a_plot(others: Path, tmp_path: Path) -> None:
    (tmp_path / "plot.png").symlink_to(others / "kept")
    with pytest.raises(SquawqError, match=r"plot.png'\: is a link to .*kept"):
        check_plot(tmp_path / "plot.png")
