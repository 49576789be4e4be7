"""Soak test of the server: many mixed requests; every complete response is compared with the engine's own result.

`make_cases` has requests for every generation route with their expected answers, computed one at a time by an engine.
`soak` sends them over HTTP in random order, among clients that disconnect, send invalid requests or read slowly.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from http_client import HOST, Answer, ask, decode, encode

from squawq.engine.protocol import InferenceEngine
from squawq.engine.request import FinishReason, Grammar, Output, Request, SamplingParams
from squawq.engine.sequence import join
from squawq.text.tokenizer import Tokenizer

DEADLINE = 60  # seconds; an answer that takes longer counts as missing
ABORTED, BAD, SLOW = 0.2, 0.1, 0.05  # shares of the requests
PROMPTS = ("Once upon a time", "The little dog said", "Tell me a story about Zoë and 3 cats.")
SCHEMA = '{"type": "object", "properties": {"a": {"enum": ["x", "yes"]}, "b": {"type": "boolean"}}, "required": ["a"]}'
SETTINGS = (
    SamplingParams(max_tokens=12),
    SamplingParams(max_tokens=12, temperature=0.9, top_p=0.95, seed=11),
    SamplingParams(max_tokens=10, temperature=1.0, top_k=40, seed=5, n=3, logprobs=0),
    SamplingParams(max_tokens=40, temperature=0.7, seed=8, stop=(".", " the"), repetition_penalty=1.2),
    SamplingParams(max_tokens=8, temperature=0.8, seed=2, logprobs=3),
    SamplingParams(max_tokens=32, temperature=1.0, seed=4, grammar=Grammar("json_schema", SCHEMA)),
    SamplingParams(max_tokens=16, temperature=1.0, seed=6, grammar=Grammar("regex", "[a-z]{3,9} [0-9]{2}")),
)
NONSENSE: tuple[tuple[str, Any, str, int], ...] = (  # path, body, content type, status
    ("/v1/chat/completions", b'{"messages": [', "application/json", 400),
    ("/v1/chat/completions", {"messages": []}, "application/json", 400),
    ("/v1/chat/completions", {"messages": [{"role": "king", "content": "a"}]}, "application/json", 400),
    ("/v1/chat/completions", b"[" * 20000, "application/json", 400),
    ("/v1/completions", {"prompt": "a", "temperature": -1}, "application/json", 400),
    ("/v1/completions", {"prompt": "a", "max_tokens": 10**6}, "application/json", 400),
    ("/v1/completions", {"prompt": [10**6]}, "application/json", 400),
    ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "("}}, "application/json", 400),
    ("/v1/completions", {"prompt": "a", "stream": True, "prompt_embeds": "a"}, "application/json", 400),
    ("/v1/completions", {"prompt": "a"}, "text/plain", 415),
    ("/generate", {"inputs": ""}, "application/json", 422),
    ("/generate_stream", {"inputs": "a", "parameters": {"max_new_tokens": 0}}, "application/json", 422),
    ("/generate", b"\xff\xfe", "application/json", 422),
    ("/no/such/route", {"prompt": "a"}, "application/json", 404),
)


@dataclass(frozen=True)
class Text:
    """One text of an answer: the text, its finish reason, and log probabilities of its tokens if requested."""

    text: str
    finish: str | None
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Case:
    """A request, and the engine's expected texts."""

    path: str
    body: Mapping[str, Any]
    expected: tuple[Text, ...]

    @property
    def request(self) -> bytes:
        """The request as bytes."""
        return encode(self.path, self.body)

    def wrong(self, answer: Answer) -> str | None:
        """What is wrong with an answer, or nothing."""
        if answer.status != 200:
            return f"{self.path} answered {answer.status}: {answer.body[:200]!r}"
        try:
            read = _openai_texts if self.path.startswith("/v1/") else _tgi_texts
            found = read(answer, len(self.expected))
        except (LookupError, TypeError, ValueError) as error:
            return f"{self.path} {self.body}: {error!r} in {answer.body[:300]!r}"
        return None if found == self.expected else f"{self.path} {self.body}: {found}, not {self.expected}"


def make_cases(engine: InferenceEngine, tokenizer: Tokenizer) -> list[Case]:
    """Requests of every kind with their answers; each runs alone."""

    def alone(ids: Sequence[int], params: SamplingParams) -> list[Output]:
        outputs = list(engine.generate([Request("alone", ids, params)]))
        return [join([output for output in outputs if output.index == index]) for index in range(params.n)]

    cases = []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        ids, chat_ids = tokenizer.encode(prompt), tokenizer.encode_chat(messages)
        for params in SETTINGS:
            texts, chats = (tuple(map(_text, alone(given, params))) for given in (ids, chat_ids))
            for stream in (False, True):
                body = {**_openai_body(params), "stream": stream}
                scored: dict[str, Any] = {} if params.logprobs is None else {"logprobs": params.logprobs}
                cases.append(Case("/v1/completions", {"prompt": prompt, **body, **scored}, texts))
                scored = scored and {"logprobs": True, "top_logprobs": params.logprobs}
                cases.append(Case("/v1/chat/completions", {"messages": messages, **body, **scored}, chats))
            if params.n == 1:
                (output,) = alone(ids, replace(params, include_stop=True, logprobs=params.logprobs or 0))
                body, texts = {"inputs": prompt, "parameters": _tgi_body(params)}, (_tgi_text(output),)
                cases += [Case(path, body, texts) for path in ("/generate", "/generate_stream")]
    return cases


def _openai_body(params: SamplingParams) -> dict[str, Any]:
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed", "n", "repetition_penalty")
    body = {name: getattr(params, name) for name in names} | {"stop": list(params.stop)}
    return body | ({"response_format": _form(params.grammar)} if params.grammar else {})


def _tgi_body(params: SamplingParams) -> dict[str, Any]:
    body: dict[str, Any] = {
        "max_new_tokens": params.max_tokens,
        "details": True,
        "stop": list(params.stop),
        "seed": params.seed,
    }
    body |= {"repetition_penalty": params.repetition_penalty, "top_n_tokens": params.logprobs}
    if params.temperature:
        body |= {"do_sample": True, "temperature": params.temperature}
        body |= {"top_p": params.top_p} if params.top_p < 1 else {}
    return body | ({"grammar": _form(params.grammar)} if params.grammar else {})


def _form(grammar: Grammar) -> dict[str, Any]:
    return {"type": "regex" if grammar.kind == "regex" else "json_object", "value": grammar.text}


def _text(output: Output) -> Text:
    assert output.finish is not None
    return Text(output.text, output.finish.value, tuple(item.logprob for item in output.logprobs or ()))


def _tgi_text(output: Output) -> Text:
    ended = "stop_sequence" if isinstance(output.stop_reason, str) else "eos_token"
    return replace(_text(output), finish="length" if output.finish is FinishReason.LENGTH else ended)


def _openai_texts(answer: Answer, count: int) -> tuple[Text, ...]:
    """The texts of a whole response or of a stream's chunks."""
    texts = [Text("", None, ())] * count
    if answer.streamed and not answer.ended:
        raise ValueError("the stream has no end mark")
    for choice in (choice for value in answer.values() for choice in value["choices"]):
        before = texts[choice["index"]]
        if before.finish is not None:
            raise ValueError("a piece came after the end")
        text = (
            choice["text"] if "text" in choice else choice["delta" if answer.streamed else "message"].get("content", "")
        )
        scores = choice["logprobs"] or {}
        scores = scores.get("token_logprobs") or [item["logprob"] for item in scores.get("content", ())]
        texts[choice["index"]] = Text(before.text + text, choice["finish_reason"], (*before.logprobs, *scores))
    return tuple(texts)


def _tgi_texts(answer: Answer, _: int) -> tuple[Text, ...]:
    values = answer.values()
    text, details = values[-1]["generated_text"], values[-1]["details"]
    tokens = [value["token"] for value in values] if "token" in values[-1] else details["tokens"]
    return (Text(text, details["finish_reason"], tuple(token["logprob"] for token in tokens)),)


@dataclass
class Tally:
    """Outcome of the requests. wrong: answers that differ; unexpected: statuses, and requests without an answer."""

    equal: int = 0
    slow: int = 0
    aborted: int = 0
    bad: int = 0
    wrong: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


async def soak(port: int, cases: Sequence[Case], count: int, at_once: int, seed: int) -> Tally:
    """Send `count` requests, `at_once` at a time."""
    tally, draw = Tally(), random.Random(seed)
    moods = iter([draw.random() for _ in range(count)])
    await asyncio.gather(*(_client(port, cases, moods, draw, tally) for _ in range(at_once)))
    return tally


async def _client(port: int, cases: Sequence[Case], moods: Iterator[float], draw: random.Random, tally: Tally) -> None:
    for mood in moods:
        case = draw.choice(cases)
        try:
            async with asyncio.timeout(DEADLINE):
                if mood < ABORTED:
                    await _hang_up(port, case.request, draw)
                    tally.aborted += 1
                elif mood < ABORTED + BAD:
                    path, body, kind, status = draw.choice(NONSENSE)
                    answer = await ask(port, encode(path, body, kind))
                    tally.bad += 1
                    if answer.status != status:
                        tally.unexpected.append(f"{path} {str(body)[:80]}: {answer.status}, not {status}")
                else:
                    slow = mood < ABORTED + BAD + SLOW
                    answer = await (_crawl if slow else ask)(port, case.request)
                    wrong = case.wrong(answer)
                    tally.slow += slow
                    tally.equal += wrong is None
                    if wrong is not None:
                        (tally.wrong if answer.status == 200 else tally.unexpected).append(wrong)
        except (OSError, ValueError) as error:  # TimeoutError is an OSError
            tally.unexpected.append(f"{case.path} {case.body}: {error!r}")


async def _hang_up(port: int, request: bytes, draw: random.Random) -> None:
    """Close or reset a connection at any moment: while the request is sent, while its answer is made or read."""
    reader, writer = await asyncio.open_connection(HOST, port)
    sent = draw.choice((len(request), len(request), draw.randrange(len(request))))
    writer.write(request[:sent])
    try:
        async with asyncio.timeout(draw.choice((0.01, 0.1, 0.5)) * draw.random()):
            await reader.read()
    except (TimeoutError, ConnectionError):
        pass
    if draw.random() < 0.5:
        writer.transport.abort()
    writer.close()


async def _crawl(port: int, request: bytes) -> Answer:
    """Read an answer in small pieces with pauses."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (HOST, port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=512)
    try:
        writer.write(request)
        data = b""
        while piece := await reader.read(256):
            data += piece
            await asyncio.sleep(0.01)
        return decode(data)
    finally:
        writer.close()
