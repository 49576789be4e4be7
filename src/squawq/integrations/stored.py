"""transformers' GPTQ, AutoRound and compressed-tensors models where their own packages are not installed.

With these packages transformers loads such models itself, and nothing is changed. The tensors are loaded under the
checkpoint's names and become `AwqLinear`s, which multiply as those of AWQ checkpoints do.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from squawq.errors import CheckpointError, ConfigError
from squawq.format.layouts import LAYOUTS, Layout, input_order
from squawq.format.shards import TensorInfo
from squawq.integrations.linear import AwqLinear
from squawq.integrations.quantizer import SquawqQuantizer, find_tensor
from squawq.stored_quant import read_quantization

PACKAGES = {"gptq": "gptqmodel", "auto-round": "auto_round", "compressed-tensors": "compressed_tensors"}


def register() -> None:
    """Put the quantizer into transformers' tables for the methods that it cannot load here."""
    for method, package in PACKAGES.items():
        if find_spec(package) is None:
            AUTO_QUANTIZATION_CONFIG_MAPPING[method] = StoredConfig
            AUTO_QUANTIZER_MAPPING[method] = StoredQuantizer


class StoredConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A checkpoint's `quantization_config` as it is (`source`)."""

    def __init__(self, **source: Any) -> None:
        self.quant_method, self.source = source["quant_method"], source
        self.exact = False

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.source)


class StoredLinear(nn.Module):
    """A linear's tensors as the checkpoint has them, until all are loaded."""

    def __init__(self, layout: Layout, infos: Mapping[str, TensorInfo], group: int, exact: bool) -> None:
        super().__init__()
        self.layout, self.group, self.exact = layout, group, exact
        for name, info in infos.items():
            tensor = torch.empty(info.shape, dtype=info.dtype, device="meta")
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def finished(self) -> AwqLinear:
        """Raises CheckpointError for zeros or groups that cannot be."""
        tensors: dict[str, Tensor] = {name: parameter.data for name, parameter in self.named_parameters()}
        layout, groups = self.layout, tensors.get(self.layout.groups)
        integers, scales = tensors[layout.integers], tensors[layout.scales]
        out, in_features = layout.features(*integers.shape)
        order = None if groups is None else input_order(groups.cpu(), self.group)
        zeros = tensors.get(layout.zeros)
        qweight, scales, zeros = layout.to_gemm(integers, scales, zeros, in_features // self.group)
        qweight = qweight if order is None else qweight[order.to(qweight.device)]
        bias = tensors.get("bias")
        with torch.device("meta"):
            made = AwqLinear(in_features, out, self.group, zeros=zeros is not None, exact=self.exact)
        for name, tensor in (("qweight", qweight), ("scales", scales), ("qzeros", zeros), ("bias", bias)):
            if tensor is not None:
                setattr(made, name, nn.Parameter(tensor, requires_grad=False))
        made.register_buffer("order", None if order is None else order.to(qweight.device), persistent=False)
        return made


class StoredQuantizer(SquawqQuantizer):
    """Loads 4-bit checkpoints of the other layouts; they are not saved again."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise ConfigError(
                "transformers cannot quantize to it here; quantize with `squawq quantize`, then `squawq export`"
            )
        super(SquawqQuantizer, self).__init__(quantization_config, **kwargs)
        self.settings, layout = read_quantization(quantization_config.source, "quantization_config")
        self.layout, self.backend, self._folder = LAYOUTS[layout], None, None

    def is_serializable(self) -> bool:
        return False

    def _layer(self, path: str, stored: Mapping[str, TensorInfo], in_features: int, out_features: int) -> nn.Module:
        """The checkpoint's tensors of a linear; shapes and dtypes are checked here."""
        group, layout = self.settings.group_of(in_features), self.layout
        if in_features % group or in_features % layout.inputs or out_features % layout.outputs:
            raise CheckpointError(f"{path} [{out_features}, {in_features}] has no groups of {group}")
        shapes = dict(
            zip(("integers", "scales", "zeros"), layout.shapes(in_features, out_features, group), strict=True)
        )
        wanted: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {
            layout.integers: (layout.words, shapes["integers"]),
            layout.scales: (None, shapes["scales"]),
            layout.zeros: (layout.words if layout.packed_zeros else None, shapes["zeros"]),
            layout.groups: (torch.int32, (in_features,)),
            layout.sizes: (torch.int64, (2,)),
            "bias": (None, (out_features,)),
        }
        optional = {layout.groups, layout.sizes, "bias", *(() if self.settings.zero_point else (layout.zeros,))}
        infos = {}
        for name, (dtype, shape) in wanted.items():
            if name and (name not in optional or f"{path}.{name}" in stored):
                infos[name] = info = find_tensor(stored, f"{path}.{name}")
                fits = info.dtype == dtype if dtype is not None else info.dtype.is_floating_point
                if not fits or info.shape != shape:
                    raise CheckpointError(
                        f"{info.file}: tensor '{path}.{name}' is {info.dtype} {list(info.shape)}; "
                        f"{dtype or 'floating point'} {list(shape)} is needed"
                    )
        return StoredLinear(layout, infos, group, self.quantization_config.exact)

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:  # noqa: ARG002
        """Raises ConfigError for several processes."""
        if getattr(getattr(model.config, "distributed_config", None), "tp_size", 1) > 1:
            raise ConfigError("only AWQ models are shared among processes here; export this one with --format awq")

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        paths = [path for path, module in model.named_modules() if isinstance(module, StoredLinear)]
        for path in paths:  # without a list of the modules, each is freed once it is replaced
            try:
                model.set_submodule(path, model.get_submodule(path).finished())
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from error
        return model
