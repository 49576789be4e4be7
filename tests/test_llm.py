"""Generation: greedy text against transformers, sampling by its definition, limits and streams."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from squawq.demo import demo_model
from squawq.errors import ConfigError
from squawq.llm import LLM, SamplingParams, sample

CHAT = [{"role": "user", "content": "Tell me a story about a cat named Tom."}]
GREEDY = SamplingParams(max_tokens=40)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(demo_model())


def test_greedy_equals_transformers(llm: LLM) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32).eval()
    ids = llm.tokenizer.encode_chat(CHAT)
    expected = theirs.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, temperature=None, top_p=None)
    assert list(llm.generate_ids(ids, GREEDY)) == expected[0, len(ids) :].tolist()


def test_golden_text(llm: LLM) -> None:
    assert llm.chat(CHAT, GREEDY).startswith("Once upon a time, there was a cat named Tom. Tom loved to eat tuna.")


def test_stream_is_generate_in_pieces(llm: LLM) -> None:
    pieces = list(llm.stream("Once upon a time", GREEDY))
    assert len(pieces) > 10
    assert "".join(pieces) == llm.generate("Once upon a time", GREEDY)


def test_ends_at_a_stop_token(llm: LLM) -> None:
    text = llm.chat(CHAT, SamplingParams(max_tokens=1000))
    assert text.endswith(("again.", "after.", ".", "!"))
    assert len(llm.tokenizer.encode(text)) < 500
    assert "<|" not in text


def test_seed(llm: LLM) -> None:
    warm = SamplingParams(max_tokens=20, temperature=1.0, seed=7)
    assert llm.chat(CHAT, warm) == llm.chat(CHAT, warm)
    assert len({llm.chat(CHAT, SamplingParams(max_tokens=20, temperature=1.5, seed=s)) for s in range(4)}) > 1


def test_defaults_come_from_the_model(llm: LLM) -> None:
    defaults = llm.sampling_defaults()
    assert (defaults.temperature, defaults.top_p) == (0.6, 0.9)


def test_prompt_limits(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="5000 tokens; the model has 4096 positions"):
        llm.generate_ids([5] * 5000)
    with pytest.raises(ConfigError, match="empty"):
        llm.generate_ids([])


def draws(logits: list[float], count: int = 2000, **settings: float) -> Counter[int]:
    generator = torch.Generator().manual_seed(0)
    sampling = SamplingParams(**settings)  # type: ignore[arg-type]
    return Counter(sample(torch.tensor(logits), sampling, generator) for _ in range(count))


def test_sampling_follows_the_softmax() -> None:
    found = draws([0.0, 1.0, 2.0], temperature=2.0)
    expected = torch.tensor([0.0, 0.5, 1.0]).softmax(0)
    for token in range(3):
        assert found[token] / 2000 == pytest.approx(float(expected[token]), abs=0.05)


def test_top_k_and_top_p_cut_the_tail() -> None:
    assert set(draws([0.0, 1.0, 2.0, 3.0], temperature=5.0, top_k=2)) == {2, 3}
    assert set(draws([0.0, 0.0, 10.0], temperature=1.0, top_p=0.5)) == {2}
    assert set(draws([0.0, 0.1, 0.0], temperature=1.0, top_p=0.01)) == {1}
    assert set(draws([0.0, 5.0, 0.0])) == {1}


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"max_tokens": 0},
        {"top_k": -1},
        {"temperature": float("nan")},
    ],
)
def test_bad_settings(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        SamplingParams(**bad)  # type: ignore[arg-type]
