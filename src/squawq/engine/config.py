"""EngineConfig: every knob of the engine, in one place for LLM, serve, bench and the launchers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from squawq.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How to run a model. Knobs that vLLM has too go by vLLM's names.

    Attributes:
        device: "cpu", "cuda" or "cuda:N".
        threads: Threads of the CPU kernels, for the whole process; None keeps the current number.
        exact: Use float32 activations in 4-bit matmuls: slower, for comparison.
        head: Format of the output layer: "int8", "int4", "16-bit" or None for the default (`nn.loader.Options`).
        kv_tokens: Capacity of the KV cache in tokens; None takes a share of the free memory.
        gpu_memory_utilization: CUDA: the share of the GPU's memory for weights and KV cache together, above 0 to 1.
            `kv_tokens` takes precedence.
        max_num_seqs: Sequences that run at the same time.
        max_num_batched_tokens: Tokens in a step, raised to 2 * `max_num_seqs` if it is smaller.
        max_waiting: Requests in the queue; None for no limit.
        prefix_caching: Reuse the KV cache of common prefixes.
        grammar_timeout: Processor seconds for compiling a grammar.
        seed: Generates the seeds of requests without one, in order of arrival; None: random seeds.

    Raises:
        ConfigError: A value is out of range.
    """

    device: str = "cpu"
    threads: int | None = None
    exact: bool = False
    head: str | None = None
    kv_tokens: int | None = None
    gpu_memory_utilization: float | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_waiting: int | None = 1024
    prefix_caching: bool = True
    grammar_timeout: float = 2.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("threads", "max_num_seqs", "max_num_batched_tokens", "max_waiting"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        share = self.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization is {share}; it must be above 0, at most 1")

    @classmethod
    def from_knobs(cls, knobs: Mapping[str, Any]) -> Self:
        """A config from keyword arguments. Raises ConfigError for an unknown name."""
        known = [entry.name for entry in fields(cls)]
        if unknown := next((name for name in knobs if name not in known), None):
            raise ConfigError(f"there is no setting {unknown!r}; choose from {', '.join(known)}")
        return cls(**knobs)

    @property
    def step_tokens(self) -> int:
        """Tokens in a step at most: decodes fill half of it at most, so neither they nor prompts starve."""
        return max(self.max_num_batched_tokens, 2 * self.max_num_seqs)
