"""Settings out of range are refused by name, value and rule."""

from __future__ import annotations

import math
import time

import pytest

from squawq.engine.request import MAX_ALLOWED, MAX_GRAMMAR_BYTES, Grammar, SamplingParams
from squawq.errors import ConfigError

NUMBERS = [
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "n",
    "best_of",
    "logprobs",
    "prompt_logprobs",
]
BAD: list[tuple[str, object]] = [
    ("temperature", -1),
    ("temperature", 101),
    ("top_p", 0),
    ("top_p", 1.5),
    ("typical_p", 0),
    ("min_p", -0.1),
    ("max_tokens", 0),
    ("max_tokens", 1.5),
    ("min_tokens", 257),
    ("top_k", -1),
    ("repetition_penalty", 0),
    ("frequency_penalty", 2.1),
    ("presence_penalty", -2.1),
    ("seed", -1),
    ("seed", 2**63),
    ("n", 0),
    ("n", 65),
    ("best_of", 0),
    ("logprobs", 21),
    ("prompt_logprobs", -1),
    ("stop", ("",)),
    ("stop", ["a"] * 17),
    ("stop", ["a" * 1001]),
    ("stop", 7),
    ("stop_ids", [-1]),
    ("stop_ids", 5),
    ("stop_ids", ["a"]),
    ("logit_bias", {"5": 1}),
    ("logit_bias", {5: 101}),
    ("logit_bias", {5: math.nan}),
    ("logit_bias", dict.fromkeys(range(1025), 1)),
    ("logit_bias", [5]),
    ("allowed_ids", []),
    ("allowed_ids", 5),
    ("allowed_ids", [-1]),
    ("allowed_ids", [1, "a"]),
    ("allowed_ids", [0] * (MAX_ALLOWED + 1)),
    ("bad_ids", 5),
    ("bad_ids", [5]),
    ("bad_ids", [[]]),
    ("bad_ids", [[1], [-1]]),
    ("bad_ids", [[1.0]]),
    ("bad_ids", [[1]] * 129),
    ("bad_ids", [[1] * 65]),
    ("include_stop", 1),
    ("ignore_eos", "yes"),
    ("grammar", "a+"),
    *[(name, value) for name in NUMBERS for value in (math.nan, math.inf, True, "1")],
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", [""] * 300_000),
        ("stop_ids", [-1] * 300_000),
        ("allowed_ids", [-1] * 300_000),
        ("bad_ids", [[-1] * 300_000]),
    ],
)
def test_the_items_of_too_long_a_list_are_not_looked_at(name: str, value: object) -> None:
    began = time.thread_time()
    with pytest.raises(ConfigError, match=name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert time.thread_time() - began < 1  # 16 microseconds for each made it five


def test_good_values_at_the_edge() -> None:
    SamplingParams(
        max_tokens=None,
        temperature=100,
        top_p=1,
        min_p=1,
        seed=2**63 - 1,
        n=2,
        best_of=64,
        logprobs=20,
        frequency_penalty=-2,
        logit_bias={0: -100, 5: 100.0},
        allowed_ids=[0] * MAX_ALLOWED,
        bad_ids=[[1] * 64] * 128,
    )


def test_a_single_stop_string_and_lists_become_tuples() -> None:
    params = SamplingParams(stop="END", stop_ids=[3], allowed_ids=[4], bad_ids=[[5, 6], (7,)])
    assert (params.stop, params.stop_ids) == (("END",), (3,))
    assert (params.allowed_ids, params.bad_ids) == ((4,), ((5, 6), (7,)))


def test_the_callers_mapping_is_copied() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = math.nan
    assert params.logit_bias == {1: 2.0}


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [("yaml", "a", "json_schema, regex, lark"), ("regex", "", "text"), ("lark", "é" * MAX_GRAMMAR_BYTES, "bytes")],
)
def test_bad_grammars(kind: str, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Grammar(kind, text)


def test_a_grammar_needs_its_end() -> None:
    with pytest.raises(ConfigError, match="ignore_eos"):
        SamplingParams(grammar=Grammar("regex", "a"), ignore_eos=True)
