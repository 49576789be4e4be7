"""Tests the server under load: disconnects, a thousand connections, a soak, shutdown signals, many grammars.

    python benchmarks/serve_load.py [MODEL] [--only hang-ups connections soak shutdown grammars] [--threads 2]
        [--clients 200] [--connections 1000] [--requests 5000] [--at-once 32] [--schemas 2000] [--streams 16]

MODEL is a folder; default: the demo model. The server runs in its own process; the clients run in this one, on
loopback. Each row has a result and its target; the exit code is 1 if one was missed. After a load, pages, sequences,
sockets and threads must be back at their initial numbers. Memory is compared with that after an earlier load of the
same kind, because the first load touches cache pages and fills pools. The soak's requests are in serve_soak.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import print_table
from http_client import HOST, ask, decode, encode
from serve_process import Process, Row, State, grown, held, living
from serve_soak import DEADLINE, Tally, make_cases, soak

from squawq.backends.cpu import library
from squawq.demo import demo_model
from squawq.llm import LLM

SMALL = {"prompt": "The cat sat", "max_tokens": 10, "ignore_eos": True, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
JSON = {"prompt": "Once", "max_tokens": 8, "response_format": {"type": "json_object"}}
ABORTS = 'request_success_total{finished_reason="abort"}'
WAVES = 3  # of disconnecting clients; memory is compared over the last
LATER = 0.5  # seconds after a server's end in which its child processes may end
CONNECTION = 2**17  # bytes that a connection and its refusal may take


async def small(process: Process) -> float:
    """Seconds that a request of 10 tokens takes."""
    began = time.perf_counter()
    answer = await ask(process.port, encode("/v1/completions", SMALL))
    if answer.status != 200 or answer.values()[0]["usage"]["completion_tokens"] != 10:
        sys.exit(f"the small request got {answer}")
    return time.perf_counter() - began


async def wake(process: Process) -> None:
    """Start every thread that a server starts when it is needed."""
    bodies = [("chat/completions", CHAT), *[("completions", body) for body in (JSON, *[SMALL] * 6)]]
    answers = await asyncio.gather(*(ask(process.port, encode(f"/v1/{path}", body)) for path, body in bodies))
    if any(answer.status != 200 for answer in answers):
        sys.exit(f"the server answers {answers}")


async def hang_ups(args: argparse.Namespace, process: Process) -> list[Row]:
    """Clients that ask for very much and leave after half a second."""
    idle = statistics.median([await small(process) for _ in range(5)])
    first = after = await process.quiet()
    times, aborted = [], (await process.metrics())[ABORTS]
    for _ in range(WAVES):
        before = after
        pairs = await asyncio.gather(*(asyncio.open_connection(HOST, process.port) for _ in range(args.clients)))
        for index, (_, writer) in enumerate(pairs):
            body = {**SMALL, "max_tokens": args.long_tokens, "stream": index % 2 == 0}
            writer.write(encode("/v1/completions", body))
        await asyncio.sleep(0.5)
        for _, writer in pairs:
            writer.close()
        times.append(await small(process))
        after = await process.settled(first)
    aborted = (await process.metrics())[ABORTS] - aborted
    count, name = WAVES * args.clients, f"{args.clients} hang up"
    return [
        Row(f"{name}: the next answer (idle: {idle:.3f} s)", f"{max(times):.3f} s", "<= 2 s", max(times) <= 2),
        Row(f"{name}, {WAVES} times: aborted", f"{aborted:.0f}", str(count), aborted == count),
        held(name, first, after),
        grown(f"{name}, last time", before.memory, after.memory),
    ]


async def connections(args: argparse.Namespace, process: Process) -> list[Row]:
    """A request on each of many connections at once, against the default limits."""
    before, base = await process.quiet(), process.peak(reset=True)
    requests = (encode("/v1/chat/completions", CHAT), encode("/v1/completions", SMALL))
    start = asyncio.Barrier(args.connections)

    async def client(index: int) -> str:
        try:
            async with asyncio.timeout(DEADLINE):
                reader, writer = await asyncio.open_connection(HOST, process.port)
                await start.wait()
                writer.write(requests[index % 2])
                status = decode(await reader.read()).status
                writer.close()
                return str(status)
        except (OSError, ValueError) as error:  # TimeoutError is an OSError
            return type(error).__name__

    began = time.perf_counter()
    found = Counter(await asyncio.gather(*map(client, range(args.connections))))
    seconds, name = time.perf_counter() - began, f"{args.connections} connections"
    whole = sum(found[status] for status in ("200", "429", "503")) == args.connections
    statuses = ", ".join(f"{status}: {count}" for status, count in sorted(found.items()))
    return [
        Row(f"{name}: answered within {seconds:.1f} s", statuses, "200, 429 or 503", whole),
        grown(f"{name}, peak", base, process.peak(), args.connections * CONNECTION),
        held(name, before, await process.settled(before)),
    ]


async def soaking(args: argparse.Namespace, process: Process) -> list[Row]:
    """Mixed requests; what is held after each quarter of them."""
    with LLM(args.model, threads=args.threads, kv_tokens=8192) as llm:
        cases = make_cases(llm.engine, llm.tokenizer)
    answers = await asyncio.gather(*(ask(process.port, case.request) for case in cases))
    first = [case.wrong(answer) for case, answer in zip(cases, answers, strict=True)]
    before, began = await process.quiet(), time.perf_counter()
    tallies, states = [Tally(wrong=[text for text in first if text])], []
    for quarter in range(4):
        tallies.append(await soak(process.port, cases, args.requests // 4, args.at_once, args.seed + quarter))
        states.append(await process.settled(before))
    seconds = time.perf_counter() - began
    wrong, unexpected = ([text for one in tallies for text in getattr(one, name)] for name in ("wrong", "unexpected"))
    for text in (wrong + unexpected)[:20]:
        print(text, file=sys.stderr)
    equal, slow, aborted, bad = (
        sum(getattr(one, name) for one in tallies) for name in ("equal", "slow", "aborted", "bad")
    )
    kinds, sent = f"{equal} equal ({slow} slow), {aborted} hung up, {bad} bad", args.requests // 4 * 4
    name = f"soak, {len(cases)} kinds of request"
    return [
        Row(f"{name}: within {seconds:.0f} s", kinds, f"{sent} in all", equal + aborted + bad == sent),
        Row(f"{name}: wrong answers", str(len(wrong)), "0", not wrong),
        Row(f"{name}: wrong statuses, no answers", str(len(unexpected)), "0", not unexpected),
        held(name, before, states[-1]),
        grown(f"{name}, second half ({_sizes(states)})", states[1].memory, states[3].memory),
    ]


async def grammars(args: argparse.Namespace, process: Process) -> list[Row]:
    """Schemas that are all different; what is held after each quarter of them."""
    states: list[State] = []
    for quarter in range(4):
        names = iter([f"property_{quarter}_{index}" for index in range(args.schemas // 4)])
        await asyncio.gather(*(_ask_schemas(process, names) for _ in range(8)))
        states.append(await process.settled(states[0]) if states else await process.quiet())
    name = f"{args.schemas} grammars, last three quarters"
    return [
        held(name, states[0], states[3]),
        grown(f"{name} ({_sizes(states)})", states[0].memory, states[3].memory),
    ]


async def _ask_schemas(process: Process, names: Iterator[str]) -> None:
    for name in names:
        schema = {"type": "object", "properties": {name: {"enum": ["a", "b"]}}, "required": [name]}
        body = {"prompt": "Once", "max_tokens": 4, "response_format": {"type": "json_object", "value": schema}}
        if (answer := await ask(process.port, encode("/v1/completions", body))).status != 200:
            sys.exit(f"a schema got {answer}")


def _sizes(states: list[State]) -> str:
    return ", ".join(f"{state.memory / 2**20:.0f}" for state in states)


@dataclass(frozen=True)
class Way:
    """A way to end a server: seconds for running requests, signals, and the expected outcome of its streams."""

    name: str
    timeout: int
    signals: int
    tokens: int
    reason: str
    seconds: float


WAYS = (
    Way("drain", 30, 1, 200, "length", 30),
    Way("abort", 0, 1, 3000, "abort", 4),
    Way("second signal", 30, 2, 3000, "abort", 4),
)


async def shut_down(args: argparse.Namespace, process: Process, way: Way) -> list[Row]:
    """Signals to a server with streams under way."""
    pairs = await asyncio.gather(*(asyncio.open_connection(HOST, process.port) for _ in range(args.streams)))
    for _, writer in pairs:
        writer.write(encode("/v1/completions", {**SMALL, "max_tokens": way.tokens, "stream": True}))
    heads = [await reader.readuntil(b"data: ") for reader, _ in pairs]
    rows, family, began = [], process.family(), time.perf_counter()
    process.child.send_signal(signal.SIGTERM)
    if way.timeout:
        await asyncio.sleep(0.2)
        answer = await ask(process.port, encode("/v1/completions", SMALL))
        rows.append(Row(f"{way.name}: a new request", str(answer.status), "503", answer.status == 503))
    if way.signals == 2:
        began = time.perf_counter()
        process.child.send_signal(signal.SIGTERM)
    rests = await asyncio.gather(*(reader.read() for reader, _ in pairs))
    reasons = Counter(_reason(head + rest) for head, rest in zip(heads, rests, strict=True))
    code = await asyncio.to_thread(process.child.wait, DEADLINE)
    seconds = time.perf_counter() - began
    await asyncio.sleep(LATER)
    left = len(living(family))
    found = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
    return [
        *rows,
        Row(f"{way.name}: reasons", found, f"{way.reason}: {args.streams}", reasons == {way.reason: args.streams}),
        Row(f"{way.name}: ended after", f"{seconds:.1f} s", f"< {way.seconds:g} s", seconds < way.seconds),
        Row(f"{way.name}: exit code", str(code), "0", code == 0),
        Row(f"{way.name}: processes left of {len(family)}", str(left), "0", left == 0),
    ]


def _reason(data: bytes) -> str:
    """Finish reason of a stream."""
    try:
        answer = decode(data)
        return str(answer.values()[-1]["choices"][0]["finish_reason"]) if answer.ended else "no end mark"
    except (LookupError, ValueError) as error:
        return repr(error)


Scenario = Callable[[argparse.Namespace, Process], Coroutine[Any, Any, list[Row]]]


def scenarios(args: argparse.Namespace) -> dict[str, list[tuple[Scenario, list[str]]]]:
    """The scenarios by name, each with the flags of its own server."""
    return {
        "hang-ups": [(hang_ups, ["--max-num-queued-reqs", str(args.clients)])],
        "connections": [(connections, [])],
        "soak": [(soaking, [])],
        "shutdown": [(partial(shut_down, way=way), ["--shutdown-timeout", str(way.timeout)]) for way in WAYS],
        "grammars": [(grammars, [])],
    }


def roomy(model: Path, tokens: int, folder: Path) -> Path:
    """The model with enough positions for the given number of new tokens; speed and memory do not change, texts do."""
    for file in model.iterdir():
        shutil.copy(file, folder)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = max(config["max_position_embeddings"], 2 * tokens)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def run(args: argparse.Namespace, scenario: Scenario, flags: list[str]) -> list[Row]:
    """Run one scenario with its own server."""
    with tempfile.TemporaryDirectory() as folder:
        model = roomy(args.model, args.long_tokens, Path(folder)) if scenario is hang_ups else args.model
        process = Process(model, args.threads, *flags)
        try:
            asyncio.run(wake(process))
            rows = asyncio.run(scenario(args, process))
        finally:
            process.close()
    print("".join(process.errors), end="", file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=demo_model())
    parser.add_argument("--only", nargs="+", choices=list(scenarios(argparse.Namespace(clients=0))))
    parser.add_argument("--threads", type=int, default=library.default_threads())
    parser.add_argument("--clients", type=int, default=200, help="that hang up")
    parser.add_argument("--long-tokens", type=int, default=10_000, help="that they ask for")
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=5000, help="of the soak")
    parser.add_argument("--at-once", type=int, default=32, help="of those")
    parser.add_argument("--seed", type=int, default=1, help="of their order")
    parser.add_argument("--streams", type=int, default=16, help="under way at a signal")
    parser.add_argument("--schemas", type=int, default=2000)
    args = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    known = scenarios(args)
    rows = [row for name in args.only or known for scenario, flags in known[name] for row in run(args, scenario, flags)]
    title = f"{args.model.name}, {args.threads} threads, {library.isa()}"
    print_table(title, ["", "found", "to reach", "reached"], [row.cells() for row in rows])
    sys.exit(not all(row.reached for row in rows))


if __name__ == "__main__":
    main()
