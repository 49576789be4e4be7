"""Runs Python programs in processes of their own that fork from one with the large packages imported.

Importing torch and transformers takes seconds of processor time, which most tests of the command line need not spend. A
program sees its own arguments, environment, folder and streams. Signals and exit codes are those of any process, but
that a KeyboardInterrupt which nobody catches ends it with 1. A test of what an import does, or of the interpreter's own
flags, starts `sys.executable` instead.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver, get_context, reduction
from pathlib import Path
from threading import Lock
from typing import IO, Any

STARTING = Lock()
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["imported"])
READ_AT_IMPORT = ("HF_", "XDG_", "HOME")  # variables that huggingface_hub reads when it is imported


def run(
    arguments: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str = "",
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([sys.executable, *arguments], capture_output=True, text=True)`."""
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin)
        given.seek(0)
        program = Program(arguments, env=env, cwd=cwd, stdin=given, stdout=out, stderr=err)
        try:
            program.wait(timeout)
        finally:
            program.kill()
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode())
    return subprocess.CompletedProcess(program.args, program.returncode or 0, *texts)


def run_ranks(
    size: int, arguments: Sequence[str | Path], *, env: Mapping[str, str], timeout: float
) -> list[subprocess.CompletedProcess[str]]:
    """As torchrun starts a program `size` times on this machine, but that a rank that ends does not end the others."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    common = {**env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
    sizes = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}

    def run_rank(rank: int) -> subprocess.CompletedProcess[str]:
        return run(arguments, env={**common, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)}, timeout=timeout)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run_rank, range(size)))


class Program:
    """As `subprocess.Popen([sys.executable, *arguments], text=True)`. A stream is a file, PIPE, or None for none."""

    def __init__(
        self,
        arguments: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: IO[Any] | None = None,
        stdout: IO[Any] | int | None = None,
        stderr: IO[Any] | int | None = None,
    ) -> None:
        self.args = list(map(str, arguments))
        self.stdout: IO[str] | None = None
        self.stderr: IO[str] | None = None
        opened = []
        with Path(os.devnull).open("r+b") as null:
            files = [(null if stdin is None else stdin).fileno()]
            for name, stream in (("stdout", stdout), ("stderr", stderr)):
                if stream == subprocess.PIPE:
                    reader, writer = os.pipe()
                    setattr(self, name, os.fdopen(reader, encoding="utf-8"))
                    opened.append(writer)
                    files.append(writer)
                else:
                    files.append((null if stream is None or isinstance(stream, int) else stream).fileno())
            environment = dict(os.environ if env is None else env)
            streams = [_Passed(file) for file in files]
            _start_server()
            folder = str(cwd or Path.cwd())
            self._process = CONTEXT.Process(target=_main, args=(self.args, environment, folder, streams))
            self._process.start()
        for writer in opened:
            os.close(writer)
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()


def _start_server() -> None:
    """Start the process to fork from, if it does not run yet. It finds `imported` by PYTHONPATH alone."""
    with STARTING:
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
        try:
            forkserver.ensure_running()
        finally:
            del os.environ["PYTHONPATH"]
            if before is not None:
                os.environ["PYTHONPATH"] = before


class _Passed:
    """A file descriptor that goes to the new process."""

    def __init__(self, file: int) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self.file),)


def _received(passed: Any) -> int:
    return int(passed.detach())


def _main(arguments: list[str], environment: dict[str, str], folder: str, streams: list[int]) -> None:
    """The new process: becomes the program, and ends as the interpreter would."""
    import atexit
    import threading
    import traceback

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, f"__{name}__", getattr(sys, name))
    changed = {name for name in {*os.environ, *environment} if os.environ.get(name) != environment.get(name)}
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[1:] = [*filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *sys.path[1:]]
    sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).parent)]
    if any(name.startswith(READ_AT_IMPORT) for name in changed):
        _read_again()
    code = 1
    try:
        _run(arguments)
        code = 0
    except SystemExit as ended:
        code = _exit_code(ended)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for output in (sys.stdout, sys.stderr):
        output.flush()
    os._exit(code)


def _read_again() -> None:
    """Give huggingface_hub the new variables. Importing transformers anew with it would take seconds."""
    from huggingface_hub import constants, hf_api

    importlib.reload(constants)
    hf_api.api.endpoint = constants.ENDPOINT


def _run(arguments: list[str]) -> None:
    import runpy
    import warnings

    if arguments[0] == "-W":
        warnings.simplefilter(arguments[1])  # type: ignore[arg-type]
        arguments = arguments[2:]
    kind, rest = arguments[0], arguments[1:]
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        module = type(sys)("__main__")
        sys.modules["__main__"] = module
        exec(compile(rest[0], "<string>", "exec"), module.__dict__)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(kind).parent)
        runpy.run_path(kind, run_name="__main__")


def _exit_code(ended: SystemExit) -> int:
    if ended.code is None or isinstance(ended.code, int):
        return ended.code or 0
    print(ended.code, file=sys.stderr)
    return 1
