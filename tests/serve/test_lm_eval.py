"""What lm-evaluation-harness's local-completions model sends (read in its releases 0.4.9 to 0.4.13), what it reads out
of the answers, and that it is the model's own log likelihoods.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest
from conftest import shared_data
from running import Running

from squawq.demo import demo_model
from squawq.engine.request import SamplingParams
from squawq.llm import LLM
from squawq.serve.openai.base import LogprobFormatter
from squawq.text.tokenizer import Tokenizer

PAIRS = [
    ("Once upon a time,", " there was a little girl"),
    ("The dog", " ran to the park.\nIt was"),
    ("She was", " happy. é😀"),
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(demo_model(), threads=1) as found:
        yield found


@pytest.fixture(params=["server", "tgi_server"])
def any_server(request: pytest.FixtureRequest) -> Running:
    found: Running = request.getfixturevalue(request.param)
    return found


def ask(server: Running, path: str, body: dict[str, Any]) -> Any:
    answer = httpx.post(server.url + path, json=body, headers={"Authorization": "Bearer"}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def score(server: Running, prompt: Any) -> list[dict[str, Any]]:
    """The choices for a loglikelihood request, in the order of the prompts."""
    body = {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 1, "logprobs": 1}
    choices = ask(server, "/v1/completions", {**body, "seed": 1234, "echo": True})["choices"]
    return sorted(choices, key=lambda choice: int(choice["index"]))


def read(choice: dict[str, Any], context: int) -> tuple[float, bool]:
    """A continuation's log likelihood and whether it is the greedy one, as the harness finds them."""
    scores = choice["logprobs"]["token_logprobs"][context:-1]
    tops = choice["logprobs"]["top_logprobs"][context:-1]
    return sum(scores), all(score == max(top.values()) for score, top in zip(scores, tops, strict=True))


def split(llm: LLM, pair: tuple[str, str]) -> tuple[list[int], int]:
    """Tokens of context and continuation, and how many are the context's; no begin token."""
    return llm.tokenizer.encode("".join(pair), False), len(llm.tokenizer.encode(pair[0], False))


def own(llm: LLM, ids: list[int], context: int) -> tuple[float, bool]:
    """The same from the library."""
    ((output,),) = llm.complete([ids], SamplingParams(max_tokens=1, prompt_logprobs=1))
    assert output.prompt_logprobs is not None
    found = [item for item in output.prompt_logprobs[context:] if item is not None]
    assert len(found) == len(ids) - context
    return sum(item.logprob for item in found), all(item.logprob == item.top[0][1] for item in found)


def test_log_likelihoods(any_server: Running, llm: LLM) -> None:
    batch = [split(llm, pair) for pair in PAIRS]
    choices = score(any_server, [ids for ids, _ in batch])
    found = [read(choice, context) for choice, (_, context) in zip(choices, batch, strict=True)]
    assert found == [own(llm, ids, context) for ids, context in batch]
    assert [greedy for _, greedy in found] == [True, False, False]
    alone = [read(score(any_server, [ids])[0], context) for ids, context in batch]
    assert alone == found


def test_the_form_of_an_answer(server: Running, llm: LLM) -> None:
    for ids, _ in (split(llm, pair) for pair in PAIRS):
        (choice,) = score(server, [ids])
        text, found = choice["text"], choice["logprobs"]
        rows = [found[name] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")]
        assert [len(row) for row in rows] == [len(ids) + 1] * 4, "a begin token was added, or a token is missing"
        assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
        assert all(-math.inf < logprob <= 0 for logprob in found["token_logprobs"][1:])
        assert all(1 <= len(top) <= 2 for top in found["top_logprobs"][1:])
        assert text.startswith(llm.tokenizer.decode(ids))
        assert found["text_offset"][0] == 0
        pieces = [text[a:b] for a, b in pairwise([*found["text_offset"], len(text)])]
        assert "".join(pieces) == text
        assert all(
            piece == name for piece, name in zip(pieces, found["tokens"], strict=True) if "\ufffd" not in name + piece
        )


def test_names_keep_their_spaces() -> None:
    """Decoded alone, such tokens of SentencePiece lose theirs."""
    tokenizer = Tokenizer(shared_data("autoawq-babyllama"))
    assert [LogprobFormatter(tokenizer).text(token) for token in tokenizer.encode("a b")] == ["<s>", " ", "a", " ", "b"]


def test_texts_and_their_ids_are_the_same(server: Running, llm: LLM) -> None:
    """A text gets the model's begin token, as in vLLM; ids get nothing."""
    texts = ["".join(pair) for pair in PAIRS]
    by_text, by_ids = score(server, texts), score(server, [llm.tokenizer.encode(text) for text in texts])
    assert by_text == by_ids
    for text, choice in zip(texts, by_text, strict=True):
        assert score(server, text) == [{**choice, "index": 0}]
        assert choice["logprobs"]["tokens"][0] == "<|begin_of_text|>"


def test_a_prompt_that_fills_the_context(server: Running, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.served, "max_len", 64)
    monkeypatch.setattr(server.served, "max_input", 63)
    ids = llm.tokenizer.encode("Lily had a dog. " * 40, False)[:63]
    assert read(score(server, [ids])[0], 60) == own(llm, ids, 60)


def test_generation(any_server: Running, llm: LLM) -> None:
    until = ["\n\n", ".", "<|eot_id|>"]
    body = {"prompt": [llm.tokenizer.encode("Once upon a time")], "model": "demo", "max_tokens": 20, "temperature": 0}
    choice = ask(any_server, "/v1/completions", {**body, "stop": until, "seed": 1234})["choices"][0]
    whole = llm.generate("Once upon a time", SamplingParams(max_tokens=20))
    assert choice["text"].removesuffix(".") == whole.split(".")[0]  # TGI's dialect keeps what stopped it


def test_chats(server: Running, llm: LLM) -> None:
    messages = [{"role": "user", "content": "Tell me a story.", "type": "text"}]
    body = {"messages": messages, "model": "demo", "max_tokens": 8, "temperature": 0, "stop": ["\n\n"], "seed": 1234}
    text = ask(server, "/v1/chat/completions", body)["choices"][0]["message"]["content"]
    assert text == llm.chat([{"role": "user", "content": "Tell me a story."}], SamplingParams(max_tokens=8))


def test_the_remote_tokenizer(any_server: Running, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness tokenizes by the server where /tokenizer_info has an eos_token, a text, and /tokenize answers."""
    monkeypatch.setitem(any_server.served.tokenizer.settings, "eos_token", {"content": "<|eot_id|>", "lstrip": False})
    info = any_server.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<|begin_of_text|>", "<|eot_id|>")
    assert info["chat_template"] == llm.tokenizer.chat_template

    def encode(text: str) -> list[int]:
        body = {"prompt": text, "add_special_tokens": False}
        found: list[int] = ask(any_server, "/tokenize", body)["tokens"]
        return found

    assert encode(info["eos_token"]) == [4]
    for pair in PAIRS:
        text = "".join(pair)
        assert encode(text) == llm.tokenizer.encode(text, False)
        assert ask(any_server, "/detokenize", {"tokens": encode(text)}) == {"prompt": text}
