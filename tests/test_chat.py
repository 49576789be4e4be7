"""`squawq chat` on a terminal: a real pty, with answers (stdout) in a pipe of their own."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from squawq import cli
from squawq.commands import chat
from squawq.commands.chatting import talk
from squawq.commands.chatting.conversation import Conversation
from squawq.demo import demo_model
from squawq.engine.request import FinishReason, Output, SamplingParams

PROMPT = rb"\x1b\[\?2004h[^>]*\x1b\[0m>"  # a new one, as prompt_toolkit draws it
UP, LEFT, BACKSPACE, CTRL_C, CTRL_D, CTRL_U = b"\x1b[A", b"\x1b[D", b"\x7f", b"\x03", b"\x04", b"\x15"


class Terminal:
    """The other end of a child's terminal, and its stdout."""

    def __init__(self, master: int, child: subprocess.Popen[bytes]) -> None:
        self.master, self.child = master, child
        assert child.stdout is not None
        self._answers = child.stdout.fileno()
        self.shown, self.answers = b"", b""

    def type(self, data: bytes) -> None:
        while data:
            data = data[os.write(self.master, data[:1000]) :]
            self._read(0)

    def paste(self, text: str) -> None:
        self.type(b"\x1b[200~" + text.encode() + b"\x1b[201~")

    def wait(self, pattern: bytes, *, answer: bool = False, seconds: float = 120) -> bytes:
        """What was shown (or answered) since the last wait, once it has this."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found = self.answers if answer else self.shown
            if re.search(pattern, found):
                if answer:
                    self.answers = b""
                else:
                    self.shown = b""
                return found
            self._read(0.2)
        raise AssertionError(f"{pattern!r} did not come; shown: {self.shown[-500:]!r}, answers: {self.answers!r}")

    def _read(self, seconds: float) -> None:
        ready, _, _ = select.select([self.master, self._answers], [], [], seconds)
        if self.master in ready:
            self.shown += os.read(self.master, 65536)
        if self._answers in ready:
            self.answers += os.read(self._answers, 65536)


@contextmanager
def talking(model: Path, state: Path, *options: str) -> Iterator[Terminal]:
    master, slave = os.openpty()
    child = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "squawq", "chat", str(model), *options],
        stdin=slave,
        stderr=slave,
        stdout=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_take_terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40", "XDG_STATE_HOME": str(state)},
    )
    os.close(slave)
    try:
        yield Terminal(master, child)
    finally:
        child.kill()
        child.wait(20)
        assert child.stdout is not None
        child.stdout.close()
        os.close(master)


def _take_terminal() -> None:
    """Ctrl-C is a signal only on a process's own terminal, and where the tests' parent has not had it ignored."""
    import fcntl
    import signal
    import termios

    signal.signal(signal.SIGINT, signal.default_int_handler)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """The demo model without an end of its texts: an answer is under way until it is stopped."""
    folder = Path(shutil.copytree(demo_model(), tmp_path / "demo_model"))
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, "eos_token_id": settings["pad_token_id"]}))
    return folder


def test_a_conversation_on_a_terminal(endless: Path, tmp_path: Path) -> None:
    options = ("--max-tokens", "2000", "--temperature", "0", "--threads", "1")
    with talking(endless, tmp_path, *options) as terminal:
        banner = terminal.wait(PROMPT)
        for words in (b"demo_model", b"context of 4,096 tokens", b"Ctrl-C stops an answer", b"/exit or Ctrl-D ends"):
            assert words in banner
        assert b"run the same command" not in banner

        terminal.type(b"half a quest" + CTRL_C)  # at the prompt: how to leave, and go on
        assert b"/exit or Ctrl-D ends" in terminal.wait(b"there is none now[^>]*" + PROMPT)

        terminal.type(b"Tell me a stoy." + LEFT + LEFT + b"r" + b"\r")  # the arrow moves, and prints no ^[[D
        terminal.wait(b"Once upon a time", answer=True)
        terminal.type(CTRL_C)
        ended = rb"\d+ tokens, [\d.,]+ tokens/s, context [\d,]+ of 4,096, stopped by Ctrl-C"
        assert re.search(ended, terminal.wait(PROMPT))
        terminal.wait(b"\n", answer=True)

        terminal.type(UP)
        assert b"Tell me a story." in terminal.wait(rb"Tell me a story\.")
        terminal.type(CTRL_U + b"/und\t")
        terminal.wait(rb"/und[^o]*o")  # completed, perhaps drawn in pieces
        terminal.type(b"\r")  # the question is back in the editor
        terminal.wait(rb"taken back: Tell me a story\.[^>]*" + PROMPT + rb"[^>]*Tell me a story\.")
        terminal.type(CTRL_U + b"/new\r")
        assert b"/new is no command; choose one of /help, /system" in terminal.wait(b"is no command[^>]*" + PROMPT)
        terminal.type(b"/reset\r")
        terminal.wait(b"starts over[^>]*" + PROMPT)

        terminal.paste("Tell me a story\nabout a cat\nnamed Tom.")
        terminal.type(b"\r")
        terminal.wait(b"\n", answer=True)
        terminal.wait(PROMPT)
        terminal.type(UP)  # the last message is all three lines
        recalled = terminal.wait(b"named Tom")
        assert b"Tell me a story" in recalled
        assert b"about a cat" in recalled
        terminal.type(CTRL_C)
        terminal.wait(PROMPT)

        terminal.paste("The cat sat. " * 3700)  # 48,100 characters
        terminal.type(b"\r")
        said = re.search(rb"the prompt has (\d+) tokens", terminal.wait(b"/reset starts over[^>]*" + PROMPT))
        assert said is not None
        assert int(said[1]) > 3700 * 4

        terminal.type(CTRL_D)
        assert terminal.child.wait(60) == 0

    kept = tmp_path / "squawq" / "chat_history"
    assert "Tell me a story." in kept.read_text()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    with talking(endless, tmp_path, *options) as terminal:
        terminal.wait(PROMPT)
        terminal.type(UP + UP)
        terminal.wait(b"about a cat")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", str(demo_model())], "squawq: stopped\n"),
        (["quantize", str(demo_model()), "OUT"], "squawq: stopped; run the same command again to resume\n"),
    ],
)
def test_only_what_goes_on_says_to_run_it_again(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "load", interrupted)
    monkeypatch.setattr("squawq.quantization.pipeline.quantize", interrupted)
    assert cli.main(arguments) == 130
    assert capsys.readouterr().err.lstrip() == message


class Stopping:
    """A model whose first answer is stopped, with reasoning before it."""

    context = 100
    tokenizer: Stopping

    def __init__(self) -> None:
        self.asked: list[list[dict[str, str]]] = []
        self.tokenizer = self

    def render(self, messages: list[dict[str, str]]) -> str:
        self.asked.append(messages)
        return "a prompt"

    def encode(self, _: str, special: bool) -> list[int]:
        assert not special
        return [1, 2, 3]

    def stream_outputs(self, ids: list[int], _: object) -> Iterator[Output]:
        yield Output("r", 0, (7, 8), "<think>hm</think>\n\none")
        if len(self.asked) == 1:
            raise KeyboardInterrupt
        yield Output("r", 0, (9,), " two", finish=FinishReason.STOP)


def test_a_stopped_answer_stays_as_far_as_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    typed = iter(["a", "/nope", "//b", "/undo", "c", "/exit"])
    llm = Stopping()
    talk.talk(llm, Conversation(SamplingParams()), lambda _: next(typed), plain=False, interactive=False)
    assert [message["content"] for message in llm.asked[1]] == ["a", "one", "/b"]  # without the reasoning
    assert [message["content"] for message in llm.asked[2]] == ["a", "one", "c"]
    captured = capsys.readouterr()
    assert captured.out == "<think>hm</think>\n\none\n" + 2 * "<think>hm</think>\n\none two\n"
    said = captured.err.splitlines()
    assert [said[0], said[2]] == ["(stopped)", "taken back: /b"]
    assert said[1].startswith("/nope is no command; choose one of /help")
    assert len(said) == 3
