"""The face is enough: a backend written from `base.py` alone runs the demo model as the reference does."""

from __future__ import annotations

import pytest
import torch
from plain_backend import PlainBackend

from squawq.backends import BACKENDS
from squawq.backends.sampling import Chunk, Sampling, StepOutput
from squawq.demo import demo_model
from squawq.engine.request import SamplingParams
from squawq.engine.runner import DecoderRunner
from squawq.nn.loader import Options, load

MODEL = demo_model()


def test_it_runs_the_demo_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "plain", "plain_backend:PlainBackend")
    ids, found = list(range(5, 45)), []
    for name in ("plain", "reference"):
        decoder = load(MODEL, Options(backend=name))
        assert isinstance(decoder.backend, PlainBackend) == (name == "plain")
        runner = DecoderRunner(decoder, kv_tokens=128)
        table = list(range(2, 2 - (-len(ids) // runner.page_size)))
        chunks = Chunk(ids[:30], 0, table, 30), Chunk(ids[30:], 30, table, 10)
        found.append(torch.cat([torch.from_numpy(runner.run([chunk])[0]) for chunk in chunks]))
    assert torch.equal(found[0].argmax(-1), found[1].argmax(-1))
    assert torch.allclose(found[0], found[1], atol=1e-2)  # float32 pages beside float16 ones


def test_sampling_is_the_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the host by default; a backend that samples on its device replaces it."""
    decoder = load(MODEL, Options(backend="reference"))
    runner = DecoderRunner(decoder, kv_tokens=64)
    sampling = Sampling(SamplingParams(), [5, 6], [], seed=0, index=0, logprobs=0)
    runner.prepare(sampling)
    chunk = Chunk([5, 6], 0, [0], 1, sampling)
    (output,) = runner.start([chunk]).outputs()
    (logits,) = runner.run([chunk])
    assert output.token == logits[-1].argmax()
    assert output.logprob is not None
    assert output.logprob.logprob == pytest.approx(float(torch.from_numpy(logits[-1]).log_softmax(-1).max()), abs=1e-5)
    monkeypatch.setattr(decoder.backend, "sample", lambda _, batch: [StepOutput(7) for _ in batch])
    assert [found.token for found in runner.start([chunk, chunk]).outputs()] == [7, 7]
