"""The parts of gpu.py that run whole models of random weights: loading, serving, prefill, batch invariance, warm-up."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import torch
from checkpoints import SHAPES, Shape, write_checkpoint
from gpu_kernels import GROUP, dense_weights, event, linear_microseconds, random_gemm

from squawq.backends import backend_for
from squawq.backends.base import Vocabulary
from squawq.backends.sampling import Chunk
from squawq.config import ModelConfig
from squawq.engine.config import EngineConfig
from squawq.engine.engine import Engine
from squawq.engine.request import FinishReason, Output, Request, SamplingParams
from squawq.engine.runner import DecoderRunner, load_runner
from squawq.families import family_of
from squawq.nn.decoder import Decoder
from squawq.nn.layers import layer_operations, norm_sizes
from squawq.nn.loader import FUSED, linear_shapes
from squawq.nn.shard import ALONE, Shard

SMALL, LARGE = SHAPES["llama-3.1-8b"], SHAPES["llama-3.1-70b"]
LOGITS_STD = 3.0  # as wide as a language model's: a few tokens have most of the probability
SETTINGS = EngineConfig(
    device="cuda", kv_tokens=81920, max_num_seqs=256, max_num_batched_tokens=4096, prefix_caching=False
)
LOADS = ((1, 512, 128), (64, 128, 128), (256, 128, 128))  # streams, tokens in, tokens out
GRAPHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # streams
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95)
CASE_SECONDS = 20.0  # of one workload; with fewer new tokens if it would take longer
CHILD_SECONDS = 75.0
PREFILL = 4096
# Prompts whose tokens are compared: sizes around pages, tiles and chunks.
PROMPTS = (1, 5, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 300, 511, 512, 513, 900, 1500)


@dataclass
class Models:
    """The 8B as an AWQ folder, written when it is first needed, and loaded."""

    place: Path | None = None  # where the folder is kept; None: a temporary one
    shape: Shape = SMALL
    _temporary: list[Path] = field(default_factory=list)

    @cached_property
    def folder(self) -> Path:
        if self.place is None:
            self._temporary.append(Path(tempfile.mkdtemp()))
        folder = (self.place or self._temporary[0]) / "model-awq"
        if not folder.exists():
            part = folder.with_name("model-awq.part")
            shutil.rmtree(part, ignore_errors=True)
            head_std = LOGITS_STD / math.sqrt(self.shape.hidden)
            write_checkpoint(part, self.shape, self.shape.layers, quantized=True, head_std=head_std)
            part.rename(folder)
        return folder

    @cached_property
    def runner(self) -> DecoderRunner:
        found = load_runner(self.folder, SETTINGS)
        gc.collect()
        gc.freeze()  # as `squawq serve` does
        return found

    def release(self) -> None:
        """Free the card's memory."""
        self.__dict__.pop("runner", None)
        gc.unfreeze()
        gc.collect()
        torch.cuda.empty_cache()

    def close(self) -> None:
        for folder in self._temporary:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Load:
    """Loading from the page cache in a fresh process, beside reading the files; peaks of host and card memory.

    ready_s: seconds from the loaded model to the captured graphs; most of it compiles kernels where none are cached.
    """

    read_s: float
    load_s: float
    ready_s: float
    host_peak_bytes: int
    card_peak_bytes: int


@dataclass(frozen=True)
class Streams:
    """A workload through the engine. Times per step are of steps after the last sequence's first token.

    graph_ms: time of the CUDA graphs of a step. unhidden_ms: the rest of the step's wall time.
    """

    streams: int
    prompt: int
    new_tokens: int
    sampled: bool
    first_token_s: float  # of the last sequence
    decode_tok_s: float
    all_in_tok_s: float
    step_ms: float
    graph_ms: float
    unhidden_ms: float


@dataclass(frozen=True)
class GraphTime:
    """The CUDA graphs of one decode step, greedy, after prompts of 128 tokens."""

    streams: int
    graph_ms: float


@dataclass(frozen=True)
class Prefill:
    """A step of one prompt, and torch's bfloat16 products of the same shapes; share: of the step that these take."""

    tokens: int
    step_ms: float
    matmul_ms: float
    share: float


@dataclass(frozen=True)
class Large:
    """The 70B, built in the card's memory: bytes of its weights, and one stream (128 in, 64 out)."""

    weight_bytes: int
    stream: Streams


@dataclass(frozen=True)
class Invariance:
    """Sequences whose tokens and log probabilities are the same bits as alone."""

    how: str
    same: int
    sequences: int
    differ: tuple[str, ...]


@dataclass(frozen=True)
class WarmUp:
    """A fresh process with an empty Triton cache: seconds of loading, of the first steps, and of steps that follow."""

    load_s: float
    prompt_s: float  # first prompt of 512 tokens
    decode_s: float  # first decode step
    crowd_s: float  # then the first 64 streams, 4 tokens each
    again_s: float  # then prompt and decode step again


@contextmanager
def timed_graphs() -> Iterator[dict[int, list[float]]]:
    """Milliseconds of each replay of each CUDA graph in the block, filled in at its end."""
    found: dict[int, list[float]] = {}
    events = defaultdict(list)
    replay = torch.cuda.CUDAGraph.replay

    def timed(graph: torch.cuda.CUDAGraph) -> None:
        first, last = event(), event()
        first.record()
        replay(graph)
        last.record()
        events[id(graph)].append((first, last))

    with patch.object(torch.cuda.CUDAGraph, "replay", timed):
        yield found
    torch.cuda.synchronize()
    found.update({key: [first.elapsed_time(last) for first, last in pairs] for key, pairs in events.items()})


@dataclass
class Times:
    """When a workload's outputs came, in seconds from its start, and how many tokens each had."""

    outputs: list[tuple[float, str, int]]

    @property
    def decode_began(self) -> float:
        """The last sequence's first token."""
        firsts: dict[str, float] = {}
        for when, request, _ in self.outputs:
            firsts.setdefault(request, when)
        return max(firsts.values())

    @property
    def ended(self) -> float:
        return self.outputs[-1][0]

    @property
    def tokens(self) -> int:
        return sum(count for *_, count in self.outputs)

    @property
    def decoded(self) -> int:
        """Tokens after `decode_began`."""
        began = self.decode_began
        return sum(count for when, _, count in self.outputs if when > began)


def prompt(index: int, tokens: int, vocab: int) -> list[int]:
    return [(7 * index + 13 * place) % (vocab - 2) + 2 for place in range(tokens)]


def run(
    runner: DecoderRunner, requests: Sequence[Request], step_tokens: int = SETTINGS.max_num_batched_tokens
) -> Iterator[tuple[float, Output]]:
    """Outputs of requests that are sent together, and when they came. Raises RuntimeError if one fails."""
    engine = Engine(runner, config=replace(SETTINGS, max_num_batched_tokens=step_tokens))
    started = time.perf_counter()
    try:
        for output in engine.generate(requests):
            if output.finish not in (None, FinishReason.LENGTH):
                raise RuntimeError(f"request {output.request} ended with {output.finish}: {output.stop_reason}")
            yield time.perf_counter() - started, output
    finally:
        engine.close()


def serve(runner: DecoderRunner, streams: int, tokens: int, new: int, params: SamplingParams) -> Times:
    asked = (replace(params, max_tokens=new, ignore_eos=True, seed=index) for index in range(streams))
    requests = [Request(str(i), prompt(i, tokens, runner.vocab_size), one) for i, one in enumerate(asked)]
    return Times([(when, output.request, len(output.ids)) for when, output in run(runner, requests)])


def step_graphs(runner: DecoderRunner, streams: int, tokens: int, params: SamplingParams, steps: int = 12) -> float:
    """Milliseconds of the CUDA graphs of one decode step."""
    with timed_graphs() as replays:
        serve(runner, streams, tokens, steps, params)
    return sum((statistics.median(times) for times in replays.values() if len(times) >= steps // 2), 0.0)


def stream(runner: DecoderRunner, streams: int, tokens: int, new: int, sampled: bool) -> Streams:
    """One workload: once to compile what prompts need, once with timed graphs, once as it is."""
    params = SAMPLED if sampled else SamplingParams()
    trial = serve(runner, streams, tokens, 4, params)
    graph_ms = step_graphs(runner, streams, tokens, params)
    step = (trial.ended - trial.decode_began) / 3
    new = max(16, min(new, int(CASE_SECONDS / max(step, 1e-4))))
    times = serve(runner, streams, tokens, new, params)
    decode = times.ended - times.decode_began
    step_ms = decode / (new - 1) * 1e3
    return Streams(
        streams,
        tokens,
        new,
        sampled,
        times.decode_began,
        times.decoded / decode,
        times.tokens / times.ended,
        step_ms,
        graph_ms,
        step_ms - graph_ms,
    )


def child(work: str, folder: Path, **environment: str) -> dict[str, float]:
    """Run gpu_child.py. Raises RuntimeError with its last lines if it fails."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_child.py")), work, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=CHILD_SECONDS, env={**os.environ, **environment}
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def load(models: Models) -> Iterator[Load]:
    """Loading the 8B's folder."""
    found = child("load", models.folder)
    memory = int(found["host_peak_bytes"]), int(found["card_peak_bytes"])
    yield Load(found["read_s"], found["load_s"], found["ready_s"], *memory)


def streams(models: Models) -> Iterator[Streams]:
    """The 8B through the engine: greedy, and sampled with temperature 0.8, top_p 0.95 and seeds."""
    for case in LOADS:
        for sampled in (False, True):
            yield stream(models.runner, *case, sampled)


def graphs(models: Models) -> Iterator[GraphTime]:
    """Time of a decode step on the card for each batch size."""
    for count in GRAPHS:
        serve(models.runner, count, 128, 4, SamplingParams())
        yield GraphTime(count, step_graphs(models.runner, count, 128, SamplingParams()))


def prefill(models: Models) -> Iterator[Prefill]:
    """A prompt of 4,096 tokens in one step."""
    runner, shape = models.runner, models.shape
    chunk = Chunk(prompt(0, PREFILL, runner.vocab_size), 0, list(range(PREFILL // runner.page_size)), 1)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        runner.run([chunk])
        seconds.append(time.perf_counter() - started)
    step_ms, matmul_ms = statistics.median(seconds[1:]) * 1e3, 0.0
    for out, in_ in fused_shapes(shape).values():
        x = torch.randn(PREFILL, in_, device="cuda", dtype=torch.bfloat16)
        matmul_ms += shape.layers * linear_microseconds(x, dense_weights(out, in_, torch.bfloat16)) / 1e3
    yield Prefill(PREFILL, step_ms, matmul_ms, matmul_ms / step_ms)


def fused_shapes(shape: Shape) -> dict[str, tuple[int, int]]:
    """(out, in) of a layer's products, linears with the same input stacked."""
    sizes = linear_shapes(ModelConfig.from_dict(shape.config(shape.layers)))
    return {name: (sum(sizes[part][0] for part in parts), sizes[parts[0]][1]) for name, parts in FUSED.items()}


def random_decoder(shape: Shape, device: str = "cuda", shard: Shard = ALONE) -> Decoder:
    """A decoder of random weights, or a rank's part of one, built in the device's memory."""
    whole = ModelConfig.from_dict(shape.config(shape.layers))
    config, tokens = shard.config(whole), shard.vocabulary(whole)
    family, backend = family_of(config.model_type), backend_for(device)
    sizes = linear_shapes(config)

    def matrix() -> torch.Tensor:
        return torch.randn(tokens.stop - tokens.start, shape.hidden, device=device, dtype=torch.float16)

    operations = []
    for index in range(shape.layers):
        linears = {}
        for name, parts in FUSED.items():
            out, in_ = sum(sizes[part][0] for part in parts), sizes[parts[0]][1]
            linears[name] = backend.pack_int4(out, in_, GROUP, [random_gemm(out, in_, device)])
        norms = {name: torch.ones(size, device=device) for name, size in norm_sizes(config, family, index).items()}
        operations.append(layer_operations(config, family, index, linears, norms, shared=shard.size > 1))
    head = backend.pack_dense([matrix().mul_(LOGITS_STD / math.sqrt(shape.hidden))])
    norm = torch.ones(shape.hidden, device=device)
    vocabulary = None if shard.size == 1 else Vocabulary(tokens, shard.vocabularies(whole))
    return Decoder(config, backend, matrix(), tuple(chain(*operations)), norm, head, vocabulary)


def large(models: Models) -> Iterator[Large]:
    """The 70B, one stream."""
    models.release()
    before = torch.cuda.memory_allocated()
    decoder = random_decoder(LARGE)
    weights = torch.cuda.memory_allocated() - before
    yield Large(weights, stream(DecoderRunner(decoder, kv_tokens=4096, rows=1), 1, 128, 64, False))


def compared(runner: DecoderRunner) -> list[Request]:
    """Greedy prompts of many sizes, and three that are sampled with seeds; log probabilities of all tokens."""

    def ask(index: int, tokens: int, **sampling: float) -> Request:
        params = SamplingParams(max_tokens=40, ignore_eos=True, logprobs=0, **sampling)  # type: ignore[arg-type]
        return Request(f"{index}: {tokens} tokens", prompt(index, tokens, runner.vocab_size), params)

    greedy = [ask(index, tokens) for index, tokens in enumerate(PROMPTS)]
    return greedy + [ask(100 + seed, 40, temperature=0.8, top_p=0.9, seed=seed) for seed in range(3)]


def bits(
    runner: DecoderRunner, requests: Sequence[Request], step_tokens: int = SETTINGS.max_num_batched_tokens
) -> dict[str, list[tuple[int, float]]]:
    """Tokens and log probabilities of each request."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for _, output in run(runner, requests, step_tokens):
        found[output.request] += [(item.token, item.logprob) for item in output.logprobs or ()]
    return found


def invariance(models: Models) -> Iterator[Invariance]:
    """The same sequences alone, again alone, among others, and with prompts in chunks."""
    runner = models.runner
    mine = compared(runner)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    others = [
        Request(f"other {index}", prompt(1000 + index, 20 + 3 * (index % 60), runner.vocab_size), params)
        for index in range(256 - len(mine))
    ]
    alone = {key: value for request in mine for key, value in bits(runner, [request]).items()}

    def same_as_alone(how: str, found: dict[str, list[tuple[int, float]]]) -> Invariance:
        differ = tuple(request.id for request in mine if found[request.id] != alone[request.id])
        return Invariance(how, len(mine) - len(differ), len(mine), differ)

    yield same_as_alone("alone, again", {k: v for r in mine for k, v in bits(runner, [r]).items()})
    yield same_as_alone(f"among {len(others) + len(mine)} sequences", bits(runner, [*mine, *others]))
    chunked = bits(runner, [*mine, *others[:100]], step_tokens=700)
    yield same_as_alone("among 121 sequences, 700 tokens a step", chunked)


def warm_up(models: Models) -> Iterator[WarmUp]:
    """The first steps of a process that has to compile every kernel."""
    models.release()
    with tempfile.TemporaryDirectory() as cache:
        yield WarmUp(**child("warm_up", models.folder, TRITON_CACHE_DIR=cache))
