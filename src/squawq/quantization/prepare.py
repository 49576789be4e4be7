"""Checks a quantization before it starts, from headers and the calibration text, and settles what was left open.

On an NVIDIA GPU that holds the whole 16-bit model, the default method generates half or more of its calibration text
with that model, weights tokens by its gradients, and tunes scales at the end. Elsewhere it does none of this unasked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from squawq.backends.devices import check_device
from squawq.config import ModelConfig
from squawq.errors import CheckpointError, ConfigError
from squawq.families import expert_of, family_of
from squawq.format.files import has_file
from squawq.format.reader import Checkpoint
from squawq.hub.download import resolve
from squawq.hub.stream import open_streamed
from squawq.layerwise.blocks import Blocks
from squawq.layerwise.plan import LayerPlan
from squawq.layerwise.tensor_names import weight_count
from squawq.nn.shard import refused, sizes, splits_groups
from squawq.quant_config import GROUP_SIZES, QuantConfig
from squawq.quantization.calibration import DEFAULT_SAMPLES, Calibration, token_blocks
from squawq.quantization.job import SCRATCH, identity, partial_path, target_path
from squawq.quantization.self_calibration import MIXED, SOURCES, SelfCalibration, default_rows
from squawq.quantization.token_weights import check_token_weights, weighting_bytes
from squawq.quantization.tuning import check_tuning, tuning_bytes
from squawq.report.files import public_name
from squawq.text.tokenizer import Tokenizer

WEIGHTS_SHARE = 0.7  # of a GPU's memory, which the weights of a model that generates text may take, unasked
WEIGHTING_SHARE = 0.9  # of a GPU's memory, which weighting tokens may take, unasked
TUNING_SHARE = 0.9  # of a GPU's memory, which tuning may take, unasked
MAX_TUNED = 16e9  # parameters of a model that is tuned unasked: 6 minutes for 8e9 on an H200, by projection
BUILTIN = "builtin"  # the built-in set, where that is not the default


@dataclass(frozen=True)
class Work:
    """A job, checked."""

    blocks: Blocks  # the 16-bit model
    plans: list[LayerPlan]  # by layer
    config: QuantConfig  # without "auto" or None for `token_weights` and `tune`
    calibration: str | None  # its name, for the report
    tokens: Tensor | None  # calibration blocks int64 [blocks, seqlen]; None for plain rounding, or until generated
    generated: SelfCalibration | None  # how the model generates calibration blocks or text for tuning, if it does
    out: Path
    identity: dict[str, Any]  # what another run must have to resume this one
    name: str  # of the model, in the report
    size: int  # bytes of the result

    @property
    def calibration_blocks(self) -> int | None:
        """How many calibration blocks there are, or will be; None for plain rounding."""
        if self.generated is not None:
            return self.generated.calibration_rows
        return None if self.tokens is None else len(self.tokens)


def prepare(
    model: str | Path, out: str | Path, config: QuantConfig, calibration: Calibration, device: str, stream: bool
) -> Work:
    """Plan a job. Raises SquawqError for everything that can be refused before work starts."""
    check_device(device, mps=True)
    _check_choices(config, calibration, stream)
    if stream:
        checkpoint = open_streamed(model, partial_path(Path(out).resolve()) / SCRATCH)
    else:
        checkpoint = Checkpoint(resolve(model))
    family, positions = family_of(checkpoint.config.model_type), checkpoint.config.max_positions
    if checkpoint.config.quant is not None:
        raise CheckpointError(
            f"{checkpoint.folder}: is quantized already; give the 16-bit checkpoint, or make 16 bits of this one with "
            "squawq export --format dense"
        )
    folder = target_path(out, checkpoint.folder)
    if config.seqlen is not None and config.seqlen > positions:
        raise ConfigError(f"seqlen is {config.seqlen}; the model has {positions} positions")
    config = replace(config, seqlen=config.seqlen or min(512, positions))
    config = replace(config, group_size=_group_size(config, checkpoint.config))
    if config.method != "squawq":  # settings that have no effect are not part of the job
        config = replace(config, compensate=False, refine=0, sequential=False)
        config = replace(config, act_order=QuantConfig.act_order, damping=QuantConfig.damping)
    if not config.sequential:
        config = replace(config, token_weights=False)
    checkpoint.companions()  # raises now rather than when all else is done
    blocks = Blocks(checkpoint, family, device)
    blocks.check()
    if config.dtype == "auto":
        config = replace(config, dtype=default_dtype(blocks))
    plans = _plans(blocks, config)
    asked = config
    config, calibration = _settled(config, calibration, checkpoint, device, stream)
    if config.token_weights:
        needed = weighting_bytes(blocks, plans, 1, config.seqlen or 0)
        if asked.token_weights is None and needed > WEIGHTING_SHARE * _gpu_memory(device):
            config = replace(config, token_weights=False)
        else:
            check_token_weights(blocks, plans, config.seqlen or 0)
    tokens, generated = _text(config, calibration, checkpoint, device)
    if config.tune and generated is not None:
        if asked.tune is None and tuning_bytes(blocks, plans, generated.shape) > TUNING_SHARE * _gpu_memory(device):
            config = replace(config, tune=False)
            tokens, generated = _text(config, calibration, checkpoint, device)
        else:
            check_tuning(blocks, plans, generated.shape)
    if config.seed != QuantConfig.seed and generated is None and not config.token_weights:
        raise ConfigError(
            f"seed is {config.seed}, but only calibration 'self', token_weights and tune sample tokens; leave it out"
        )
    same = identity(checkpoint, config, tokens if generated is None else generated, device)
    size = _result_bytes(blocks, plans, config)
    name = public_name(calibration) if isinstance(calibration, str | Path) else None
    return Work(blocks, plans, config, name, tokens, generated, folder, same, public_name(model), size)


def _is_own(calibration: Calibration) -> TypeGuard[str]:
    """Whether the 16-bit model generates calibration text."""
    return isinstance(calibration, str) and calibration in SOURCES


def _check_choices(config: QuantConfig, calibration: Calibration, stream: bool) -> None:
    """Raise ConfigError for choices that exclude each other."""
    if _is_own(calibration) and stream:
        raise ConfigError(
            f"calibration {calibration!r} runs the whole model, whose files stream keeps only in part; choose one"
        )
    for name in ("token_weights", "tune"):
        if getattr(config, name) and stream:
            raise ConfigError(f"{name} runs the whole model, whose files stream keeps only in part; choose one")
    if config.token_weights and not (config.method == "squawq" and config.sequential):
        raise ConfigError("token_weights needs method 'squawq' with sequential calibration; leave it out, or use those")
    if config.tune and config.method == "rtn":
        raise ConfigError("tune is True, but method 'rtn' runs no text; leave it out, or use another method")
    if config.method == "rtn" and calibration is not None:
        raise ConfigError("method 'rtn' needs no text; leave the calibration out, or use another method")


def _settled(
    config: QuantConfig, calibration: Calibration, checkpoint: Checkpoint, device: str, stream: bool
) -> tuple[QuantConfig, Calibration]:
    """Choose the calibration text, and whether to weight tokens and to tune, where that was left open."""
    room = WEIGHTS_SHARE * _gpu_memory(device)
    quick = config.method == "squawq" and not stream and checkpoint.nbytes() <= room
    if calibration is None and quick and has_file(checkpoint.folder / "tokenizer.json"):
        calibration = MIXED
    if config.token_weights is None:
        config = replace(config, token_weights=quick)
    if config.tune is None:
        parameters = sum(weight_count(checkpoint, name) for name in checkpoint.tensors)
        config = replace(config, tune=quick and parameters <= MAX_TUNED)
    return config, calibration


def _gpu_memory(device: str) -> int:
    """Bytes of an NVIDIA GPU's memory, used or not, so that a run that is resumed settles alike; 0 elsewhere."""
    return torch.cuda.get_device_properties(device).total_memory if device.startswith("cuda") else 0


def _text(
    config: QuantConfig, calibration: Calibration, checkpoint: Checkpoint, device: str
) -> tuple[Tensor | None, SelfCalibration | None]:
    """The calibration blocks, as far as they are given, and how the model generates others or text for tuning."""
    if config.method == "rtn":
        return None, None
    seqlen, hidden = config.seqlen or 0, checkpoint.config.hidden_size
    if _is_own(calibration):
        default = default_rows(seqlen * hidden) if device.startswith("cuda") else DEFAULT_SAMPLES
        rows, tune = config.samples or default, bool(config.tune)
        return None, SelfCalibration.of(calibration, checkpoint, rows=rows, seqlen=seqlen, seed=config.seed, tune=tune)
    tokens = token_blocks(
        None if isinstance(calibration, str) and calibration == BUILTIN else calibration,
        lambda: Tokenizer(checkpoint.folder),
        seqlen=seqlen,
        samples=config.samples,
        vocab_size=checkpoint.config.vocab_size,
    )
    return tokens, SelfCalibration.beside(tokens, checkpoint, config.seed) if config.tune else None


def _plans(blocks: Blocks, config: QuantConfig) -> list[LayerPlan]:
    """Raises ConfigError if a name to skip matches nothing, or if nothing would be quantized."""
    shapes, layer = blocks.meta_model.shapes, blocks.family.layer
    plans = [LayerPlan(shapes(i), blocks.family, config, layer(i)) for i in range(len(blocks.layers))]
    names = [f"{plan.prefix}.{name}" for plan in plans for name in (*plan.converted, *plan.kept)]
    for skip in config.modules_to_not_convert:
        if not any(skip in name for name in names):
            raise ConfigError(f"modules_to_not_convert: {skip!r} is in no name; names are like {names[0]}, {names[-1]}")
    if not any(plan.converted for plan in plans):
        reason = next(iter(plans[0].kept.values()))
        raise ConfigError(f"no linear can be quantized with these settings: {reason}; try a smaller group_size")
    kept = (f"{p.prefix}.{name}: {reason}" for p in plans for name, reason in p.kept.items() if expert_of(name))
    if blocks.meta_model.interleaved and (found := next(kept, None)):
        raise ConfigError(
            f"{found}; nothing reads single experts of {blocks.family.model_type} in 16 bits. Choose a group_size that "
            "fits all (64 for gpt-oss), and skip no expert"
        )
    return plans


def _group_size(config: QuantConfig, model: ModelConfig) -> int:
    """The group size asked for, or a smaller one with which `for_tensor_parallel` GPUs can share the result."""
    if (size := config.for_tensor_parallel or 1) == 1:
        return config.group_size
    if not family_of(model.model_type).decoder:
        raise ConfigError(
            f"for_tensor_parallel is {size}, and how {model.model_type} is split is not known; leave it out"
        )
    if reason := refused(model, size):
        fitting = ", ".join(map(str, sizes(model)))
        raise ConfigError(f"for_tensor_parallel is {size}, but {reason}; this model can be shared by {fitting}")
    candidates = [config.group_size, *(group for group in sorted(GROUP_SIZES, reverse=True) if group != -1)]
    for group in candidates:
        if not splits_groups(model, size, group) and (group <= config.group_size or config.group_size == -1):
            return group
    raise ConfigError(
        f"for_tensor_parallel is {size}, and groups of {config.group_size} and smaller ones would be on two GPUs; "
        "choose a smaller number"
    )


def default_dtype(blocks: Blocks) -> str:
    """What "auto" means: bfloat16 for a bfloat16 source, since it holds values that float16 cannot; else float16."""
    info = blocks.checkpoint.info(blocks.names.stored_name(f"{blocks.family.embedding}.weight"))
    return "bfloat16" if info.dtype == torch.bfloat16 else "float16"


def _result_bytes(blocks: Blocks, plans: Sequence[LayerPlan], config: QuantConfig) -> int:
    """Bytes of the tensors to be written, from names and shapes."""
    name_of, total = blocks.names.storage_name, 0
    in_features = {name_of(f"{p.prefix}.{n}.weight"): p.shapes[n][1] for p in plans for n in p.converted}
    for name in blocks.names.stored_names:
        count = weight_count(blocks.checkpoint, name)
        groups = count // config.group_of(in_features[name]) if name in in_features else 0
        total += count // 2 + 2 * groups + groups // 2 if groups else 2 * count  # integers, scales, zeros
    return total
