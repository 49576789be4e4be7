"""TGI's own routes: its rules and texts, its replies, and streams that say the same as whole replies."""

from __future__ import annotations

import copy
import json
import queue
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from squawq import __version__
from squawq.engine.request import FinishReason, Output, TokenLogprob
from squawq.engine.sequence import join
from squawq.errors import ConfigError
from squawq.serve.errors import ApiError
from squawq.serve.http import dump
from squawq.serve.metrics import Timing
from squawq.serve.model import Served
from squawq.serve.runtime import Call, Reply
from squawq.serve.tgi.generate import chat_tokens, generate, info, tokens

TIMES = Timing(arrived=1.0, validated=1.25, first_token=1.5, ended=3.25)
PROMPT = "Once upon a time, there was a little girl"


def call_of(served: Served, parameters: dict[str, Any] | None = None, inputs: str = PROMPT, **options: Any) -> Call:
    raw: dict[str, Any] = {"inputs": inputs} if parameters is None else {"inputs": inputs, "parameters": parameters}
    return generate({**raw, **options.pop("more", {})}, served, **{"stream": False, "compat": False, **options})


def outputs_of(served: Served, call: Call) -> list[Output]:
    outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
    for request in call.requests:
        served.engine.submit(request, outputs.put)
    found, left = [], len(call.requests)
    while left:
        found.append(outputs.get(timeout=60))
        left -= found[-1].finish is not None
    return found


def reply_of(served: Served, call: Call) -> Reply:
    outputs = outputs_of(served, call)
    sequences = [[o for o in outputs if o.request == request.id] for request in call.requests]
    reply = call.reply([[join(parts)] for parts in sequences], TIMES)
    return replace(reply, body=json.loads(dump(reply.body)))


def body_of(served: Served, parameters: dict[str, Any] | None = None, **options: Any) -> Any:
    return reply_of(served, call_of(served, parameters, **options)).body


def events_of(served: Served, parameters: dict[str, Any] | None = None, **options: Any) -> list[dict[str, Any]]:
    call = call_of(served, parameters, **{"stream": True, **options})
    payloads = [*(p for output in outputs_of(served, call) for p in call.push(output)), *call.end()]
    return [json.loads(dump(payload)) for payload in payloads]


def joined(shown: Sequence[dict[str, Any]]) -> str:
    return "".join(token["text"] for token in shown if not token["special"])


def refusal(served: Served, parameters: dict[str, Any] | None = None, **options: Any) -> str:
    with pytest.raises(ApiError) as refused:
        call_of(served, parameters, **options)
    error = refused.value
    assert error.status(tgi=True) == 422
    assert error.body(tgi=True, tgi_route=True) == {"error": error.message, "error_type": "validation"}
    return error.message


def rule_of(served: Served, parameters: dict[str, Any] | None = None, **options: Any) -> str:
    """The rule that a request is refused by."""
    before, rule = refusal(served, parameters, **options).split(": ", 1)
    assert before == "Input validation error"
    return rule


RULES: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 0}, "`best_of` must be > 0 and <= 2. Given: 0"),
    ({"best_of": -1}, "`best_of` must be > 0 and <= 2. Given: -1"),
    ({"best_of": 10**9}, "`best_of` must be > 0 and <= 2. Given: 1000000000"),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
    ({"temperature": 0}, "`temperature` must be strictly positive"),
    ({"temperature": -0.5}, "`temperature` must be strictly positive"),
    ({"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"frequency_penalty": -2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_p": 0.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 0.0}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 1.0}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"top_k": -1}, "`top_k` must be strictly positive"),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 4095. Given: 0"),
    ({"truncate": 4096}, "`truncate` must be strictly positive and less than 4095. Given: 4096"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"stop": ["a"] * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    ({"top_n_tokens": -1}, "`top_n_tokens` must be >= 0 and <= 5. Given: -1"),
]


@pytest.mark.parametrize(("parameters", "rule"), RULES)
def test_rules(served: Served, parameters: dict[str, Any], rule: str) -> None:
    assert rule_of(served, parameters) == rule
    if "best_of" not in parameters:
        assert rule_of(served, parameters, stream=True) == rule


def test_rules_of_streams(served: Served) -> None:
    for options in ({"stream": True}, {"compat": True, "more": {"stream": True}}):
        rule = rule_of(served, {"best_of": 2, "do_sample": True}, **options)
        assert rule == "`best_of` != 1 is not supported when streaming tokens"
        rule = rule_of(served, {"decoder_input_details": True}, **options)
        assert rule == "`decoder_input_details` == true is not supported when streaming tokens"


def test_limits_are_the_settings(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = replace(served.settings, max_best_of=1, max_stop_sequences=1, max_top_n_tokens=1)
    monkeypatch.setattr(served, "settings", changed)
    assert rule_of(served, {"best_of": 2, "do_sample": True}) == "`best_of` != 1 is not allowed for this endpoint"
    assert rule_of(served, {"stop": ["a", "b"]}) == "`stop` supports up to 1 stop sequences. Given: 2"
    assert rule_of(served, {"top_n_tokens": 2}) == "`top_n_tokens` must be >= 0 and <= 1. Given: 2"


def test_edges_that_are_allowed(served: Served) -> None:
    for parameters in (
        {"best_of": 1, "seed": 0},
        {"temperature": 1e-9},
        {"frequency_penalty": -2},
        {"truncate": 4095},
        {"stop": ["a"] * 4, "top_n_tokens": 5},
        {"watermark": False, "grammar": None, "adapter_id": None, "seed": None},
    ):
        assert len(call_of(served, parameters).requests) == 1
    assert len(call_of(served, {"best_of": 2, "temperature": 0.5}).requests) == 2


def test_inputs_that_are_empty_or_too_long(served: Served) -> None:
    assert rule_of(served, inputs="") == "`inputs` cannot be empty"
    long = "a" + " a" * 4094
    assert len(served.encode(long)) == 4096
    assert rule_of(served, inputs=long) == "`inputs` must have less than 4095 tokens. Given: 4096"
    assert len(call_of(served, {"truncate": 4095}, inputs=long).requests[0].prompt) == 4095


def test_max_new_tokens_counts_in_full(served: Served) -> None:
    count = len(served.encode(PROMPT))
    room = 4096 - count
    assert call_of(served).requests[0].params.max_tokens == room
    assert call_of(served, {"max_new_tokens": room}).requests[0].params.max_tokens == room
    rule = rule_of(served, {"max_new_tokens": room + 1})
    assert rule.startswith("`inputs` tokens + `max_new_tokens` must be <= 4096. ")
    assert rule.endswith(f"Given: {count} `inputs` tokens and {room + 1} `max_new_tokens`")


def test_truncate_keeps_the_last_tokens(served: Served) -> None:
    ids = served.encode(PROMPT)
    assert call_of(served).requests[0].prompt == ids
    assert call_of(served, {"truncate": 3}).requests[0].prompt == ids[-3:]
    assert call_of(served, {"truncate": 4000}).requests[0].prompt == ids


@pytest.mark.parametrize(
    "parameters",
    [
        {"watermark": True},
        {"adapter_id": "x"},
        {"max_length": 5},
        {"max_new_tokens": "5"},
        {"max_new_tokens": 5.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"seed": -1},
        {"seed": 2**64},
        {"stop": "a"},
        {"stop": [""]},
        {"top_k": 2**40},
        {"grammar": "a"},
    ],
)
def test_what_is_not_supported_is_refused(served: Served, parameters: dict[str, Any]) -> None:
    (name,) = parameters
    assert name in refusal(served, parameters)


def test_unknown_fields_are_taken_as_in_tgi(served: Served) -> None:
    plain = body_of(served, {"max_new_tokens": 5})
    assert body_of(served, {"max_new_tokens": 5, "max_retries": 2, "x": 1}, more={"y": {"z": []}}) == plain
    strict = copy.copy(served)
    strict.settings = replace(served.settings, strict_fields=True)
    assert "y" in refusal(strict, more={"y": 1})
    assert "parameters.x" in refusal(strict, {"x": 1})


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        (None, 1.0),
        ({}, 0.0),
        ({"max_new_tokens": 5}, 0.0),
        ({"do_sample": False}, 0.0),
        ({"temperature": 1.0}, 0.0),
        ({"repetition_penalty": 1.2}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.5}, 0.5),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.5}, 1.0),
        ({"typical_p": 0.5}, 1.0),
        ({"do_sample": False, "top_k": 5, "temperature": 0.5}, 0.5),
    ],
)
def test_when_tokens_are_drawn(served: Served, parameters: dict[str, Any] | None, temperature: float) -> None:
    params = call_of(served, parameters).requests[0].params
    assert params.temperature == temperature
    assert (params.seed is None) == (temperature == 0)


def test_settings_reach_the_engine(served: Served) -> None:
    parameters = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "typical_p": 0.8, "repetition_penalty": 1.1, "seed": 5}
    params = call_of(served, {**parameters, "frequency_penalty": 0.3, "stop": ["x"]}).requests[0].params
    assert {name: getattr(params, name) for name in parameters} == parameters
    assert params.frequency_penalty == 0.3
    assert params.stop == ("x",)
    assert params.include_stop


def test_log_probabilities_are_computed_where_they_are_shown(served: Served) -> None:
    def asked(parameters: dict[str, Any], **options: Any) -> tuple[int | None, int | None]:
        params = call_of(served, parameters, **options).requests[0].params
        return params.logprobs, params.prompt_logprobs

    assert asked({"top_n_tokens": 3}) == (None, None)
    assert asked({"best_of": 2, "do_sample": True}) == (0, None)
    assert asked({"details": True}) == (0, None)
    assert asked({"details": True, "top_n_tokens": 3}) == (3, None)
    assert asked({"decoder_input_details": True}) == (0, 0)
    assert asked({}, stream=True) == (0, None)
    assert asked({"top_n_tokens": 2}, stream=True) == (2, None)


def test_seeds(served: Served) -> None:
    sampled = {"do_sample": True, "max_new_tokens": 8, "details": True}
    drawn = [call_of(served, sampled).requests[0].params.seed for _ in range(3)]
    assert len(set(drawn)) == 3
    first = body_of(served, sampled)
    assert body_of(served, {**sampled, "seed": first["details"]["seed"]}) == first
    for seed, engine in ((2**63 - 1, 2**63 - 1), (2**63 + 5, 5), (2**64 - 1, 2**63 - 1)):
        assert call_of(served, {**sampled, "seed": seed}).requests[0].params.seed == engine
    large = body_of(served, {**sampled, "seed": 2**64 - 1})
    assert large["details"]["seed"] == 2**64 - 1
    assert body_of(served, {**sampled, "seed": 2**63 - 1})["generated_text"] == large["generated_text"]
    assert body_of(served, {"seed": 5, "details": True, "max_new_tokens": 1})["details"]["seed"] is None


def test_a_whole_reply(served: Served) -> None:
    reply = reply_of(served, call_of(served, {"max_new_tokens": 6}, inputs="é" + PROMPT))
    assert list(reply.body) == ["generated_text"]  # type: ignore[call-overload]
    assert reply.headers == {
        "x-compute-type": "cpu",
        "x-compute-time": "2.250000",
        "x-compute-characters": str(len(PROMPT) + 1),
        "x-total-time": "2250",
        "x-validation-time": "250",
        "x-inference-time": "2000",
        "x-time-per-token": "333",
        "x-prompt-tokens": str(len(served.encode("é" + PROMPT))),
        "x-generated-tokens": "6",
    }


def test_details(served: Served) -> None:
    call = call_of(served, {"max_new_tokens": 6, "details": True})
    body: Any = reply_of(served, call).body
    details = body["details"]
    assert list(details) == ["finish_reason", "generated_tokens", "seed", "prefill", "tokens"]
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == 6
    assert details["prefill"] == []
    assert all(list(token) == ["id", "text", "logprob", "special"] for token in details["tokens"])
    assert joined(details["tokens"]) == body["generated_text"]
    ids = [token["id"] for token in details["tokens"]]
    engine = join(outputs_of(served, call_of(served, {"max_new_tokens": 6, "details": True})))
    assert tuple(ids) == engine.ids
    assert body["generated_text"] == engine.text
    assert [token["logprob"] for token in details["tokens"]] == [p.logprob for p in engine.logprobs or ()]


def test_prefill(served: Served) -> None:
    body = body_of(served, {"max_new_tokens": 2, "decoder_input_details": True})
    prefill = body["details"]["prefill"]
    assert [token["id"] for token in prefill] == served.encode(PROMPT)
    assert "".join(token["text"] for token in prefill[1:]) == PROMPT
    assert prefill[0] == {"id": 0, "text": "<|begin_of_text|>", "logprob": None}
    assert all(token["logprob"] <= 0 for token in prefill[1:])


def test_top_tokens(served: Served) -> None:
    parameters = {"max_new_tokens": 4, "details": True, "top_n_tokens": 3}
    details = body_of(served, parameters)["details"]
    assert list(details)[-1] == "top_tokens"
    assert [len(top) for top in details["top_tokens"]] == [3] * 4
    for token, top in zip(details["tokens"], details["top_tokens"], strict=True):
        assert top[0]["id"] == token["id"]  # the likeliest was taken
        assert all(one["logprob"] >= other["logprob"] for one, other in pairwise(top))
    events = events_of(served, parameters)
    assert [event["top_tokens"] for event in events] == details["top_tokens"]
    assert list(events[0]) == ["index", "token", "top_tokens", "generated_text", "details"]
    assert "top_tokens" not in body_of(served, {**parameters, "top_n_tokens": 0})["details"]


def test_best_of(served: Served) -> None:
    body = body_of(served, {"best_of": 2, "do_sample": True, "max_new_tokens": 12, "details": True})
    details = body["details"]
    (other,) = details["best_of_sequences"]

    def mean(found: dict[str, Any]) -> float:
        return fmean(token["logprob"] for token in found["tokens"])

    assert mean(details) >= mean(other)
    assert [joined(details["tokens"]), joined(other["tokens"])] == [body["generated_text"], other["generated_text"]]
    assert details["seed"] != other["seed"]
    for text, found in ((body["generated_text"], details), (other["generated_text"], other)):
        again = body_of(served, {"do_sample": True, "max_new_tokens": 12, "seed": found["seed"]})
        assert again["generated_text"] == text


def test_best_of_chooses_without_details(served: Served) -> None:
    call = call_of(served, {"best_of": 2, "do_sample": True, "max_new_tokens": 5})

    def output(number: int, text: str, *scores: float) -> list[Output]:
        found, name = tuple(TokenLogprob(9, score, ()) for score in scores), call.requests[number].id
        return [Output(name, 0, (9,) * len(scores), text, found, finish=FinishReason.LENGTH)]

    best = call.reply([output(0, "long", -1, -1, -4), output(1, "good", -1.5)], TIMES).body
    assert best == {"generated_text": "good"}


def test_the_root_route(served: Served) -> None:
    (body,) = body_of(served, {"max_new_tokens": 5}, compat=True)
    plain = body_of(served, {"max_new_tokens": 5})["generated_text"]
    assert body == {"generated_text": PROMPT + plain}
    (body,) = body_of(served, {"max_new_tokens": 5, "return_full_text": False}, compat=True)
    assert body == {"generated_text": plain}
    assert body_of(served, {"max_new_tokens": 5, "return_full_text": True}) == {"generated_text": PROMPT + plain}
    assert not call_of(served, compat=True).stream
    assert call_of(served, compat=True, more={"stream": True}).stream
    assert "use /generate_stream" in refusal(served, more={"stream": True})
    events = events_of(served, {"max_new_tokens": 5}, compat=True, more={"stream": True})
    assert events[-1]["generated_text"] == PROMPT + plain
    assert joined([event["token"] for event in events]) == plain


def test_stream_events(served: Served) -> None:
    call = call_of(served, {"max_new_tokens": 3}, stream=True)
    payloads = [p for output in outputs_of(served, call) for p in call.push(output)]
    events = [json.loads(dump(payload)) for payload in payloads]
    assert dump(payloads[0]).startswith('{"index":1,"token":{"id":')
    assert [event["index"] for event in events] == [1, 2, 3]
    assert all(list(event) == ["index", "token", "generated_text", "details"] for event in events)
    assert [event["generated_text"] for event in events] == [None, None, joined([e["token"] for e in events])]
    assert [event["details"] for event in events] == [None] * 3
    assert call.end() == []


def test_details_of_a_stream(served: Served) -> None:
    events = events_of(served, {"max_new_tokens": 3, "details": True, "do_sample": True, "seed": 2**64 - 1})
    assert [event["details"] for event in events[:2]] == [None, None]
    assert list(events[2]["details"].items()) == [
        ("finish_reason", "length"),
        ("generated_tokens", 3),
        ("seed", 2**64 - 1),
        ("input_length", len(served.encode(PROMPT))),
    ]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([0.5, 1.5, 20.0]),
    stop=st.lists(st.sampled_from([" the", "e", ".", "a little", "zzz", "ing t"]), max_size=3),
    inputs=st.sampled_from([PROMPT, "The", "é🙂", "{"]),
    limit=st.integers(1, 10),
)
def test_streams_and_whole_replies_agree(
    served: Served, seed: int, temperature: float, stop: list[str], inputs: str, limit: int
) -> None:
    parameters = {
        "seed": seed,
        "temperature": temperature,
        "stop": stop,
        "max_new_tokens": limit,
        "details": True,
        "top_n_tokens": 2,
    }
    events = events_of(served, parameters, inputs=inputs)
    body = body_of(served, parameters, inputs=inputs)
    shown, whole = [event["token"] for event in events], body["details"]
    assert events[-1]["generated_text"] == joined(shown) == joined(whole["tokens"]) == body["generated_text"]
    assert [token["id"] for token in shown] == [token["id"] for token in whole["tokens"]]
    assert [token["logprob"] for token in shown] == [token["logprob"] for token in whole["tokens"]]
    last = events[-1]["details"]
    assert [last[name] for name in ("finish_reason", "generated_tokens", "seed")] == [
        whole[name] for name in ("finish_reason", "generated_tokens", "seed")
    ]
    if whole["finish_reason"] == "stop_sequence":
        assert body["generated_text"].endswith(tuple(stop))


def test_stop_strings_stay_in_the_text(served: Served) -> None:
    text = body_of(served, {"max_new_tokens": 10})["generated_text"]
    stop = text[3:6]
    parameters = {"max_new_tokens": 10, "stop": [stop], "details": True}
    body, events = body_of(served, parameters), events_of(served, parameters)
    assert body["generated_text"] == text[: text.index(stop) + 3]
    assert body["details"]["finish_reason"] == events[-1]["details"]["finish_reason"] == "stop_sequence"
    assert events[-1]["generated_text"] == body["generated_text"]


def test_half_characters_and_the_end_token(served: Served) -> None:
    parameters = {"grammar": {"type": "regex", "value": "é🙂"}, "details": True}
    events, body = events_of(served, parameters), body_of(served, parameters)
    assert body["generated_text"] == events[-1]["generated_text"] == "é🙂"
    for shown in ([event["token"] for event in events], body["details"]["tokens"]):
        assert [token["text"] for token in shown[:-1] if token["text"]] == ["é", "🙂"]
        end = shown[-1]
        assert end["special"]
        assert end["id"] in served.eos_ids
        assert end["text"] == served.tokenizer.token_text(end["id"])
    assert body["details"]["finish_reason"] == "eos_token"


def test_an_end_token_that_lets_text_out(served: Served) -> None:
    call = call_of(served, {"stop": ["a b"]}, stream=True)
    name, eos = call.requests[0].id, min(served.eos_ids)

    def output(token: int, text: str, finish: FinishReason | None = None) -> Output:
        return Output(name, 0, (token,), text, (TokenLogprob(token, -1.0, ()),), None, finish, finish and token)

    payloads = [*call.push(output(70, "")), *call.push(output(eos, "a ", FinishReason.STOP))]
    events = [json.loads(dump(payload)) for payload in payloads]
    assert joined([event["token"] for event in events]) == events[-1]["generated_text"] == "a "


def test_an_output_of_several_tokens(served: Served) -> None:
    call = call_of(served, {"details": True}, stream=True)
    scores = tuple(TokenLogprob(token, float("-inf"), ()) for token in (70, 71))
    output = Output(call.requests[0].id, 0, (70, 71), "ab", scores, finish=FinishReason.LENGTH)
    events = [json.loads(dump(payload)) for payload in call.push(output)]
    assert [event["token"]["text"] for event in events] == ["", "ab"]
    assert [event["index"] for event in events] == [1, 2]
    assert [event["generated_text"] for event in events] == [None, "ab"]
    assert events[0]["token"]["logprob"] == -9999.0


def test_a_grammar_holds(served: Served) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    for grammar in ({"type": "json", "value": schema}, {"type": "json_object", "value": json.dumps(schema)}):
        text = body_of(served, {"grammar": grammar, "max_new_tokens": 900})["generated_text"]
        assert json.loads(text)["a"] in (1, 2)


@pytest.mark.parametrize(
    "grammar",
    [
        {"type": "regex", "value": "(a"},
        {"type": "regex"},
        {"type": "cfg", "value": "a"},
        {"type": "json", "value": {"type": "nonsense"}},
        {"type": "json", "value": "{"},
    ],
)
def test_bad_grammars_are_refused(served: Served, grammar: dict[str, Any]) -> None:
    try:
        call = call_of(served, {"grammar": grammar})
    except ApiError as error:
        refused = error
    else:
        with pytest.raises(ConfigError) as failed:
            served.engine.check(call.requests[0])
        refused = call.invalid(failed.value)
    assert refused.status(tgi=True) == 422
    assert refused.message.startswith("Input validation error: grammar is not valid: ")


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
def test_sequences_that_do_not_finish(served: Served, reason: FinishReason) -> None:
    call = call_of(served, stream=True)
    output = Output(call.requests[0].id, 0, text="held", finish=reason)
    failure = {"error": "Incomplete generation", "error_type": "incomplete_generation"}
    assert [json.loads(dump(payload)) for payload in call.push(output)] == [failure]
    with pytest.raises(ApiError) as failed:
        call.reply([[output]], TIMES)
    assert failed.value.body(tgi=True, tgi_route=True) == failure
    assert failed.value.status(tgi=True) == 503


def test_a_failed_stream(served: Served) -> None:
    (payload,) = call_of(served, stream=True).fail(ApiError("generation", "Request failed during generation: x"))
    assert dump(payload) == '{"error":"Request failed during generation: x","error_type":"generation"}'


def test_ids_are_unique(served: Served) -> None:
    assert call_of(served).requests[0].id != call_of(served).requests[0].id


@given(text=st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_tokenize_gives_bytes(served: Served, text: str) -> None:
    found = tokens({"inputs": text}, served)
    assert [token["id"] for token in found] == served.encode(text)
    assert all(token["text"].encode() == text.encode()[token["start"] : token["stop"]] for token in found)
    covered = sorted({(token["start"], token["stop"]) for token in found[1:]})
    assert all(before[1] <= after[0] or after == before for before, after in pairwise(covered))
    if text:
        assert covered[-1][1] == len(text.encode())
    assert [token["id"] for token in chat_tokens(text, served)] == served.encode(text, special=False)


def test_tokenize_truncates(served: Served) -> None:
    whole = tokens({"inputs": PROMPT}, served)
    assert whole[0] == {"id": 0, "text": "", "start": 0, "stop": 0}
    assert tokens({"inputs": PROMPT, "parameters": {"truncate": 2}}, served) == whole[-2:]
    with pytest.raises(ApiError, match="`truncate` must be strictly positive"):
        tokens({"inputs": PROMPT, "parameters": {"truncate": 0}}, served)
    with pytest.raises(ApiError, match="inputs"):
        tokens({}, served)


def test_info(served: Served) -> None:
    assert info(served) == {
        "model_id": served.name,
        "model_sha": None,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": served.settings.max_concurrent,
        "max_best_of": 2,
        "max_stop_sequences": 4,
        "max_input_tokens": 4095,
        "max_total_tokens": 4096,
        "validation_workers": 2,
        "max_client_batch_size": 4,
        "router": "text-generation-router",
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }
