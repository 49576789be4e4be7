"""Processes for untrusted work: copies go on separately, limits end one alone, none outlives whoever holds it."""

from __future__ import annotations

import gc
import os
import signal
import socket  # noqa: F401 (what a process is asked to use)
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from squawq.text.child import Child, ChildError, Handler

WAIT = 30.0  # seconds; only a test that fails waits so long


def load(data: bytes) -> Handler:
    """What runs in the processes: keeps what it is told, and does harm when it is asked to."""
    said = [data]

    def answer(message: bytes) -> bytes:
        if message == b"loop":
            while True:
                pass
        if message == b"memory":
            return bytes(10**9)[:1]
        if message == b"crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if message == b"pid":
            return str(os.getpid()).encode()
        if message == b"environment":
            return " ".join(sorted(os.environ)).encode()
        if message.startswith(b"do "):
            try:
                eval(message[3:])
            except (OSError, MemoryError) as error:
                return type(error).__name__.encode()
            return b"done"
        said.append(message)
        return b" ".join(said)

    return answer


@pytest.fixture(scope="module")
def first() -> Iterator[Child]:
    child = Child.start(f"{__name__}:load", b"begin")
    yield child
    child.close()
    assert not child.alive


def ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    state = Path(f"/proc/{pid}/stat")
    return state.is_file() and ") Z " in state.read_text()  # a container's first process may not take exit codes


def wait_until_ended(pid: int) -> None:
    limit = time.monotonic() + WAIT
    while not ended(pid):
        assert time.monotonic() < limit, "a process was left"
        time.sleep(0.005)


def test_a_copy_goes_on_from_where_its_original_stands(first: Child) -> None:
    one = first.fork()
    assert one.call(b"a", 1) == b"begin a"
    two = one.fork()
    assert one.call(b"b", 1) == b"begin a b"
    assert two.call(b"c" * 10**6, 1) == b"begin a " + b"c" * 10**6
    assert first.fork().call(b"d", 1) == b"begin d"


def test_answers_come_in_order(first: Child) -> None:
    child = first.fork()
    child.send(b"a", 1)
    child.send(b"b", 1)
    copy = child.fork()  # after both
    assert [child.receive(), child.receive()] == [b"begin a", b"begin a b"]
    assert copy.call(b"c", 1) == b"begin a b c"


@pytest.mark.parametrize("harm", [b"loop", b"memory", b"crash"])
def test_harm_is_done_to_itself_alone(first: Child, harm: bytes) -> None:
    if harm == b"memory" and sys.platform != "linux":
        pytest.skip("memory is limited on Linux")
    child, other = first.fork(), first.fork()
    with pytest.raises(ChildError, match="too much time or memory, or crashed"):
        child.call(harm, 0.1)
    with pytest.raises(ChildError):
        child.call(b"a", 1)
    with pytest.raises(ChildError):
        child.fork().call(b"a", 1)
    assert other.call(b"a", 1) == b"begin a"
    assert first.fork().call(b"a", 1) == b"begin a"


def test_who_holds_nothing_leaves_nothing(first: Child) -> None:
    one = first.fork()
    two = one.fork()
    pids = [int(child.call(b"pid", 1)) for child in (one, two)]
    assert len(set(pids)) == 2
    del one, two
    gc.collect()
    for pid in pids:
        wait_until_ended(pid)


def test_none_outlives_a_parent_that_is_killed() -> None:
    program = (
        f"import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r}); from squawq.text.child import Child\n"
        f"child = Child.start('{__name__}:load', b''); copy = child.fork()\n"
        "print(child._process.pid, copy.call(b'pid', 1).decode(), flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert not any(map(ended, pids))
        parent.kill()
    for pid in pids:
        wait_until_ended(pid)


def test_secrets_in_the_environment_stay_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "secret")
    child = Child.start(f"{__name__}:load", b"")
    assert b"SOME_API_KEY" not in child.call(b"environment", 1)
    child.close()


def test_what_a_process_without_copies_gives_up() -> None:
    """Even code that got out of a sandbox opens nothing."""
    child = Child.start(f"{__name__}:load", b"", memory=2**28, forks=False)
    for deed in ("open('/dev/null')", "open('x', 'w')", "socket.socket()", "os.pipe()", "os.dup(0)"):
        assert child.call(f"do {deed}".encode(), 60) == b"OSError", deed
    if sys.platform == "linux":
        assert child.call(b"do bytes(2**29)", 60) == b"MemoryError"
    assert child.call(b"a", 60) == b" a"
    child.close()


def test_how_a_process_ended_is_said() -> None:
    for harm, message in (
        (b"loop", r"it took more than 0\.1 s"),
        (b"crash", rf"it died \(code -{int(signal.SIGSEGV)}\)"),
    ):
        child = Child.start(f"{__name__}:load", b"", forks=False)
        with pytest.raises(ChildError, match=message):
            child.call(harm, 0.1)
        assert not child.alive


def test_a_supervisor_that_ends_all_processes_leaves_the_parent_its_own(first: Child) -> None:
    assert first.pid is not None
    os.kill(first.pid, signal.SIGTERM)
    os.kill(first.pid, signal.SIGINT)
    assert first.fork().call(b"a", 1) == b"begin a"


def test_what_cannot_be_loaded(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ChildError):
        Child.start("squawq.no_such_module:load", b"")
    assert "no_such_module" in capfd.readouterr().err  # for whoever runs it
