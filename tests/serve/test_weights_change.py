"""Weights that are cut off or overwritten in place under a running server: it goes on with what it has read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from running import process

PROMPTS = ["Once upon a time", "The cat and the dog", "One day", "zebra 42"]


def answers(url: str) -> list[str]:
    body = {"prompt": PROMPTS, "max_tokens": 12, "temperature": 0}
    choices = httpx.post(f"{url}/v1/completions", json=body, timeout=120).raise_for_status().json()["choices"]
    return [choice["text"] for choice in choices]


def cut_off(path: Path) -> None:
    os.truncate(path, 0)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize("isa", ["", "torch"])
def test_a_running_server(isa: str, awq_demo: Path, tmp_path: Path) -> None:
    """A server that mapped its embedding ended with SIGBUS at the next request, without a line."""
    folder = tmp_path / "model"
    shutil.copytree(awq_demo, folder)
    changes: list[Callable[[Path], None]] = [overwrite, cut_off]
    arguments = ["serve", str(folder), "--port", "0", "--kv-tokens", "4096"]
    with process(arguments, {"SQUAWQ_ISA": isa}) as (child, url):
        before = answers(url)
        assert all(before)
        for change in changes:
            for path in folder.glob("*.safetensors"):
                change(path)
            assert answers(url) == before
            assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        assert child.poll() is None
