"""EngineConfig: every knob of the engine, in one place for LLM, serve, bench and the launchers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, WrapValidator

from squawq.errors import ConfigError
from squawq.strict import strict

Count = Annotated[int, Field(ge=1, description="at least 1")]
Dtype = Annotated[Literal["auto", "float16", "bfloat16"], Field(description="choose one of auto, float16, bfloat16")]
KvCacheDtype = Annotated[
    Literal["auto", "float16", "fp8", "fp8_e4m3"], Field(description="choose one of auto, float16, fp8, fp8_e4m3")
]
ModelImpl = Literal["auto", "squawq", "transformers"]
OptionalCount = Annotated[int | None, Field(ge=1, description="at least 1")]


def _none_or(value: Any, check: Any) -> Any:
    return value if value is None else check(value)


# An int once the object is made; None: by the device
CountByDevice = Annotated[int, Field(ge=1, description="at least 1"), WrapValidator(_none_or)]
# Values on a CPU, and on CUDA, where each step with prompt tokens dequantizes all weights, however few they are
# Settings that only one of the engines has, and the values that mean nothing to the other
OURS: dict[str, tuple[Any, ...]] = {
    "model_impl": ("auto",),
    "threads": (None,),
    "exact": (False,),
    "head": (None,),
    "kv_tokens": (None,),
}
VLLMS: dict[str, tuple[Any, ...]] = {
    "pipeline_parallel_size": (1,),
    "distributed_executor_backend": (None, "mp", "uni"),
    "nnodes": (1,),
    "node_rank": (0,),
    "master_addr": (None,),
    "master_port": (None,),
    "engine_args": ({},),
}
BY_DEVICE = {"max_num_seqs": (64, 256), "max_num_batched_tokens": (512, 2048)}


@strict(kw_only=True)
class EngineConfig:
    """How to run a model. Knobs that vLLM has too go by vLLM's names. Raises ConfigError for a value out of range.

    Settings that depend on the device have their final value once the object is made: `device` is never "auto" then.
    """

    engine: Literal["squawq", "vllm"] = "squawq"  # "vllm": vLLM's, which must be installed; see engine/vllm.py
    # "squawq": our decoder; "transformers": its model class, which every family has; "auto": our decoder where it can
    model_impl: Annotated[ModelImpl, Field(description=f"choose one of {', '.join(get_args(ModelImpl))}")] = "auto"
    device: str = "auto"  # "cpu", "cuda", "cuda:N"; "auto": a GPU that the CUDA backend takes, else the CPU
    threads: OptionalCount = None  # of the CPU kernels, for the whole process; None keeps the current number
    exact: bool = False  # float32 activations in 4-bit matmuls: slower, for comparison
    head: str | None = None  # format of the output head: "int8", "int4", "16-bit"; None: the backend's default
    dtype: Dtype = "auto"  # of activations, on CUDA; "auto": float16 there, float32 on a CPU
    kv_cache_dtype: KvCacheDtype = "auto"  # "auto": as the activations, on a CPU float16; "fp8", "fp8_e4m3": CUDA alone
    # processes that share the model: each with a GPU of its own, or on a CPU with `threads`, by default its part of all
    tensor_parallel_size: Count = 1
    kv_tokens: OptionalCount = None  # capacity of the KV cache; None: a share of the free memory
    # CUDA: share of the GPU's memory for weights, buffers and KV cache together, 0.9 by default; kv_tokens wins
    gpu_memory_utilization: Annotated[float | None, Field(gt=0, le=1, description="above 0, at most 1")] = None
    max_num_seqs: CountByDevice = None  # type: ignore[assignment]  # sequences that run at the same time
    # tokens in a step, raised to 2 * max_num_seqs if it is smaller
    max_num_batched_tokens: CountByDevice = None  # type: ignore[assignment]
    max_waiting: OptionalCount = 1024  # requests in the queue; None: no limit
    prefix_caching: bool = True  # reuse the KV cache of common prefixes
    grammar_timeout: Annotated[float, Field(gt=0, description="a number of seconds above 0")] = 2.0  # to compile one
    seed: Annotated[int | None, Field(ge=0, description="at least 0")] = None  # seeds requests without one, in order
    max_model_len: OptionalCount = None  # tokens of a prompt and its answer; of our engine the server's limit alone

    # vLLM's alone
    pipeline_parallel_size: Count = 1
    distributed_executor_backend: Annotated[
        Literal["mp", "ray", "uni"] | None, Field(description="choose one of mp, ray, uni")
    ] = None
    nnodes: Count = 1  # hosts
    node_rank: Annotated[int, Field(ge=0, description="at least 0")] = 0  # of this host
    master_addr: str | None = None  # of host 0
    master_port: OptionalCount = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)  # other arguments of vLLM's AsyncEngineArgs

    def __post_init__(self) -> None:
        if self.device == "auto":
            from squawq.backends.devices import pick_device  # imports torch

            object.__setattr__(self, "device", pick_device("auto", exact=self.exact))
        self._check_engine()
        for name, values in BY_DEVICE.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, values[self.device.startswith("cuda")])

    def _check_engine(self) -> None:
        """Raise ConfigError for settings that the other engine has."""
        other, lacking = ("squawq", OURS) if self.engine == "vllm" else ("vllm", VLLMS)
        for name, allowed in lacking.items():
            if (value := getattr(self, name)) not in allowed:
                raise ConfigError(f"{name} is {value!r}, which needs the engine {other}; leave it out, or choose that")

    @property
    def step_tokens(self) -> int:
        """Tokens in a step at most; decodes fill at most half of it, so neither decodes nor prompts starve."""
        return max(self.max_num_batched_tokens, 2 * self.max_num_seqs)
