"""Sampling on the card, in Triton's interpreter, against its definition in torch."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from squawq.backends.sampling import Sampling
from squawq.engine.request import SamplingParams

pytest.importorskip("triton")

from squawq.backends.cuda import launch
from squawq.backends.cuda.parameters import counts, parameters, samples

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 9000  # three parts of a row, the last one not full
pytestmark = [
    *([pytest.mark.gpu] if DEVICE.type == "cuda" else []),
    # in the interpreter itself
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),
]


def sampled(params: SamplingParams, tokens: list[int] | None = None, seed: int = 0, index: int = 0) -> Sampling:
    return Sampling(params, [1, 2, 3], (7, 9), seed, index, tokens=tokens or [1, 2, 3])


def draw(logits: Tensor, rows: list[Sampling], places: list[int] | None = None) -> launch.SamplingSpace:
    """Sample each row of logits [rows, vocab] by the parameters of its sequence."""
    places = places or list(range(len(rows)))
    vocab = logits.shape[1]
    space = launch.sampling_space(max(places) + 1, vocab, DEVICE)
    for place, sampling in zip(places, rows, strict=True):
        own, whole, penalized = parameters(sampling)
        space.floats[place, : len(own)] = torch.tensor(own)
        space.ints[place, : len(whole)] = torch.tensor(whole, dtype=torch.int32)
        if penalized:
            space.counts[place] = torch.from_numpy(counts(sampling, vocab))
    sample(logits, places, [len(sampling.tokens) - 1 for sampling in rows], space)
    return space


def sample(logits: Tensor, places: list[int], positions: list[int], space: launch.SamplingSpace) -> None:
    own = torch.tensor(places, dtype=torch.int32, device=DEVICE), torch.tensor(positions, device=DEVICE)
    launch.sample(logits.to(DEVICE), *own, space)


def tokens_of(space: launch.SamplingSpace) -> list[int]:
    return [int(token) for token in space.results[0]]


def adjusted(row: Tensor, sampling: Sampling) -> Tensor:
    """Logits after penalties and min_tokens, by their definitions."""
    params, row = sampling.params, row.clone()
    output = Counter(sampling.tokens[len(sampling.prompt) :])
    for token in {*sampling.prompt, *output}:
        value = row[token]
        row[token] = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
    for token, times in output.items():
        row[token] -= params.frequency_penalty * times + params.presence_penalty
    if sum(output.values()) < params.min_tokens:
        row[list(sampling.ending)] = -math.inf
    return row


def kept(row: Tensor, params: SamplingParams) -> Tensor:
    """bool [vocab]: what top_k, then top_p, then min_p leave."""
    found = torch.ones(len(row), dtype=torch.bool)
    if params.top_k:
        found &= row >= row.topk(params.top_k).values[-1]
    weights = torch.where(found, ((row - row.max()) / params.temperature).double().exp(), 0.0)
    ordered, ids = weights.sort(descending=True)
    before = ordered.cumsum(0) - ordered
    nucleus = torch.zeros_like(found)
    nucleus[ids[before < params.top_p * weights.sum()]] = True
    found &= nucleus
    if params.min_p:
        found &= row >= row.max() + params.temperature * math.log(params.min_p)
    return found


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    top_k=st.sampled_from([0, 0, 1, 2, 50, 128]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    penalties=st.sampled_from([(1.0, 0.0, 0.0), (1.3, 0.4, 0.2), (0.8, -1.0, 0.0)]),
    min_tokens=st.sampled_from([0, 2, 9]),
    seed=st.integers(0, 2**63 - 1),
)
def test_the_largest_of_what_is_kept(
    top_k: int,
    top_p: float,
    min_p: float,
    temperature: float,
    spread: float,
    penalties: tuple[float, float, float],
    min_tokens: int,
    seed: int,
) -> None:
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalties[0],
        frequency_penalty=penalties[1],
        presence_penalty=penalties[2],
        min_tokens=min_tokens,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, VOCAB, generator=generator) * spread
    likely = logits[0].argsort(descending=True)[:4].tolist()
    sampling = sampled(params, [1, 2, 3, *likely[:2], likely[0]], seed)
    assert samples(sampling)
    space = draw(logits, [sampling])
    row = adjusted(logits[0], sampling)
    noisy = space.noisy[0].cpu() if temperature and top_k != 1 else row
    (token,) = tokens_of(space)
    if top_k == 1:
        assert token == int(row.argmax())
    wanted = kept(row, params) if temperature else torch.ones(VOCAB, dtype=torch.bool)
    assert wanted[token]
    assert noisy[token] >= torch.where(wanted, noisy, -math.inf).max() - 1e-5
    expected = logits[0].log_softmax(0)[token]
    assert float(space.results[1].view(torch.float32)[0]) == pytest.approx(float(expected), abs=1e-4)


def test_noise_is_of_gumbel_and_of_its_own_for_each_token_of_each_sequence() -> None:
    params = SamplingParams(temperature=2.0)
    logits = torch.zeros(1, VOCAB).repeat(4, 1)
    rows = [sampled(params, seed=5), sampled(params, seed=5, index=1), sampled(params, seed=6)]
    noise = draw(logits, [*rows, sampled(params, [1, 2, 3, 4], seed=5)]).noisy.cpu().double()
    levels = torch.exp(-torch.exp(-noise))  # uniform
    for row in levels:
        counted = torch.histc(row, 20, 0, 1)
        assert (counted - VOCAB / 20).abs().max() < 5 * math.sqrt(VOCAB / 20)
    assert torch.corrcoef(levels).fill_diagonal_(0).abs().max() < 5 / math.sqrt(VOCAB)


def test_a_row_does_not_depend_on_the_others_nor_on_its_place() -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    rows = [
        sampled(SamplingParams(temperature=1.0, top_p=0.9), seed=1),
        sampled(SamplingParams()),
        sampled(SamplingParams(temperature=0.5, top_k=9, repetition_penalty=1.2), seed=3),
        sampled(SamplingParams(temperature=2.0, min_p=0.1), seed=4),
        sampled(SamplingParams(temperature=1.0), seed=5),
    ]
    together = draw(logits, rows, [4, 2, 0, 1, 3]).results[:, [4, 2, 0, 1, 3]]
    alone = [draw(logits[i : i + 1], [row]).results[:, 0] for i, row in enumerate(rows)]
    assert torch.equal(together, torch.stack(alone, 1))


def test_rows_of_padding_and_rows_without_a_token() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, 4097] = math.nan
    logits[2] = -math.inf
    rows = [sampled(SamplingParams(temperature=1.0))] * 3
    space = launch.sampling_space(3, VOCAB, DEVICE)
    space.results[:] = 77
    sample(logits, [0, 1, 2], [-1, 3, 3], space)
    assert space.results[:, 0].tolist() == [77, 77]
    assert not torch.isfinite(draw(logits, rows).results[1, 1:].view(torch.float32)).any()
    assert tokens_of(space)[1] in range(VOCAB)


def test_a_token_that_is_drawn_is_counted() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [5, 6]] = torch.tensor([3.0, 2.0])
    sampling = sampled(SamplingParams(frequency_penalty=0.6))
    space = draw(logits, [sampling])
    found = tokens_of(space)
    for position in range(3, 6):
        sample(logits, [0], [position], space)
        found += tokens_of(space)
    assert found == [5, 5, 6, 5]
    assert space.counts[0, [5, 6, 1]].tolist() == [3, 1, -(2**15)]


def test_what_the_host_samples() -> None:
    plain = SamplingParams()
    for other in (
        replace(plain, logit_bias={1: 2.0}),
        replace(plain, allowed_ids=(1,)),
        replace(plain, bad_ids=((1,),)),
        replace(plain, typical_p=0.5),
        replace(plain, top_k=129),
    ):
        assert not samples(sampled(other))
    assert samples(sampled(replace(plain, top_k=128, min_tokens=3)))
    many = replace(sampled(replace(plain, min_tokens=3)), ending=tuple(range(17)))
    assert not samples(many)
    seeds = [parameters(sampled(plain, seed=seed))[1][1:3] for seed in (1, 2**31, 2**62 + 5)]
    assert [np.array(seed, np.int32).view(np.int64)[0] for seed in seeds] == [1, 2**31, 2**62 + 5]
