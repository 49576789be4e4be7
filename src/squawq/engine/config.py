"""EngineConfig: every knob of the engine, in one place for LLM, serve, bench and the launchers."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from squawq.strict import strict

Count = Annotated[int, Field(ge=1, description="at least 1")]
OptionalCount = Annotated[int | None, Field(ge=1, description="at least 1")]


@strict(kw_only=True)
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
    threads: OptionalCount = None
    exact: bool = False
    head: str | None = None
    kv_tokens: OptionalCount = None
    gpu_memory_utilization: Annotated[float | None, Field(gt=0, le=1, description="above 0, at most 1")] = None
    max_num_seqs: Count = 64
    max_num_batched_tokens: Count = 512
    max_waiting: OptionalCount = 1024
    prefix_caching: bool = True
    grammar_timeout: Annotated[float, Field(gt=0, description="a number of seconds above 0")] = 2.0
    seed: Annotated[int | None, Field(ge=0, description="at least 0")] = None

    @property
    def step_tokens(self) -> int:
        """Tokens in a step at most: decodes fill half of it at most, so neither they nor prompts starve."""
        return max(self.max_num_batched_tokens, 2 * self.max_num_seqs)
