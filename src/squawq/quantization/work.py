"""Plans a job and checks all of it before it starts: model, tensor names, settings, calibration, target, size.

Reads headers and the calibration text, no weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squawq.backends.devices import check_device
from squawq.config import ModelConfig
from squawq.errors import CheckpointError, ConfigError
from squawq.families import family_of
from squawq.format.reader import Checkpoint
from squawq.hub.download import resolve
from squawq.hub.stream import open_streamed
from squawq.layerwise.blocks import Blocks
from squawq.layerwise.plan import LayerPlan
from squawq.quant_config import QuantConfig
from squawq.quantization.calibration import Calibration, token_blocks
from squawq.quantization.job import identity, scratch_folder, target_path
from squawq.quantization.size import result_bytes
from squawq.report.files import public_name
from squawq.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Work:
    """A job, checked.

    Attributes:
        blocks: The 16-bit model.
        config: Settings without "auto".
        tokens: Calibration blocks int64 [blocks, seqlen]; None for plain rounding.
        out: Where the result goes.
        identity: What makes another run the same job.
        name: The model's name in the report.
        size: Bytes of the result.
    """

    blocks: Blocks
    config: QuantConfig
    tokens: Tensor | None
    out: Path
    identity: dict[str, Any]
    name: str
    size: int

    def plan(self, index: int) -> LayerPlan:
        """Which linears of a layer are quantized."""
        return _plan(self.blocks, self.config, index)


def prepare(
    model: str | Path, out: str | Path, config: QuantConfig, calibration: Calibration, device: str, stream: bool
) -> Work:
    """Plan a job. Raises SquawqError for everything that can be refused before work starts."""
    check_device(device, mps=True)
    checkpoint = open_streamed(model, scratch_folder(Path(out).resolve())) if stream else Checkpoint(resolve(model))
    family = family_of(checkpoint.config.model_type)
    if checkpoint.config.quant is not None:
        raise CheckpointError(f"{checkpoint.folder}: is quantized already; give the 16-bit checkpoint")
    folder = target_path(out, checkpoint.folder)
    config = replace(config, seqlen=_calibration_length(config, checkpoint.config))
    if config.method != "squawq":
        plain = QuantConfig()
        config = replace(config, compensate=False, refine=0, sequential=False)
        config = replace(config, act_order=plain.act_order, damping=plain.damping)
    checkpoint.companions()  # raises now rather than when all else is done
    blocks = Blocks(checkpoint, family, device)
    blocks.check()
    config = replace(config, dtype=_stored_dtype(config, blocks))
    converted = _choice(blocks, config)
    tokens = None
    if config.method != "rtn":
        tokens = token_blocks(
            calibration,
            lambda: Tokenizer(checkpoint.folder),
            seqlen=config.seqlen or 0,
            samples=config.samples,
            vocab_size=checkpoint.config.vocab_size,
        )
    elif calibration is not None:
        raise ConfigError(
            "method 'rtn' rounds without looking at text; leave the calibration out, or use another method"
        )
    size = result_bytes({name: checkpoint.tensors[name] for name in blocks.names.stored_names}, converted, config)
    same = identity(checkpoint, config, tokens, device)
    return Work(blocks, config, tokens, folder, same, public_name(model), size)


def _plan(blocks: Blocks, config: QuantConfig, index: int) -> LayerPlan:
    return LayerPlan(blocks.meta_model.shapes(index), blocks.family, config, blocks.family.layer(index))


def _choice(blocks: Blocks, config: QuantConfig) -> dict[str, int]:
    """The checkpoint's tensors to be quantized, and their in_features.

    Raises ConfigError if a name to skip matches nothing, or if nothing would be quantized.
    """
    layers = [_plan(blocks, config, index) for index in range(len(blocks.layers))]
    names = [f"{plan.prefix}.{name}" for plan in layers for name in (*plan.converted, *plan.kept)]
    for skip in config.modules_to_not_convert:
        if not any(skip in name for name in names):
            raise ConfigError(f"modules_to_not_convert: {skip!r} is in no name; names are like {names[0]}, {names[-1]}")
    if not any(plan.converted for plan in layers):
        reason = next(iter(layers[0].kept.values()))
        raise ConfigError(f"no linear can be quantized with these settings: {reason}; try a smaller group_size")
    found: dict[str, int] = {}
    for index, plan in enumerate(layers):
        shapes = blocks.meta_model.shapes(index)
        found |= {blocks.names.storage_name(f"{plan.prefix}.{n}.weight"): shapes[n][1] for n in plan.converted}
    return found


def _stored_dtype(config: QuantConfig, blocks: Blocks) -> str:
    """The dtype asked for; for "auto" the source's, since bfloat16 holds values that float16 cannot."""
    if config.dtype != "auto":
        return config.dtype
    info = blocks.checkpoint.info(blocks.names.stored_name(f"{blocks.family.embedding}.weight"))
    return "bfloat16" if info.dtype == torch.bfloat16 else "float16"


def _calibration_length(config: QuantConfig, model: ModelConfig) -> int:
    """Tokens in a calibration block. Raises ConfigError when more are asked for than the model has positions."""
    if config.seqlen is None:
        return min(512, model.max_positions)
    if config.seqlen > model.max_positions:
        raise ConfigError(f"seqlen is {config.seqlen}; the model has {model.max_positions} positions")
    return config.seqlen
