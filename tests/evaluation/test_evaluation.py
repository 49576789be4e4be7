"""Perplexity and divergence, streamed layer by layer, against transformers' own logits computed at once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import MakeModel, shared_data
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import squawq
from squawq.demo import demo_model
from squawq.errors import CalibrationError, CheckpointError, ConfigError
from squawq.evaluation.metrics import Score, SlicedDivergence
from squawq.evaluation.plots import save_plot
from squawq.evaluation.run import evaluate, text_ids, windows_of
from squawq.quant_config import QuantConfig
from squawq.quantization.calibration import builtin_rows, read_text, split_documents
from squawq.text.tokenizer import Tokenizer


@settings(max_examples=80, deadline=None)
@given(length=st.integers(2, 300), window=st.integers(2, 40), stride=st.integers(1, 40))
def test_windows_score_every_token_once(length: int, window: int, stride: int) -> None:
    if stride > window or length < window:
        return
    cut = windows_of(list(range(length)), window, stride)
    scored = [i for n in range(len(cut.ids)) for i in (cut.ids[n, cut.scored(n)] + 1).tolist()]
    last = int(cut.ids[-1, -1])
    if stride == window:
        assert scored == [i for i in range(1, last + 1) if i % window]
    else:
        assert scored == list(range(1, last + 1))


def test_against_transformers(make_model: MakeModel) -> None:
    from transformers import AutoModelForCausalLM

    folder, twin = make_model(), make_model(name="twin", seed=1)
    ids = torch.randint(0, 160, (100,), generator=torch.Generator().manual_seed(3)).tolist()
    found = evaluate(twin, folder, ids=ids, window=32, stride=16)
    model, reference = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (twin, folder))
    loss, divergence, agreed = [], [], []
    for n, start in enumerate(range(0, 100 - 32 + 1, 16)):
        window = torch.tensor(ids[start : start + 32])
        with torch.no_grad():
            log_p, log_r = (m(window[None]).logits[0].double().log_softmax(-1) for m in (model, reference))
        for position in range(0 if n == 0 else 15, 31):
            loss.append(-float(log_p[position, window[position + 1]]))
            divergence.append(float((log_r[position].exp() * (log_r[position] - log_p[position])).sum()))
            agreed.append(bool(log_p[position].argmax() == log_r[position].argmax()))
    assert found["tokens"] == len(loss) == 95
    assert found["perplexity"] == pytest.approx(math.exp(sum(loss) / 95), rel=1e-4)
    assert found["kl_mean"] == pytest.approx(sum(divergence) / 95, rel=1e-4)
    assert found["kl_p99"] == pytest.approx(sorted(divergence)[math.ceil(0.99 * 95) - 1], rel=1e-3)
    assert found["top1_agreement"] == pytest.approx(sum(agreed) / 95)
    assert len(found["kl_by_position"]) == 31


def test_a_model_does_not_differ_from_itself(make_model: MakeModel) -> None:
    folder = make_model()
    found = evaluate(folder, folder, ids=list(range(100)), window=20)
    assert found["kl_mean"] < 1e-9
    assert found["top1_agreement"] == 1
    assert found["perplexity"] == found["reference_perplexity"]


def test_score_by_hand() -> None:
    score = Score()
    score.add(torch.tensor([[0.0, math.log(3)]]), torch.tensor([0]), torch.tensor([[0.0, 0.0]]))
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    summary = score.summary()
    assert summary["kl_mean"] == pytest.approx(expected)
    assert summary["perplexity"] == pytest.approx(4)


def test_percentile_by_rank() -> None:
    """Of 1 to n, the 99th percentile is ceil(0.99 n)."""
    for n, expected in ((1, 1), (99, 99), (100, 99), (101, 100), (1000, 990)):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
        score = Score(tokens=n, divergence=[order[: n // 3] + 1.0, order[n // 3 :] + 1.0])
        assert score.summary()["kl_p99"] == expected
        assert score.summary()["kl_mean"] == pytest.approx((n + 1) / 2)


def test_known_perplexity_of_babyllama() -> None:
    """2.544 in 32 bits and 2.647 by AutoAWQ: the figures that came with the data, measured elsewhere."""
    source, awq = shared_data("babyllama-tok361") / "hf-g128", shared_data("autoawq-babyllama")
    raw = (shared_data("tinystories-text") / "tinystories_train_2MiB.txt").read_bytes()[-120_000:]
    ids = Tokenizer(source).encode(raw.decode("utf-8", "ignore"))[:20_000]
    found = evaluate(awq, source, ids=ids, window=256, stride=256)
    assert found["reference_perplexity"] == pytest.approx(2.544, abs=5e-4)
    assert found["perplexity"] == pytest.approx(2.647, abs=6e-3)
    assert found["kl_mean"] == pytest.approx(0.0428, abs=1e-3)


def test_demo_model_has_not_changed() -> None:
    """The demo model's perplexity on its held-back stories."""
    found = evaluate(demo_model(), text=demo_model() / "held_back.txt", window=256, stride=256, max_tokens=4096)
    assert found["perplexity"] == pytest.approx(DEMO_PERPLEXITY, rel=2e-3)


DEMO_PERPLEXITY = 18.8075


def test_builtin_text_is_apart_from_the_calibration_set() -> None:
    tokenizer = Tokenizer(demo_model())
    assert len(text_ids(tokenizer, None)) > 8000
    calibration = {
        line for row in builtin_rows() if isinstance(row, str) for line in row.splitlines() if len(line) > 30
    }
    path = Path(squawq.__file__).parent / "evaluation_data" / "evaluation.txt"
    lines = [line for text in split_documents(read_text(path)) for line in text.splitlines() if len(line) > 30]
    assert len(lines) > 50
    assert not calibration.intersection(lines)


def test_misuse(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model()
    ids = list(range(100))
    with pytest.raises(ConfigError, match="stride 30"):
        evaluate(folder, ids=ids, window=20, stride=30)
    with pytest.raises(ConfigError, match="the model has 256 positions"):
        evaluate(folder, ids=ids, window=300)
    with pytest.raises(CalibrationError, match="100 tokens of text are read; at least 128"):
        evaluate(folder, ids=ids, window=128)
    with pytest.raises(CalibrationError, match="outside 0 to 159"):
        evaluate(folder, ids=[400] * 50, window=20)
    with pytest.raises(CalibrationError, match=r"none\.txt' cannot be read"):
        evaluate(demo_model(), text=tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="differ in vocabulary: 160 and 4096"):
        evaluate(folder, demo_model(), ids=ids)


def test_plot(make_model: MakeModel, rows: list[list[int]], tmp_path: Path) -> None:
    folder = make_model()
    report = squawq.quantize(
        folder, tmp_path / "out", QuantConfig(group_size=32, samples=8, seqlen=32), calibration=rows
    )
    scores = evaluate(tmp_path / "out", folder, ids=[i for row in rows for i in row], window=32)
    save_plot(tmp_path / "full.png", report, scores)
    save_plot(tmp_path / "empty.png", None, {k: v for k, v in scores.items() if not k.startswith("kl")})
    full, empty = (tmp_path / name for name in ("full.png", "empty.png"))
    assert full.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert full.stat().st_size > empty.stat().st_size > 1000
    assert json.loads((tmp_path / "out" / "squawq_report.json").read_text()) == report
    save_plot(tmp_path / "exported.png", {"format": "dense"}, scores)  # of a folder that had no report
    with pytest.raises(CheckpointError, match="not as squawq quantize writes it: layers"):
        save_plot(tmp_path / "bad.png", {**report, "layers": [{"name": "a"}]}, scores)


@pytest.mark.parametrize(("factor", "message"), [(1e38, "logits are not finite"), (1e6, "nats a token")])
def test_a_broken_reference_is_named(make_model: MakeModel, tmp_path: Path, factor: float, message: str) -> None:
    """JSON has no infinity: scores that are not finite were a traceback at the end."""
    model, broken = make_model(), make_model(name="broken")
    state = load_file(broken / "model.safetensors")
    state["lm_head.weight"][:] *= factor
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"broken: .*{message}"):
        evaluate(model, broken, ids=list(range(2, 66)), window=32)


@pytest.mark.parametrize("size", [1, 7, 50, 64])
def test_divergence_by_slices_is_that_of_whole_rows(size: int) -> None:
    both = torch.randn(2, 9, 50, generator=torch.Generator().manual_seed(2)) * 4
    both[1] = both[0] + both[1] / 8
    both[:, 3] -= 30
    both[:, 4, 10:] = both[:, 4, :1]  # ties, in both models
    whole, sums = Score(), SlicedDivergence(9, "cpu")
    whole.add(both[1], torch.zeros(9, dtype=torch.int64), both[0])
    for part in torch.split(both, size, -1):
        sums.add(part)
    kl, agreement = sums.result()
    assert kl == pytest.approx(whole.summary()["kl_mean"], abs=1e-5)
    assert agreement == pytest.approx(whole.summary()["top1_agreement"])
    both[1, 5, 20] = float("nan")
    sums = SlicedDivergence(9, "cpu")
    for part in torch.split(both, size, -1):
        sums.add(part)
    assert math.isnan(sums.result()[0])
