"""transformers' "awq" quantizer, by squawq: which linears of a model are 4-bit is read from the checkpoint's headers.

Reads AWQ GEMM in safetensors. Also widens `AwqConfig` in place, since users import it before or after us: it keeps
`do_fuse`, `fuse_max_seq_len` and `modules_to_fuse`, takes AutoAWQ's spellings, and refuses what it does not know.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AwqConfig, GPTQConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from squawq.backends import REFERENCE
from squawq.errors import CheckpointError, ConfigError
from squawq.format.layouts import LAYOUTS
from squawq.format.shards import TensorInfo, read_header
from squawq.integrations.linear import AwqLinear
from squawq.nn.experts import Expert, Experts, expert_names, gating, is_stacked, stacked_sizes
from squawq.quant_config import QuantConfig

logger = logging.getLogger("squawq")
BACKENDS = ("auto", "torch_awq")
LOADING = ("do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exact")  # how to run; not of the checkpoint
SPELLINGS = {"w_bit": "bits", "q_group_size": "group_size"}  # AutoAWQ's
_init, _to_dict, _loading = AwqConfig.__init__, AwqConfig.to_dict, AwqConfig.get_loading_attributes
_known = (set(signature(AwqConfig).parameters) | set(signature(GPTQConfig).parameters)) - {"kwargs"}
KNOWN = _known | {"version", "format", "checkpoint_format", "quant_method"}
STATED = ("bits", "group_size", "zero_point", "format")  # the checkpoint's, not the caller's to choose


def _config_init(
    self: Any,
    *args: Any,
    do_fuse: bool | None = None,
    fuse_max_seq_len: int | None = None,
    modules_to_fuse: Mapping[str, Any] | None = None,
    exact: bool = False,
    **kwargs: Any,
) -> None:
    """AwqConfig's arguments, and: do_fuse, with fuse_max_seq_len tokens of cache a sequence; exact, float activations.

    Raises ConfigError for an unknown argument or a value that cannot be.
    """
    for theirs, ours in SPELLINGS.items():
        if theirs in kwargs:
            if ours in kwargs:
                raise ConfigError(f"{theirs} and {ours} are the same setting; give one of them")
            kwargs[ours] = kwargs.pop(theirs)
    if unknown := sorted(set(kwargs) - KNOWN):
        choices = ", ".join((*sorted(KNOWN), *LOADING))
        raise ConfigError(f"AwqConfig has no argument {unknown[0]!r}; it has {choices}")
    do_fuse = modules_to_fuse is not None if do_fuse is None else do_fuse
    whole = isinstance(fuse_max_seq_len, int) and not isinstance(fuse_max_seq_len, bool) and fuse_max_seq_len > 0
    if do_fuse and not whole:
        raise ConfigError(
            f"fuse_max_seq_len is {fuse_max_seq_len!r}; with do_fuse it must be the most tokens of a sequence, as 512"
        )
    self.do_fuse, self.fuse_max_seq_len = do_fuse, fuse_max_seq_len
    self.modules_to_fuse, self.exact = modules_to_fuse, exact
    _init(self, *args, **kwargs)
    given = {**dict(zip(("bits", "group_size", "zero_point"), args, strict=False)), **kwargs}
    given |= {"format": self.format} if given.get("version") is not None else {}
    self.given = {name: getattr(self, name) for name in STATED if name in given}
    QuantConfig(bits=self.bits, group_size=self.group_size, zero_point=self.zero_point)  # raises


def _config_from_dict(
    cls: Any, /, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
) -> Any:
    """A checkpoint's `quantization_config`. Unknown keys of other writers are ignored, and written back on saving; so
    are a backend and do_fuse: how to run is the caller's choice."""
    known = {k: v for k, v in config_dict.items() if (k in KNOWN and k != "backend") or k in SPELLINGS}
    config = cls(**known)
    config.source, config.given = copy.deepcopy(dict(config_dict)), {}
    rest = {k: v for k, v in kwargs.items() if not hasattr(config, k)}
    for name in kwargs.keys() - rest.keys():
        setattr(config, name, kwargs[name])
    return (config, rest) if return_unused_kwargs else config


def _config_to_dict(self: Any) -> dict[str, Any]:
    """As the checkpoint has it, where the settings come from one."""
    written: dict[str, Any] = copy.deepcopy(self.source) if hasattr(self, "source") else _to_dict(self)
    written.pop("given", None)
    return written


def _config_loading(self: Any) -> dict[str, Any]:
    """What the user's settings override in the checkpoint's; `given`: what they must agree in."""
    return {**_loading(self), **{name: getattr(self, name) for name in (*LOADING, "given")}}


@cache
def _say_once(text: str) -> None:
    logger.warning(text)


def register() -> None:
    """Put the quantizer into transformers' table, and widen AwqConfig."""
    AwqConfig.__init__, AwqConfig.to_dict = _config_init, _config_to_dict
    AwqConfig.get_loading_attributes, AwqConfig.from_dict = _config_loading, classmethod(_config_from_dict)
    AUTO_QUANTIZER_MAPPING["awq"] = SquawqQuantizer


class SquawqQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads AWQ checkpoints; `squawq.quantize` makes them."""

    layout = LAYOUTS["gemm"]
    requires_calibration = True
    is_compileable = True
    is_trainable = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise ConfigError(
                "AwqConfig was given for a model that is not quantized (its config.json has no quantization_config); "
                "make an AWQ checkpoint of it with `squawq quantize MODEL OUT`"
            )
        super().__init__(quantization_config, **kwargs)
        backend = getattr(quantization_config.backend, "value", quantization_config.backend)
        if backend not in BACKENDS:
            raise ConfigError(f"backend is {backend!r}; squawq has {' and '.join(BACKENDS)} (plain torch everywhere)")
        written = quantization_config.to_dict()
        self.settings = QuantConfig.from_quantization_config(written, "quantization_config")
        for name, value in quantization_config.given.items():
            stored = "gemm" if name == "format" else getattr(self.settings, name)
            if value != stored:
                raise ConfigError(
                    f"AwqConfig has {name}={getattr(value, 'value', value)!r}, and the checkpoint {stored!r}; leave it "
                    "out: a checkpoint says itself how it is quantized"
                )
        if quantization_config.modules_to_fuse:
            _say_once("modules_to_fuse turns do_fuse on; what it lists is not used, since the whole model is fused")
        self.backend = None if backend == "auto" else REFERENCE
        self._folder: Path | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing beside torch is needed."""

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> Any:
        """Put 4-bit layers where the checkpoint has 4-bit tensors. Raises CheckpointError naming what does not fit."""
        stored = stored_tensors(model, checkpoint_files)
        self._folder = Path(checkpoint_files[0]).parent if checkpoint_files else None
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                if f"{path}.{self.layout.integers}" in stored:
                    model.set_submodule(path, self._layer(path, stored, module.in_features, module.out_features))
                elif f"{path}.weight" not in stored and re.search(r"\.\d+\.", path):
                    raise CheckpointError(f"the checkpoint has neither {path}.{self.layout.integers} nor {path}.weight")
            elif is_stacked(module):
                self._replace_experts(model, path, module, stored)
            elif f"{path}.{self.layout.integers}" in stored:
                kind = type(module).__name__
                raise CheckpointError(f"{path} is quantized in the checkpoint, and no linear layer but a {kind} here")
        return model

    def _replace_experts(self, model: Any, path: str, module: Any, stored: Mapping[str, TensorInfo]) -> None:
        count, hidden, inner = stacked_sizes(module)
        names = expert_names(path, count, stored, self.layout.integers)
        if names is None:
            return
        shapes = dict(zip(names, ((hidden, inner), (hidden, inner), (inner, hidden)), strict=True))
        experts = []
        for index in range(count):
            places = {name: f"{path}.{index}.{name}" for name in names}
            linears = {n: self._layer(place, stored, *shapes[n]) for n, place in places.items()}
            experts.append(Expert(linears, gating(module)))
        model.set_submodule(path, Experts(experts))

    def _layer(self, path: str, stored: Mapping[str, TensorInfo], in_features: int, out_features: int) -> nn.Module:
        """The layer, without its tensors, whose shapes and dtypes are checked here."""
        group = self.settings.group_of(in_features)
        if in_features % group or out_features % 8:
            raise CheckpointError(f"{path} [{out_features}, {in_features}] has no groups of {group}")
        zeros = self.settings.zero_point or f"{path}.qzeros" in stored
        bias, scales = stored.get(f"{path}.bias"), find_tensor(stored, f"{path}.scales")
        if not scales.dtype.is_floating_point:
            raise CheckpointError(f"{scales.file}: tensor '{path}.scales' is {scales.dtype}; it must be floating point")
        with torch.device("meta"):
            layer = AwqLinear(
                *(in_features, out_features, group),
                zeros=zeros,
                bias=None if bias is None else bias.dtype,
                scales=scales.dtype,
                exact=self.quantization_config.exact,
                backend=self.backend,
            )
        for name, tensor in layer.named_parameters():
            info = find_tensor(stored, f"{path}.{name}")
            if (info.dtype, info.shape) != (tensor.dtype, tuple(tensor.shape)):
                raise CheckpointError(
                    f"{info.file}: tensor '{path}.{name}' is {info.dtype} {list(info.shape)}; "
                    f"{tensor.dtype} {list(tensor.shape)} is needed"
                )
        return layer

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """AWQ tensors are [in, out]: what cuts a dense weight's rows cuts their columns, and the other way round."""
        swapped = {"colwise": "rowwise", "rowwise": "colwise"}
        modules = by_pattern(model)
        for path, module in modules.items():
            if isinstance(module, Experts) and plan.pop(f"{path}.gate_up_proj", None) == "packed_colwise":
                plan.pop(f"{path}.down_proj", None)
                plan.pop(path, None)  # each expert's down projection sums over the processes itself
                gate, up, down = (f"{path}.*.{name}" for name in module.names)
                plan.update({gate: "colwise", up: "colwise", down: "rowwise"})
        distributed = getattr(model.config, "distributed_config", None)
        check_cuts(model, plan, getattr(distributed, "tp_size", 1))
        for path, style in list(plan.items()):
            if isinstance(modules.get(path), AwqLinear) and style in swapped:
                plan.update({f"{path}.{name}": swapped[style] for name in ("qweight", "qzeros", "scales")})

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for module in model.modules():
            if isinstance(module, AwqLinear):
                module.requires_grad_(False)  # transformers loads float tensors as trainable
        config = self.quantization_config
        if config.do_fuse:
            from squawq.integrations.fused import fuse

            fuse(model, config.fuse_max_seq_len, self._folder)
        return model


def by_pattern(model: Any) -> dict[str, nn.Module]:
    """The modules by their names with * for numbers, as transformers' plans have them; one stands for its kind."""
    return {re.sub(r"\.\d+(?=\.|$)", ".*", name): module for name, module in model.named_modules()}


def check_cuts(model: Any, plan: Mapping[str, str], processes: int) -> None:
    """Raises ConfigError where a cut among processes would go through a group of inputs or a word of outputs."""
    modules = by_pattern(model)
    for path, style in plan.items():
        layer = modules.get(path)
        if isinstance(layer, AwqLinear) and style in ("colwise", "rowwise"):
            size, unit = (layer.out_features, 8) if style == "colwise" else (layer.in_features, layer.group)
            if size % (unit * processes):
                raise ConfigError(
                    f"{path} [{layer.out_features}, {layer.in_features}] in groups of {layer.group} cannot be cut for "
                    f"{processes} processes; use fewer"
                )


def find_tensor(stored: Mapping[str, TensorInfo], name: str) -> TensorInfo:
    if name not in stored:
        raise CheckpointError(f"tensor {name!r} is missing in the checkpoint")
    return stored[name]


def stored_tensors(model: Any, files: list[str] | None) -> dict[str, TensorInfo]:
    """The checkpoint's tensors by the names that they have in the model, from checked headers."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise ConfigError("squawq loads AWQ checkpoints from safetensors files; convert this one to safetensors first")
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    prefix, children = model.base_model_prefix, dict(model.named_children())
    found = {}
    for file in files:
        for name, info in read_header(Path(file)).items():
            place = name
            for renaming in renamings:
                place, _ = renaming.rename_source_key(place)
            if prefix not in children:
                place = place.removeprefix(f"{prefix}.")
            elif place.partition(".")[0] not in children:
                place = f"{prefix}.{place}"
            found[place] = info
    return found
