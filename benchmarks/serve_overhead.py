"""Measures the overhead of HTTP: tokens per second and time to first token, against the same engine without a server.

    python benchmarks/serve_overhead.py [MODEL] [--folder DIR] [--threads 2] [--streams 8] [--rounds 5]

MODEL is a folder with a tokenizer; default: random weights of Llama-3.2-1B's shape with a made-up vocabulary, made in
--folder (a temporary one) and reused. In each round the engine serves the same number of streaming requests twice: from
this process, and over HTTP from a client in another process, which shares the machine's cores. The order alternates
between rounds. Figures are medians; ratios and differences are medians of values measured in one round. Prompts are new
random ids in every round; nothing is cached.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import print_table
from engine import serve
from http_client import Client
from llamacpp import run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from squawq.backends.cpu import library
from squawq.engine.request import Output
from squawq.serve.app import Api
from squawq.serve.model import Served
from squawq.serve.server import Server
from squawq.serve.settings import ServerSettings

SHAPE = "llama-3.2-1b"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A byte-level tokenizer of short words, so that every id has a text."""
    words = ("".join(word) for size in itertools.count(1) for word in itertools.product(LETTERS, repeat=size))
    pieces = {piece: index for index, piece in enumerate(itertools.islice((f"Ġ{word}" for word in words), vocab))}
    tokenizer = Tokenizer(models.BPE(pieces, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def bare(served: Served, prompts: Sequence[list[int]], new_tokens: int) -> tuple[float, float]:
    """Seconds until the last token, and mean seconds to the first, directly from the engine."""
    first: dict[str, float] = {}

    def heard(output: Output) -> None:
        first.setdefault(output.request, time.perf_counter())

    started = time.perf_counter()
    serve(served.engine, prompts, new_tokens, heard)
    return time.perf_counter() - started, statistics.mean(first.values()) - started


def over_http(client: Client, prompts: Sequence[list[int]], new_tokens: int) -> tuple[float, float]:
    """The same over HTTP."""
    common = {"max_tokens": new_tokens, "ignore_eos": True, "stream": True, "temperature": 0}
    found = client.ask([{"prompt": prompt, **common} for prompt in prompts])
    expected = len(prompts) * (new_tokens + 1)  # and the end mark
    if found["events"] != expected:
        sys.exit(f"the server sent {found['events']} events, not {expected}")
    return found["seconds"], statistics.mean(found["first"])


def measure(served: Served, client: Client, args: argparse.Namespace) -> list[list[str]]:
    """Rows of the table."""
    generator = np.random.default_rng(1)

    def ids(count: int, tokens: int) -> list[list[int]]:
        found: list[list[int]] = generator.integers(0, served.config.vocab_size, (count, tokens)).tolist()
        return found

    rows = []
    for streams in (1, args.streams):
        pairs = []
        over_http(client, ids(streams, 16), 2)  # awake
        for index in range(args.rounds):
            found = {}
            for http in (False, True) if index % 2 == 0 else (True, False):
                prompts = ids(streams, args.prompt_tokens)
                way = over_http(client, prompts, args.new_tokens) if http else bare(served, prompts, args.new_tokens)
                found[http] = way
            pairs.append((found[False], found[True]))
        tokens = streams * args.new_tokens
        rates = [statistics.median(tokens / pair[way][0] for pair in pairs) for way in (0, 1)]
        firsts = [statistics.median(pair[way][1] for pair in pairs) * 1e3 for way in (0, 1)]
        cost = statistics.median(1 - without[0] / with_[0] for without, with_ in pairs)
        later = statistics.median(with_[1] - without[1] for without, with_ in pairs) * 1e3
        name = f"{streams} stream{'s' if streams > 1 else ''}"
        rows.append([f"{name}: tokens/s", f"{rates[0]:.1f}", f"{rates[1]:.1f}", f"{cost:+.1%}", "<= 5 %"])
        rows.append(
            [f"{name}: mean time to first token", *(f"{x:.1f} ms" for x in firsts), f"{later:+.1f} ms", "<= 10 ms"]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--folder", type=Path, help="keeps the random model; default: a temporary one")
    parser.add_argument("--threads", type=int, default=library.default_threads())
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        model = args.model or (args.folder or Path(temporary)) / f"{SHAPE}-awq"
        if not args.model and not model.exists():
            run([sys.executable, str(Path(__file__).parent / "checkpoints.py"), SHAPE, str(model)])
        if not args.model and not (model / "tokenizer.json").exists():
            write_tokenizer(model, 128256)
        room = 2 * args.streams * (args.prompt_tokens + args.new_tokens + 16)
        settings = ServerSettings(model=str(model), port=0, threads=args.threads, kv_tokens=room, prefix_caching=False)
        served = Served(settings)
        server = Server(Api(served))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        client = Client(server.bound_port)
        try:
            rows = measure(served, client, args)
        finally:
            client.close()
            server.stop()
            server.stop()
            thread.join()
    title = f"{model.name}, {args.threads} threads, {library.isa()}, {args.prompt_tokens} + {args.new_tokens} tokens"
    print_table(title, ["", "engine", "over HTTP", "cost", "target"], rows)


if __name__ == "__main__":
    main()
