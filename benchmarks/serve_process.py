"""Runs a server in its own process for the benchmarks, and reads its state from its metrics and from /proc (Linux).

Also makes the table rows that compare this state with its target.
"""

from __future__ import annotations

import asyncio
import contextlib
import operator
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from http_client import ask, encode

POOLS = 2 + min(32, (os.cpu_count() or 1) + 4)  # threads that validation and asyncio start on demand
ROOM = 8 * 2**20  # bytes of growth allowed since a load of the same kind


@dataclass(frozen=True)
class State:
    """The state of a server including its child processes.

    pages: share of the KV cache in use. memory: anonymous resident bytes (RssAnon); shared memory counts once.
    """

    sequences: int
    pages: float
    sockets: int
    threads: int
    processes: int
    memory: int

    def back(self, before: State) -> bool:
        """Whether sequences and pages are free and all else is at its initial state, except threads of pools."""
        now = (self.sequences, self.pages, self.sockets, self.processes, self.threads - POOLS)
        return all(map(operator.le, now, (0, 0, before.sockets, before.processes, before.threads)))

    def __str__(self) -> str:
        return f"{self.sequences}, {self.pages:.1%}, {self.sockets}, {self.threads}, {self.processes}"


class Process:
    """`squawq serve` in its own process."""

    def __init__(self, model: Path, threads: int, *flags: str) -> None:
        command = [sys.executable, "-m", "squawq", "serve", str(model), "--port", "0", "--threads", str(threads)]
        self.child = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True)
        self.errors: list[str] = []
        assert self.child.stderr is not None
        for line in self.child.stderr:
            if found := re.search(r" serving .*at=\S+:(\d+)", line):
                self.port = int(found[1])
                break
            self.errors.append(line)
        else:
            sys.exit("the server did not start: " + "".join(self.errors))
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        """Empty the pipe; keep unexpected records."""
        self.errors += [line for line in self.child.stderr or () if " INFO " not in line]

    async def metrics(self) -> dict[str, float]:
        """vLLM's and other metrics by their names and labels, the model's left out."""
        text = (await ask(self.port, encode("/metrics", b"", method="GET"))).body.decode()
        pairs = re.findall(r"^vllm:(\S+) (\S+)$", text, re.MULTILINE)
        return {re.sub(r',?model_name="[^"]*"', "", name).replace("{}", ""): float(value) for name, value in pairs}

    async def state(self) -> State:
        """What it holds now."""
        metrics, family = await self.metrics(), [self.child.pid, *self.family()]
        links = []
        for path in Path(f"/proc/{self.child.pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # already closed
                links.append(str(path.readlink()))
        return State(
            sequences=int(metrics["num_requests_running"] + metrics["num_requests_waiting"]),
            pages=metrics["kv_cache_usage_perc"],
            sockets=sum(link.startswith("socket:") for link in links),
            threads=_figure(self.child.pid, "status", "Threads"),
            processes=len(family),
            memory=sum(_figure(pid, "smaps_rollup", "Pss_Anon") for pid in family) * 1024,
        )

    async def quiet(self) -> State:
        """What it holds after a rest, in which what is on its way out ends."""
        await asyncio.sleep(0.5)
        return await self.state()

    async def settled(self, before: State, seconds: float = 20) -> State:
        """What it holds once all is back to where it was, or after so many seconds."""
        until = time.monotonic() + seconds
        while not (state := await self.state()).back(before) and time.monotonic() < until:
            await asyncio.sleep(0.1)
        return state

    def peak(self, *, reset: bool = False) -> int:
        """Peak resident bytes since the last reset."""
        if reset:
            Path(f"/proc/{self.child.pid}/clear_refs").write_text("5")
        return _figure(self.child.pid, "status", "VmHWM") * 1024

    def family(self) -> list[int]:
        """Child processes, recursively."""
        parents = {int(path.parent.name): _parent(path) for path in Path("/proc").glob("[0-9]*/stat")}
        found = [self.child.pid]
        for known in found:  # which grows
            found += [pid for pid, parent in parents.items() if parent == known]
        return found[1:]

    def close(self) -> None:
        """End the process, whatever state it is in."""
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()


def living(pids: Sequence[int]) -> list[int]:
    """Those of the processes that are still running."""
    return [pid for pid in pids if _parent(Path(f"/proc/{pid}/stat")) is not None]


def _parent(stat: Path) -> int | None:
    """Parent of a running process."""
    try:
        state, parent = stat.read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state in "ZX" else int(parent)


def _figure(pid: int, file: str, name: str) -> int:
    """A number from /proc; 0 for a process that has ended."""
    try:
        text = Path(f"/proc/{pid}/{file}").read_text()
    except OSError:
        return 0
    return int(re.findall(rf"^{name}:\s+(\d+)", text, re.MULTILINE)[0])


@dataclass(frozen=True)
class Row:
    """A result, its target, and whether it was reached."""

    title: str
    found: str
    target: str
    reached: bool

    def cells(self) -> list[str]:
        """Cells of the table."""
        return [self.title, self.found, self.target, "yes" if self.reached else "NO"]


def held(title: str, before: State, after: State) -> Row:
    """Values that must return to their initial state."""
    return Row(
        f"{title}: then sequences, pages, sockets, threads, processes", str(after), str(before), after.back(before)
    )


def grown(title: str, before: int, after: int, room: int = ROOM) -> Row:
    """Growth of memory in bytes."""
    found = f"{before / 2**20:.0f} -> {after / 2**20:.0f} MiB"
    return Row(f"{title}: memory", found, f"<= {room / 2**20:+.0f} MiB", after - before <= room)
