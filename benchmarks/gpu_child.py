"""What gpu.py measures in a fresh process: `python gpu_child.py load|warm_up FOLDER` prints one line of JSON."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from squawq.engine.config import EngineConfig
from squawq.engine.engine import Engine
from squawq.engine.request import Request, SamplingParams
from squawq.engine.runner import DecoderRunner, load_runner
from squawq.nn.loader import Options, open_model

CONFIG = EngineConfig(device="cuda", kv_tokens=32768, prefix_caching=False)


def memory(what: str) -> int:
    """Bytes, from /proc/self/status: VmRSS now, VmHWM at most so far."""
    found = re.search(what + r":\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def read_files(folder: Path) -> float:
    """Seconds to read the folder's weights, as they lie in the page cache afterwards."""
    block, started = bytearray(2**20), time.perf_counter()
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    return time.perf_counter() - started


def load(folder: Path) -> dict[str, float]:
    """Loading from the page cache."""
    read_files(folder)
    read = read_files(folder)
    torch.zeros(1, device="cuda")  # the driver's own memory and time
    before, started = memory("VmRSS"), time.perf_counter()
    decoder = open_model(folder, Options(CONFIG.device)).load()
    torch.cuda.synchronize()
    loaded, peak = time.perf_counter() - started, memory("VmHWM") - before
    started = time.perf_counter()
    DecoderRunner(decoder, CONFIG.kv_tokens, rows=CONFIG.max_num_seqs)
    torch.cuda.synchronize()
    ready, taken = time.perf_counter() - started, torch.cuda.max_memory_allocated()
    return {"read_s": read, "load_s": loaded, "ready_s": ready, "host_peak_bytes": peak, "card_peak_bytes": taken}


def token_times(engine: Engine, prompts: Sequence[list[int]], count: int) -> list[float]:
    """Seconds until each output of these requests."""
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    started = time.perf_counter()
    requests = [Request(f"{started} {index}", prompt, params) for index, prompt in enumerate(prompts)]
    return [time.perf_counter() - started for _ in engine.generate(requests)]


def warm_up(folder: Path) -> dict[str, float]:
    """The first prompt, the first decode step after it, and then the first steps of 64 sequences."""
    started = time.perf_counter()
    engine = Engine(load_runner(folder, CONFIG), config=CONFIG)
    loaded = time.perf_counter() - started
    try:
        first, second = token_times(engine, [list(range(512))], 2)
        crowd = token_times(engine, [list(range(index, index + 128)) for index in range(64)], 4)[-1]
        again = token_times(engine, [list(range(512))], 2)
    finally:
        engine.close()
    return {"load_s": loaded, "prompt_s": first, "decode_s": second - first, "crowd_s": crowd, "again_s": again[-1]}


if __name__ == "__main__":
    print(json.dumps({"load": load, "warm_up": warm_up}[sys.argv[1]](Path(sys.argv[2]))))
