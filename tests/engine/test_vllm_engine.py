"""vLLM as the engine: the adapter on a stand-in, and, where vLLM is installed, on vLLM itself.

The latter need an environment of their own: CONTRIBUTING.md.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_vllm
import pytest

from squawq import LLM
from squawq.config import ModelConfig
from squawq.demo import demo_model
from squawq.engine import vllm_process
from squawq.engine.config import EngineConfig
from squawq.engine.request import FinishReason, Grammar, Output, Request, SamplingParams
from squawq.engine.vllm import VllmEngine
from squawq.errors import ConfigError, EngineClosed, QueueFull
from squawq.format.files import read_config
from squawq.serve.settings import ServerSettings
from squawq.text.tokenizer import Tokenizer

CONFIG = EngineConfig(device="cpu", engine="vllm", max_waiting=2)
INSTALLED = importlib.util.find_spec("vllm") is not None


def real(test: Any) -> Any:
    """A test on vLLM itself, whose own warnings are not ours."""
    lacking = pytest.mark.skipif(not INSTALLED, reason="needs vLLM, in an environment of its own")
    return pytest.mark.filterwarnings("ignore")(lacking(test))


fake = pytest.mark.skipif(INSTALLED, reason="vLLM itself is here")


@pytest.fixture
def engine() -> Iterator[VllmEngine]:
    with fake_vllm.installed(), pytest.MonkeyPatch.context() as patch:
        for name in ("VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL", "VLLM_CONFIGURE_LOGGING", vllm_process.OWNER):
            patch.setenv(name, "")  # put back afterwards
        model = ModelConfig.from_dict(read_config(demo_model()))
        made = VllmEngine(demo_model(), CONFIG, model, Tokenizer(demo_model()), eos_ids=[2])
        yield made
        made.close()
        assert fake_vllm.AsyncLLM.latest.shut


def asked(name: str = "a", **params: Any) -> Request:
    return Request(name, [3, 4, 5], SamplingParams(**{"max_tokens": 5, **params}))


def answers(engine: VllmEngine, *requests: Request) -> dict[str, list[Output]]:
    found: dict[str, list[Output]] = {}
    for output in engine.generate(requests):
        found.setdefault(output.request, []).append(output)
    return found


@fake
def test_tokens_text_and_log_probabilities(engine: VllmEngine) -> None:
    outputs = answers(engine, asked(logprobs=1, prompt_logprobs=0))["a"]
    assert [token for output in outputs for token in output.ids] == fake_vllm.TOKENS[:5]
    assert outputs[-1].finish is FinishReason.LENGTH
    assert "".join(output.text for output in outputs) == Tokenizer(demo_model()).decode(fake_vllm.TOKENS[:5])
    first = outputs[0]
    assert first.logprobs is not None
    assert (first.logprobs[0].token, first.logprobs[0].logprob, first.logprobs[0].top) == (11, -0.5, ((99, -0.25),))
    assert first.prompt_logprobs is not None
    assert [one and (one.token, one.logprob) for one in first.prompt_logprobs] == [None, (4, -1.0), (5, -1.0)]
    stats = engine.stats()
    assert (stats.tokens_generated, stats.pages, stats.pages_used, stats.steps) == (5, 8, 4, 5)
    assert (engine.max_positions, engine.cache_tokens) == (100, 128)


@fake
def test_stop_strings_and_end_tokens_are_ours(engine: VllmEngine) -> None:
    """A stop string closes vLLM's stream; an end token is among the tokens, but not in the text."""
    tokenizer = Tokenizer(demo_model())
    word = tokenizer.decode(fake_vllm.TOKENS[:3])[-1]
    (last,) = answers(engine, asked(stop=[word], max_tokens=60))["a"][-1:]
    assert (last.finish, last.stop_reason) == (FinishReason.STOP, word)
    outputs = answers(engine, asked("b", stop_ids=[13]))["b"]
    assert [token for output in outputs for token in output.ids] == [11, 12, 13]
    assert (outputs[-1].finish, outputs[-1].stop_reason, outputs[-1].text) == (FinishReason.STOP, 13, "")
    assert fake_vllm.AsyncLLM.latest.closed[0] == "a-0"


@fake
def test_parameters_arrive(engine: VllmEngine) -> None:
    """Each sequence is a request of its own; what vLLM does not have is refused."""
    params: dict[str, Any] = {
        "temperature": 0.7,
        "top_k": 9,
        "top_p": 0.8,
        "min_p": 0.1,
        "min_tokens": 2,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.3,
        "logit_bias": {7: 2.0},
        "allowed_ids": [11, 12],
        "bad_ids": [[8, 9]],
        "seed": 2**63 - 1,
        "n": 2,
    }
    found = answers(engine, Request("a", [3, 4], SamplingParams(max_tokens=3, **params), tenant="t", cache_salt="s"))
    assert {output.index for output in found["a"]} == {0, 1}
    (prompt, one, name), (_, two, _) = fake_vllm.AsyncLLM.latest.asked
    assert (prompt, name) == ({"prompt_token_ids": [3, 4], "cache_salt": "t\0s"}, "a-0")
    for key in ("temperature", "top_k", "top_p", "min_p", "min_tokens", "repetition_penalty", "logit_bias"):
        assert getattr(one, key) == params[key]
    assert (one.frequency_penalty, one.presence_penalty, one.allowed_token_ids) == (0.2, 0.3, [11, 12])
    assert (one._bad_words_token_ids, one.seed, two.seed, one.max_tokens) == ([[8, 9]], 2**63 - 1, 0, 3)
    assert (one.stop_token_ids, one.ignore_eos, one.detokenize) == ([2], True, False)
    with pytest.raises(ConfigError, match=r"typical_p is 0\.5, which vLLM does not have"):
        engine.check(asked("b", typical_p=0.5))


@fake
def test_grammars(engine: VllmEngine) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for kind, text in (("json_schema", json.dumps(schema)), ("regex", "[ab]+"), ("gbnf", 'root ::= "yes"')):
        answers(engine, asked(kind, grammar=Grammar(kind, text)))
    given = [params.structured_outputs for _, params, _ in fake_vllm.AsyncLLM.latest.asked]
    assert json.loads(given[0].json) == {**schema, "additionalProperties": False}
    assert (given[1].regex, given[2].grammar) == ("[ab]+", 'root ::= "yes"')
    with pytest.raises(ConfigError):
        engine.check(asked(grammar=Grammar("regex", "(")))


@fake
def test_best_of_gives_the_best(engine: VllmEngine) -> None:
    outputs = answers(engine, asked(n=1, best_of=3))["a"]
    assert [(output.index, len(output.ids)) for output in outputs] == [(0, 5)]


@fake
def test_abort_queue_and_close(engine: VllmEngine) -> None:
    llm, got = fake_vllm.AsyncLLM.latest, queue.SimpleQueue[Output]()
    llm.hold.clear()
    for name in ("a", "b"):
        engine.submit(asked(name), got.put)
    assert engine.waits("a")
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        engine.submit(asked("c"), got.put)
    with pytest.raises(ConfigError, match="'a' is in use"):
        engine.submit(asked("a"), got.put)
    engine.abort("a")
    engine.abort("unknown")
    assert (ended := got.get(timeout=10)).request == "a"
    assert ended.finish is FinishReason.ABORT
    assert not engine.waits("a")
    threading.Timer(0.2, engine._loop.call_soon_threadsafe, [llm.hold.set]).start()
    engine.close(drain=True, timeout=10)
    finishes = []
    while not got.empty():
        finishes.append(got.get().finish)
    assert finishes[-1] is FinishReason.LENGTH
    assert not engine.alive
    with pytest.raises(EngineClosed):
        engine.submit(asked("d"), got.put)


@fake
def test_a_sink_that_raises_aborts_its_request_alone(engine: VllmEngine) -> None:
    def sink(_: Output) -> None:
        raise ValueError

    engine.submit(asked("a", max_tokens=50), sink)
    assert answers(engine, asked("b"))["b"][-1].finish is FinishReason.LENGTH
    steps: list[int] = []
    engine.on_step(lambda: steps.append(1))
    answers(engine, asked("a"))  # the id is free again
    assert steps


@fake
def test_a_dead_engine_ends_its_requests(engine: VllmEngine) -> None:
    fake_vllm.AsyncLLM.latest.fails = True
    outputs = answers(engine, asked())["a"]
    assert (outputs[-1].finish, outputs[-1].stop_reason) == (FinishReason.ERROR, "vLLM's engine has ended")
    assert engine.failure == "vLLM's engine has ended"
    assert not engine.alive


@fake
def test_refused_arguments() -> None:
    model = ModelConfig.from_dict(read_config(demo_model()))
    with pytest.raises(ConfigError, match=r"vLLM cannot be imported .*; install it"):
        VllmEngine(demo_model(), CONFIG, model)
    with fake_vllm.installed():
        config = EngineConfig(device="cpu", engine="vllm", engine_args={"no_such": 1})
        with pytest.raises(ConfigError, match="engine_args has 'no_such'"):
            VllmEngine(demo_model(), config, model)
        second = EngineConfig(device="cuda:1", engine="vllm")
        with pytest.raises(ConfigError, match=r"device is 'cuda:1', but .*CUDA_VISIBLE_DEVICES"):
            VllmEngine(demo_model(), second, model)
        refused = EngineConfig(device="cpu", engine="vllm", engine_args={"model": "refused"})
        with pytest.raises(ConfigError, match=r"vLLM cannot run .*: no such architecture"):
            VllmEngine(demo_model(), refused, model)
    assert "squawq-vllm" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    ("knobs", "why"),
    [
        ({"engine": "vllm", "exact": True}, "exact is True, which needs the engine squawq"),
        ({"engine": "vllm", "kv_tokens": 64}, "kv_tokens is 64"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2, which needs the engine vllm"),
        ({"distributed_executor_backend": "ray"}, "distributed_executor_backend is 'ray'"),
        ({"engine": "other"}, "engine"),
    ],
)
def test_settings_of_the_other_engine_are_refused(knobs: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        EngineConfig(device="cpu", **knobs)


def test_headless_is_for_other_hosts() -> None:
    with pytest.raises(ConfigError, match="node_rank is above 0"):
        ServerSettings(model="m", device="cpu", engine="vllm", headless=True)
    assert ServerSettings(model="m", device="cpu", engine="vllm", nnodes=2, node_rank=1, headless=True).headless


def test_vllms_processes_end_with_their_owner() -> None:
    """The plugin, as vLLM calls it: in a process whose owner is alive, and in one whose owner is not."""
    program = "from squawq.engine.vllm_process import *; end_with_owner(); time.sleep(3)"
    gone = subprocess.Popen(["true"])
    gone.wait()
    for owner, code in ((os.getpid(), 0), (gone.pid, 1)):
        env = {**os.environ, vllm_process.OWNER: str(owner)}
        assert subprocess.run([sys.executable, "-c", program], env=env, check=False).returncode == code


PROMPTS = ["Once upon a time", "The little dog", "Tom and Lily went to the park and"]
REAL = {"enforce_eager": True, "dtype": "float32"}


@real
def test_vllm_gives_our_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    wanted: dict[str, Any] = {"max_tokens": 40, "temperature": 0, "progress": False}
    with LLM(demo_model(), device="cpu", exact=True) as llm:
        ours = llm.generate(PROMPTS, **wanted)
        scored = llm.complete(PROMPTS[:1], max_tokens=5, temperature=0, logprobs=2)[0][0]
    with LLM(demo_model(), device="cpu", engine="vllm", max_model_len=512, engine_args=REAL) as llm:
        assert llm.generate(PROMPTS, **wanted) == ours
        found = llm.complete(PROMPTS[:1], max_tokens=5, temperature=0, logprobs=2)[0][0]
        for one, other in zip(scored.logprobs or (), found.logprobs or (), strict=True):
            assert one.token == other.token
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
            assert abs(one.logprob - other.logprob) < 1e-3
        stream = llm.stream("Once", max_tokens=400, ignore_eos=True)
        next(stream)
        stream.close()
        choice = Grammar("gbnf", 'root ::= "yes" | "no"')
        assert llm.generate("Say: ", max_tokens=9, temperature=0, grammar=choice, progress=False) in ("yes", "no")
        end = time.monotonic() + 10
        while llm.engine.stats().running and time.monotonic() < end:
            llm.generate("Once", max_tokens=1, progress=False)
        assert llm.engine.stats().running == 0


class Server:
    """`squawq serve --engine vllm` in a process of its own."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "squawq", "serve", str(demo_model()), "--engine", "vllm", "--port", "0"]
        command += ["--max-model-len", "1024", "--engine-args", json.dumps(REAL), "--log-format", "json"]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if '"serving"' in line:
                self.url = json.loads(line)["at"]
                break
        self._reader = threading.Thread(target=self.process.stderr.read, daemon=True)
        self._reader.start()
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=True)
        self.children = [int(pid) for pid in found.stdout.split()]

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(30)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def engine_process(self) -> int:
        (found,) = (pid for pid in self.children if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text())
        return found

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def childless(self, seconds: float = 10) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not any(Path(f"/proc/{pid}").exists() for pid in self.children):
                return True
            time.sleep(0.1)
        return False


@real
def test_a_server_speaks_both_dialects_and_leaves_no_process() -> None:
    with Server() as server:
        body = {"prompt": "Once", "max_tokens": 8, "temperature": 0}
        assert server.post("/v1/completions", body)["choices"][0]["text"] == " upon a time, there was a little"
        tgi = {"inputs": "Once", "parameters": {"max_new_tokens": 8}}
        assert server.post("/generate", tgi)["generated_text"] == " upon a time, there was a little"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert server.childless()


@real
@pytest.mark.parametrize("killed", ["server", "engine"])
def test_what_is_killed_ends_all(killed: str) -> None:
    with Server() as server:
        os.kill(server.process.pid if killed == "server" else server.engine_process(), signal.SIGKILL)
        assert server.process.wait(20) == (-signal.SIGKILL if killed == "server" else 1)
        assert server.childless()
