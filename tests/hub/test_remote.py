"""`squawq inspect` of a Hub id, and a card's source by its id: one small file each is fetched, and no weights."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import programs
import pytest
from standin import Hub, Repository, standin

from squawq.demo import demo_model
from squawq.inspection import inspect

ID = "me/demo"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with standin() as found:
        found.repos[ID] = Repository()
        files = {path.name: path.read_bytes() for path in demo_model().iterdir() if path.is_file()}
        found.repos[ID].branches["main"] = files
        yield found


def run(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return programs.run(arguments, env=hub.environment(home))


def fetched(hub: Hub) -> set[str]:
    return {path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path}


def test_inspect_fetches_the_config_alone(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "-m", "squawq", "inspect", ID, "--json")
    assert done.returncode == 0, done.stderr
    assert fetched(hub) == {"config.json"}
    found = json.loads(done.stdout)
    assert found["bytes"] == inspect(demo_model())["bytes"]
    assert (found["model"], found["tensors"]) == (ID, "shapes")


def test_inspect_of_what_is_not_there(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "-m", "squawq", "inspect", "me/none")
    assert done.returncode == 2
    assert "'me/none' is not on the Hub, or needs a login" in done.stderr.splitlines()[-1]


def test_a_cards_source_by_its_id(hub: Hub, tmp_path: Path) -> None:
    code = f"from squawq.publish.card import *; import json; print(json.dumps(front_matter(Origin(source={ID!r}))))"
    done = run(hub, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["license"], found["base_model"]) == ("cdla-sharing-1.0", ID)
    assert fetched(hub) == {"README.md"}


def test_a_source_without_a_card(hub: Hub, tmp_path: Path) -> None:
    del hub.repos[ID].branches["main"]["README.md"]
    code = f"from squawq.publish.card import *; import json; print(json.dumps(front_matter(Origin(source={ID!r}))))"
    done = run(hub, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found.get("license"), found["base_model"]) == (None, ID)
