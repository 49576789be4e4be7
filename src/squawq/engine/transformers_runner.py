"""The runner of every family that our decoder does not run: transformers' model, with our linears and our KV cache.

Where attention goes through transformers' interface and the past is keys and values alone, which is found by running a
token, a step runs all sequences together on the paged cache. Otherwise each sequence has a cache of transformers' own.
With plain torch between the linears, a row's last bits may depend on the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from squawq.backends import backend_for
from squawq.backends.base import Backend
from squawq.backends.sampling import Chunk, Sampling, StartedStep
from squawq.backends.threads import one_thread
from squawq.config import ModelConfig
from squawq.engine.batching import batch_of
from squawq.engine.capacity import (
    GPU_SHARE,
    default_kv_tokens,
    free_gpu_tokens,
    free_memory,
    free_on,
    gib,
    pages_of,
    states_that_fit,
)
from squawq.engine.config import EngineConfig
from squawq.errors import ConfigError
from squawq.families import family_of
from squawq.format.reader import Checkpoint
from squawq.format.shards import DeviceReader, read_tensor
from squawq.layerwise.attention import AttentionLayer, PagedAttention, Unpaged, attention_layers
from squawq.layerwise.blocks import Blocks
from squawq.layerwise.meta_model import refusing
from squawq.layerwise.packed_model import PackedModel
from squawq.nn.cache import Cache

logger = logging.getLogger("squawq")
BY_LENGTH = ("dynamic", "longrope")  # types of rotary embedding
FEW_TOKENS = 64  # in a step, whose operations between the linears are too small for torch's threads
TRIAL = 4  # tokens by which `Caches` tells whether a prompt can be cut


class Steps(Protocol):
    """Runs steps on a cache.

    Attributes:
        token_bytes: Bytes of the cache for a token.
        shares_prefixes: `Runner.shares_prefixes`.
    """

    token_bytes: int
    shares_prefixes: bool

    def open(self, pages: int) -> None:
        """Make the cache."""

    def logits(self, batch: Sequence[Chunk]) -> Tensor:
        """float32 [rows, vocab], `chunk.logits` rows of each chunk in order."""

    def release(self, slot: int) -> None:
        """`Runner.release`."""


class Paged:
    """All sequences of a step as one row of tokens, on a paged cache."""

    shares_prefixes = True

    def __init__(self, model: PackedModel, layers: Sequence[AttentionLayer], backend: Backend) -> None:
        self._model, self._layers, self._backend = model, layers, backend
        self._attention: PagedAttention
        self.token_bytes = PagedAttention.token_bytes(layers, backend)

    def open(self, pages: int) -> None:
        self._attention = PagedAttention(self._model, self._layers, pages, self._backend)

    def logits(self, batch: Sequence[Chunk]) -> Tensor:
        step = batch_of(batch, self._backend.page_size, self._backend.device)
        self._attention.begin(step)
        found = self._model(step.ids[None], step.outputs, position_ids=step.positions[None], use_cache=False)
        return found.logits[0].float()  # type: ignore[no-any-return]

    def release(self, slot: int) -> None:
        """Pages hold all of a sequence's past."""


class Caches:
    """One sequence after another, each with a cache of transformers' own by its slot."""

    shares_prefixes = False

    def __init__(self, model: PackedModel, cache_name: str, config: ModelConfig, backend: Backend) -> None:
        self._model, self._name, self._device = model, cache_name, backend.device
        self._slots: dict[int, Any] = {}
        self.token_bytes = Cache.token_bytes(config, backend.activation_dtype)
        self._cuts = self._may_cut()

    def open(self, pages: int) -> None:
        """Caches grow as they are written."""

    def logits(self, batch: Sequence[Chunk]) -> Tensor:
        return torch.cat([self._run(chunk.slot, chunk.ids, chunk.start, chunk.logits) for chunk in batch])

    def release(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def _run(self, slot: int, ids: Sequence[int], start: int, logits: int) -> Tensor:
        if start and not self._cuts and len(ids) > 1:
            first = len(ids) - logits
            return torch.cat([self._run(slot, [token], start + i, int(i >= first)) for i, token in enumerate(ids)])
        if not start:
            self.release(slot)
        tokens = torch.tensor([ids], dtype=torch.int64, device=self._device)
        rows = torch.arange(len(ids) - logits, len(ids), device=self._device)
        found = self._model(tokens, rows, use_cache=True, **{self._name: self._slots.get(slot)})
        self._slots[slot] = found[self._name]
        return found.logits[0].float()  # type: ignore[no-any-return]

    def _may_cut(self) -> bool:
        """Whether the model goes on from its state with several tokens as it does with one; some forget it."""
        self._cuts, ids = True, list(range(TRIAL))
        whole = self._run(0, ids, 0, 1)
        self._run(0, ids[: TRIAL // 2], 0, 0)
        cut = self._run(0, ids[TRIAL // 2 :], TRIAL // 2, 1)
        self._slots.clear()
        return bool((whole - cut).abs().max() < 0.01 * whole.abs().max())


class TransformersRunner:
    """transformers' model of a checkpoint, loaded, and its KV cache.

    Args:
        checkpoint: A model that transformers has a class for.
        config: Settings of the engine.

    Raises:
        CheckpointError: transformers cannot use the config, or a tensor is missing or damaged.
        ConfigError: A setting does not suit the model or the machine.
    """

    cache_outputs = True  # to rounding: the bits of a row may depend on the others of its step
    failure = None

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig) -> None:
        self.config = checkpoint.config
        self.vocab_size, self.max_positions = self.config.vocab_size, self.config.max_positions
        self._backend = backend = _backend(self.config, config)
        self.page_size = backend.page_size
        if config.threads is not None:
            backend.set_threads(config.threads)
        blocks = Blocks(checkpoint, family_of(self.config.model_type), config.device)
        self._where = blocks.meta_model.where
        model = PackedModel(blocks, backend, config.head)
        with refusing(self._where):
            self._steps = _steps(model, self.config, backend)
        self.shares_prefixes = self._steps.shares_prefixes
        self.token_bytes = self._steps.token_bytes
        self.max_sequences = states_that_fit(self.config, config.max_num_seqs, free_on(backend.device))
        self.num_pages = pages_of(self._kv_tokens(config), self.page_size)
        try:
            self._steps.open(self.num_pages)
        except (MemoryError, RuntimeError, ValueError) as error:
            tokens = self.num_pages * self.page_size
            raise ConfigError(f"kv_tokens is {tokens}; the machine has no room for so many: {error}") from error

    def _kv_tokens(self, config: EngineConfig) -> int:
        if config.kv_tokens is not None:
            return config.kv_tokens
        states = self.max_sequences * Cache.state_bytes(self.config)
        if self._backend.device.type != "cuda":
            return default_kv_tokens(self.config, self.token_bytes, free_memory() - states)
        working = states + self._backend.working_bytes(self.config, config.max_num_seqs, config.step_tokens)
        share = config.gpu_memory_utilization or GPU_SHARE
        sizes = self._backend.device, working, share, config.max_num_seqs
        return free_gpu_tokens(self.config, self.token_bytes, *sizes)

    @property
    def cache_bytes(self) -> int:
        """Of the whole KV cache and all states."""
        return self.num_pages * self.page_size * self.token_bytes + self.max_sequences * Cache.state_bytes(self.config)

    def prepare(self, sampling: Sampling) -> None:
        self._backend.prepare_sampling(sampling)

    def start(self, batch: Sequence[Chunk]) -> StartedStep:
        few = sum(len(chunk.ids) for chunk in batch) <= FEW_TOKENS
        with torch.inference_mode(), one_thread() if few else nullcontext():
            found = self._backend.sample(self._steps.logits(batch), batch)
        return StartedStep(lambda: found)

    def release(self, slot: int) -> None:
        self._steps.release(slot)

    def close(self) -> None:
        """Nothing is held beside memory."""


def _backend(model: ModelConfig, config: EngineConfig) -> Backend:
    """On a GPU, activations are by default in the dtype that the checkpoint names, as transformers has them."""
    dtype, stated = config.dtype, model.text
    if dtype == "auto" and "bfloat16" in (stated.get("dtype"), stated.get("torch_dtype")):
        dtype = "bfloat16" if config.device.startswith("cuda") else dtype
    return backend_for(config.device, exact=config.exact, dtype=dtype, kv_cache_dtype=config.kv_cache_dtype)


def _steps(model: PackedModel, config: ModelConfig, backend: Backend) -> Steps:
    known = signature(model.model.base_model.forward).parameters
    cache_name = "cache" if "cache" in known else "past_key_values"  # transformers 5.24 has renamed it
    try:
        if "position_ids" not in known:
            raise Unpaged("it takes no positions")
        if any(rope is not None and rope.type in BY_LENGTH for rope in config.ropes):
            raise Unpaged("its rotary embedding depends on the sequence's length")
        return Paged(model, attention_layers(model, cache_name, config.max_positions), backend)
    except Unpaged as reason:
        logger.info("sequences run one after another, each with a cache of its own: %s", reason)
        return Caches(model, cache_name, config, backend)


def load_transformers(folder: Path, config: EngineConfig, reason: str) -> TransformersRunner:
    """Load a folder for the engine.

    Args:
        folder: The model.
        config: Settings of the engine, for one process.
        reason: Why our decoder does not run it, for the log.

    Raises:
        SquawqError: It cannot be run.
    """
    device = torch.device(config.device)
    checkpoint = Checkpoint(folder, read_data=DeviceReader(device) if device.type == "cuda" else read_tensor)
    if device.type == "cuda" and (needed := checkpoint.nbytes()) > (free := torch.cuda.mem_get_info(device)[0]):
        raise ConfigError(f"{folder} has {gib(needed)} of weights, and the GPU has {gib(free)} free; use device cpu")
    logger.warning("%s runs on transformers' model class, which is slower than our decoder: %s", folder, reason)
    return TransformersRunner(checkpoint, config)
