"""The server through OpenAI's own client: chats, completions, models, and vLLM's fields as extra_body. Tools are
test_openai_tools.py's, answers in a form test_openai_formats.py's, errors test_openai_errors.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from running import MESSAGES, Running

from squawq.engine.request import Request, SamplingParams

PROMPT = "Once upon a time"
GREEDY: dict[str, Any] = {"model": "any", "temperature": 0, "max_tokens": 12}


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture
def chat(client: Any) -> Any:
    return lambda **options: client.chat.completions.create(**{**GREEDY, "messages": MESSAGES, **options})


@pytest.fixture
def complete(client: Any) -> Any:
    return lambda **options: client.completions.create(**{**GREEDY, "prompt": PROMPT, **options})


def engine_text(server: Running, params: SamplingParams) -> str:
    """What the engine alone makes of PROMPT."""
    request = Request("test", server.served.encode(PROMPT), params)
    return "".join(output.text for output in server.served.engine.generate([request]))


def parts(stream: Any) -> list[str]:
    """The texts of a stream's chunks."""
    return [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]


def test_a_chat(server: Running, chat: Any) -> None:
    answer = chat()
    (choice,) = answer.choices
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model, choice.index) == ("chat.completion", "demo_model", 0)
    assert (choice.message.role, choice.message.refusal, choice.logprobs) == ("assistant", None, None)
    assert choice.finish_reason == "length"
    served = server.served
    ids = served.encode(served.render_chat(MESSAGES), special=False)
    assert answer.usage.to_dict() == {"prompt_tokens": len(ids), "completion_tokens": 12, "total_tokens": len(ids) + 12}
    told = chat(max_tokens=None, max_completion_tokens=5)
    assert told.usage.completion_tokens == 5
    assert choice.message.content.startswith(told.choices[0].message.content)


def test_a_streamed_chat_is_the_whole_one(chat: Any) -> None:
    whole = chat(logprobs=True, top_logprobs=2)
    chunks = list(chat(logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.role for chunk in chunks[1:-1]] == [None] * (len(chunks) - 2)
    assert "".join(parts(chunks)) == whole.choices[0].message.content
    assert len(parts(chunks)) > 10
    entries = [e for chunk in chunks[:-1] if chunk.choices[0].logprobs for e in chunk.choices[0].logprobs.content]
    assert entries == whole.choices[0].logprobs.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)


def test_logprobs_of_a_chat(chat: Any) -> None:
    content = chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(content) == 12
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
        assert bytes(entry.bytes).decode() == entry.token
        assert 0 >= entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob >= entry.top_logprobs[2].logprob
    alone = chat(logprobs=True).choices[0].logprobs.content
    assert [entry.top_logprobs for entry in alone] == [[]] * 12
    assert [entry.logprob for entry in alone] == [entry.logprob for entry in content]


def test_several_answers(chat: Any) -> None:
    drawn = {"temperature": 1.5, "seed": 5, "n": 3}
    whole = chat(**drawn)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) == 3
    assert whole.usage.completion_tokens == 36
    texts = ["", "", ""]
    for chunk in chat(stream=True, **drawn):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert chat(**{**drawn, "n": 1}).choices[0].message.content == texts[0]


def test_stop_strings(chat: Any) -> None:
    text = chat(max_tokens=40).choices[0].message.content
    stop = text[10:14]
    for given in (stop, [stop], ["never seen", stop]):
        choice = chat(max_tokens=40, stop=given).choices[0]
        assert (choice.message.content, choice.finish_reason) == (text[: text.index(stop)], "stop")
        assert choice.stop_reason == stop
        assert "".join(parts(chat(max_tokens=40, stop=given, stream=True))) == choice.message.content
    kept = chat(max_tokens=40, stop=stop, extra_body={"include_stop_str_in_output": True}).choices[0].message.content
    assert kept == text[: text.index(stop) + 4]


def test_seeds(chat: Any) -> None:
    def drawn(**options: Any) -> str:
        return str(chat(temperature=2, max_tokens=24, **options).choices[0].message.content)

    assert drawn(seed=7) == drawn(seed=7)
    assert len({drawn(seed=seed) for seed in (1, 2, 3)}) == 3
    assert len({drawn() for _ in range(3)}) == 3


def test_logit_bias(server: Running, chat: Any) -> None:
    lily = server.served.encode(" Lily", special=False)[0]
    assert chat(max_tokens=4, logit_bias={str(lily): 100}).choices[0].message.content == " Lily" * 4
    first = chat(max_tokens=1, logprobs=True).choices[0].logprobs.content[0].token
    token = server.served.encode(first, special=False)[0]
    assert chat(max_tokens=1, logit_bias={str(token): -100}).choices[0].message.content != first


def test_roles_and_content_parts(server: Running, chat: Any) -> None:
    def prompt(*messages: dict[str, Any]) -> str:
        ids = chat(messages=list(messages), max_tokens=1, extra_body={"return_token_ids": True}).prompt_token_ids
        return server.served.tokenizer.decode(ids, skip_special=False)

    plain = prompt({"role": "system", "content": "Be kind."}, {"role": "user", "content": "One\nTwo"})
    assert "system<|end_header_id|>\n\nBe kind.<|eot_id|>" in plain
    part = [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]
    assert prompt({"role": "developer", "content": "Be kind."}, {"role": "user", "content": part}) == plain
    turns = [*MESSAGES, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Go on.", "name": "Ann"}]
    assert "assistant<|end_header_id|>\n\nYes.<|eot_id|>" in prompt(*turns)


def test_an_answer_goes_back_as_the_client_holds_it(chat: Any) -> None:
    message = chat().choices[0].message
    for held in (message, message.to_dict(), message.model_dump()):
        answer = chat(messages=[*MESSAGES, held, {"role": "user", "content": "And then?"}])
        assert answer.choices[0].message.content


def test_a_message_is_continued(chat: Any) -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": PROMPT}]
    keep = {"continue_final_message": True, "add_generation_prompt": False, "return_token_ids": True}
    answer = chat(messages=begun, max_tokens=1, extra_body=keep)
    assert answer.choices[0].message.content == ","
    with pytest.raises(openai.BadRequestError, match="needs an assistant's message at the end"):
        chat(extra_body={"continue_final_message": True})


def test_the_clients_streaming_helper(chat: Any, client: Any) -> None:
    with client.chat.completions.stream(**GREEDY, messages=MESSAGES, stop=[" little"]) as stream:
        kinds = [event.type for event in stream]
    assert {"chunk", "content.delta", "content.done"} <= set(kinds)
    assert stream.get_final_completion().choices[0].message.content == "Once upon a time, there was a"


PROMPTS: list[Any] = [PROMPT, [PROMPT], [PROMPT, "The dog"], [0, 436, 458], [[0, 436, 458], [0, 436]]]


@pytest.mark.parametrize("prompt", PROMPTS, ids=["text", "list", "texts", "ids", "lists of ids"])
def test_prompts(server: Running, complete: Any, prompt: Any) -> None:
    several = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    whole = complete(prompt=prompt, n=2, seed=3, temperature=1)
    assert [choice.index for choice in whole.choices] == list(range(2 * len(several)))
    ids = [server.served.encode(item) if isinstance(item, str) else item for item in several]
    assert whole.usage.prompt_tokens == sum(map(len, ids))
    assert whole.usage.completion_tokens == 24 * len(several)
    texts = [""] * len(whole.choices)
    for chunk in complete(prompt=prompt, n=2, seed=3, temperature=1, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    alone = [complete(prompt=item, n=2, seed=3, temperature=1).choices for item in several]
    assert [choice.text for choices in alone for choice in choices] == texts


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(server: Running, complete: Any, stream: bool) -> None:
    found = complete(echo=True, logprobs=2, max_tokens=3, stream=stream)
    choices = [chunk.choices[0] for chunk in found] if stream else found.choices
    text = "".join(choice.text for choice in choices)
    given = [choice.logprobs for choice in choices if choice.logprobs]
    scores = [score for item in given for score in item.token_logprobs]
    tokens = [token for item in given for token in item.tokens]
    offsets = [offset for item in given for offset in item.text_offset]
    assert text == PROMPT + complete(max_tokens=3).choices[0].text
    assert len(scores) == len(tokens) == len(offsets) == len(server.served.encode(PROMPT)) + 3
    assert scores[0] is None
    assert all(score < 0 for score in scores[1:])
    assert tokens == ["<|begin_of_text|>", *(text[a:b] for a, b in zip(offsets[1:], [*offsets[2:], None], strict=True))]


def test_echo_alone(complete: Any) -> None:
    found = complete(echo=True, max_tokens=0)
    assert (found.choices[0].text, found.usage.completion_tokens) == (PROMPT, 0)
    assert complete(echo=True, max_tokens=1).choices[0].text == PROMPT + ","


def test_offsets_of_parts_of_characters(complete: Any) -> None:
    text = "a é 😀 b"
    choice = complete(prompt=text, echo=True, logprobs=0, max_tokens=1).choices[0]
    offsets = choice.logprobs.text_offset
    assert "\ufffd" in choice.logprobs.tokens, "every character is one token; the test shows nothing"
    pieces = [choice.text[a:b] for a, b in zip(offsets, [*offsets[1:], None], strict=True)]
    assert "".join(pieces) == choice.text
    assert all(
        piece == token for piece, token in zip(pieces[1:], choice.logprobs.tokens[1:], strict=True) if token.isascii()
    )


def test_best_of(complete: Any) -> None:
    drawn = {"temperature": 1.5, "seed": 4, "logprobs": 0}

    def mean(choice: Any) -> float:
        return float(sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs))

    every = sorted(complete(n=4, **drawn).choices, key=mean, reverse=True)
    best = complete(n=2, best_of=4, **drawn)
    assert [choice.text for choice in best.choices] == [choice.text for choice in every[:2]]
    assert best.usage.completion_tokens >= 24


def test_models(server: Running, client: Any) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.max_model_len) == ("demo_model", "model", 4096)
    assert model.sampling_defaults == server.served.sampling_defaults()
    assert client.models.retrieve("demo_model") == model
    with pytest.raises(openai.NotFoundError, match="The model `other/one` does not exist"):
        client.models.retrieve("other/one")


def test_sampling_fields_reach_the_engine(server: Running, complete: Any) -> None:
    extra: dict[str, Any] = {"top_k": 5, "min_p": 0.2, "repetition_penalty": 1.3, "typical_p": 0.9}
    params: dict[str, Any] = {"temperature": 1.2, "seed": 11, "top_p": 0.8}
    params |= {"frequency_penalty": 0.5, "presence_penalty": -0.5}
    wanted = SamplingParams(max_tokens=12, **params, **extra)
    assert complete(**params, extra_body=extra).choices[0].text == engine_text(server, wanted)
    assert complete(**params).choices[0].text != engine_text(server, wanted)


def test_tokens_that_may_come(server: Running, complete: Any) -> None:
    ids = server.served.encode(" dog cat", special=False)
    drawn = {"temperature": 2, "seed": 1, "logprobs": 0}
    found = complete(**drawn, extra_body={"allowed_token_ids": ids}).choices[0].logprobs.tokens
    assert set(found) == {" dog", " cat"}
    assert complete().choices[0].text.startswith(", there was")
    assert "there" not in complete(extra_body={"bad_words": ["there"]}).choices[0].text


def test_ending(server: Running, complete: Any) -> None:
    end = {"logit_bias": {"4": 100}}  # nothing but the end token, as soon as it may come
    choice = complete(**end).choices[0]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("", "stop", None)
    kept = complete(**end, extra_body={"ignore_eos": True, "skip_special_tokens": False}).choices[0]
    assert (kept.text, kept.finish_reason) == ("<|eot_id|>" * 12, "length")
    assert complete(**end, extra_body={"min_tokens": 5}).usage.completion_tokens == 6
    (comma,) = server.served.encode(",", special=False)
    stopped = complete(extra_body={"stop_token_ids": [comma]}).choices[0]
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("", "stop", comma)


def test_token_ids_and_prompt_logprobs(server: Running, complete: Any, chat: Any) -> None:
    asked = {"prompt_logprobs": 2, "return_token_ids": True}
    choice = complete(echo=True, logprobs=2, extra_body=asked).choices[0]
    ids = server.served.encode(PROMPT)
    assert choice.prompt_token_ids == ids
    assert PROMPT + server.served.tokenizer.decode(choice.token_ids) == choice.text
    named = complete(logprobs=1, extra_body={"return_tokens_as_token_ids": True}).choices[0].logprobs
    assert named.tokens == [f"token_id:{token}" for token in choice.token_ids]
    scores = choice.prompt_logprobs
    assert scores[0] is None
    assert [row[str(token)]["logprob"] for row, token in zip(scores[1:], ids[1:], strict=True)] == (
        choice.logprobs.token_logprobs[1 : len(ids)]
    )
    assert all(2 <= len(row) <= 3 for row in scores[1:])
    answer = chat(extra_body=asked)
    assert len(answer.prompt_logprobs) == len(answer.prompt_token_ids) == answer.usage.prompt_tokens
    assert server.served.tokenizer.decode(answer.choices[0].token_ids) == answer.choices[0].message.content
    streamed = [i for c in chat(stream=True, extra_body=asked) for i in c.choices[0].model_extra.get("token_ids", [])]
    assert streamed == answer.choices[0].token_ids


def test_prompts_are_truncated(server: Running, complete: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = server.served.encode(PROMPT)
    for side, kept in (("left", ids[-2:]), ("right", ids[:2])):
        asked = {"truncate_prompt_tokens": 2, "truncation_side": side, "return_token_ids": True}
        assert complete(extra_body=asked).choices[0].prompt_token_ids == kept
    monkeypatch.setattr(server.served, "max_input", 3)
    assert complete(extra_body={"truncate_prompt_tokens": -1}).usage.prompt_tokens == 3
