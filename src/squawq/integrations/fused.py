"""do_fuse: a transformers causal model that runs on our decoder and keeps transformers' interface.

The model's own tensors become memory-mapped views of the checkpoint, so that the weights are in memory once, packed.
Logits are float32. This file turns a batch's rows into steps of the decoder.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple
from transformers.utils.hub import cached_file

from squawq.backends.sampling import Chunk
from squawq.backends.threads import one_thread
from squawq.config import ModelConfig
from squawq.decoder_support import check_decoder
from squawq.delta_config import DELTA_RULE
from squawq.errors import CheckpointError, ConfigError, FusionError
from squawq.families import FAMILIES
from squawq.format.reader import Checkpoint
from squawq.integrations.fused_cache import FusedCache, Runners, check_length
from squawq.integrations.fused_inputs import (
    Mask,
    check_arguments,
    check_positions,
    kept_columns,
    least_pads,
    new_columns,
    used_tokens,
)
from squawq.integrations.linear import AwqLinear
from squawq.nn.loader import Options, load

STEP_TOKENS = 512  # of a prompt at once
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"  # before 5.24
PACKED = (".qweight", ".qzeros", ".scales")
REFUSED = {
    **dict.fromkeys(
        ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"),
        "continuous batching needs transformers' own layers; squawq.LLM and `squawq serve` have their own",
    ),
    **dict.fromkeys(("add_adapter", "load_adapter"), "adapters need transformers' own layers"),
    **dict.fromkeys(("resize_token_embeddings", "set_input_embeddings", "set_output_embeddings"), "weights are fixed"),
}


@dataclass
class _Fused:
    """The decoder of a fused model."""

    runners: Runners
    folder: Path
    max_seq_len: int
    lock: Any = field(default_factory=threading.Lock)  # the decoder is prepared for one cache at a time

    def __deepcopy__(self, _: Any) -> _Fused:
        return self  # its weights are read-only

    def __reduce__(self) -> Any:
        raise ConfigError("a fused model cannot be pickled; save it with save_pretrained and load it again")


def fuse(model: Any, max_seq_len: int, folder: str | Path | None = None) -> None:
    """Make a causal model of transformers run on our decoder, in place.

    Peak memory: the loaded model, if its tensors are not memory-mapped yet, and the packed decoder.

    Args:
        max_seq_len: Most tokens of a sequence, prompt and new ones. On a fused model, replaces its limit.
        folder: The checkpoint that the model came from; by default what its config names.

    Raises:
        FusionError, ConfigError, CheckpointError: The model cannot be fused; it is unchanged.
    """
    if isinstance(max_seq_len, bool) or not isinstance(max_seq_len, int) or max_seq_len < 1:
        raise ConfigError(f"fuse_max_seq_len is {max_seq_len!r}; it must be a whole number of at least 1, such as 512")
    if isinstance(model, FusedCausalLM):
        model._fused.max_seq_len = max_seq_len
        return
    takes = sorted(name for name, family in FAMILIES.items() if family.decoder and name not in DELTA_RULE)
    if (kind := model.config.model_type) not in takes:
        raise FusionError(f"model_type is {kind!r}; do_fuse takes {', '.join(takes)}")
    if not hasattr(model, "lm_head"):
        raise FusionError(f"do_fuse takes causal language models; this is a {type(model).__name__}")
    device = _device(model)
    wanted = _config(model)
    checkpoint = Checkpoint(folder or _folder(model))
    _check_config(wanted, checkpoint)
    _map(model, checkpoint)
    linears = [module for module in model.modules() if isinstance(module, AwqLinear)]
    exact = any(module.exact for module in linears)
    backend = linears[0].backend if linears else None
    decoder = load(checkpoint.folder, Options(str(device), exact, backend=backend))
    model._fused = _Fused(Runners(decoder), checkpoint.folder.resolve(), max_seq_len)
    model.__class__ = _fused_class(model.__class__)


def _device(model: Any) -> torch.device:
    """The device of the whole model. Raises FusionError if it is on several."""
    devices = {str(tensor.device) for tensor in model.parameters()}
    hooked = "forward" in vars(model) or any(hasattr(tensor, "device_mesh") for tensor in model.parameters())
    if len(devices) != 1 or "meta" in devices or hooked:
        raise FusionError(
            f"do_fuse takes a model that is whole on one device; this one is on {', '.join(sorted(devices))}"
            f"{', in parts' if hooked else ''}; give device_map='cpu' or one GPU, or leave do_fuse out"
        )
    return torch.device(devices.pop())


def _folder(model: Any) -> Path:
    """The checkpoint's folder: as given, or transformers' download of the same commit."""
    name, commit = model.config._name_or_path, getattr(model.config, "_commit_hash", None)
    try:
        found = cached_file(name, "config.json", revision=commit, local_files_only=True) if name else None
    except OSError:
        found = None
    if found is None:
        raise CheckpointError(f"do_fuse reads the checkpoint again, and {name!r} is no folder of one on this machine")
    return Path(found).parent


def _config(model: Any) -> ModelConfig:
    """The model's settings. Raises FusionError for one that transformers knows and our decoder does not."""
    mine = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    try:
        config = ModelConfig.from_dict(mine, "the model's config")
        check_decoder(config)
        return config
    except (CheckpointError, ConfigError) as error:
        raise FusionError(str(error)) from error


def _check_config(wanted: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raise FusionError where the model's settings are not the folder's, by which the decoder is built."""
    for name in (f.name for f in fields(ModelConfig) if f.name not in ("raw", "quant")):
        given, stored = getattr(wanted, name), getattr(checkpoint.config, name)
        if given != stored:
            if name == "ropes":  # one of each layer
                given, stored = next(both for both in zip(given, stored, strict=True) if both[0] != both[1])
            raise FusionError(
                f"{name} is {given} in the model and {stored} in {checkpoint.folder}; do_fuse runs a checkpoint as it "
                "is stored: change its config.json, or leave do_fuse out"
            )


def _map(model: Any, checkpoint: Checkpoint) -> None:
    """Replace the model's tensors by memory-mapped views of the checkpoint's files where the dtypes agree.

    4-bit tensors are replaced on every device, others only on the CPU: transformers takes their device for the model's.
    Raises FusionError, with nothing changed, if a tensor differs from the stored one.
    """
    views = []
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name not in checkpoint.tensors:
            continue
        stored = checkpoint.read(name)
        if stored.shape != tensor.shape or not torch.equal(stored.to(tensor.device, tensor.dtype), tensor):
            raise FusionError(
                f"{name} is not what {checkpoint.folder} has; do_fuse runs a checkpoint as it is stored: save this "
                "model to another folder and load it from there, or leave do_fuse out"
            )
        if stored.dtype == tensor.dtype and (tensor.device.type == "cpu" or name.endswith(PACKED)):
            views.append((tensor, checkpoint.mapped(name)))
    for tensor, view in views:
        tensor.data = view


@functools.cache
def _fused_class(kind: type) -> type:
    """The model's class with our forward; it keeps its name, which saving writes to config.json."""
    refusing = {name: _refusal(name, why) for name, why in REFUSED.items() if hasattr(kind, name)}
    return type(kind.__name__, (FusedCausalLM, kind), {"__module__": kind.__module__, **refusing})


def _refusal(name: str, why: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ConfigError(f"a fused model has no {name}: {why}; load it without do_fuse for that")

    return refuse


class FusedCausalLM:
    """Methods of a fused model that replace those of its transformers class."""

    _fused: Any
    config: Any
    loss_function: Any

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As the model's own; logits float32 [rows, kept columns, vocab], zeros for pad tokens.

        attention_mask: 0 and 1, [rows, columns of the cache and of input_ids]. A token's position is its place in
        its row.
        Raises ConfigError for what our decoder does not do.
        """
        check_arguments(self.config, input_ids, inputs_embeds, kwargs)
        assert input_ids is not None
        past = cache if cache is not None else past_key_values
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if past is None:
            past = FusedCache(self._fused.runners, self._fused.max_seq_len)
        elif not isinstance(past, FusedCache):
            raise ConfigError(f"a fused model makes its own cache; it was given a {type(past).__name__}")
        mask = new_columns(attention_mask, input_ids, past)
        with self._fused.lock:
            logits = _run(past, input_ids, mask, position_ids, logits_to_keep).to(input_ids.device)
        sizes = {"vocab_size": self.config.vocab_size}
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, **sizes)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **({CACHE: past} if use_cache else {}))

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], _mode: Any, _batch: int, max_cache_length: int
    ) -> None:
        """generate's cache. Raises ConfigError, before anything is run, if the longest row would not fit."""
        pads = least_pads(model_kwargs.get("attention_mask"))
        check_length(max_cache_length + 1 - pads, self._fused.max_seq_len)
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ConfigError(
                f"cache_implementation is {generation_config.cache_implementation!r}; a fused model has its own cache, "
                "so leave it out"
            )
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = FusedCache(self._fused.runners, self._fused.max_seq_len)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        with one_thread():
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As the model's own, but not into the folder that its tensors are views of."""
        if Path(save_directory).resolve() == self._fused.folder:
            raise ConfigError(f"{save_directory} is the folder that this fused model reads; save it to another one")
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


def _run(past: FusedCache, ids: Tensor, mask: Mask, positions: Tensor | None, keep: int | Tensor) -> Tensor:
    """Logits float32 [rows, kept columns, vocab] of a batch's tokens, whose keys and values go to the cache."""
    rows, width = ids.shape
    first, chosen = kept_columns(keep, width, mask)
    runner = past.open(rows)
    tokens = used_tokens(ids, mask, runner.vocab_size)
    counts = [len(row) for row in tokens]
    if positions is not None:
        check_positions(positions, past.lengths, counts, mask)
    starts = past.extend(counts, width)
    if mask is None and width == 1 and all(starts) and (next_logits := runner.prepare_next_logits()) is not None:
        logits = next_logits(ids[:, 0], starts, past.tables)[:, None]
        return logits if chosen is None else logits[:, chosen]
    wanted = [width - first] * rows if mask is None else mask[:, first:].sum(1).tolist()
    parts = [part for step in _steps(tokens, starts, past.tables, wanted) for part in runner.run(step)]
    if mask is None:
        logits = torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts)).view(rows, width - first, -1)
    else:
        logits = torch.zeros(rows, width - first, runner.vocab_size)
        if parts:  # none if all are pads, as in one piece of a long prompt
            logits[torch.from_numpy(mask[:, first:])] = torch.from_numpy(np.concatenate(parts))
    return logits if chosen is None else logits[:, chosen]


def _steps(
    tokens: Sequence[list[int]], starts: Sequence[int], tables: Sequence[Sequence[int]], wanted: Sequence[int]
) -> Iterator[list[Chunk]]:
    """Rows of tokens in steps of at most STEP_TOKENS, in order. wanted: last tokens of each row that get logits."""
    step: list[Chunk] = []
    room = STEP_TOKENS
    for row, start, table, count in zip(tokens, starts, tables, wanted, strict=True):
        at = 0
        while at < len(row):
            ids = row[at : at + room]
            at, room = at + len(ids), room - len(ids)
            logits = min(len(ids), max(0, count - (len(row) - at)))
            step.append(Chunk(ids, start + at - len(ids), table, logits))
            if not room:
                yield step
                step, room = [], STEP_TOKENS
    if step:
        yield step
