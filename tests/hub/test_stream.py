"""A model of the Hub quantized with few of its weight files on disk at a time, against a stand-in on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from conftest import MakeModel
from results import settled
from safetensors.torch import load_file, save_file
from standin import Hub, Repository, standin

from squawq.format.shards import write_index
from squawq.report.files import REPORT

ID = "me/sharded"
LAYERS = 6
SMALL_FILES = 32_000  # bytes
Rows = list[list[int]]
RUN = """
# Imports everything once, then forks a child for every case. Each prints its error, and the most bytes and weight
# files on disk beside the result, looked at whenever a file was fetched. stop: the fetch to die after.
import json, os, sys
from pathlib import Path
import squawq
from squawq.errors import SquawqError
from squawq.hub.stream import HubShards
from squawq.quantization import pipeline
from transformers.models.llama import modeling_llama

repo, rows, cases = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
seen, fetch = [], HubShards._fetch

def looking(self, name):
    fetch(self, name)
    files = [p for top in (self.scratch, Path(os.environ["HF_HOME"])) for p in top.rglob("*") if p.is_file()]
    blobs = {os.path.realpath(p) for p in files}
    seen.append((sum(os.path.getsize(p) for p in blobs), sum(p.suffix == ".safetensors" for p in files)))
    if len(seen) == stop:
        os._exit(9)

HubShards._fetch = looking
config = squawq.QuantConfig(group_size=32, seqlen=32, samples=8, n_grid=2)
for out, how, stop in cases:
    child = os.fork()
    if child == 0:
        error = ""
        try:
            squawq.quantize(repo, out, config, calibration=rows, stream=how == "stream")
        except SquawqError as raised:
            error = str(raised)
        size, files = [max(column) for column in zip(*seen)] or [0, 0]
        print(json.dumps({"error": error, "fetched": len(seen), "bytes": size, "files": files}), flush=True)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        print(json.dumps({"error": "killed"}), flush=True)
"""


@pytest.fixture
def hub(make_model: MakeModel) -> Iterator[Hub]:
    """Six layers in eight files: the embedding, the layers, the norm with the head. One layer lies in two."""
    folder = make_model(num_hidden_layers=LAYERS, intermediate_size=256)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(LAYERS + 2)]
    for name, tensor in state.items():
        place = int(name.split(".")[2]) + 1 if ".layers." in name else 0 if "embed" in name else LAYERS + 1
        parts[3 if name == "model.layers.1.mlp.up_proj.weight" else place][name] = tensor
    for number, part in enumerate(parts, 1):
        save_file(part, folder / f"model-{number:05d}-of-{len(parts):05d}.safetensors", metadata={"format": "pt"})
    write_index(folder)
    with standin() as found:
        found.repos[ID] = Repository()
        found.repos[ID].branches["main"] = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
        yield found


def run(hub: Hub, home: Path, rows: Rows, *cases: tuple[Path, str, int]) -> list[dict[str, Any]]:
    """One quantization after another: (OUT, "stream" or "whole", the fetch to be killed after or 0)."""
    given = json.dumps([(str(out), how, stop) for out, how, stop in cases])
    done = programs.run(["-c", RUN, ID, json.dumps(rows), given], env=hub.environment(home))
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(cases), done.stderr
    return found


def test_two_files_at_a_time_give_what_the_whole_model_gives(hub: Hub, rows: Rows, tmp_path: Path) -> None:
    """Streamed, from the cache's whole model, and streamed again while the cache holds it."""
    home, out, whole, again = (tmp_path / name for name in ("home", "out", "whole", "again"))
    first, second, third = run(hub, home, rows, (out, "stream", 0), (whole, "whole", 0), (again, "stream", 0))
    assert [case["error"] for case in (first, second, third)] == ["", "", ""]
    sizes = sorted(len(c) for name, c in hub.repos[ID].branches["main"].items() if name.endswith(".safetensors"))
    assert first["files"] == 2
    assert first["bytes"] < sum(sizes[-2:]) + SMALL_FILES < sum(sizes) / 2
    assert (first["fetched"], third["fetched"]) == (len(sizes), 0)  # each file once
    assert not (tmp_path / "out.partial").exists()
    assert len({path.resolve() for path in home.rglob("*.safetensors")}) == len(sizes)  # nothing of the cache is gone
    assert settled(out) == settled(again)
    of_whole, streamed = settled(whole), settled(out)
    assert of_whole.pop(REPORT) != streamed.pop(REPORT)  # the source's identity is another for a folder
    assert streamed == of_whole


def test_killed_and_gone_on(hub: Hub, rows: Rows, tmp_path: Path) -> None:
    out, straight = tmp_path / "out", tmp_path / "straight"
    cases = (straight, "stream", 0), (out, "stream", 3), (out, "stream", 4), (out, "stream", 0)
    found = run(hub, tmp_path / "home", rows, *cases)
    assert [case["error"] for case in found] == ["", "killed", "killed", ""]
    assert found[-1]["files"] == 2
    assert settled(out) == settled(straight)


def test_a_file_that_arrives_damaged(hub: Hub, rows: Rows, tmp_path: Path) -> None:
    out, name = tmp_path / "out", f"model-00004-of-{LAYERS + 2:05d}.safetensors"
    hub.damages[name] = True
    damaged, again = run(hub, tmp_path / "home", rows, (out, "stream", 0), (out, "stream", 0))
    assert f"{ID}/{name}: did not arrive as the Hub has it; run the same again" in damaged["error"]
    assert again["error"] == ""


def test_a_model_that_changed_between_the_runs(hub: Hub, rows: Rows, tmp_path: Path) -> None:
    case = (tmp_path / "out", "stream", 6)
    assert run(hub, tmp_path / "home", rows, case)[0]["error"] == "killed"
    files, name = hub.repos[ID].branches["main"], f"model-00008-of-{LAYERS + 2:05d}.safetensors"
    files[name] = files[name][:-1] + b"\0"
    assert "holds an unfinished run with another source" in run(hub, tmp_path / "home", rows, case)[0]["error"]
    assert not (tmp_path / "out").exists()
