"""Measures the speed of a model on this machine: prefill and decode through the engine, on random token ids."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from squawq.backends import backend_for
from squawq.engine.config import EngineConfig
from squawq.engine.loaded_model import LoadedModel
from squawq.engine.protocol import InferenceEngine
from squawq.engine.request import FinishReason, Output, Request, SamplingParams
from squawq.errors import ConfigError, GenerationError
from squawq.format.reader import Checkpoint
from squawq.hub.download import resolve
from squawq.memory import peak_memory

MAX_STREAMS = 256


def bench(
    model: str | Path, *, prompt_tokens: int = 512, new_tokens: int = 128, streams: int = 1, **knobs: Any
) -> dict[str, Any]:
    """Load `model` and measure it; streams run together, each on a random prompt of its own.

    Args:
        streams: Requests at once.
        **knobs: Fields of EngineConfig, such as device and threads.

    Returns:
        load_s; prefill_tok_s: tokens of all prompts by the time to the last stream's first token; ttft_ms: mean time to
        first token; decode_tok_s: tokens of all streams from then on; itl_ms_p50, itl_ms_p99: inter-token latency in
        that phase; overhead: share of the engine's time outside of the runner; peak_rss_bytes (of the process so far);
        prompt_tokens, new_tokens, streams, tensor_parallel_size and device; threads and isa of a CPU, or the gpu's
        name.

    Raises:
        ConfigError: A number is out of range.
        CheckpointError: The folder cannot be run.
    """
    numbers = ("prompt_tokens", prompt_tokens, 1), ("new_tokens", new_tokens, 2), ("streams", streams, 1)
    for name, value, least in numbers:
        if value < least:
            raise ConfigError(f"{name} is {value}; it must be at least {least}")
    if streams > MAX_STREAMS:
        raise ConfigError(f"streams is {streams}; it must be at most {MAX_STREAMS}")
    folder = resolve(model)
    positions = Checkpoint(folder).config.max_positions
    if prompt_tokens + new_tokens > positions:
        total = prompt_tokens + new_tokens
        raise ConfigError(f"prompt_tokens and new_tokens are {total} together; the model has {positions} positions")
    began = time.perf_counter()
    room = (prompt_tokens + new_tokens + 16) * streams
    knobs = {"kv_tokens": room, "max_num_seqs": streams, "prefix_caching": False, **knobs}
    config = EngineConfig(**knobs)
    loaded = LoadedModel(folder, config, text=False)
    load_s = time.perf_counter() - began
    ids = np.random.default_rng(0).integers(0, loaded.config.vocab_size, (streams, prompt_tokens)).tolist()
    engine = loaded.engine
    try:
        _run(engine, [prompt[:16] for prompt in ids], 2)  # threads and pages awake
        before = engine.stats()
        started, times = _run(engine, ids, new_tokens)
        after = engine.stats()
        machine = backend_for(config.device, exact=config.exact).describe()
    finally:
        loaded.close()
    step_seconds = after.step_seconds - before.step_seconds
    return {
        **_figures(started, times, prompt_tokens),
        "overhead": 1 - (after.runner_seconds - before.runner_seconds) / step_seconds,
        "peak_rss_bytes": peak_memory(),
        "load_s": load_s,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "streams": streams,
        "tensor_parallel_size": config.tensor_parallel_size,
        "device": config.device,
        **{{"instructions": "isa"}.get(name, name): fact for name, fact in machine.items()},
    }


def _run(engine: InferenceEngine, prompts: Sequence[list[int]], new_tokens: int) -> tuple[float, list[list[float]]]:
    """Start time, and for each prompt the times of its tokens."""
    times: list[list[float]] = [[] for _ in prompts]
    left = len(prompts)
    failure: Output | None = None
    done = threading.Event()

    def sink(output: Output) -> None:
        nonlocal left, failure
        times[int(output.request)].extend([time.perf_counter()] * len(output.ids))
        if output.finish:
            failure = failure if output.finish is FinishReason.LENGTH else output
            left -= 1
            if not left:
                done.set()

    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    started = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.submit(Request(str(index), prompt, params), sink)
    done.wait()
    if failure is not None:
        raise GenerationError(f"a stream ended early: {failure.finish}: {failure.stop_reason}")
    return started, times


def _figures(started: float, times: list[list[float]], prompt_tokens: int) -> dict[str, float]:
    firsts = [stream[0] for stream in times]
    together, end = max(firsts), max(stream[-1] for stream in times)
    later = [[t for t in stream if t >= together] for stream in times]
    gaps = np.concatenate([np.diff(stream) for stream in later]) * 1e3
    return {
        "prefill_tok_s": len(times) * prompt_tokens / (together - started),
        "decode_tok_s": sum(sum(t > together for t in stream) for stream in times) / (end - together),
        "ttft_ms": float(np.mean(firsts) - started) * 1e3,
        "itl_ms_p50": float(np.percentile(gaps, 50)),
        "itl_ms_p99": float(np.percentile(gaps, 99)),
    }
