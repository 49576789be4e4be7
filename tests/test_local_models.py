"""`squawq models`: what it says of folders of each kind, whole and broken, and of the Hub's cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import programs
import pytest
from conftest import tiny_config
from huggingface_hub import snapshot_download
from standin import Repository, standin

from squawq.demo import demo_model
from squawq.local_models import describe

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def folder(at: Path, config: dict[str, Any] | str, *files: str) -> Path:
    """A model folder with these weight files, which are empty."""
    at.mkdir(parents=True)
    (at / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for file in files:
        (at / file).touch()
    return at


def test_what_runs_a_model(awq_demo: Path) -> None:
    found = describe("demo", demo_model())
    assert (found.name, found.family, found.format, found.bytes) == ("demo", "llama", "bfloat16", 14_696_792)
    assert (found.runs_in, found.note, found.broken) == (("squawq", "transformers"), "", False)
    found = describe("awq", awq_demo)
    assert (found.format, found.runs_in) == ("AWQ INT4 g128", ("squawq", "transformers", "vLLM", "TGI"))


@pytest.mark.parametrize(
    ("config", "file", "form", "runs_in", "note"),
    [
        ({"quantization_config": GPTQ}, "model.safetensors", "GPTQ INT4 g128", ("squawq", "transformers", "vLLM"), ""),
        (
            {"quantization_config": PACKED},
            "model.safetensors",
            f"compressed-tensors {PACKED['format']}",
            (),
            "no config_groups",
        ),
        ({"model_type": "gemma3_text"}, "model.safetensors", "float32", ("squawq", "transformers"), ""),
        ({"model_type": "bert"}, "model.safetensors", "float32", (), "does not know the family bert"),
        ({}, "pytorch_model.bin", "float32", (), "weights are .bin, not safetensors"),
    ],
)
def test_other_formats_and_families(
    config: dict[str, Any], file: str, form: str, runs_in: tuple[str, ...], note: str, tmp_path: Path
) -> None:
    found = describe("m", folder(tmp_path / "m", {**tiny_config(), **config}, file))
    assert (found.format, found.runs_in, found.broken) == (form, runs_in, False)
    assert note in found.note


def test_broken_folders_are_listed(tmp_path: Path) -> None:
    def broken(name: str, config: dict[str, Any] | str, *files: str) -> str:
        found = describe(name, folder(tmp_path / name, config, *files))
        assert found.broken
        return found.note

    assert "cannot be read as JSON" in broken("json", "{", "model.safetensors")
    assert broken("empty", tiny_config()) == "has no weights"
    (folder(tmp_path / "part", tiny_config(), "a.safetensors") / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})
    )
    assert describe("part", tmp_path / "part").note == "1 of its files are missing, such as b.safetensors"


def listed(*arguments: str | Path, cwd: Path, **variables: str) -> list[dict[str, Any]]:
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(cwd / "nothing"),
        "XDG_CACHE_HOME": str(cwd / "cache"),
        **variables,
    }
    done = programs.run(["-W", "error", "-m", "squawq", "models", *arguments, "--json"], env=environment, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_folders_are_searched_two_levels_deep(tmp_path: Path) -> None:
    folder(tmp_path / "here" / "a", tiny_config(), "model.safetensors")
    folder(tmp_path / "here" / "b" / "c", "{", "model.safetensors")
    folder(tmp_path / "here" / "b" / "d" / "too deep", tiny_config(), "model.safetensors")
    folder(tmp_path / "here" / ".hidden", tiny_config(), "model.safetensors")
    folder(tmp_path / "here" / "a web page", '{"name": "no model"}')
    (tmp_path / "here" / "b" / "q4.gguf").write_bytes(b"GGUF")
    (tmp_path / "here" / "loop").symlink_to(tmp_path / "here")
    kept = folder(tmp_path / "cache" / "squawq" / "quantized" / "made", tiny_config(), "model.safetensors")
    rows = listed(cwd=tmp_path / "here", XDG_CACHE_HOME=str(tmp_path / "cache"))
    rows = [row for row in rows if not row["name"].startswith("loop/")]
    assert [row["name"] for row in rows] == [str(kept), "a", "b/q4.gguf", "b/c"]
    assert [row["broken"] for row in rows] == [False, False, False, True]
    assert rows[2]["format"] == "GGUF"
    assert [row["name"] for row in listed("a", cwd=tmp_path / "here")] == ["a"]


def test_the_hubs_cache_is_listed_and_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub"
    with standin() as hub:
        hub.repos["me/demo"] = Repository()
        files = {path.name: path.read_bytes() for path in demo_model().iterdir() if path.is_file()}
        hub.repos["me/demo"].branches["main"] = files
        for patterns in (["*.json"], None):  # first in part, then the rest
            snapshot_download(
                "me/demo", cache_dir=cache, allow_patterns=patterns, endpoint=hub.endpoint, token="hf_standin"
            )
            rows = listed(cwd=tmp_path, HF_HUB_CACHE=str(cache))
            assert [row["name"] for row in rows] == ["me/demo"]
            assert rows[0]["broken"] == (patterns is not None)
    assert rows[0]["runs_in"] == ["squawq", "transformers"]
    assert rows[0]["bytes"] == len(files["model.safetensors"])
    card = cache / "models--me--card" / "snapshots" / "01"  # the card alone, as huggingface_hub's RepoCard leaves it
    card.mkdir(parents=True)
    (card / "README.md").write_text("# A card\n")
    (cache / "models--me--damaged").mkdir()
    broken, _ = listed(cwd=tmp_path, HF_HUB_CACHE=str(cache))
    assert (broken["name"], broken["broken"]) == ("me/damaged", True)
    shutil.copytree(demo_model(), tmp_path / "media")
    assert completed("squawq chat me", HF_HUB_CACHE=str(cache), cwd=tmp_path) == [
        "me/card",
        "me/damaged",
        "me/demo",
        "media",
    ]
    assert completed("squawq serve ./me", HF_HUB_CACHE=str(cache), cwd=tmp_path) == ["./media"]
    launcher = "text-generation-launcher --model-id me/de"
    assert completed(launcher, HF_HUB_CACHE=str(cache), cwd=tmp_path) == ["me/demo"]


def completed(line: str, cwd: Path | None = None, **variables: str) -> list[str]:
    """What the shell is given to complete the last word of a line."""
    program = line.split(" ")[0]
    module = "squawq" if program == "squawq" else "squawq.serve.tgi_launcher"
    asked = {f"_{program.upper().replace('-', '_')}_COMPLETE": "complete_bash", "COMP_WORDS": line}
    environment = {**os.environ, **asked, "COMP_CWORD": str(line.count(" ")), **variables}
    done = programs.run(["-m", module], env=environment, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("squawq mod", ["models"]),
        ("squawq quantize M OUT --method ", ["squawq", "awq", "rtn"]),
        ("squawq chat M --device c", ["cpu", "cuda"]),
        ("squawq quantize M OUT --device m", ["mps"]),
        ("squawq export M OUT --format ", ["awq", "gptq", "compressed-tensors", "gguf", "dense"]),
        ("squawq serve M --log-format ", ["text", "json"]),
        ("squawq serve M --device a", ["auto"]),
        ("squawq serve M --generation-config ", ["auto", "vllm"]),
        ("squawq serve M --max-model-len ", []),
        ("text-generation-launcher --dtype ", ["float16", "bfloat16"]),
        ("text-generation-launcher --quant", ["--quantize"]),
    ],
)
def test_the_shell_completes(line: str, values: list[str]) -> None:
    assert completed(line) == values


def test_listing_and_completing_import_no_torch() -> None:
    code = (
        "import sys; from squawq import cli; from squawq.local_models import complete, local_models; "
        "from pathlib import Path; complete('a'); local_models([Path('.')]); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=demo_model().parent).returncode == 0
