"""How a checkpoint is quantized: the `quantization_config` of writers of AWQ, GPTQ, AutoRound and compressed-tensors.

Settings that concern single layers are checked only for what they change: which linears are in 4 bits is told by the
tensors themselves (format/reader.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from squawq.errors import CheckpointError, ConfigError
from squawq.quant_config import AWQ_LAYOUTS, QuantConfig, stated_layout

AUTOROUND = {  # packing_format, without auto_round: before and a kernel after it -> the layout
    **dict.fromkeys(("auto_round", "gptqmodel", "exllamav2", "tritonv2"), "gptq_v2"),
    **dict.fromkeys(("auto_gptq", "gptq"), "gptq"),
    **dict.fromkeys(("auto_awq", "awq"), "gemm"),
}
PACKED = "pack-quantized"
NAMES = {  # of methods, for people
    "awq": "AWQ",
    "gptq": "GPTQ",
    "auto-round": "AutoRound",
    "compressed-tensors": "compressed-tensors",
}


def read_quantization(values: Mapping[str, Any], where: str) -> tuple[QuantConfig, str]:
    """Settings and layout (a key of `format.layouts.LAYOUTS`) of a `quantization_config`.

    Raises CheckpointError naming `where` for another method, number of bits or storage than squawq reads.
    """
    method = method_of(values)
    if method == "awq":
        return QuantConfig.from_quantization_config(values, where, AWQ_LAYOUTS), str(stated_layout(values))
    if method not in _READERS:
        raise CheckpointError(f"{where}: quant_method is {method!r:.100}; squawq reads awq, {', '.join(_READERS)}")
    try:
        return _READERS[method](values)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def method_of(values: Mapping[str, Any]) -> str:
    """The method that a `quantization_config` names; where it names none, AWQ is meant."""
    return str(values.get("quant_method", "awq")).removeprefix("intel/")


def _settings(bits: object, group: object, symmetric: object) -> QuantConfig:
    """Raises ConfigError for anything but 4 bits in groups that squawq has."""
    if not isinstance(symmetric, bool):
        raise ConfigError(f"whether the integers are symmetric is {symmetric!r:.100}; it must be true or false")
    return QuantConfig.from_dict({"bits": bits, "group_size": group, "zero_point": not symmetric})


def _gptq(values: Mapping[str, Any]) -> tuple[QuantConfig, str]:
    """As AutoGPTQ and GPTQModel write it; the older name of checkpoint_format is format."""
    stated = values.get("checkpoint_format") or values.get("format") or "gptq"
    if stated not in ("gptq", "gptq_v2") or values.get("is_marlin_format"):
        raise ConfigError(f"checkpoint_format is {stated!r:.100}; of GPTQ's, squawq reads gptq and gptq_v2")
    quant = _settings(values.get("bits"), values.get("group_size", -1), values.get("sym", True))
    for pattern, changes in _entries(values, "dynamic"):
        if not pattern.startswith("-:"):  # which keeps a linear in 16 bits
            _check_override("dynamic", pattern, changes, quant)
    return quant, str(stated)


def _auto_round(values: Mapping[str, Any]) -> tuple[QuantConfig, str]:
    stated = values.get("packing_format") or values.get("backend") or "auto_round"
    layout = AUTOROUND.get(str(stated).removeprefix("auto_round:").partition(":")[0])
    if layout is None or values.get("data_type", "int") != "int":
        what = f"packing_format {stated!r:.100} with data_type {values.get('data_type', 'int')!r:.100}"
        raise ConfigError(f"{what} is not read; of AutoRound's, squawq reads int in auto_round, auto_gptq and auto_awq")
    quant = _settings(values.get("bits"), values.get("group_size", 128), values.get("sym", True))
    _check_activations(values)
    for name, changes in _entries(values, "extra_config"):
        _check_activations(changes)
        _check_override("extra_config", name, changes, quant)
    return quant, layout


def _check_activations(values: Mapping[str, Any]) -> None:
    if (bits := values.get("act_bits")) not in (None, 16, 32):
        raise ConfigError(f"act_bits is {bits!r:.20}; squawq reads 4-bit weights with 16-bit activations (W4A16)")


def _entries(values: Mapping[str, Any], key: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Settings of single layers by their names or patterns."""
    entries = values.get(key) or {}
    if not isinstance(entries, Mapping) or not all(isinstance(changes, Mapping) for changes in entries.values()):
        raise ConfigError(f"{key} must map names to settings")
    return list(entries.items())


def _check_override(key: str, name: str, changes: Mapping[str, Any], quant: QuantConfig) -> None:
    """Refuse settings of a layer by which its integers would not be like the others'. 16 bits and more are none."""
    bits = changes.get("bits", quant.bits)
    if isinstance(bits, int) and bits >= 16:
        return
    found = bits, changes.get("group_size", quant.group_size)
    if found != (quant.bits, quant.group_size):
        raise ConfigError(
            f"{key} has {found[0]!r:.20} bits in groups of {found[1]!r:.20} for {name!r:.200}; squawq reads "
            f"checkpoints whose quantized linears are alike, here 4 bits in groups of {quant.group_size}"
        )


def _compressed_tensors(values: Mapping[str, Any]) -> tuple[QuantConfig, str]:
    """As compressed-tensors 0.20 defines it (quantization/quant_config.py)."""
    for key in ("kv_cache_scheme", "transform_config"):
        if values.get(key):
            raise ConfigError(f"quantization_config has a {key}, which squawq does not apply")
    sparsity = values.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise ConfigError("quantization_config has a sparsity_config: weights are compressed as sparse ones, too")
    groups = values.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(g, Mapping) for g in groups.values()):
        raise ConfigError("quantization_config has no config_groups of objects")
    found = {_weights(name, group, values.get("format")) for name, group in groups.items()}
    if len(found) != 1:
        raise ConfigError(f"config_groups has {len(found)} schemes of weights; squawq reads checkpoints with one")
    return _settings(4, *found.pop()), PACKED


def _weights(name: str, group: Mapping[str, Any], whole: object) -> tuple[int, bool]:
    """(group size, symmetric) of one of config_groups. Raises ConfigError for all but 4-bit weights."""
    where, stated, weights = f"config_groups has {name!r:.100}", group.get("format") or whole, group.get("weights")
    if stated != PACKED:
        raise ConfigError(f"{where} in the format {stated!r:.100}; of compressed-tensors', squawq reads {PACKED}")
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise ConfigError(f"{where} with {key}; squawq reads weights alone in 4 bits (W4A16)")
    if not isinstance(weights, Mapping):
        raise ConfigError(f"{where} without weights")
    kind = {key: weights.get(key, usual) for key, usual in (("num_bits", 8), ("type", "int"), ("dynamic", False))}
    if kind != {"num_bits": 4, "type": "int", "dynamic": False}:
        raise ConfigError(f"{where} with weights of {kind}; squawq reads integers of 4 bits")
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "channel" if size in (None, -1) else "group"
    if strategy not in ("group", "channel") or (strategy == "group" and not isinstance(size, int)):
        raise ConfigError(
            f"{where} with strategy {strategy!r:.100} and group_size {size!r:.100}; squawq reads group, channel"
        )
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise ConfigError(f"{where} with symmetric {symmetric!r:.100}; it must be true or false")
    return (-1 if strategy == "channel" else int(size or 0)), symmetric


_READERS = {
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
    "auto-round": _auto_round,
}
