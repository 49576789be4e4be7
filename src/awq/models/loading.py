"""Opens a model folder (its config alone) and loads it through transformers. Knows AutoAWQ's loading arguments.

Nothing but safetensors is read, and no code of a model folder is run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from awq.models._config import AwqConfig
from squawq.config import CODE, ModelConfig, without
from squawq.errors import ConfigError, FusionError
from squawq.families import FAMILIES
from squawq.format.files import has_file, read_config, read_json
from squawq.format.reader import Checkpoint
from squawq.hub.download import resolve
from squawq.layerwise.meta_model import transformers_config

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
            self.folder, config=self.config, use_safetensors=True, trust_remote_code=False, **self.arguments
        )
        if self.fuse is not None:
            fuse_layers(model, self.fuse)
        return model.eval()


def fuse_layers(model: Any, max_seq_len: int) -> None:
    """Let the model run as squawq's fused decoder; one that cannot stays as it is, and the user is told.

    Raises SquawqError for a max_seq_len that cannot be and for a damaged checkpoint.
    """
    from squawq.integrations.fused import fuse

    try:
        fuse(model, max_seq_len)
    except FusionError as error:
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
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not safetensors:
        raise ConfigError("safetensors is False; only safetensors files are read and written, since pickles run code")
    if trust_remote_code:
        say_once("trust_remote_code: no code of a model folder is run; known architectures need none")
    folder = resolve(model, revision=_revision(download_kwargs, settings))
    settings = {key: value for key, value in settings.items() if key != "revision"}
    raw = read_config(folder)
    if (kind := str(raw.get("model_type"))) not in CONFIG_MAPPING:
        raise ConfigError(f"{folder}: transformers has no model_type {kind!r}, and no code of a model folder is run")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(f"{folder}: model_type is {kind!r}, which is no causal language model of transformers")
    if has_file(folder / "adapter_config.json"):  # transformers would load the model that it names
        raise ConfigError(f"{folder}: is an adapter (adapter_config.json); merge it into its base model first")
    config = _transformers_config(folder)
    quantization, found = raw.get("quantization_config"), None
    if quantization is not None:
        found = AwqConfig.from_transformers_dict(quantization, str(folder))
        if getattr(config, "quantization_config", None) is None:  # an older form's file; transformers reads config.json
            config.quantization_config = found.to_transformers_dict()
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
    if found is None and config.model_type not in FAMILIES:
        raise ConfigError(f"model_type is {config.model_type!r}; squawq quantizes {', '.join(sorted(FAMILIES))}")
    return Opened(folder, config, found, arguments, settings)


def _transformers_config(folder: Path) -> Any:
    """A folder's config as transformers has it, without what names code to fetch or run.

    Raises CheckpointError for one that transformers cannot use.
    """
    from transformers import CONFIG_MAPPING

    raw = read_json(folder / "config.json")
    transformers_config(raw, str(folder / "config.json"))  # its numbers are checked
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(without(raw, (*CODE, "num_labels")))  # memory for each label
    config.name_or_path = str(folder)
    return config


def check_as_stored(config: Any, model: Any, checkpoint: Checkpoint) -> None:
    """Raise ConfigError where settings or weights are no longer the folder's, which is what `quantize` reads.

    model: None while it is not loaded. A name that only one side has (stacked experts, a tied head) is left aside.
    """
    import torch

    advice = "quantize() reads the folder: change it there, or save the model to another folder and open that"
    stored = _transformers_config(checkpoint.folder)
    given, wanted = (ModelConfig.from_dict(c.to_dict(), "the model's config") for c in (config, stored))
    for name in (field.name for field in fields(ModelConfig) if field.name not in ("raw", "quant")):
        if (mine := getattr(given, name)) != (theirs := getattr(wanted, name)):
            raise ConfigError(f"{name} is {mine} in the model and {theirs} in {checkpoint.folder}; {advice}")
    for name, tensor in () if model is None else model.state_dict().items():
        read = name in checkpoint.tensors and not tensor.is_meta
        if read and not torch.equal(tensor.cpu(), checkpoint.read(name).to(tensor.dtype)):
            raise ConfigError(f"{name} in the model is not what {checkpoint.folder} has; {advice}")


def check_count(name: str, value: object) -> None:
    """Raise ConfigError for what is no whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")


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
