"""LLM: a model folder that talks. Loads it, turns text to ids and back, samples token by token.

One request at a time over plain torch; correct first, batching and speed come with the engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squawq.errors import ConfigError
from squawq.hub.download import resolve
from squawq.kernels.devices import check_device
from squawq.nn.loader import load
from squawq.tokenizer import Message, TextStream, Tokenizer


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. temperature 0 takes the likeliest; top_p 1 and top_k 0 leave all in.

    max_tokens: at most so many new tokens. seed: the same text again; None for another each time.
    Raises ConfigError for values out of range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        ranges = {
            "max_tokens": self.max_tokens >= 1,
            "temperature": 0 <= self.temperature <= 100,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "seed": self.seed is None or 0 <= self.seed < 2**63,
        }
        rules = {
            "max_tokens": "at least 1",
            "temperature": "0 to 100",
            "top_p": "above 0, at most 1",
            "top_k": "0 (off) or more",
            "seed": "0 to 2^63 - 1",
        }
        for name, good in ranges.items():
            if not good:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {rules[name]}")


class LLM:
    """A folder or Hub id, loaded: 16-bit or AWQ. Raises SquawqError for what cannot be run.

    `generate` continues a text, `chat` answers messages, `stream` and `stream_chat` give the text piece by piece.
    """

    def __init__(self, model: str | Path, *, device: str = "cpu") -> None:
        check_device(device)
        self.folder = resolve(model)
        self.tokenizer = Tokenizer(self.folder)
        self.decoder = load(self.folder, device)
        self.config = self.decoder.config
        self._stop_ids = self._read_stop_ids()

    def sampling_defaults(self) -> SamplingParams:
        """What generation_config.json asks for."""
        values = self._generation_config()
        if not values.get("do_sample", False):
            return SamplingParams()
        given: dict[str, Any] = {k: values[k] for k in ("temperature", "top_p", "top_k") if _is_number(values.get(k))}
        return SamplingParams(**{"temperature": 1.0, **given})

    def generate(self, prompt: str, sampling: SamplingParams | None = None) -> str:
        """The text that follows `prompt`."""
        return "".join(self.stream(prompt, sampling))

    def chat(self, messages: Iterable[Message], sampling: SamplingParams | None = None) -> str:
        """The assistant's answer to messages of {"role", "content"}, by the model's chat template."""
        return "".join(self.stream_chat(messages, sampling))

    def stream(self, prompt: str, sampling: SamplingParams | None = None) -> Iterator[str]:
        """`generate` in pieces as they come, never half a character."""
        return self._text(self.tokenizer.encode(prompt), sampling)

    def stream_chat(self, messages: Iterable[Message], sampling: SamplingParams | None = None) -> Iterator[str]:
        """`chat` in pieces."""
        return self._text(self.tokenizer.encode_chat(messages), sampling)

    def generate_ids(self, ids: list[int], sampling: SamplingParams | None = None) -> Iterator[int]:
        """New token ids one by one, the stop id not included.

        Stops at the model's last position. Raises ConfigError for an empty prompt or one without room for a token.
        """
        sampling = sampling or self.sampling_defaults()
        if not ids:
            raise ConfigError("the prompt is empty; give at least one token")
        if len(ids) >= self.config.max_positions:
            raise ConfigError(f"the prompt has {len(ids)} tokens; the model has {self.config.max_positions} positions")
        return self._generate(ids, sampling)

    def _generate(self, ids: list[int], sampling: SamplingParams) -> Iterator[int]:
        device = self.decoder.embedding.device
        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        cache = self.decoder.new_cache()
        step = torch.tensor([ids], device=device)
        for _ in range(min(sampling.max_tokens, self.config.max_positions - len(ids))):
            token = sample(self.decoder(step, cache, last_only=True)[0, -1].cpu(), sampling, generator)
            if token in self._stop_ids:
                return
            yield token
            step = torch.tensor([[token]], device=device)

    def _text(self, ids: list[int], sampling: SamplingParams | None) -> Iterator[str]:
        tokens = self.generate_ids(ids, sampling)

        def pieces() -> Iterator[str]:
            text = TextStream(self.tokenizer, ids[-8:])
            for token in tokens:
                if piece := text.push(token):
                    yield piece
            if piece := text.finish():
                yield piece

        return pieces()

    def _generation_config(self) -> dict[str, object]:
        path = self.folder / "generation_config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        return values if isinstance(values, dict) else {}

    def _read_stop_ids(self) -> frozenset[int]:
        value = self._generation_config().get("eos_token_id", self.config.raw.get("eos_token_id"))
        values = value if isinstance(value, list) else [value]
        return frozenset(v for v in values if isinstance(v, int))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def sample(logits: Tensor, sampling: SamplingParams, generator: torch.Generator) -> int:
    """A token id from logits float32 [vocab]: temperature, top_k, top_p (Holtzman et al., arXiv 1904.09751)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled, order = (logits.double() / sampling.temperature).sort(descending=True, stable=True)
    probabilities = scaled.softmax(0)
    keep = probabilities.cumsum(0) - probabilities < sampling.top_p
    if sampling.top_k:
        keep[sampling.top_k :] = False
    probabilities[~keep] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
