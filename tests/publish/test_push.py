"""`squawq push` through the real huggingface_hub against a stand-in of the Hub: checks, upload, resuming, refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import programs
import pytest
from standin import COMMIT, TOKEN, Hub, Repository, standin

from squawq.commands.push import push as push_command
from squawq.demo import demo_model
from squawq.errors import ConfigError, OutputError
from squawq.publish.card import is_ours, write_card
from squawq.publish.push import push as run
from squawq.publish.push import read_token

REPO = "me/demo-AWQ"


@pytest.fixture
def folder(awq_demo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(awq_demo, tmp_path / "demo-awq"))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with standin() as found:
        yield found


def command(folder: Path, *arguments: str) -> list[str]:
    return ["-m", "squawq", "push", str(folder), *(arguments or (REPO,))]


def push(hub: Hub, folder: Path, *arguments: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
    environment = hub.environment(folder.parent / "home", token)
    return programs.run(command(folder, *arguments), env=environment)


def last(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.splitlines()[-1]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_everything_arrives_with_a_card_through_a_dropped_connection(hub: Hub, folder: Path) -> None:
    hub.drops = 1
    (folder / ".cache").mkdir()  # as other clients leave it
    done = push(hub, folder, REPO, "--private", "--source", str(demo_model()))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.endpoint}/{REPO}/commit/{COMMIT}"
    assert "19 files, 5.8 MB, to me/demo-AWQ" in done.stderr
    (folder / ".cache").rmdir()
    there = dict(hub.repos[REPO].branches["main"])
    assert there.pop(".gitattributes") == b""
    assert there == contents(folder)
    assert hub.repos[REPO].private
    assert hub.drops == 0
    card = there["README.md"].decode()
    assert "license: cdla-sharing-1.0" in card
    assert is_ours(card)
    assert TOKEN not in done.stdout + done.stderr


def test_again_sends_nothing(hub: Hub, folder: Path) -> None:
    assert push(hub, folder).returncode == 0
    sent = dict(hub.puts)
    done = push(hub, folder)
    assert done.returncode == 0, done.stderr
    assert dict(hub.puts) == sent
    assert len(hub.repos[REPO].commits) == 1


def test_a_killed_push_goes_on(hub: Hub, folder: Path) -> None:
    hub.stall_from = 4
    environment = hub.environment(folder.parent / "home")
    process = programs.Program(command(folder), env=environment)
    try:
        until = time.monotonic() + 60
        while len(hub.objects) < 4 and time.monotonic() < until:
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    first = set(hub.objects)
    assert len(first) == 4
    assert set(hub.repos[REPO].branches["main"]) == {".gitattributes"}  # nothing half-made is to be seen
    hub.go.set()
    hub.stall_from = None
    done = push(hub, folder)
    assert done.returncode == 0, done.stderr
    assert len(hub.objects) == 10
    assert set(hub.puts.values()) == {1}  # what had arrived was not sent again
    assert hub.repos[REPO].branches["main"].items() >= contents(folder).items()


def test_a_branch(hub: Hub, folder: Path) -> None:
    done = push(hub, folder, REPO, "--revision", "int4")
    assert done.returncode == 0, done.stderr
    assert set(hub.repos[REPO].branches["main"]) == {".gitattributes"}
    assert hub.repos[REPO].branches["int4"].items() >= contents(folder).items()


@pytest.mark.parametrize("where", ["variable", "file", "none"])
def test_a_bad_token(hub: Hub, folder: Path, tmp_path: Path, where: str) -> None:
    wrong = "hf_wrongwrong"
    arguments = []
    if where == "file":
        (tmp_path / "token").write_text(f"{wrong}\n")
        arguments = ["--token-file", str(tmp_path / "token")]
    done = push(hub, folder, REPO, *arguments, token={"variable": wrong, "file": TOKEN, "none": None}[where])
    assert done.returncode == 2
    expected = "no token: set HF_TOKEN" if where == "none" else "the Hub refuses the token"
    assert expected in last(done)
    assert wrong not in done.stdout + done.stderr
    assert hub.repos == {}


def test_a_token_file(hub: Hub, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert push(hub, folder, REPO, "--token-file", str(tmp_path / "token"), token=None).returncode == 0


def test_another_owner(hub: Hub, folder: Path) -> None:
    done = push(hub, folder, "other/demo")
    assert done.returncode == 2
    assert "the token may not write to other/demo" in last(done)


def test_private_is_not_put_into_a_public_repository(hub: Hub, folder: Path) -> None:
    hub.repos[REPO] = Repository(private=False)
    done = push(hub, folder, REPO, "--private")
    assert done.returncode == 2
    assert "exists and is public" in last(done)
    assert not hub.puts


@pytest.mark.parametrize(("name", "reason"), [("README.md", "a README.md that"), ("old/a.gguf", "other weights")])
def test_a_repository_with_something_else(hub: Hub, folder: Path, name: str, reason: str) -> None:
    hub.repos[REPO] = Repository()
    hub.repos[REPO].branches["main"][name] = b"# mine\n"
    done = push(hub, folder)
    assert done.returncode == 2
    assert reason in last(done)
    assert not hub.puts
    assert not hub.repos[REPO].commits
    assert push(hub, folder, REPO, "--force").returncode == 0
    assert ("mine" in hub.repos[REPO].branches["main"][name].decode()) == (name != "README.md")


def test_a_card_keeps_what_it_was_given(hub: Hub, folder: Path) -> None:
    assert push(hub, folder, REPO, "--license", "mit", "--base-model", "me/demo", "--card-only").returncode == 0
    done = push(hub, folder, REPO, "--source", str(demo_model()))
    assert done.returncode == 0, done.stderr
    path = folder / "README.md"
    kept = "kept from the card before: license, base_model (remove it to begin anew)"
    assert f"{path}: written; {kept}" in done.stderr.splitlines()
    card = hub.repos[REPO].branches["main"]["README.md"].decode()
    assert "license: mit\n" in card
    assert "base_model: me/demo\n" in card
    assert f"{path}: kept as it is" in push(hub, folder).stderr.splitlines()


def test_the_cache_is_left_alone(hub: Hub, folder: Path) -> None:
    """What a push reads of the repository would be listed there as a broken model."""
    assert push(hub, folder).returncode == 0
    flip(folder)
    done = push(hub, folder, REPO, "--license", "mit")  # reads the card and the report that are there
    assert done.returncode == 0, done.stderr
    read = {path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path}
    assert read == {"README.md", "squawq_report.json"}
    assert not list((folder.parent / "home").rglob("models--*"))


def test_other_weights_under_the_same_names(hub: Hub, folder: Path) -> None:
    """Goes on where the report names the same 16-bit model, and only there."""
    (folder / "README.md").write_text("# mine\n")
    assert push(hub, folder).returncode == 0
    flip(folder)
    assert push(hub, folder).returncode == 0
    assert len(hub.repos[REPO].commits) == 2
    report = folder / "squawq_report.json"
    found = json.loads(report.read_text())
    report.write_text(json.dumps({**found, "job": {**found["job"], "source": "another"}}))
    flip(folder)
    before = dict(hub.repos[REPO].branches["main"])
    done = push(hub, folder)
    assert done.returncode == 2
    assert f"{REPO} has other weights (model-00002-of-00010.safetensors)" in last(done)
    assert hub.repos[REPO].branches["main"] == before
    assert push(hub, folder, REPO, "--force").returncode == 0


def flip(folder: Path) -> None:
    """Another weight, in a file of the same size."""
    path = folder / "model-00002-of-00010.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 + content[len(content) // 2] % 2
    path.write_bytes(content)


def test_a_card_of_something_else_is_not_sent(folder: Path) -> None:
    write_card(folder, REPO)
    with pytest.raises(OutputError, match=f"was written for {REPO}; remove it, or say --source"):
        run(folder, "me/other")
    flip(folder)
    with pytest.raises(OutputError, match="was written before the model changed"):
        run(folder, REPO)


def test_no_hub(folder: Path, hub: Hub) -> None:
    hub.endpoint = "http://127.0.0.1:9"
    done = push(hub, folder)
    assert done.returncode == 2
    assert "stopped" in last(done)


def test_a_readme_of_ones_own_stays(hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("# mine\n")
    with pytest.raises(OutputError, match="not as squawq wrote it"):
        write_card(folder, REPO)
    done = push(hub, folder)
    assert done.returncode == 0
    assert f"{folder / 'README.md'}: kept as it is; it is not as squawq wrote it" in done.stderr.splitlines()
    assert hub.repos[REPO].branches["main"]["README.md"] == b"# mine\n"
    assert push(hub, folder, REPO, "--license", "mit").returncode == 2


@pytest.mark.parametrize("content", ["", "a b", "hf_x\nhf_y", "hf_é"])
def test_a_token_file_that_is_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="one token") as raised:
        read_token(path)
    assert content == "" or content not in str(raised.value)


def test_card_only_sends_nothing(hub: Hub, folder: Path) -> None:
    done = push(hub, folder, REPO, "--card-only", token=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder / "README.md")
    assert not hub.requests


@pytest.mark.parametrize("given", [{"private": True}, {"revision": "int4"}, {"token_file": Path("token")}])
def test_card_only_with_what_only_sending_needs(folder: Path, given: dict[str, Any]) -> None:
    (option,) = given
    with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} cannot be meant"):
        push_command(folder, REPO, card_only=True, **given)
    assert not (folder / "README.md").exists()
