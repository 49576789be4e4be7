"""What a folder says of generating: the tokens that end a text, and how its makers would sample.

A value that cannot work is passed over with a warning: a downloaded file should not keep a model from running.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from squawq.config import ModelConfig
from squawq.engine.request import SamplingParams
from squawq.errors import ConfigError

logger = logging.getLogger("squawq")
_SAMPLED = ("temperature", "top_p", "top_k", "min_p", "typical_p")


class GenerationConfig:
    """A folder's generation_config.json; without one, nothing but config.json's end tokens.

    Raises ConfigError for a file that is not JSON.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self._path = folder / "generation_config.json"
        try:
            values = json.loads(self._path.read_text(encoding="utf-8")) if self._path.is_file() else {}
        except ValueError as error:
            raise ConfigError(f"{self._path} is not JSON: {error}") from error
        self._values: Mapping[str, Any] = values if isinstance(values, dict) else {}
        self.eos_ids = self._read_eos_ids(config)

    def sampling_defaults(self) -> SamplingParams:
        """What the file asks for: the likeliest token, unless its do_sample is true."""
        values = self._values
        given: dict[str, Any] = {"temperature": 1.0} if values.get("do_sample", False) else {}
        for name in (*(_SAMPLED if given else ()), "repetition_penalty"):
            value = values.get(name)
            if isinstance(value, float) and value.is_integer() and name == "top_k":
                value = int(value)
            if value is None:
                continue
            try:
                SamplingParams(**{name: value})
            except ConfigError as error:
                logger.warning("%s: passed over: %s", self._path, error)
            else:
                given[name] = value
        return SamplingParams(**given)

    def _read_eos_ids(self, config: ModelConfig) -> frozenset[int]:
        value = self._values.get("eos_token_id")
        value = config.raw.get("eos_token_id") if value is None else value
        values = value if isinstance(value, list) else [value]
        return frozenset(v for v in values if isinstance(v, int) and 0 <= v < config.vocab_size)
