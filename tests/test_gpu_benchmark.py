"""benchmarks/gpu.py without a GPU: its tables and plot, its driver, the models that it makes, and what it compares."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from squawq.backends.sampling import Chunk
from squawq.engine.config import EngineConfig
from squawq.engine.request import SamplingParams
from squawq.engine.runner import DecoderRunner
from squawq.nn.loader import load

STREAM = {
    "streams": 64,
    "prompt": 128,
    "new_tokens": 100,
    "sampled": True,
    "first_token_s": 0.5,
    "decode_tok_s": 12345.6,
    "all_in_tok_s": 9876.5,
    "step_ms": 5.25,
    "graph_ms": 5.0,
    "unhidden_ms": 0.25,
}


def product(out: int, in_: int, rows: int) -> dict[str, Any]:
    peers = {"Marlin (vLLM)": "ModuleNotFoundError: No module named 'vllm'", "Humming": 9.25}
    return {
        "out": out,
        "in_": in_,
        "rows": rows,
        "kernel": 6.25 * rows,
        "whole": 250.0,
        "fp16": 16.0,
        "share": 0.5,
        "error": rows / 1e5,
        "peers": peers,
    }


RESULTS: dict[str, list[dict[str, Any]]] = {
    "ceilings": [{"copy_gb_s": 4225.4, "bf16_tflops": 745.2, "fp16_tflops": 740.0}],
    "products": [product(6144, 4096, 1), product(6144, 4096, 64), product(4096, 14336, 1)],
    "load": [{"read_s": 1.25, "load_s": 4.0, "ready_s": 3.5, "host_peak_bytes": 2**31, "card_peak_bytes": 2**33}],
    "streams": [STREAM, {**STREAM, "sampled": False}],
    "graphs": [{"streams": 1, "graph_ms": 2.13}, {"streams": 256, "graph_ms": 14.4}],
    "prefill": [{"tokens": 4096, "step_ms": 100.0, "matmul_ms": 75.0, "share": 0.75}],
    "large": [{"weight_bytes": 38 * 2**30, "stream": {**STREAM, "streams": 1}}],
    "invariance": [{"how": "among 256 sequences", "same": 20, "sequences": 21, "differ": ["3: 16 tokens"]}],
    "warm_up": [{"load_s": 5.0, "prompt_s": 11.0, "decode_s": 12.0, "crowd_s": 13.0, "again_s": 0.0125}],
}


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


@pytest.fixture
def found() -> dict[str, Any]:
    parts = {name: {"results": results, "seconds": 1.0, "problem": ""} for name, results in RESULTS.items()}
    parts["products"]["results"] = [*RESULTS["products"], product(6144, 4096, 999)]
    parts["graphs"]["problem"] = "stopped after 26 s"
    parts["large"] = {"results": [], "seconds": 1.0, "problem": "OutOfMemoryError: too large"}
    return {"gpu": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "squawq": "0.1.0", "parts": parts}


def test_every_part_has_a_table(found: dict[str, Any]) -> None:
    from gpu import PARTS
    from gpu_report import failures, markdown

    assert list(RESULTS.keys() - PARTS.keys()) == list(PARTS.keys() - RESULTS.keys()) == []
    text = markdown(found)
    assert text.startswith("NVIDIA H200, torch 2.11, triton 3.6, squawq 0.1.0.\n")
    for line in (
        "| copy bandwidth, read and written | 4,225 GB/s |",
        "| out x in | 1 | 64 | 999 |",
        "| 6144 x 4096 | 6.2 | 400 | 6244 |",
        "| 4096 x 14336 | 6.2 |  |  |",
        "Humming, microseconds",
        "| Marlin (vLLM) | ModuleNotFoundError: No module named 'vllm' |",
        "| 6144 x 4096, 999 rows | 1.0e-02 |",
        "| 64, sampled | 128, 100 | 0.500 | 12,346 | 9,876 | 5.25 | 5.00 | 0.25 |",
        "| milliseconds | 2.13 | 14.40 |",
        "| 4,096 tokens | 100.0 | 75.0 | 0.75 |",
        "| among 256 sequences | 20 of 21 | 3: 16 tokens |",
        "| both | 23.0 s |",
        "| large | OutOfMemoryError: too large |",
        "| graphs | stopped after 26 s |",
    ):
        assert line in text
    assert failures(found) == [
        "graphs: stopped after 26 s",
        "large: OutOfMemoryError: too large",
        "products: wrong results of 6144 x 4096, 999 rows",
        "invariance: other bits among 256 sequences: 3: 16 tokens",
    ]
    found["parts"]["large"] = {"results": RESULTS["large"], "problem": ""}
    assert "70B through the engine; its weights take 38.0 GiB" in markdown(found)


def test_a_result_in_a_line() -> None:
    from gpu_report import brief

    text = brief(product(6144, 4096, 1))
    assert text == "out 6144, in_ 4096, rows 1, kernel 6.25, whole 250, fp16 16, share 0.5, error 1e-05, Humming 9.25"


def test_the_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU."""
    pytest.importorskip("triton")
    import gpu_child
    from checkpoints import Shape
    from gpu_models import Models, WarmUp

    folder = Models(tmp_path, Shape(layers=1, hidden=256, inner=512, heads=4, kv_heads=2, vocab=1024)).folder
    monkeypatch.setattr(gpu_child, "CONFIG", EngineConfig(kv_tokens=16384, prefix_caching=False))
    assert gpu_child.read_files(folder) > 0
    found = WarmUp(**gpu_child.warm_up(folder))
    assert min(found.load_s, found.prompt_s, found.decode_s, found.crowd_s, found.again_s) > 0


def test_roofline(found: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from gpu_report import plot

    plot(found, tmp_path / "roofline.svg")
    assert "<svg" in (tmp_path / "roofline.svg").read_text()
    found["parts"]["products"]["results"] = []
    with pytest.raises(ValueError, match="ceilings and products"):
        plot(found, tmp_path / "none.svg")


def test_a_part_that_fails_or_takes_too_long_keeps_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    import gpu

    @dataclass(frozen=True)
    class Result:
        value: int

    def part(name: str, models: object) -> Iterator[Result]:
        yield Result(1)
        yield Result(2)
        raise ValueError("broken")

    monkeypatch.setattr(gpu.Part, "run", lambda self, name, models: part(name, models))
    later = time.monotonic() + 60
    failed = gpu.measure("x", gpu.Part("m", 60), None, later)
    assert failed["results"] == [{"value": 1}, {"value": 2}]
    assert failed["problem"] == "ValueError: broken"
    stopped = gpu.measure("x", gpu.Part("m", -1), None, later)
    assert stopped["results"] == [{"value": 1}]
    assert stopped["problem"].startswith("stopped after")
    assert "no time was left" in gpu.measure("x", gpu.Part("m", 60), None, time.monotonic() - 1)["problem"]
    json.dumps([failed, stopped])


def test_shapes_are_those_of_the_models() -> None:
    pytest.importorskip("triton")
    from gpu_kernels import SHAPES
    from gpu_models import LARGE, SMALL, fused_shapes

    assert list(SHAPES) == [*fused_shapes(SMALL).values(), *fused_shapes(LARGE).values()]


def finite(runner: DecoderRunner) -> None:
    (found,) = runner.run([Chunk(list(range(20)), 0, [3, 1], 20)])
    assert torch.isfinite(torch.from_numpy(found)).all()
    assert found.std() > 0.5


def test_random_models(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from checkpoints import Shape
    from gpu_models import Models, bits, compared, random_decoder, serve

    shape = Shape(layers=2, hidden=256, inner=512, heads=4, kv_heads=2, vocab=1024)
    models = Models(tmp_path, shape)
    written = models.folder / "config.json"
    before = written.stat().st_mtime_ns
    assert Models(tmp_path, shape).folder == models.folder
    assert written.stat().st_mtime_ns == before
    runner = DecoderRunner(load(models.folder), kv_tokens=4096)
    finite(runner)
    finite(DecoderRunner(random_decoder(shape, "cpu"), kv_tokens=512))
    times = serve(runner, 3, 20, 5, SamplingParams(temperature=0.8, top_p=0.95))
    assert times.tokens == 15
    assert 8 <= times.decoded <= 12
    assert 0 < times.decode_began < times.ended
    assert {request: len(found) for request, found in bits(runner, compared(runner)[:2]).items()} == {
        "0: 1 tokens": 40,
        "1: 5 tokens": 40,
    }
    models.close()
    assert written.exists()


def test_invariance_counts_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    import gpu_models

    asked: list[int] = []

    def bits(runner: object, requests: list[Any], step_tokens: int = 4096) -> dict[str, list[tuple[int, float]]]:
        asked.append(len(requests))
        wrong = step_tokens == 700
        return {one.id: [(len(one.prompt), -1.0 - (wrong and len(one.prompt) == 900))] for one in requests}

    monkeypatch.setattr(gpu_models, "bits", bits)
    models: Any = SimpleNamespace(runner=SimpleNamespace(vocab_size=1024))
    found = list(gpu_models.invariance(models))
    assert [(one.same, one.sequences, one.differ) for one in found] == [
        (21, 21, ()),
        (21, 21, ()),
        (20, 21, ("16: 900 tokens",)),
    ]
    assert asked == [1] * 42 + [256, 121]
