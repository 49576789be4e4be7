"""Measures tensor parallelism on NVIDIA GPUs of one host: N ranks beside one, and one-shot sums beside NCCL's.

    python -m benchmarks.gpu_parallel [--ranks 2] [--only sums large] [--json gpu-parallel.json]

Models have random weights, built in the GPUs' memory. Each workload runs on one GPU, then on all by peers' memory, then
on all by NCCL alone. Sums are timed as replays of one CUDA graph. `text` compares greedy text of the demo model;
`ends` kills a rank during a generation. The exit status is 1 if a part fails, or texts differ.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))

import torch
from checkpoints import SHAPES
from gpu_kernels import graph_microseconds
from gpu_models import random_decoder, stream
from torch import Tensor

from squawq import LLM, QuantConfig, quantize
from squawq.backends.base import Vocabulary
from squawq.backends.cuda import launch, peers
from squawq.backends.cuda.group import CudaGroup
from squawq.config import ModelConfig
from squawq.demo import demo_model
from squawq.engine import followers
from squawq.engine.runner import DecoderRunner
from squawq.errors import GenerationError
from squawq.nn.decoder import Decoder
from squawq.nn.loader import Options
from squawq.nn.shard import Shard
from squawq.text.child import environment

ONE, PEERS, NCCL = "one GPU", "peers' memory", "NCCL"
SIZES = ((1, 4096), (1, 8192), (8, 8192), (64, 4096), (64, 8192), (256, 8192))  # rows, features
SUMS = 64  # in a graph
LOADS = {"llama-3.1-8b": ((1, 512, 128), (64, 128, 128)), "llama-3.1-70b": ((1, 128, 64),)}
PROMPTS = ["Once upon a time", "The little dog", "Tom and Lily went to the park and", "One day, a girl named Mia"]


def start(port: int, memory: int) -> subprocess.Popen[bytes]:
    """A follower that is this program."""
    return subprocess.Popen(
        [sys.executable, __file__, "--follow", str(port), str(os.getpid())],
        stdin=subprocess.PIPE,
        env=environment("HOME", "WAY", *(name for name in os.environ if name.startswith(followers.VARIABLES))),
        pass_fds=(port, memory),
        start_new_session=True,
    )


def load(told: dict[str, Any]) -> Decoder:
    """What a follower loads: the part of a random model, named where the folder should be, or of a folder."""
    if told["folder"] not in SHAPES:
        return own_load(told)
    shard = Shard(told["rank"], told["size"])
    decoder = random_decoder(SHAPES[told["folder"]], told["options"]["device"], shard)
    decoder.backend.join(shard.rank, shard.size, told["memory"])
    os.close(told["memory"])
    return decoder


own_load = followers._load


@contextmanager
def chosen(way: str) -> Iterator[None]:
    """Exchanges in this process and its followers by peers' memory, or by NCCL."""

    def none(*_: object) -> peers.PeerExchange:
        raise RuntimeError("not chosen")

    os.environ["WAY"] = way
    with patch.object(followers, "_start", start), patch.object(followers, "_load", load):
        if way == NCCL:
            with patch.object(peers, "PeerExchange", none):
                yield
        else:
            yield


@contextmanager
def running(name: str, ranks: int, rows: int, kv_tokens: int) -> Iterator[DecoderRunner]:
    """A random model on so many GPUs."""
    decoder = random_decoder(SHAPES[name], "cuda:0", Shard(0, ranks))
    others = None
    if ranks > 1:
        config = ModelConfig.from_dict(SHAPES[name].config(SHAPES[name].layers))
        checkpoint = SimpleNamespace(config=config, folder=name)
        model: Any = SimpleNamespace(shard=Shard(0, ranks), checkpoint=checkpoint, backend=decoder.backend)
        others = followers.Followers(model, Options("cuda"), 1)
        others.wait()
    runner = DecoderRunner(decoder, kv_tokens, rows=rows, step_tokens=4096, followers=others)
    try:
        yield runner
    finally:
        runner.close()
        del runner, decoder
        gc.collect()
        torch.cuda.empty_cache()


def sums(ranks: int) -> Iterator[dict[str, Any]]:
    """Microseconds of a sum over all ranks, with the RMS norm that adds it up; and of the norm alone."""
    with tempfile.TemporaryFile() as file:
        command = [sys.executable, __file__, "--sums", str(ranks), str(file.fileno())]
        others = [subprocess.Popen([*command, str(rank)], pass_fds=[file.fileno()]) for rank in range(1, ranks)]
        yield from time_sums(0, ranks, file.fileno())
        for other in others:
            other.wait(60)


def time_sums(rank: int, ranks: int, file: int) -> Iterator[dict[str, Any]]:
    device = torch.device("cuda", rank)
    group = CudaGroup(rank, ranks, file, device)
    vocabulary = Vocabulary(slice(0, 16), [16] * ranks)
    for rows, n in SIZES:
        x = torch.randn(1, rows, n, device=device, generator=torch.Generator(device).manual_seed(rank))
        weight, hidden = torch.ones(n, device=device), torch.zeros(rows, n, device=device)
        out = torch.empty(rows, n, device=device, dtype=torch.float16)

        def norm(parts: launch.Sums, hidden: Tensor = hidden, weight: Tensor = weight, out: Tensor = out) -> None:
            launch.add_norm(parts, hidden, weight, 1e-5, out)

        def add(exchange: peers.Exchange, parts: Tensor, place: peers.Place, norm: Any = norm) -> None:
            norm(exchange.all_reduce(launch.Sums(parts), place, False))

        found: dict[str, Any] = {"rows": rows, "features": n, "bytes": 2 * rows * n}
        found["norm_us"] = graph_microseconds([lambda: norm(launch.Sums(x))] * SUMS)  # noqa: B023
        total = x.clone()
        group.all_reduce(total)
        ways: dict[str, peers.Exchange] = {"peers": peers.PeerExchange(group, vocabulary, rows, n)}
        ways["nccl"] = peers.GroupExchange(group, vocabulary)
        for way, exchange in ways.items():
            places = [peers.Place.ATTENTION, peers.Place.MLP] * (SUMS // 2)
            calls = [partial(add, exchange, x, place) for place in places]
            for call in calls[:2]:
                call()  # as many exchanges on all ranks
            hidden.zero_()
            calls[0]()
            calls[1]()
            found[f"{way}_error"] = float((hidden - 2 * total[0]).abs().max())
            found[f"{way}_us"] = graph_microseconds([lambda: None, *calls])  # the first is called once more
        half = x.half()
        found["nccl_16_bit_us"] = graph_microseconds([lambda: group.all_reduce(half)] * SUMS)  # noqa: B023
        group.barrier()
        if rank == 0:
            yield found


def models(name: str, ranks: int) -> Iterator[dict[str, Any]]:
    """Tokens per second."""
    for way in (ONE, PEERS, NCCL):
        most = max(streams for streams, *_ in LOADS[name])
        with chosen(way), running(name, 1 if way == ONE else ranks, most, 32768) as runner:
            for load_ in LOADS[name]:
                found = stream(runner, *load_, sampled=False)
                yield {
                    "way": way,
                    "streams": load_[0],
                    "tok_s": found.decode_tok_s,
                    "step_ms": found.step_ms,
                    "graph_ms": found.graph_ms,
                }


def small(ranks: int) -> Iterator[dict[str, Any]]:
    yield from models("llama-3.1-8b", ranks)


def large(ranks: int) -> Iterator[dict[str, Any]]:
    yield from models("llama-3.1-70b", ranks)


@contextmanager
def quantized_demo() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        quantize(demo_model(), Path(folder, "out"), QuantConfig(method="rtn"), progress=False)
        yield Path(folder, "out")


def text(ranks: int) -> Iterator[dict[str, Any]]:
    """Greedy text of the demo model."""
    with quantized_demo() as folder:
        texts = {}
        for way in (ONE, PEERS, NCCL):
            with chosen(way), LLM(folder, device="cuda", tensor_parallel_size=1 if way == ONE else ranks) as llm:
                texts[way] = llm.generate(PROMPTS, max_tokens=64, temperature=0, progress=False)
        for way in (PEERS, NCCL):
            same = sum(one == other for one, other in zip(texts[ONE], texts[way], strict=True))
            yield {"way": way, "same": same, "of": len(PROMPTS), "first": str(texts[way][0])[:60]}


def ends(ranks: int) -> Iterator[dict[str, Any]]:
    """Seconds from the death of a rank to the error, and to the end of all processes."""
    with quantized_demo() as folder:
        for way in (PEERS, NCCL):
            with chosen(way), LLM(folder, device="cuda", tensor_parallel_size=ranks) as llm:
                tokens = llm.stream("Once", max_tokens=1500, ignore_eos=True)
                for _ in range(20):
                    next(tokens)
                runner: Any = llm._model._runner
                runner._followers._processes[0].send_signal(signal.SIGKILL)
                killed, error = time.monotonic(), ""
                try:
                    for _ in tokens:
                        pass
                except GenerationError as found:
                    error = str(found)
                seconds = time.monotonic() - killed
            yield {"way": way, "error_s": seconds, "closed_s": time.monotonic() - killed, "error": error[:80]}


PARTS = {"sums": sums, "text": text, "ends": ends, "small": small, "large": large}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "gpus": args.ranks, "torch": torch.__version__}
    failed = []
    for name in args.only:
        found[name], began = [], time.monotonic()
        try:
            for row in PARTS[name](args.ranks):
                found[name].append(row)
                print(f"{name} {time.monotonic() - began:6.1f} s", row, flush=True)
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
            print(failed[-1], file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    if any(row["same"] != row["of"] for row in found.get("text", [])):
        failed.append("text: not the same on all GPUs")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--follow"]:
        sys.argv[1:2] = []
        with chosen(os.environ["WAY"]):
            followers.main()
    elif sys.argv[1:2] == ["--sums"]:
        list(time_sums(int(sys.argv[4]), int(sys.argv[2]), int(sys.argv[3])))
    else:
        main()
