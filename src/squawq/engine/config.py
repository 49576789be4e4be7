"""EngineConfig: every knob of the engine, in one place for LLM, serve, bench and the launchers."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from squawq.strict import strict

Count = Annotated[int, Field(ge=1, description="at least 1")]
OptionalCount = Annotated[int | None, Field(ge=1, description="at least 1")]


@strict(kw_only=True)
class EngineConfig:
    """How to run a model. Knobs that vLLM has too go by vLLM's names. Raises ConfigError for a value out of range.

    Settings that depend on the device have their final value once the object is made: `device` is never "auto" then.
    """

    device: str = "auto"  # "cpu", "cuda", "cuda:N"; "auto": a GPU that the CUDA backend takes, else the CPU
    threads: OptionalCount = None  # of the CPU kernels, for the whole process; None keeps the current number
    exact: bool = False  # float32 activations in 4-bit matmuls: slower, for comparison
    head: str | None = None  # format of the output head: "int8", "int4", "16-bit"; None: the backend's default
    kv_tokens: OptionalCount = None  # capacity of the KV cache; None: a share of the free memory
    # CUDA: share of the GPU's memory for weights and KV cache together; kv_tokens takes precedence
    gpu_memory_utilization: Annotated[float | None, Field(gt=0, le=1, description="above 0, at most 1")] = None
    max_num_seqs: Count = 64  # sequences that run at the same time
    max_num_batched_tokens: Count = 512  # tokens in a step, raised to 2 * max_num_seqs if it is smaller
    max_waiting: OptionalCount = 1024  # requests in the queue; None: no limit
    prefix_caching: bool = True  # reuse the KV cache of common prefixes
    grammar_timeout: Annotated[float, Field(gt=0, description="a number of seconds above 0")] = 2.0  # to compile one
    seed: Annotated[int | None, Field(ge=0, description="at least 0")] = None  # seeds requests without one, in order

    def __post_init__(self) -> None:
        if self.device == "auto":
            from squawq.backends.devices import pick_device  # imports torch

            object.__setattr__(self, "device", pick_device("auto", exact=self.exact))

    @property
    def step_tokens(self) -> int:
        """Tokens in a step at most; decodes fill at most half of it, so neither decodes nor prompts starve."""
        return max(self.max_num_batched_tokens, 2 * self.max_num_seqs)
