"""A native library that is damaged or another version's: a warning, and torch. Loading one killed the process."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squawq.backends.cpu import library
from squawq.errors import ConfigError, KernelError

FOUND = library._find()
if FOUND is None:
    pytest.skip("the native kernels are not built on this machine", allow_module_level=True)


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    assert FOUND is not None
    path = tmp_path / FOUND.name
    data = FOUND.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def test_a_process_with_a_library_that_is_cut_off(cut: Path) -> None:
    code = f"""
import torch
from pathlib import Path
from squawq.backends import backend_for
from squawq.backends.cpu import library
library._find = lambda: Path({str(cut)!r})
library.load(), library.load()
print(library.isa(), backend_for("cpu").activation_mul(torch.ones(1, 32), "silu").shape[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["torch", "16"]), done.stderr
    assert done.stderr.count(f"{cut} is cut off: reinstall the package; running on torch, much slower") == 1


@settings(deadline=None)
@given(st.data())
def test_no_cut_is_loaded(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    assert FOUND is not None
    whole = FOUND.read_bytes()
    path = tmp_path_factory.mktemp("cut") / FOUND.name
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(KernelError, match=r"is cut off|cannot be loaded \(.*(file too short|invalid ELF header)"):
        library._open(path)


def test_another_version_and_a_missing_symbol(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library._open(FOUND) is not None
    with monkeypatch.context() as patch:
        patch.setattr(library, "ABI", library.ABI + 1)
        with pytest.raises(KernelError, match="of another version of squawq: reinstall the package"):
            library._open(FOUND)
    monkeypatch.setitem(library._SIGNATURES, "squawq_nothing", ())
    with pytest.raises(KernelError, match=r"cannot be loaded \(.*squawq_nothing"):
        library._open(FOUND)


def test_it_is_said_and_an_instruction_set_that_was_asked_for_is_refused(
    cut: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_find", lambda: cut)
    monkeypatch.delenv("SQUAWQ_ISA", raising=False)
    with caplog.at_level(logging.WARNING, "squawq"):
        assert library.load.__wrapped__() is None
    assert "running on torch, much slower" in caplog.text
    monkeypatch.setenv("SQUAWQ_ISA", "scalar")
    with pytest.raises(ConfigError, match=r"SQUAWQ_ISA is 'scalar', but .* is cut off"):
        library.load.__wrapped__()
