"""Sampling by its definition: against a plain program that sorts everything, and by hand."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from squawq.backends.sampling import NoTokenError, Sampler, draw, token_logprob
from squawq.engine.request import SamplingParams

Row = NDArray[np.float32]


def row(*values: float) -> Row:
    return np.array(values, dtype=np.float32)


def plain(logits: Row, params: SamplingParams, uniform: float) -> int:
    """The definition, with everything sorted and Python's own sums."""
    scaled = (logits - logits.max()) / np.float32(params.temperature)
    weights = np.exp(scaled)
    order = sorted((i for i in range(len(logits)) if logits[i] > -math.inf), key=lambda i: (-scaled[i], i))
    total = float(weights.sum(dtype=np.float64))
    if params.top_k:
        order = order[: params.top_k]
        total = float(weights[order].sum(dtype=np.float64))
    if params.typical_p < 1:
        pool = order if params.top_k else list(range(len(logits)))
        products = weights[pool] * np.where(weights[pool] > 0, scaled[pool], np.float32(0))
        mean = float(products.sum(dtype=np.float64)) / total
        kept = typical([abs(mean - float(scaled[i])) for i in order], weights[order], params.typical_p * total)
        order = [token for place, token in enumerate(order) if place in kept]
        total = float(weights[order].sum(dtype=np.float64))
    if params.top_p < 1:
        mass, count = 0.0, 0
        while count < len(order) and mass < params.top_p * total:
            mass += float(weights[order[count]])
            count += 1
        order, total = order[:count], mass
    if params.min_p:
        order = [i for i in order if weights[i] >= np.float32(params.min_p) * weights[order[0]]]
        total = sum(float(weights[i]) for i in order)
    mass = 0.0
    for token in order:
        mass += float(weights[token])
        if mass > uniform * total:
            return token
    return order[-1]


def typical(distances: list[float], weights: Row, wanted: float) -> set[int]:
    """Places nearest to the entropy. log p is the scaled logit less a constant, so information less entropy, which is
    its mean, is the mean scaled logit less the token's."""
    mass, kept = 0.0, set()
    for place in sorted(range(len(weights)), key=lambda i: (distances[i], i)):
        if mass >= wanted:
            break
        kept.add(place)
        mass += float(weights[place])
    return kept


@st.composite
def rows(draw_from: st.DrawFn) -> Row:
    size = draw_from(st.sampled_from([1, 2, 50, 3000]))
    generator = np.random.default_rng(draw_from(st.integers(0, 2**32)))
    logits = generator.normal(0, draw_from(st.sampled_from([0.0, 0.1, 3.0, 30.0])), size).astype(np.float32)
    if draw_from(st.booleans()):
        logits = np.round(logits)  # many ties
    if size > 1 and draw_from(st.booleans()):
        logits[generator.random(size) < 0.5] = -np.inf
        logits[draw_from(st.integers(0, size - 1))] = 1.0
    return logits


shares = st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])


@settings(max_examples=400, deadline=None)
@given(
    rows(),
    st.sampled_from([1e-5, 0.3, 1.0, 2.0, 100.0]),
    st.sampled_from([0, 0, 1, 2, 40, 5000]),
    shares,
    shares,
    st.sampled_from([0.0, 0.0, 1e-9, 0.05, 0.5, 1.0]),
    st.floats(0, 1, exclude_max=True),
)
def test_draw_equals_the_definition(
    logits: Row, temperature: float, top_k: int, top_p: float, typical_p: float, min_p: float, uniform: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, typical_p=typical_p, min_p=min_p)
    with np.errstate(over="ignore"):
        assert draw(logits, params, uniform) == plain(logits, params, uniform)


@pytest.mark.parametrize("min_p", [1e-12, 1e-9, 1e-4])
def test_min_p_alone_is_scaled_by_all_that_it_leaves(min_p: float) -> None:
    logits = np.linspace(0, 12, 300).astype(np.float32)
    params = SamplingParams(temperature=1.0, min_p=min_p)
    for uniform in np.linspace(0, 0.99, 20):
        assert draw(logits, params, float(uniform)) == plain(logits, params, float(uniform))


@pytest.mark.parametrize("depth", [2.0, 4.0, 6.0, 9.0])
@pytest.mark.parametrize("change", [-1e-6, 1e-6])
def test_as_much_is_sorted_as_the_outcome_needs(depth: float, change: float) -> None:
    logits = row(0, 0.01 - depth, -0.01 - depth, -0.02 - depth)
    weights = np.exp(logits.astype(np.float64))
    params = SamplingParams(temperature=1.0, top_p=float(weights[:2].sum() / weights.sum()) + change)
    assert draw(logits, params, 1 - 1e-9) == (1 if change < 0 else 2)


@settings(max_examples=100, deadline=None)
@given(rows(), st.integers(0, 20), st.data())
def test_logprobs_are_the_raw_models(logits: Row, top: int, data: st.DataObject) -> None:
    finite = np.flatnonzero(np.isfinite(logits))
    token = int(data.draw(st.sampled_from(finite.tolist())))
    found = token_logprob(logits, token, top)
    exact = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
    assert found.logprob == pytest.approx(exact[token], abs=1e-4)  # float32 weights: 1e-7 of each, 3000 of them
    order = sorted(finite.tolist(), key=lambda i: (-logits[i], i))[:top]
    assert [i for i, _ in found.top] == order
    assert [p for _, p in found.top] == pytest.approx([exact[i] for i in order], abs=1e-4)


def choices(settings: dict[str, object], logits: Row, count: int, prompt: tuple[int, ...] = ()) -> list[int]:
    sampler = Sampler(SamplingParams(**settings), prompt, [0], 0, 0)  # type: ignore[arg-type]
    return [sampler.choose(logits) for _ in range(count)]


def test_draws_follow_the_softmax() -> None:
    found = Counter(choices({"temperature": 2.0}, row(0.0, 1.0, 2.0), 3000))
    shares = np.exp([0.0, 0.5, 1.0]) / np.exp([0.0, 0.5, 1.0]).sum()
    for token in range(3):
        assert found[token] / 3000 == pytest.approx(shares[token], abs=0.04)  # four standard deviations


def test_top_k_top_p_and_min_p_cut_the_tail() -> None:
    warm: dict[str, object] = {"temperature": 1.0}
    assert set(choices({**warm, "top_k": 2}, row(0, 0.1, 0.2, 0.3), 200)) == {2, 3}
    assert set(choices({**warm, "top_p": 0.01}, row(0, 0.1, 0), 50)) == {1}
    assert set(choices({**warm, "min_p": 0.9}, row(0, 0.01, 1), 50)) == {2}
    assert set(choices({}, row(0, 5, 0), 5)) == {1}


def test_typical_p_prefers_information_near_the_entropy() -> None:
    probabilities = np.array([0.6, 0.2, 0.1, 0.1])  # entropy 1.09 nats; information 0.51, 1.61, 2.30, 2.30
    logits = np.log(probabilities).astype(np.float32)
    assert set(choices({"temperature": 1.0, "typical_p": 0.15}, logits, 50)) == {1}
    assert set(choices({"temperature": 1.0, "typical_p": 0.7}, logits, 200)) == {0, 1}


def test_penalties() -> None:
    assert choices({"presence_penalty": 1.0}, row(0, 3, 2.5), 4) == [1, 2, 1, 1]
    assert choices({"frequency_penalty": 1.0}, row(0, 3, 2.5), 5) == [1, 2, 1, 2, 1]
    assert choices({"repetition_penalty": 2.0}, row(0, 3, 2.5), 3) == [1, 2, 1]
    assert choices({"repetition_penalty": 2.0}, row(-9, 3, 2.5), 1, prompt=(1,)) == [2]
    assert choices({"repetition_penalty": 2.0}, row(-4, -3, -5), 2) == [1, 0]
    assert choices({"frequency_penalty": 1.0}, row(0, 3, 2.5), 1, prompt=(1,)) == [1]


def test_penalties_over_many_ids() -> None:
    logits = np.linspace(1, 0, 500).astype(np.float32)
    assert choices({"presence_penalty": 2.0}, logits, 300) == list(range(300))


def test_bias_min_tokens_and_mask() -> None:
    assert choices({"logit_bias": {2: 10.0}}, row(0, 3, 2.5), 1) == [2]
    assert choices({"min_tokens": 2}, row(9, 3, 2.5), 3) == [1, 1, 0]
    sampler = Sampler(SamplingParams(min_tokens=5), (), [0], 0, 0)
    logits = row(9, 3, 2.5)
    assert sampler.choose(logits, np.array([True, False, True])) == 2
    assert sampler.choose(logits, np.array([True, False, False]), complete=True) == 0
    assert logits.tolist() == [9, 3, 2.5]


def left(size: int, params: SamplingParams, output: list[int], ending: int) -> set[int]:
    """The tokens that may be chosen after an output, by the settings' definition."""
    tokens = set(range(size) if params.allowed_ids is None else params.allowed_ids)
    for *before, last in params.bad_ids:
        if output[max(0, len(output) - len(before)) :] == before:
            tokens.discard(last)
    return tokens - {ending} if len(output) < params.min_tokens else tokens


small = st.integers(0, 4)


@settings(max_examples=300, deadline=None)
@given(
    st.none() | st.lists(small, min_size=1, max_size=8),
    st.lists(st.lists(small, min_size=1, max_size=4), max_size=6),
    st.sampled_from([0.0, 1.0, 5.0]),
    st.integers(0, 5),
    st.integers(0, 1000),
)
def test_only_what_is_left_is_chosen_as_if_it_were_all(
    allowed: list[int] | None, bad: list[list[int]], temperature: float, min_tokens: int, seed: int
) -> None:
    params = SamplingParams(
        allowed_ids=allowed, bad_ids=bad, temperature=temperature, min_tokens=min_tokens, top_k=3, presence_penalty=0.5
    )
    plain_params = SamplingParams(temperature=temperature, top_k=3, presence_penalty=0.5)
    sampler, reference = (Sampler(p, (2, 2), [0], seed, 0) for p in (params, plain_params))
    generator, output = np.random.default_rng(seed), list[int]()
    for _ in range(30):
        logits = generator.normal(0, 1, 5).astype(np.float32)
        tokens = left(5, params, output, 0)
        mask = np.isin(np.arange(5), list(tokens))
        if not tokens:
            with pytest.raises(NoTokenError, match="forbidden"):
                sampler.choose(logits)
            return
        output.append(sampler.choose(logits))
        assert output[-1] in tokens
        assert output[-1] == reference.choose(logits, mask)


def test_bad_ids_look_at_the_output_alone() -> None:
    logits = row(0, 3, 2.5)
    assert choices({"bad_ids": [[1, 1]]}, logits, 4, prompt=(1,)) == [1, 2, 1, 2]
    assert choices({"bad_ids": [[1, 1, 2], [1, 1, 1], [1]]}, logits, 3) == [2, 2, 2]
    long = [1] * 63
    assert choices({"bad_ids": [[*long, 1]]}, logits, 65) == [*long, 2, 1]


def test_allowed_ids_and_bad_ids_beside_other_settings() -> None:
    assert choices({"allowed_ids": [2, 2]}, row(9, 3, 2.5), 3) == [2, 2, 2]  # the end, 0, is not among them
    assert choices({"allowed_ids": [0, 2], "min_tokens": 1}, row(9, 3, 2.5), 2) == [2, 0]
    assert choices({"allowed_ids": [2], "logit_bias": {2: -100.0}, "repetition_penalty": 9.0}, row(9, 3, 2), 2) == [
        2,
        2,
    ]
    assert choices({"allowed_ids": [1, 2], "bad_ids": [[1]]}, row(9, 3, 2.5), 1) == [2]
    sampler = Sampler(SamplingParams(allowed_ids=[1], bad_ids=[[0]]), (), [0], 0, 0)
    assert sampler.choose(row(9, 3, 2.5), np.array([True, True, True])) == 1
    assert sampler.choose(row(9, 3, 2.5), np.array([True, False, False]), complete=True) == 0
    with pytest.raises(NoTokenError, match="forbidden"):
        sampler.choose(row(9, 3, 2.5), np.array([True, False, True]))


def test_streams_of_random_numbers() -> None:
    def run(seed: int, index: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0), (), [], seed, index)
        return [sampler.choose(np.zeros(1000, dtype=np.float32)) for _ in range(5)]

    assert run(1, 0) == run(1, 0)
    assert len({tuple(run(seed, index)) for seed in range(3) for index in range(3)}) == 9


@pytest.mark.parametrize("bad", [row(math.nan, 1), row(1, math.nan), row(-math.inf, -math.inf), row(1, math.inf)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_to_choose(bad: Row, temperature: float) -> None:
    with pytest.raises(NoTokenError, match="not finite"):
        Sampler(SamplingParams(temperature=temperature), (), [], 0, 0).choose(bad)


def test_forbidding_everything_is_an_error() -> None:
    with pytest.raises(NoTokenError, match="forbidden"):
        Sampler(SamplingParams(), (), [], 0, 0).choose(row(1, 2), np.zeros(2, dtype=np.bool_))
