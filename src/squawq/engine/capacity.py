"""Memory: how many tokens the KV cache holds by default, and whether a GPU has room for a model at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from squawq.backends import backend_class
from squawq.backends.base import FP8, PAGE
from squawq.config import ModelConfig
from squawq.engine.config import EngineConfig
from squawq.errors import ConfigError
from squawq.nn.cache import Cache
from squawq.nn.loader import OpenModel
from squawq.nn.shard import Shard

CACHE_SHARE = 0.25  # of a CPU's free memory, for keys and values, by default
STATE_SHARE = 0.5  # of the free memory, for the states of sequences, at most
GPU_SHARE = 0.9  # of a GPU's memory, for weights, buffers and KV cache together, by default (vLLM's)
MAX_CONTEXTS = 16  # whole contexts, beyond which more cache is of little use
ENOUGH_TOKENS = 4096  # that a GPU must have room for, or the model's context if that is shorter
FEW_ROWS = 8  # sequences: the max_num_seqs that an error suggests


def states_that_fit(config: ModelConfig, rows: int, free: int) -> int:
    """Of how many sequences the states of layers with linear attention take at most half of the free bytes.

    All `rows` for a model without such layers. Raises ConfigError where there is no room for one.
    """
    each = Cache.state_bytes(config)
    if each == 0:
        return rows
    fitting = min(rows, int(free * STATE_SHARE) // each)
    if fitting < 1:
        raise ConfigError(
            f"a sequence's state takes {gib(each)}, and {gib(max(0, free))} of memory are free, of which half may be "
            "used for states: free some, or choose a smaller model"
        )
    return fitting


def default_kv_tokens(config: ModelConfig, token_bytes: int, free: int) -> int:
    """Tokens in a CPU's KV cache: a quarter of the free bytes, at most 16 contexts; half of them for one context."""
    wanted = min(int(free * CACHE_SHARE) // token_bytes, MAX_CONTEXTS * config.max_positions)
    return max(min(config.max_positions, int(free * 2 * CACHE_SHARE) // token_bytes), wanted, PAGE) // PAGE * PAGE


def shared_kv_tokens(
    config: ModelConfig, token_bytes: int, working: int, share: float, free: int, total: int, contexts: int
) -> int:
    """Tokens in a GPU's KV cache, when everything together may use this share of its memory.

    Args:
        working: Bytes that steps need, `Backend.working_bytes`.
        free, total: Bytes of the GPU after the weights are loaded.
        contexts: Whole contexts at most.

    Raises:
        ConfigError: Weights and buffers use up the share.
    """
    room = int(share * total) - (total - free) - working
    if room < PAGE * token_bytes:
        raise ConfigError(
            f"gpu_memory_utilization is {share:g} of the GPU's {gib(total)}, and {gib(total - free)} are taken and "
            f"{gib(working)} needed for steps; none are left for keys and values: raise it, or lower max_num_seqs"
        )
    return min(room // token_bytes, contexts * config.max_positions) // PAGE * PAGE


def free_gpu_tokens(
    config: ModelConfig,
    token_bytes: int,
    device: torch.device,
    working: int,
    share: float,
    rows: int,
    room: int | None = None,
) -> int:
    """`shared_kv_tokens` of a GPU as it is now, for `rows` sequences. room: Bytes that are free on the other ranks."""
    torch.cuda.empty_cache()  # what loading has freed
    free, total = torch.cuda.mem_get_info(device)
    free = free if room is None else min(free, room)
    return shared_kv_tokens(config, token_bytes, working, share, free, total, max(rows, MAX_CONTEXTS))


def pages_of(tokens: int, page_size: int) -> int:
    """Pages of a KV cache of so many tokens. Raises ConfigError if there is none."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < page_size:
        raise ConfigError(
            f"kv_tokens is {tokens!r}; it must be a whole number, at least one page of {page_size} tokens"
        )
    return tokens // page_size


def check_room(model: OpenModel, config: EngineConfig, free: int, total: int) -> None:
    """Raise ConfigError, with what would fit, if a model has no room on a GPU; before it is loaded.

    free, total: Bytes of the GPU's memory.
    """
    backend, shape = model.backend, model.config
    share = config.gpu_memory_utilization or GPU_SHARE
    room = free if config.kv_tokens else min(free, int(share * total) - (total - free))
    tokens = config.kv_tokens or min(shape.max_positions, ENOUGH_TOKENS)
    each = Cache.token_bytes(shape, backend.cache_dtype)
    rows, steps = config.max_num_seqs, config.step_tokens
    weights, working, cache = model.weight_bytes(), backend.working_bytes(shape, rows, steps), tokens * each
    if Cache.state_bytes(shape):
        rows = states_that_fit(shape, rows, room - weights - working)
        working += rows * Cache.state_bytes(shape)
    excess = weights + working + cache - room
    if excess <= 0:
        return
    remedies = []
    if (fitting := (cache - excess) // each // PAGE * PAGE) > 0:
        remedies.append(f"kv_tokens of {fitting}")
    if backend.cache_dtype != FP8 and backend.fp8_declines() is None and excess <= cache // 2:
        remedies.append("kv_cache_dtype fp8")
    if rows > FEW_ROWS and excess <= working - backend.working_bytes(shape, FEW_ROWS, steps):
        remedies.append(f"max_num_seqs of {FEW_ROWS}")
    heads = (head for head in ("int8", "int4") if model.head == "16-bit" and model.head_declines(head) is None)
    remedies += [f"head {head}" for head in heads if excess <= weights - model.weight_bytes(head)]
    if excess <= free - room:
        remedies.append("a larger gpu_memory_utilization")
    needed = total + int(excess / (1 if config.kv_tokens else share))
    remedies.append(f"a GPU with {gib(needed)}, or device cpu")
    raise ConfigError(
        f"{model.checkpoint.folder} needs {gib(room + excess)} of the GPU's memory ({gib(weights)} for weights, "
        f"{gib(working)} for steps, {gib(cache)} for a KV cache of {tokens:,} tokens), and {gib(max(0, room))} can be "
        f"used ({gib(free)} of {gib(total)} are free); one of these would fit: {', '.join(remedies)}"
    )


@dataclass(frozen=True)
class GpuShare:
    """What each of `size` GPUs holds, in bytes.

    Attributes:
        weights: Of the GPU that has most.
        steps: Buffers and activations, and states of linear attention.
        room: What GPU_SHARE of the memory leaves for keys and values.
        tokens: In the KV cache, as a server has it by default.
        fits: A server starts, and there is room for the sequences that were asked for.
    """

    size: int
    weights: int
    steps: int
    room: int
    tokens: int
    fits: bool


def gpu_share(
    whole: ModelConfig, size: int, memory: int, rank_weights: Callable[[Shard], int], context: int, batch: int
) -> GpuShare:
    """A model on `size` GPUs, with a server's default settings, before there is any GPU.

    Args:
        memory: Bytes of a GPU.
        rank_weights: Bytes of a rank's weights.
        context, batch: Tokens of a sequence, and sequences at once.
    """
    weights, rank = max((rank_weights(Shard(rank, size)), rank) for rank in range(size))
    config = Shard(rank, size).config(whole)
    default = EngineConfig(device="cuda")
    settings = EngineConfig(device="cuda", max_num_seqs=max(default.max_num_seqs, batch))
    rows, each = settings.max_num_seqs, Cache.token_bytes(config)
    steps = backend_class("cuda").step_bytes(config, rows, settings.step_tokens, size)
    if state := Cache.state_bytes(config):  # of as many sequences as `states_that_fit` leaves, and those asked for
        fitting = int((memory - weights - steps) * STATE_SHARE) // state
        steps += max(batch, min(rows, fitting)) * state
    room = max(0, int(GPU_SHARE * memory) - weights - steps)
    try:
        free = memory - weights
        tokens = shared_kv_tokens(config, each, steps, GPU_SHARE, free, memory, max(rows, MAX_CONTEXTS))
    except ConfigError:
        tokens = 0
    needed = max(batch * -(-context // PAGE) * PAGE, min(whole.max_positions, ENOUGH_TOKENS))
    return GpuShare(size, weights, steps, room, tokens, room >= needed * each)


def gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def free_on(device: torch.device) -> int:
    """Free bytes of a GPU; elsewhere `free_memory`."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


def free_memory() -> int:
    """Bytes available without swapping on the machine, or within the container's limit (cgroup v2)."""
    free = _machine_memory()
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
        return min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):  # no limit, or none of this kind
        return free


def _machine_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES")) // 2
