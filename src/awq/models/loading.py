"""Opens a model folder (its config alone) and loads it through transformers. Knows AutoAWQ's loading arguments.

Nothing but safetensors is read, and no code of a model folder is run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from awq.models._config import AwqConfig
from squawq.errors import CheckpointError, ConfigError, SquawqError
from squawq.families import FAMILIES
from squawq.format.reader import read_json
from squawq.hub.download import resolve

SPREAD = (None, "auto", "balanced", "balanced_low_0", "sequential")  # device maps that let accelerate choose
PASSED_ON = frozenset({"max_memory", "offload_folder", "offload_buffers", "offload_state_dict", "attn_implementation"})
log = logging.getLogger("awq")


@cache
def say_once(text: str) -> None:
    """Log a line; the same line only once."""
    log.warning(text)


@dataclass
class Opened:
    """A model folder that is open, not loaded: its config, and how it is to be loaded."""

    folder: Path
    config: Any  # transformers' PretrainedConfig
    quantization: AwqConfig | None
    arguments: dict[str, Any]
    settings: dict[str, Any]
    fuse: int | None = None  # the fused cache's tokens; None for transformers' own layers

    def load(self) -> Any:
        """The model, ready to generate."""
        from transformers import AutoModelForCausalLM

        if self.quantization is not None:
            import squawq.transformers  # noqa: F401 (registers the quantizer)
        model = AutoModelForCausalLM.from_pretrained(
            self.folder, config=self.config, use_safetensors=True, **self.arguments
        )
        if self.fuse is not None:
            fuse_layers(model, self.fuse)
        return model.eval()


def fuse_layers(model: Any, max_seq_len: int) -> None:
    """Let the model run as squawq's fused decoder; one that cannot stays as it is, and the user is told."""
    from squawq.integrations.fused import fuse

    try:
        fuse(model, max_seq_len)
    except SquawqError as error:
        say_once(f"layers are not fused: {error}")


def open_model(
    model: str | Path,
    *,
    dtype: Any,
    trust_remote_code: bool | None,
    safetensors: bool,
    device_map: Any,
    download_kwargs: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
) -> Opened:
    """Resolve and open a folder or Hub id.

    settings: keyword arguments that are transformers' (PASSED_ON) or attributes of the model's config.
    Raises TypeError for any other, SquawqError for what cannot be read.
    """
    from transformers import AutoConfig

    if not safetensors:
        raise ConfigError("safetensors is False; only safetensors files are read and written, since pickles run code")
    if trust_remote_code:
        say_once("trust_remote_code: no code of a model folder is run; known architectures need none")
    folder = resolve(model, revision=_revision(download_kwargs, settings))
    settings = {key: value for key, value in settings.items() if key != "revision"}
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: has no config.json, so it is no model folder")
    raw = read_json(folder / "config.json")
    config = AutoConfig.from_pretrained(folder)
    if (folder / "quant_config.json").is_file() and "quantization_config" not in raw:  # AutoAWQ's older form
        raw["quantization_config"] = {"quant_method": "awq", **read_json(folder / "quant_config.json")}
        older = AwqConfig.from_transformers_dict(raw["quantization_config"], str(folder / "quant_config.json"))
        config.quantization_config = older.to_transformers_dict()
    quantization = raw.get("quantization_config")
    arguments: dict[str, Any] = {"dtype": dtype, "device_map": _device_map(device_map)}
    for key, value in settings.items():
        if key in PASSED_ON:
            arguments[key] = value
        elif hasattr(config, key):
            setattr(config, key, value)
        else:
            raise TypeError(
                f"unknown argument {key!r}; choose {', '.join(sorted(PASSED_ON))} or an attribute of the model's config"
            )
    found = None if quantization is None else AwqConfig.from_transformers_dict(quantization, str(folder))
    if found is None and config.model_type not in FAMILIES:
        raise ConfigError(f"model_type is {config.model_type!r}; squawq quantizes {', '.join(sorted(FAMILIES))}")
    return Opened(folder, config, found, arguments, settings)


def _revision(download_kwargs: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> str | None:
    """What is fetched from the Hub is squawq's choice; which revision is the caller's."""
    given = {key: value for key, value in (download_kwargs or {}).items() if key != "ignore_patterns"}
    revision: str | None = given.pop("revision", settings.get("revision"))
    if given:
        raise TypeError(
            f"download_kwargs has {sorted(given)[0]!r}; choose revision or ignore_patterns (a login and the cache's "
            "place are the environment's: HF_TOKEN, HF_HOME)"
        )
    return revision


def _device_map(given: Any) -> Any:
    """Without an accelerator there is nothing to spread over, and no need of the package accelerate."""
    import torch

    return None if given in SPREAD and not torch.accelerator.is_available() else given
