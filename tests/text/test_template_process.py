"""Templates in a process of their own: the same text as here, and nothing that a template does reaches its caller."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import shared_data
from test_child import wait_until_ended

from squawq.demo import demo_model
from squawq.errors import ConfigError, EngineClosed, QueueFull, TemplateError
from squawq.text.chat_template import render
from squawq.text.child import MAX_ANSWER
from squawq.text.template_process import TemplateProcess

DEMO = (demo_model() / "chat_template.jinja").read_text(encoding="utf-8")
LLAMA = "llama3-chat-template/meta-llama-Llama-3.1-8B-Instruct.jinja"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROWING = "{% set n = namespace(t=deed * 2**18) %}{% for i in range(40) %}{% set n.t = n.t + n.t %}{% endfor %}"
# does what the message says, so that one process is asked for good and bad; constants would be computed in advance
DEEDS = (
    "{% set deed = messages[-1].content %}"
    "{% if deed == 'loop' %}" + ENDLESS + "{% endif %}"
    "{% if deed == 'power' %}{{ (messages|length + 9) ** (10**9) > 1 }}{% endif %}"
    "{% if deed == 'bomb' %}{{ 'a' * 10**10 }}{% endif %}"
    "{% if deed == 'grow' %}" + GROWING + "{% endif %}"
    "{% if deed == 'flood' %}{{ deed * 2**23 }}{% endif %}"
    "{% if deed == 'file' %}{{ cycler.__init__.__globals__.__builtins__.open('/etc/passwd') }}{% endif %}"
    "{{ deed }}"
)


def say(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def pid(process: TemplateProcess) -> int:
    assert process._child is not None
    assert process._child.pid is not None
    return process._child.pid


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def start_endless(process: TemplateProcess, pool: ThreadPoolExecutor) -> Any:
    """Returns once the child has the chat; before that, `render` would start another for one that was killed."""
    process.start()
    assert process._child is not None
    process._child._seconds = 0.0
    future = pool.submit(process.render, say("loop"))
    deadline = time.monotonic() + 60
    while not process._child._seconds and time.monotonic() < deadline:
        time.sleep(0.001)
    return future


def test_the_text_is_the_same() -> None:
    template = shared_data(LLAMA).read_text(encoding="utf-8")
    chat = [*say("Grüße, नमस्ते 😀 \ud800"), {"role": "assistant", "content": "Hello "}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    constant = {"bos_token": "<s>"}
    with TemplateProcess(template, constant) as process:
        cases: list[dict[str, Any]] = [
            {},
            {"tools": tools},
            {"generation_prompt": False},
            {"continue_final": True},
            {"variables": {"date_string": "1 Jan 2026", "bos_token": "<other>"}},
        ]
        for options in cases:
            variables = {**constant, **options.get("variables", {})}
            assert process.render(chat, **options) == render(template, chat, **{**options, "variables": variables})


def test_options_of_the_process() -> None:
    moment = datetime(2024, 7, 26)
    with TemplateProcess("{{ strftime_now('%d %b %Y') }}", tool_template="{{ tools[0].name }}") as process:
        assert process.render(say("a"), now=moment) == "26 Jul 2024"
        assert process.render(say("a"), now=moment, tools=[]) == "26 Jul 2024"
        assert process.render(say("a"), tools=[{"name": "f"}]) == "f"
        with pytest.raises(ConfigError, match="must not be named"):
            process.render(say("a"), variables={"messages": []})
    for timeout_s in (0, float("inf")):
        with pytest.raises(ConfigError, match="must be above 0"):
            TemplateProcess("a", timeout_s=timeout_s)


def test_errors_come_back_and_the_process_stays() -> None:
    with TemplateProcess("{% for", memory_bytes=2**28) as process, pytest.raises(ConfigError, match="refuses"):
        process.render(say("a"))
    with TemplateProcess(DEEDS, memory_bytes=2**28) as process:
        process.start()
        before = pid(process)
        for deed in ("bomb", "grow"):
            with pytest.raises(TemplateError, match="out of memory"):
                process.render(say(deed))
        with pytest.raises(ConfigError, match="unsafe") as refused:
            process.render(say("file"))
        assert not isinstance(refused.value, TemplateError)
        with pytest.raises(ConfigError, match="cannot be written as JSON"):
            process.render([{"role": "user", "content": object()}])
        nested: list[Any] = []
        for _ in range(100_000):
            nested = [nested]
        with pytest.raises(ConfigError, match="cannot be written as JSON"):
            process.render([{"role": "user", "content": nested}])
        assert process.render(say("good")) == "good"
        assert pid(process) == before


@pytest.mark.parametrize("deed", ["loop", "power"])
def test_a_template_that_takes_too_long_is_stopped(deed: str) -> None:
    with TemplateProcess(DEEDS, timeout_s=0.5) as process:
        process.start()
        before = pid(process)
        with pytest.raises(TemplateError, match=r"chat template is refused: it took more than 0\.5 s"):
            process.render(say(deed))
        assert not alive(before)
        assert process.render(say("good")) == "good"


def test_a_reply_is_bounded() -> None:
    with TemplateProcess(DEEDS) as process:
        with pytest.raises(TemplateError, match=f"answered with .* bytes; {MAX_ANSWER:,} are allowed"):
            process.render(say("flood"))
        assert process.render(say("good")) == "good"


def test_more_than_a_pipe_holds() -> None:
    text = "ab" * 1_000_000
    with TemplateProcess("{{ messages[0].content }}") as process:
        assert process.render(say(text)) == text


def test_a_request_too_large_for_the_memory() -> None:
    with TemplateProcess("{{ messages[0].content }}", memory_bytes=2**26) as process:
        with pytest.raises(ConfigError, match="out of memory"):
            process.render(say("a" * 2**26))
        assert process.render(say("good")) == "good"


def test_a_killed_process_is_started_again() -> None:
    with TemplateProcess(DEEDS, timeout_s=60) as process, ThreadPoolExecutor() as pool:
        process.start()
        idle = pid(process)
        os.kill(idle, signal.SIGKILL)
        os.waitid(os.P_PID, idle, os.WEXITED | os.WNOWAIT)
        assert process.render(say("good")) == "good"
        future = start_endless(process, pool)
        os.kill(pid(process), signal.SIGKILL)
        with pytest.raises(TemplateError, match=r"died \(code -9\), perhaps out of memory"):
            future.result()
        assert process.render(say("good")) == "good"


def test_a_process_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(ConfigError, match=r"died \(code 1\)"):
        TemplateProcess(DEMO).start()


def test_ctrl_c_does_not_end_it() -> None:
    with TemplateProcess(DEEDS) as process:
        process.start()
        before = pid(process)
        os.kill(before, signal.SIGINT)
        os.kill(before, signal.SIGTERM)
        assert process.render(say("good")) == "good"
        assert pid(process) == before


def test_it_gets_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUAWQ_TEST_SECRET", "open sesame")
    with TemplateProcess(DEMO) as process:
        process.start()
        environment = Path(f"/proc/{pid(process)}/environ")
        if not environment.is_file():
            pytest.skip("needs /proc")
        assert b"sesame" not in environment.read_bytes()


def test_many_threads() -> None:
    with TemplateProcess(DEEDS, timeout_s=60) as process, ThreadPoolExecutor(8) as pool:
        texts = [f"{n} " * (n % 50 + 1) for n in range(400)]
        assert list(pool.map(lambda text: process.render(say(text)), texts)) == texts


def test_waiting_is_bounded() -> None:
    with TemplateProcess(DEEDS, timeout_s=60) as process, ThreadPoolExecutor() as pool:
        future = start_endless(process, pool)
        process._timeout_s = 0.05
        with pytest.raises(QueueFull, match="try again later"):
            process.render(say("good"))
        process.close()
        with pytest.raises(EngineClosed):
            future.result()


def test_close_ends_what_runs_and_leaves_nothing() -> None:
    process = TemplateProcess(DEEDS, timeout_s=60)
    with ThreadPoolExecutor() as pool:
        future = start_endless(process, pool)
        left = pid(process)
        closers = [threading.Thread(target=process.close) for _ in range(3)]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join(timeout=60)
            assert not closer.is_alive()
        with pytest.raises(EngineClosed):
            future.result()
    process.close()
    assert not alive(left)
    with pytest.raises(EngineClosed, match="was closed"):
        process.render(say("good"))
    assert not alive(pid(process))


def test_it_starts_at_the_first_chat_and_ends_with_its_owner() -> None:
    process = TemplateProcess(DEEDS)
    assert process._child is None
    process.render(say("good"))
    left = pid(process)
    assert alive(left)
    del process
    gc.collect()
    assert not alive(left)


def test_a_killed_parent_leaves_no_endless_template() -> None:
    program = (
        "import sys, threading\nfrom squawq.text.template_process import TemplateProcess\n"
        f"process = TemplateProcess({ENDLESS!r}, timeout_s=1); process.start()\n"
        "threading.Thread(target=process.render, args=([],)).start(); print(process._child.pid, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        left = int(parent.stdout.readline())
        parent.kill()
    wait_until_ended(left)


@pytest.mark.parametrize(
    "ending", ["pass", "os.kill(os.getpid(), signal.SIGKILL)", "raise SystemExit(3)", "os._exit(0)"]
)
def test_no_process_outlives_its_owner(ending: str) -> None:
    program = (
        "import os, signal\nfrom squawq.text.template_process import TemplateProcess\n"
        f"process = TemplateProcess('a'); process.render([])\nprint(process._child.pid, flush=True)\n{ending}"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=False)
    wait_until_ended(int(done.stdout))


def test_a_forked_owner_starts_its_own() -> None:
    with TemplateProcess("{{ messages[0].content }}") as process:
        process.render(say("a"))
        before = pid(process)
        if (fork := os.fork()) == 0:
            right = process.render(say("b")) == "b" and pid(process) != before
            process.close()
            os._exit(0 if right else 1)
        assert os.waitpid(fork, 0)[1] == 0
        assert process.render(say("c")) == "c"
        assert pid(process) == before
