"""benchmarks/quality.py --real: which rows it takes, its tables, and a whole run with a fake quantizer."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import MakeModel

from squawq.demo import demo_model
from squawq.evaluation.run import evaluate
from squawq.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from texts import Texts

STEP = 511


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


def packed(sources: dict[str, int], vocab: int = 10**6) -> dict[str, list[list[int]]]:
    """So many rows of 512 for each source; all begin with token 2, the others count up from 3."""
    found, token = {}, 0
    for name, rows in sources.items():
        found[name] = [[2, *(3 + (token + row * STEP + i) % (vocab - 3) for i in range(STEP))] for row in range(rows)]
        token += rows * STEP
    return found


@pytest.fixture
def texts() -> Texts:
    from texts import Texts

    return Texts.of_rows(packed({"wiki": 50, "built_in": 10, "maths": 20, "plays": 20, "stories": 20, "finnish": 20}))


def test_kinds_need_all_their_sources(texts: Texts) -> None:
    assert texts.first == (2,)
    assert texts.kinds() == ["built-in", "wiki", "mixture"]
    assert len(texts.streams["wiki"]) == 50 * STEP


def test_calibration_and_test_rows_are_apart(texts: Texts) -> None:
    for kind in ("wiki", "mixture"):
        drawn = [texts.calibration(kind, 20, seed) for seed in (0, 0, 1)]
        test = texts.test(kind, 14)
        assert drawn[0] == drawn[1] != drawn[2]
        assert len(test) == 14
        for rows in drawn:
            assert len(rows) == 20
            assert all(len(row) == 512 and row[0] == 2 for row in (*rows, *test))
            seen = {i for row in rows for i in row[1:]}
            assert len(seen) == 20 * STEP
            assert not seen & {i for row in test for i in row[1:]}
    every = texts.calibration("built-in", 128, 0)
    assert len(every) in (9, 10)


def test_test_rows_come_from_every_source_and_are_spread(texts: Texts) -> None:
    from texts import spread

    ends = {name: max(ids) for name, ids in texts.streams.items()}
    rows = texts.test("mixture", 8)
    assert [sum(row[1] <= ends[name] for row in rows) for name in ("maths", "plays", "stories")] == [3, 6, 8]
    assert spread([[i] for i in range(10)], 4) == [[0], [2], [5], [7]]
    assert spread([[1], [2]], 4) == [[1], [2]]


def test_without_a_token_that_begins_texts() -> None:
    from texts import Texts

    texts = Texts.of_rows({"wiki": [[i, *range(100, 100 + STEP)] for i in range(20)]})
    assert texts.first == ()
    assert len(texts.streams["wiki"]) == 20 * 512


def test_texts_by_a_tokenizer(tmp_path: Path) -> None:
    """Of the data folder's files only those that are there; the built-in set and code always are."""
    import texts

    (tmp_path / "wikitext2-valid").mkdir()
    (tmp_path / "wikitext2-valid" / "wiki.valid.raw").write_text("A long text. " * 3000)
    found = texts.sources(tmp_path)
    assert list(found) == ["built_in", "wiki", "code"]
    assert found["built_in"].startswith("system: ")
    assert "ArgumentParser" in found["code"]
    read = texts.Texts.of(demo_model(), tmp_path)
    assert read.kinds() == ["built-in", "wiki", "code"]
    tokenizer = Tokenizer(demo_model())
    assert tokenizer.decode(read.streams["wiki"]).strip().startswith("A long text. A long")
    assert [*read.first, *tokenizer.encode("a", special=False)] == tokenizer.encode("a")[: len(read.first) + 1]


def figures(kl: float, seconds: float = 10, kept: bool = False) -> dict[str, Any]:
    scores = {"kl_mean": kl, "kl_p99": 10 * kl, "top1_agreement": 0.8, "perplexity": 20 + kl}
    return {"seconds": seconds, "kept": kept, "tests": {"wiki": {**scores, "reference_perplexity": 20.0}}}


def test_table() -> None:
    from quality_real import Case, table

    measured = {
        Case("rounding", "none", 0): figures(0.5),
        Case("squawq", "wiki", 0): figures(0.1, 20.0),
        Case("squawq", "wiki", 1): figures(0.3, 30.0),
        Case("squawq", "self", 0): figures(0.2),
        Case("squawq", "self", 1): {"failed": "broken", "kept": False},
        Case("other", "wiki", 0): figures(0.2, kept=True),
        Case("AutoAWQ", "wiki", 0): {"failed": "TypeError: gemma|3 isn't supported yet.", "kept": False},
    }
    assert table("wiki", 96, measured).splitlines() == [
        "### wiki: 96 rows of 512 tokens; perplexity 20.00 in 16 bits",
        "",
        "| quantizer | calibration | KL, mean | KL, 99th percentile | top-1 | perplexity | seconds |",
        "|---|---|---:|---:|---:|---:|---:|",
        "| rounding | none | 0.5000 | 5.000 | 0.800 | 20.50 | 10.0 |",
        "| squawq | wiki | 0.2000 (0.1000 to 0.3000) | 2.000 (1.000 to 3.000) | 0.800 | 20.20 (20.10 to 20.30) "
        "| 25.0 (20.0 to 30.0) |",
        "| squawq | self | 0.2000 | 2.000 | 0.800 | 20.20 | 10.0 |",
        "| other | wiki | 0.2000 | 2.000 | 0.800 | 20.20 | 10.0\\* |",
        "| AutoAWQ | wiki | TypeError: gemma\\|3 isn't supported yet. |  |  |  |  |",
    ]
    failed = {case: found for case, found in measured.items() if "failed" in found}
    assert table("wiki", 96, failed).startswith("### wiki: 96 rows of 512 tokens\n")


def test_a_whole_run(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Quantizing is replaced by other weights; evaluating is real."""
    import quality_real
    from common import PeerFailed
    from texts import Texts

    model = make_model(max_position_embeddings=512)
    (model / "rows.json").write_text(json.dumps(packed({"wiki": 10, "built_in": 4}, vocab=160)))
    asked: list[tuple[str, int, dict[str, Any]]] = []

    def quantize(
        peer: str, python: str, model: Path, out: Path, rows: Path, settings: dict[str, Any], patience: float | None
    ) -> dict[str, Any]:
        asked.append((peer, len(json.loads(rows.read_text())), settings))
        if peer == "broken":
            raise PeerFailed(python, "Traceback\nTypeError: not this model\n\n")
        if peer == "slow":
            raise subprocess.TimeoutExpired(python, 9)
        make_model(name="other", seed=len(asked), max_position_embeddings=512).rename(out)
        return {"seconds": float(len(asked)), "peak_bytes": 1}

    monkeypatch.setattr(quality_real, "quantize_apart", quantize)
    quantizers: dict[str, tuple[str, dict[str, Any]]] = {
        "rounding": ("squawq", {"method": "rtn"}),
        "squawq": ("squawq", {}),
        "Peer": ("peer", {}),
        "Broken": ("broken", {}),
        "Slow": ("slow", {}),
    }
    args = Namespace(
        real=model,
        data=tmp_path,
        work=tmp_path / "work",
        rows=3,
        bits=4,
        device="cpu",
        seeds=2,
        calibrations=["built-in", "self"],
        tests=None,
        test_rows=2,
        patience=9.0,
        resume=False,
        fresh=False,
    )
    peers = dict.fromkeys(("squawq", "peer", "broken", "slow"), sys.executable)
    quality_real.measure_real(quantizers, list(quantizers), peers, args)
    shown = capsys.readouterr()
    rows = {tuple(line.split(" | ")[:2]): line for line in shown.out.splitlines() if line.startswith("| ")}
    assert "### wiki: 2 rows of 512 tokens; perplexity" in shown.out
    assert " to " in rows["| squawq", "self"]
    assert "(" not in rows["| rounding", "none"]
    assert "takes calibration text only, not 'self'" in rows["| Peer", "self"]
    assert "| TypeError: not this model |" in rows["| Broken", "built-in"]
    assert "| stopped after 9 s |" in rows["| Slow", "built-in"]
    told = [
        (rows, settings.get("calibration"), settings.get("seed")) for peer, rows, settings in asked if peer == "squawq"
    ]
    assert told == [(3, None, None)] * 3 + [(3, "self", 0), (3, "self", 1)]
    assert all(settings["device"] == "cpu" and settings["bits"] == 4 for _, _, settings in asked)
    (kept,) = args.work.glob("*/rounding-none-0.json")
    ids = [i for row in Texts.of(model, tmp_path).test("wiki", 2) for i in row]
    again = evaluate(
        make_model(name="other", seed=1, max_position_embeddings=512), model, ids=ids, window=512, stride=512
    )
    for name, score in json.loads(kept.read_text())["tests"]["wiki"].items():
        assert score == pytest.approx(again[name], rel=1e-6)
    before = len(asked)
    args.resume = True
    quality_real.measure_real(quantizers, ["rounding", "squawq", "Peer"], peers, args)
    assert len(asked) == before
    assert "of an earlier run" in capsys.readouterr().out


def test_a_peer_that_fails_ends_the_benchmark_with_its_errors(tmp_path: Path) -> None:
    from common import PeerFailed, quantize_apart

    with pytest.raises(PeerFailed, match=r"no\.json") as failed:
        quantize_apart("squawq", sys.executable, tmp_path / "none", tmp_path / "out", tmp_path / "no.json", {})
    assert "no.json" in failed.value.reason
    assert isinstance(failed.value, SystemExit)
