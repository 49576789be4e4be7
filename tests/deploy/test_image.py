"""The image's files, without Docker: what a container would start answers, and linters have no objection."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_nginx import free_port

from squawq.demo import demo_model

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SCRIPTS = f"{sysconfig.get_path('scripts')}{os.pathsep}{Path(sys.executable).parent}"


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("MODEL_ID", "PORT", "HOST")}
    return {**kept, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", **more}


@contextmanager
def container(arguments: list[str], **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """What ENTRYPOINT runs with these arguments and variables."""
    command = [str(DEPLOY / "entrypoint.sh"), *arguments]
    with subprocess.Popen(command, env=environment(**variables), stderr=subprocess.DEVNULL) as running:
        try:
            yield running
        finally:
            running.terminate()


def healthy(**variables: str) -> bool:
    check = subprocess.run([DEPLOY / "healthy.sh"], env=environment(**variables), capture_output=True, check=False)
    return check.returncode == 0


def wait_until_healthy(running: subprocess.Popen[bytes], **variables: str) -> None:
    end = time.monotonic() + 60
    while not healthy(**variables):
        assert running.poll() is None
        assert time.monotonic() < end
        time.sleep(0.2)


def test_tgis_line() -> None:
    """MODEL_ID and NUM_SHARD as variables, as in the model card's `docker run`."""
    port = str(free_port())
    told = {"MODEL_ID": str(demo_model()), "NUM_SHARD": "2", "DEVICE": "cpu", "PORT": port, "HOSTNAME": "127.0.0.1"}
    with container([], **told) as running:
        wait_until_healthy(running, **told)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/info") as answer:
            assert b"text-generation-router" in answer.read()
        running.terminate()
        assert running.wait(30) == 0
        assert not healthy(**told)


def test_vllms_line() -> None:
    port = str(free_port())
    line = ["--model", str(demo_model()), "--tensor-parallel-size", "2", "--max-model-len", "4096", "--port", port]
    with container([*line, "--device", "cpu", "--host", "127.0.0.1"]) as running:
        wait_until_healthy(running, PORT=port)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
            assert b'"max_model_len": 4096' in answer.read().replace(b'":4096', b'": 4096')


def test_another_program() -> None:
    command = [str(DEPLOY / "entrypoint.sh"), "squawq", "--version"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("squawq ")


def test_the_dockerfile_has_no_faults() -> None:
    program = shutil.which("hadolint", path=SCRIPTS)
    if program is None:
        pytest.skip("needs hadolint")
    done = subprocess.run([program, DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.stdout == ""
    assert done.returncode == 0


def test_what_the_dockerfile_copies_is_there() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY") and "--from" not in line]
    for name in (name for names in copied for name in names):
        assert (ROOT / name).exists(), name


def test_compose() -> None:
    found: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    first, second = (found["services"][name] for name in ("first", "second"))
    assert first == second
    assert first["build"]["target"] in ("cpu", "cuda")
    assert f" AS {first['build']['target']}\n" in (DEPLOY / "Dockerfile").read_text()
    assert set(found["services"]["nginx"]["depends_on"]) == {"first", "second"}
    command = found["services"]["nginx"]["command"]
    for name in ("127.0.0.1:8001", "127.0.0.1:8002"):
        assert name in (DEPLOY / "nginx.conf").read_text()
        assert name in command
