"""Measures squawq's port before vLLM's engine against vLLM's own server, in an environment that has both.

    python benchmarks/vllm_server.py MODEL [--streams 8] [--rounds 5] [--prompt-tokens 64] [--new-tokens 64]
        [--engine-args '{"enforce_eager": true}']

Both servers run the whole time. In each round each of them gets the same number of streaming requests, from a client in
another process; the order alternates. Prompts are new random ids in every round. Figures are medians, and the ratio is
the median of each round's ratio.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from common import print_table
from http_client import Client

OURS, THEIRS = "squawq serve --engine vllm", "vLLM's own server"
START_S = 180


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def start(name: str, model: Path, port: int, length: int, engine_args: dict[str, Any]) -> subprocess.Popen[bytes]:
    common = ["--port", str(port), "--max-model-len", str(length), "--max-num-seqs", "64"]
    if name == OURS:
        command = [sys.executable, "-m", "squawq", "serve", str(model), "--engine", "vllm", *common]
        command += ["--log-level", "warning", "--engine-args", json.dumps(engine_args)]
    else:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *common]
        command += ["--max-num-batched-tokens", "512", "--disable-uvicorn-access-log"]  # as squawq has it
        for key, value in engine_args.items():
            flag = "--" + key.replace("_", "-")
            command += [flag] if value is True else [flag, str(value)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def await_server(process: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                return
        except OSError:
            time.sleep(0.5)
    sys.exit(f"a server did not start: {process.args!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine-args", type=json.loads, default={})
    args = parser.parse_args()
    vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    generator, length = np.random.default_rng(1), args.prompt_tokens + args.new_tokens + 16
    processes, clients = {}, {}
    try:
        for name in (OURS, THEIRS):
            port = free_port()
            processes[name] = start(name, args.model, port, length, args.engine_args)
            await_server(processes[name], port)
            clients[name] = Client(port)

        def rate(name: str, new_tokens: int) -> float:
            ids = generator.integers(0, vocab, (args.streams, args.prompt_tokens)).tolist()
            common = {"max_tokens": new_tokens, "ignore_eos": True, "stream": True, "temperature": 0}
            found = clients[name].ask([{"prompt": prompt, "model": str(args.model), **common} for prompt in ids])
            return float(args.streams * new_tokens / found["seconds"])

        rounds = []
        for index in range(-1, args.rounds):
            order = (OURS, THEIRS) if index % 2 else (THEIRS, OURS)
            rates = {name: rate(name, args.new_tokens if index >= 0 else 4) for name in order}
            if index >= 0:  # before, they wake up
                rounds.append(rates)
    finally:
        for client in clients.values():
            client.close()
        for process in processes.values():
            process.terminate()
            process.wait(60)
    each = [f"{statistics.median(rates[name] for rates in rounds):.1f}" for name in (OURS, THEIRS)]
    ratio = statistics.median(rates[OURS] / rates[THEIRS] for rates in rounds)
    print_table(f"{args.streams} streams, tokens/s", [OURS, THEIRS, "ratio"], [[*each, f"{ratio:.3f}"]])


if __name__ == "__main__":
    main()
