"""The systemd unit: systemd finds no fault in it, and it runs a command that squawq understands."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from squawq.serve.launcher import settings_from

DEPLOY = Path(__file__).parents[2] / "deploy"
UNIT = (DEPLOY / "squawq.service").read_text(encoding="utf-8")
ANALYZE = shutil.which("systemd-analyze")


def value(key: str) -> str:
    (found,) = re.findall(rf"^{key}=(.*)$", UNIT, re.MULTILINE)
    return str(found)


def test_the_command_reads_the_example_settings() -> None:
    program, command, *arguments = value("ExecStart").split()
    assert (Path(program).name, command, arguments) == ("squawq", "serve", ["--config", "/etc/squawq/serve.yaml"])
    settings = settings_from(["--config", str(DEPLOY / "serve.yaml")], {})
    assert settings.host == "127.0.0.1"
    assert settings.port == 8000
    assert settings.served_names == ("llama",)


def test_systemd_waits_longer_than_the_server_drains() -> None:
    settings = settings_from(["--config", str(DEPLOY / "serve.yaml")], {})
    assert int(value("TimeoutStopSec")) > settings.shutdown_timeout + 10


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that exists."""
    path = tmp_path / "squawq.service"
    path.write_text(UNIT.replace("ExecStart=/opt/squawq/bin/squawq", f"ExecStart={shutil.which('true')}"))
    return path


@pytest.mark.skipif(ANALYZE is None, reason="needs systemd-analyze")
def test_systemd_finds_no_fault(unit: Path) -> None:
    assert ANALYZE is not None
    done = subprocess.run([ANALYZE, "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    # An exposure of 0 is the least, 10 the most; the threshold is ten times that
    rated: list[str | Path] = [ANALYZE, "security", "--offline=true", "--threshold=20", unit]
    done = subprocess.run(rated, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
