"""llama.cpp at Q4_K_M: makes a random-weight model of a shape and measures it; runs in an environment of its own.

    python llamacpp_measure.py make llama-3.2-1b OUT.gguf
    python llamacpp_measure.py measure OUT.gguf --threads 2 [--prompt-tokens 128 --new-tokens 128 --streams 8]

The environment has llama-cpp-python, gguf and numpy, and does not have squawq. `measure` prints one line of JSON.
The low-level calls alone are timed: llama_decode with prompts filled up to batches of 512 tokens, then one token of
every stream a step, picked by the largest logit; 16-bit KV cache, everything else as llama.cpp has it by default.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray

BATCH = 512
CONTEXT_STEP = 256
ERROR_LEVEL = 4
Slot = tuple[int, int, int, bool]  # token, position, sequence, whether its logits are wanted


@dataclass(frozen=True)
class Shape:
    """A Llama, or with experts a Qwen3-MoE, with tied embeddings. inner: of an expert, where there are any."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int
    head_dim: int = 64
    experts: int = 0
    top_k: int = 0

    @property
    def architecture(self) -> str:
        return "qwen3moe" if self.experts else "llama"

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """[out, in] of every matrix and [size] of every norm, by llama.cpp's names."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"token_embd": (self.vocab, self.hidden)}
        for index in range(self.layers):
            layer = {
                "attn_norm": (self.hidden,),
                "attn_q": (query, self.hidden),
                "attn_k": (key, self.hidden),
                "attn_v": (key, self.hidden),
                "attn_output": (self.hidden, query),
                "ffn_norm": (self.hidden,),
            } | (self._experts() if self.experts else self._mlp())
            shapes |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
        return shapes | {"output_norm": (self.hidden,)}

    def _mlp(self) -> dict[str, tuple[int, ...]]:
        gate, down = (self.inner, self.hidden), (self.hidden, self.inner)
        return {"ffn_gate": gate, "ffn_up": gate, "ffn_down": down}

    def _experts(self) -> dict[str, tuple[int, ...]]:
        gate, down = (self.experts, self.inner, self.hidden), (self.experts, self.hidden, self.inner)
        norms = {"attn_q_norm": (self.head_dim,), "attn_k_norm": (self.head_dim,)}
        router = {"ffn_gate_inp": (self.experts, self.hidden)}
        return {**norms, **router, "ffn_gate_exps": gate, "ffn_up_exps": gate, "ffn_down_exps": down}


SHAPES = {
    "tiny": Shape(layers=2, hidden=256, inner=512, heads=4, kv_heads=2, vocab=1024),
    "tiny-moe": Shape(2, 256, 256, 4, 2, 1024, experts=8, top_k=2),
    "qwen3-30b-a3b-4": Shape(4, 2048, 768, 32, 4, 12672, head_dim=128, experts=128, top_k=8),
    "llama-3.2-1b": Shape(layers=16, hidden=2048, inner=8192, heads=32, kv_heads=8, vocab=128256),
}


def write_f16(shape: Shape, name: str, path: Path) -> None:
    """Weights from N(0, 0.02), norms of ones; one tensor in memory at a time."""
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_block_count(shape.layers)
    writer.add_context_length(131072)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.inner)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.top_k)
        writer.add_expert_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")
    tensors = shape.tensors()
    for tensor, size in tensors.items():
        dtype = np.dtype(np.float32 if in_float32(tensor) else np.float16)
        writer.add_tensor_info(f"{tensor}.weight", size, dtype, int(np.prod(size)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(0)
    for tensor, size in tensors.items():
        weights = np.ones(size, np.float32)
        if len(size) > 1:
            weights = generator.standard_normal(size, np.float32)
            weights *= 0.02
        writer.write_tensor_data(weights if in_float32(tensor) else weights.astype(np.float16))
    writer.close()


def in_float32(tensor: str) -> bool:
    """Norms and routers, as in llama.cpp's own files."""
    return tensor.endswith(("norm", "ffn_gate_inp"))


def make(name: str, out: Path) -> None:
    """Write the model; OUT appears when it is complete."""
    f16, part = out.with_suffix(".f16"), out.with_suffix(".part")
    write_f16(SHAPES[name], name, f16)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    failed = llama_cpp.llama_model_quantize(str(f16).encode(), str(part).encode(), ctypes.byref(params))
    f16.unlink()
    if failed:
        sys.exit(f"llama_model_quantize returned {failed}")
    part.rename(out)


class Runner:
    """A loaded model with room for `streams` sequences of `length` tokens."""

    def __init__(self, path: Path, threads: int, streams: int, length: int) -> None:
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            sys.exit(f"{path} cannot be loaded")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = streams * (-(-length // CONTEXT_STEP) * CONTEXT_STEP)
        params.n_batch = BATCH
        params.n_seq_max = streams
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            sys.exit(f"no context of {params.n_ctx} tokens can be made")
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def clear(self) -> None:
        """Forget every sequence."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def step(self, slots: Sequence[Slot]) -> dict[int, int]:
        """Decode one batch; returns the most likely next token of every sequence whose logits were requested."""
        self.batch.n_tokens = len(slots)
        for row, (token, position, sequence, wanted) in enumerate(slots):
            self.batch.token[row] = token
            self.batch.pos[row] = position
            self.batch.n_seq_id[row] = 1
            self.batch.seq_id[row][0] = sequence
            self.batch.logits[row] = wanted
        if result := llama_cpp.llama_decode(self.context, self.batch):
            sys.exit(f"llama_decode returned {result}")
        return {sequence: self._argmax(row) for row, (_, _, sequence, wanted) in enumerate(slots) if wanted}

    def _argmax(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())


def run_once(runner: Runner, prompts: NDArray[np.int64], new_tokens: int) -> dict[str, float]:
    """All prompts, then new_tokens - 1 steps: the first new token of a stream comes from its prompt."""
    streams, length = prompts.shape
    slots = [
        (int(prompts[stream, position]), position, stream, position == length - 1)
        for stream in range(streams)
        for position in range(length)
    ]
    runner.clear()
    started = time.perf_counter()
    tokens: dict[int, int] = {}
    first_at: list[float] = []
    for begin in range(0, len(slots), BATCH):
        found = runner.step(slots[begin : begin + BATCH])
        first_at += [time.perf_counter() - started] * len(found)
        tokens |= found
    prefilled = time.perf_counter()
    for position in range(length, length + new_tokens - 1):
        tokens = runner.step([(tokens[stream], position, stream, True) for stream in range(streams)])
    ended = time.perf_counter()
    return {
        "prefill_tok_s": streams * length / (prefilled - started),
        "decode_tok_s": streams * (new_tokens - 1) / (ended - prefilled),
        "total_tok_s": streams * new_tokens / (ended - started),
        "ttft_ms": 1000 * statistics.mean(first_at),
    }


def measure(
    path: Path, threads: int, prompt_tokens: int, new_tokens: int, streams: int, repeats: int
) -> dict[str, Any]:
    """Medians over `repeats` runs in one process. peak_rss_bytes counts the pages of the mapped file too."""
    started = time.perf_counter()
    runner = Runner(path, threads, streams, prompt_tokens + new_tokens)
    load_s = time.perf_counter() - started
    prompts = np.random.default_rng(0).integers(0, runner.vocab, (streams, prompt_tokens))
    run_once(runner, prompts[:, :8], 3)
    runs = [run_once(runner, prompts, new_tokens) for _ in range(repeats)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        **{key: statistics.median(run[key] for run in runs) for key in runs[0]},
        "peak_rss_bytes": peak if sys.platform == "darwin" else peak * 1024,
        "load_s": load_s,
        "threads": threads,
        "parameters": llama_cpp.llama_model_n_params(runner.model),
        "weight_bytes": llama_cpp.llama_model_size(runner.model),
        "version": llama_cpp.__version__,
        "system": llama_cpp.llama_print_system_info().decode().strip(),
    }


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def log_errors(level: int, text: bytes, _: object) -> None:
    """Print llama.cpp's own errors on stderr and drop its other messages."""
    if level == ERROR_LEVEL:
        sys.stderr.write(text.decode(errors="replace"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write a random-weight Q4_K_M model")
    making.add_argument("shape", choices=SHAPES)
    making.add_argument("out", type=Path)
    measuring = commands.add_parser("measure", help="print the speeds of a model as JSON")
    measuring.add_argument("path", type=Path, metavar="GGUF")
    measuring.add_argument("--threads", type=int, required=True)
    measuring.add_argument("--prompt-tokens", type=int, default=512)
    measuring.add_argument("--new-tokens", type=int, default=128, help="at least 2, so that there is a step to time")
    measuring.add_argument("--streams", type=int, default=1)
    measuring.add_argument("--repeats", type=int, default=1)
    args = vars(parser.parse_args())
    llama_cpp.llama_log_set(log_errors, ctypes.c_void_p())
    if args.pop("command") == "make":
        make(args["shape"], args["out"])
    elif args["new_tokens"] < 2:
        parser.error("--new-tokens must be at least 2")
    else:
        print(json.dumps(measure(**args)))


if __name__ == "__main__":
    main()
