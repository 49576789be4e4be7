"""LLM and the server need of an engine what InferenceEngine says, and no more: they run on one that only repeats."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import httpx
from running import DEFAULTS

from squawq import LLM
from squawq.demo import demo_model
from squawq.engine.protocol import InferenceEngine, Stats
from squawq.engine.request import FinishReason, Output, Request, Sink
from squawq.serve.app import Api
from squawq.serve.model import Served
from squawq.serve.server import Server
from squawq.serve.settings import ServerSettings
from squawq.text.tokenizer import Tokenizer


class Parrot(InferenceEngine):
    """Answers each prompt with its own tokens."""

    max_positions, cache_tokens, alive, failure = 512, 4096, True, None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._on_step: list[Callable[[], object]] = []

    def check(self, request: Request) -> object:
        return None

    def submit(self, request: Request, sink: Sink, *, wait: bool = False) -> None:
        for output in self.generate([request]):
            sink(output)
        for callback in self._on_step:
            callback()

    def generate(self, requests: Sequence[Request]) -> Iterator[Output]:
        for request in requests:
            ids = tuple(request.prompt[: request.params.max_tokens])
            for index in range(request.params.n):
                text = self._tokenizer.decode(ids)
                yield Output(request.id, index, ids, text, finish=FinishReason.LENGTH)

    def abort(self, request_id: str) -> None:
        pass

    def waits(self, request_id: str) -> bool:
        return False

    def on_step(self, callback: Callable[[], object]) -> None:
        self._on_step.append(callback)

    def draw_seed(self) -> int:
        return 0

    def stats(self) -> Stats:
        return Stats(*[0] * 12)

    def close(self, drain: bool = False, timeout: float | None = None) -> None:
        pass


def test_llm_on_another_engine() -> None:
    with LLM(demo_model(), kv_tokens=256) as llm:
        llm.engine = Parrot(llm.tokenizer)
        assert llm.generate("Once upon a time") == "Once upon a time"
        assert llm.generate(["Once", "upon"]) == ["Once", "upon"]


def test_the_server_on_another_engine() -> None:
    served = Served(ServerSettings(**DEFAULTS))
    own, served.engine = served.engine, Parrot(served.tokenizer)
    server = Server(Api(served))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.01)
        url = f"http://127.0.0.1:{server.bound_port}/v1/completions"
        answer = httpx.post(url, json={"prompt": "Once upon a time"}, timeout=60).json()
        assert answer["choices"][0]["text"] == "Once upon a time"
    finally:
        server.stop()
        thread.join(20)
        own.close()
        served.close()
