"""Reads generation_config.json: the end tokens, and the model's sampling defaults.

An invalid value is ignored with a warning: a downloaded file should not keep a model from running.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from squawq.config import ModelConfig
from squawq.engine.request import SamplingParams
from squawq.errors import ConfigError
from squawq.format.files import has_file, read_json

logger = logging.getLogger("squawq")
_SAMPLED = ("temperature", "top_p", "top_k", "min_p", "typical_p")


class GenerationConfig:
    """A folder's generation_config.json; without one, only config.json's end tokens.

    Raises CheckpointError for a file that is not a JSON object.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self._path = folder / "generation_config.json"
        self._values: Mapping[str, Any] = read_json(self._path) if has_file(self._path) else {}
        self.eos_ids = self._read_eos_ids(config)

    def sampling_defaults(self) -> SamplingParams:
        """The file's sampling parameters: greedy, unless do_sample is true."""
        values = self._values
        given: dict[str, Any] = {"temperature": 1.0} if values.get("do_sample", False) else {}
        for name in (*(_SAMPLED if given else ()), "repetition_penalty"):
            value: Any = values.get(name)
            if value is None:
                continue
            if isinstance(value, float) and value.is_integer() and name == "top_k":
                value = int(value)
            try:
                SamplingParams(**{name: value})
                given[name] = value
            except ConfigError as error:
                logger.warning("%s: passed over: %s", self._path, error)
        return SamplingParams(**given)

    def _read_eos_ids(self, config: ModelConfig) -> frozenset[int]:
        value = self._values.get("eos_token_id")
        value = config.raw.get("eos_token_id") if value is None else value
        values = value if isinstance(value, list) else [value]
        return frozenset(v for v in values if type(v) is int and 0 <= v < config.vocab_size)
