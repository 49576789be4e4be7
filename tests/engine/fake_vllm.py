"""A stand-in for the parts of vLLM that `squawq.engine.vllm` uses: it answers with the tokens of a script."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

TOKENS = [11, 12, 13, 14, 15, 16, 17, 18]


@dataclass
class AsyncEngineArgs:
    model: str
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    distributed_executor_backend: str | None = None
    nnodes: int = 1
    node_rank: int = 0
    max_num_seqs: int = 1
    max_num_batched_tokens: int = 1
    max_model_len: int | None = None
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    structured_outputs_config: dict[str, Any] = field(default_factory=dict)


class SamplingParams(SimpleNamespace):
    pass


class StructuredOutputsParams(SimpleNamespace):
    pass


class RequestOutputKind(Enum):
    DELTA = 1


class AsyncLLM:
    """One token a moment; `hold` keeps it from the first, `fails` raises after two."""

    latest: Any = None

    def __init__(self, args: AsyncEngineArgs, stat_loggers: list[Any]) -> None:
        if args.model == "refused":
            raise ValueError("no such architecture")
        AsyncLLM.latest = self
        self.args, self.logger = args, stat_loggers[0](None)
        self.asked: list[tuple[Any, SamplingParams, str]] = []
        self.closed: list[str] = []  # streams whose reader left early
        self.errored = self.fails = self.shut = False
        self.hold = asyncio.Event()
        self.hold.set()
        cache = SimpleNamespace(num_gpu_blocks=8, block_size=16)
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=100), cache_config=cache)

    @classmethod
    def from_engine_args(cls, args: AsyncEngineArgs, stat_loggers: list[Any]) -> AsyncLLM:
        return cls(args, stat_loggers)

    async def generate(self, prompt: Any, params: SamplingParams, request_id: str) -> AsyncIterator[Any]:
        self.asked.append((prompt, params, request_id))
        ids = prompt["prompt_token_ids"]
        try:
            await self.hold.wait()
            for count in range(1, params.max_tokens + 1):
                await asyncio.sleep(0)
                if self.fails and count == 3:
                    self.errored = True
                    raise RuntimeError("the engine is dead")
                token = TOKENS[(count - 1) % len(TOKENS)]
                scores = {token: SimpleNamespace(logprob=-0.5, rank=2), 99: SimpleNamespace(logprob=-0.25, rank=1)}
                stats = SimpleNamespace(hits=2, queries=3)
                scheduler = SimpleNamespace(
                    num_running_reqs=1, num_waiting_reqs=0, kv_cache_usage=0.5, prefix_cache_stats=stats
                )
                iteration = SimpleNamespace(num_preempted_reqs=0, prompt_token_stats=SimpleNamespace(total=4))
                self.logger.record(scheduler, iteration)
                output = SimpleNamespace(token_ids=[token], logprobs=None if params.logprobs is None else [scores])
                scored = [None, *({one: SimpleNamespace(logprob=-1.0, rank=1)} for one in ids[1:])]
                ended = count == params.max_tokens or token in params.stop_token_ids
                yield SimpleNamespace(
                    outputs=[output],
                    finished=ended,
                    prompt_logprobs=scored if params.prompt_logprobs is not None and count == 1 else None,
                )
                if ended:
                    return
        except GeneratorExit:
            self.closed.append(request_id)
            raise

    def shutdown(self) -> None:
        self.shut = True


def tokens_input(ids: list[int], *, cache_salt: str | None = None) -> dict[str, Any]:
    return {"prompt_token_ids": ids, "cache_salt": cache_salt}


@contextmanager
def installed() -> Iterator[type[AsyncLLM]]:
    """While open, `import vllm` finds this."""
    modules: dict[str, dict[str, Any]] = {
        "vllm": {"AsyncEngineArgs": AsyncEngineArgs, "SamplingParams": SamplingParams},
        "vllm.sampling_params": {
            "RequestOutputKind": RequestOutputKind,
            "StructuredOutputsParams": StructuredOutputsParams,
        },
        "vllm.inputs": {},
        "vllm.inputs.engine": {"tokens_input": tokens_input},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.async_llm": {"AsyncLLM": AsyncLLM},
        "vllm.v1.metrics": {},
        "vllm.v1.metrics.loggers": {"StatLoggerBase": object},
    }
    made = {}
    for name, members in modules.items():
        made[name] = ModuleType(name)
        made[name].__dict__.update(members)
    with patch.dict(sys.modules, made):
        yield AsyncLLM
