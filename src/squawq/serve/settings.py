"""All settings of the server in one frozen object. launcher.py and tgi_launcher.py read them from flags, environment
and file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from squawq.engine.request import MAX_LOGPROBS, MAX_SEQUENCES, MAX_STOPS
from squawq.errors import ConfigError

DIALECTS = ("openai", "tgi")
LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")
TOOL_PARSERS = ("auto", "llama3_json", "hermes", "none")
CHOICES = {
    "dialect": DIALECTS,
    "log_format": LOG_FORMATS,
    "log_level": LOG_LEVELS,
    "tool_call_parser": TOOL_PARSERS,
}
RESERVED = 256  # connections beyond those of running and waiting requests
MAY_BE_0 = ("shutdown_timeout", "keep_alive_interval")  # abort at once; no comments
MIN = {"port": 0, "max_queued": 0, "seed": 0}  # of other integers: 1
MAX = {
    "max_logprobs": MAX_LOGPROBS,
    "max_top_n_tokens": MAX_LOGPROBS,
    "max_choices": MAX_SEQUENCES,
    "max_best_of": MAX_SEQUENCES,
    "max_stop_sequences": MAX_STOPS,
}


@dataclass(frozen=True)
class Settings:
    """Settings of `squawq serve`. Sizes in bytes, times in seconds; None: as the model or machine suggests.

    Attributes:
        dialect: "openai" (as vLLM answers) or "tgi": whose rules hold on the shared routes, where they differ.
        served_names: The model's name in replies, then aliases.
        tokenizer: A folder or Hub id; None for the model's own.
        generation_config: Source of sampling defaults: "auto", the model; "vllm", none; or a folder.
        seed: Draws the seeds of requests without one, in order of arrival; None: at random.
        gpu_memory_utilization: Share of a GPU's memory for weights and cache together.
        grammar_support: Accept schemas, regexes, grammars and tools.
        prometheus_port: Serve /metrics on this port as well.
        max_model_len: Tokens of a prompt and its answer together.
        max_input_tokens: Tokens of a prompt.
        max_num_seqs: Running sequences.
        max_num_batched_tokens: Tokens of a step, at least twice max_num_seqs.
        max_queued: Waiting requests; the next is refused.
        max_queue_bytes: Memory of waiting and running requests; the next is refused.
        max_connections: More than there may be requests, so that others can still ask for health; None: RESERVED more.
        tensor_parallel_size: GPUs that share a model; 1 for now.

    Raises:
        ConfigError: Values that cannot work.
    """

    model: str
    dialect: str = "openai"
    served_names: tuple[str, ...] = ()
    strict_model_name: bool = False
    strict_fields: bool = False

    revision: str | None = None
    tokenizer: str | None = None
    generation_config: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    device: str = "cpu"
    threads: int | None = None
    exact: bool = False
    head: str | None = None
    kv_tokens: int | None = None
    gpu_memory_utilization: float | None = None
    seed: int | None = None
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    max_input_tokens: int | None = None
    chat_template: Path | None = None
    tool_call_parser: str = "auto"
    grammar_support: bool = True

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_queued: int = 2048
    prefix_caching: bool = True

    host: str = "127.0.0.1"
    port: int = 8000
    prometheus_port: int | None = None
    uds: Path | None = None
    ssl_keyfile: Path | None = None
    ssl_certfile: Path | None = None
    allowed_origins: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()

    max_connections: int | None = None
    max_body_bytes: int = 2_000_000
    max_queue_bytes: int = 2**30
    max_header_bytes: int = 64 * 1024
    max_headers: int = 256
    header_timeout: float = 10
    body_timeout: float = 30
    min_body_rate: int = 1000
    idle_timeout: float = 75
    write_timeout: float = 60
    queue_timeout: float = 1800
    generation_timeout: float = 3600
    template_timeout: float = 10
    grammar_timeout: float = 2
    keep_alive_interval: float = 15
    shutdown_timeout: float = 30
    validation_workers: int = 2

    max_logprobs: int = 20
    max_logprob_entries: int = 2**18
    max_choices: int = 64
    max_prompts: int = 256
    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_client_batch: int = 4

    log_format: str = "text"
    log_level: str = "info"
    log_requests: bool = False

    def __post_init__(self) -> None:
        for entry in fields(self):
            name, value, minimum = entry.name, getattr(self, entry.name), MIN.get(entry.name, 1)
            if value not in CHOICES.get(name, (value,)):
                raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(CHOICES[name])}")
            if entry.type in ("int", "int | None") and value is not None and value < minimum:
                raise ConfigError(f"{name} is {value}; it must be at least {minimum}")
            if entry.type == "float" and not (0 <= value < math.inf and (value > 0 or name in MAY_BE_0)):
                raise ConfigError(f"{name} is {value}; it must be a number of seconds above 0")
            if name in MAX and value > MAX[name]:
                raise ConfigError(f"{name} is {value}; the engine takes at most {MAX[name]}")
        metrics, share, connections = self.prometheus_port, self.gpu_memory_utilization, self.max_connections
        for broken, message in (
            (self.port > 65535, f"port is {self.port}; it must be 0 (any free one) to 65535"),
            (
                metrics is not None and (metrics > 65535 or metrics == self.port),
                f"prometheus_port is {metrics}; it must be 1 to 65535 and not the server's",
            ),
            (
                metrics is not None and self.uds is not None,
                f"prometheus_port is {metrics} beside the Unix socket {self.uds}, which has /metrics; "
                "leave one of them out",
            ),
            (
                connections is not None and connections <= self.most_under_way,
                f"max_connections is {connections}, but up to {self.most_under_way} requests may be under way "
                "or waiting; raise it above that, or lower max_queued (--max-num-queued-reqs) or max_num_seqs",
            ),
            (
                share is not None and not 0 < share <= 1,
                f"gpu_memory_utilization is {share}; it must be above 0, at most 1",
            ),
            (
                self.tensor_parallel_size != 1,
                f"tensor_parallel_size is {self.tensor_parallel_size}; one process serves a model here for now, "
                "so it must be 1 (NUM_SHARD=1, --tensor-parallel-size 1)",
            ),
            ("" in self.api_keys, "an API key is empty; give a key or leave the flag out"),
            (
                (self.ssl_keyfile is None) != (self.ssl_certfile is None),
                "TLS needs both ssl_keyfile and ssl_certfile; only one was given",
            ),
        ):
            if broken:
                raise ConfigError(message)

    @property
    def tgi(self) -> bool:
        """Whether the shared routes follow TGI's rules."""
        return self.dialect == "tgi"

    @property
    def max_concurrent(self) -> int:
        """Generation requests that may be running or waiting at once."""
        return self.max_num_seqs + self.max_queued

    @property
    def tenants(self) -> int:
        """The number of API keys, at least 1."""
        return max(1, len(set(self.api_keys)))

    @property
    def most_under_way(self) -> int:
        """`max_concurrent`, and the shares of the other keys beside it (limits.Admission)."""
        return self.max_concurrent + (self.tenants - 1) * max(1, self.max_concurrent // self.tenants)

    @property
    def connections(self) -> int:
        """Connections that may be open at once."""
        return self.most_under_way + RESERVED if self.max_connections is None else self.max_connections
