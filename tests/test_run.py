"""`squawq run`: what is run as it is, what is quantized first, what is used again, and what is refused unfetched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import programs
import pytest
from standin import Hub, Repository, standin

from squawq.demo import demo_model
from squawq.fitting import fitting

ID = "me/demo"
QUESTION = "Tell me a story.\n"
PROGRAM = """
import sys
from squawq import cli, fitting
from squawq.commands import run
from squawq.quant_config import QuantConfig
run.SETTINGS = QuantConfig(method="rtn")  # seconds
free, arguments = int(sys.argv[1]), sys.argv[2:]
if free:
    fitting.free_memory = lambda: free
sys.exit(cli.main(["run", *arguments, "--max-tokens", "8", "--threads", "1"]))
"""
NEEDED = fitting(demo_model(), "cpu")
DENSE, INT4 = (f"{form.needed / 1e6:.1f} MB" for form in (NEEDED.dense, NEEDED.int4))


def run(*arguments: str | Path, cache: Path, free: int = 0, hub: Hub | None = None) -> subprocess.CompletedProcess[str]:
    """`squawq run` of a question; free: bytes of memory that it finds."""
    before = {**os.environ, "HF_HUB_OFFLINE": "1"} if hub is None else hub.environment(cache / "hf")
    environment = {**before, "XDG_CACHE_HOME": str(cache)}
    return programs.run(["-c", PROGRAM, str(free), *arguments], env=environment, stdin=QUESTION)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with standin() as found:
        found.repos[ID] = Repository()
        files = {path.name: path.read_bytes() for path in demo_model().iterdir() if path.is_file()}
        found.repos[ID].branches["main"] = files
        yield found


def weights_fetched(hub: Hub) -> int:
    return sum(request.startswith("GET") and request.endswith("model.safetensors") for request in hub.requests)


def test_what_fits_runs_as_it_is(tmp_path: Path) -> None:
    done = run(demo_model(), cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"16-bit weights and 4,096 tokens need {DENSE}, and ")
    assert " are free (cpu): running it as it is\n" in done.stderr
    assert len(done.stdout.split()) > 4
    assert list(tmp_path.iterdir()) == []


def test_what_is_too_large_is_quantized_once(hub: Hub, tmp_path: Path) -> None:
    free = (NEEDED.dense.needed + NEEDED.int4.needed) // 2
    done = run(ID, cache=tmp_path, free=free, hub=hub)
    assert done.returncode == 0, done.stderr
    assert "are free (cpu): quantizing to INT4 (5.4 MB) first\n" in done.stderr
    assert len(done.stdout.split()) > 4
    assert weights_fetched(hub) == 1
    (made,) = (tmp_path / "squawq" / "quantized").iterdir()
    assert made.name.startswith("me--demo-")
    assert f"the INT4 copy is in {made}\n" in done.stderr
    assert json.loads((made / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
    for link in (tmp_path / "hf").rglob("model.safetensors"):
        link.unlink()  # the 16-bit weights are not needed again
    again = run(ID, cache=tmp_path, free=free, hub=hub)
    assert again.returncode == 0, again.stderr
    assert f"using the INT4 copy that was made earlier, {made}\n" in again.stderr
    assert len(again.stdout.split()) > 4
    assert weights_fetched(hub) == 1


def test_a_folder_that_changed_is_quantized_again(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo_model(), tmp_path / "model"))
    for copies in (1, 2):
        done = run(folder, "--quantize", cache=tmp_path / "cache")
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith("quantizing to INT4 (5.4 MB) first\n")
        assert len(list((tmp_path / "cache" / "squawq" / "quantized").iterdir())) == copies
        os.utime(folder / "model.safetensors", (1, copies))


def test_an_awq_model_runs_as_it_is(awq_demo: Path, tmp_path: Path) -> None:
    done = run(awq_demo, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("INT4 weights and 4,096 tokens need ")
    done = run(awq_demo, "--quantize", cache=tmp_path)
    assert done.returncode == 2
    assert "is quantized already; leave out --quantize" in done.stderr


def test_transformers_class_runs_it_if_asked(tmp_path: Path) -> None:
    done = run(demo_model(), "--model-impl", "transformers", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "runs on transformers' model class, which is slower than our decoder: model_impl is" in done.stderr
    assert len(done.stdout.split()) > 4


@pytest.mark.parametrize(
    ("change", "arguments", "free", "message"),
    [
        ({"model_type": "bert"}, [], 0, "model_type is 'bert'; squawq knows "),
        ({"quantization_config": {"quant_method": "hqq"}}, [], 0, "quant_method is 'hqq'"),
        ({}, [], 1000, f"me/demo in INT4 needs {INT4} with 4,096 tokens, and 0.0 MB are free (cpu)"),
        ({}, ["--no-quantize"], NEEDED.dense.needed - 1, f"me/demo in 16 bits needs {DENSE} with"),
        ({}, ["--device", "gpu"], 0, "device 'gpu' is not there"),
        ({"model_type": "exaone"}, ["--model-impl", "squawq"], 0, "our decoder does not run this model"),
        ({}, ["--model-impl", "transformers", "-tp", "2"], 0, "tensor_parallel_size is 2, but transformers' model"),
        ({}, ["--top-p", "2"], 1, "top_p is 2"),
        ({"tokenizer": None}, [], 0, "has no tokenizer.json"),
        ({"chat_template": None}, [], 0, "has no chat template"),
    ],
)
def test_what_cannot_run_is_not_fetched(
    change: dict[str, object], arguments: list[str], free: int, message: str, hub: Hub, tmp_path: Path
) -> None:
    files = hub.repos[ID].branches["main"]
    for name in ("tokenizer", "chat_template"):
        if name in change:
            for file in [file for file in files if file.startswith(name)]:
                del files[file]
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), **change}).encode()
    done = run(ID, *arguments, cache=tmp_path, free=free, hub=hub)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert weights_fetched(hub) == 0
    assert done.stdout == ""
