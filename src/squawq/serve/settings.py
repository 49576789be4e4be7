"""All settings of the server in one frozen object. launcher.py and tgi_launcher.py read them from flags, environment
and file.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from squawq.engine.config import Count, EngineConfig, OptionalCount
from squawq.engine.request import MAX_LOGPROBS, MAX_SEQUENCES, MAX_STOPS
from squawq.errors import ConfigError
from squawq.strict import strict

DIALECTS = ("openai", "tgi")
LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")
TOOL_PARSERS = ("auto", "llama3_json", "hermes", "none")
RESERVED = 256  # connections beyond those of running and waiting requests
Seconds = Annotated[float, Field(gt=0, description="a number of seconds above 0")]
SecondsOrZero = Annotated[float, Field(ge=0, description="a number of seconds, 0 or more")]
Logprobs = Annotated[int, Field(ge=1, le=MAX_LOGPROBS, description=f"1 to {MAX_LOGPROBS}")]
Choices = Annotated[int, Field(ge=1, le=MAX_SEQUENCES, description=f"1 to {MAX_SEQUENCES}")]


@strict(kw_only=True)
class ServerSettings(EngineConfig):
    """Settings of `squawq serve`, beside the engine's; the help texts of the flags (launcher.TABLE) say what they mean.

    Sizes in bytes, times in seconds; None: as the model or machine suggests. Raises ConfigError for values that cannot
    work.
    """

    model: str
    dialect: str = "openai"
    served_names: tuple[str, ...] = ()
    strict_model_name: bool = False
    strict_fields: bool = False

    headless: bool = False
    revision: str | None = None
    tokenizer: str | None = None
    generation_config: str = "auto"
    quantization: str | None = None
    max_input_tokens: OptionalCount = None
    chat_template: Path | None = None
    tool_call_parser: str = "auto"
    grammar_support: bool = True

    max_waiting: int | None = field(default=None, init=False)  # the server has limits of its own
    max_queued: Annotated[int, Field(ge=0, description="at least 0")] = 2048

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="0 (any free one) to 65535")] = 8000
    prometheus_port: OptionalCount = None
    uds: Path | None = None
    ssl_keyfile: Path | None = None
    ssl_certfile: Path | None = None
    allowed_origins: tuple[str, ...] = ()
    web: bool = True
    api_keys: tuple[str, ...] = ()

    max_connections: OptionalCount = None
    max_body_bytes: Count = 2_000_000
    max_queue_bytes: Count = 2**30
    max_header_bytes: Count = 64 * 1024
    max_headers: Count = 256
    header_timeout: Seconds = 10
    body_timeout: Seconds = 30
    min_body_rate: Count = 1000
    idle_timeout: Seconds = 75
    write_timeout: Seconds = 60
    queue_timeout: Seconds = 1800
    generation_timeout: Seconds = 3600
    template_timeout: Seconds = 10
    keep_alive_interval: SecondsOrZero = 15  # 0: no comments
    shutdown_timeout: SecondsOrZero = 30  # 0: abort at once
    validation_workers: Count = 2

    max_logprobs: Logprobs = 20
    max_logprob_entries: Count = 2**18
    max_choices: Choices = 64
    max_prompts: Count = 256
    max_best_of: Choices = 2
    max_stop_sequences: Annotated[int, Field(ge=1, le=MAX_STOPS, description=f"1 to {MAX_STOPS}")] = 4
    max_top_n_tokens: Logprobs = 5
    max_client_batch: Count = 4

    log_format: str = "text"
    log_level: str = "info"
    log_requests: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (
            ("dialect", DIALECTS),
            ("log_format", LOG_FORMATS),
            ("log_level", LOG_LEVELS),
            ("tool_call_parser", TOOL_PARSERS),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if self.prometheus_port is not None and (self.prometheus_port > 65535 or self.prometheus_port == self.port):
            raise ConfigError(f"prometheus_port is {self.prometheus_port}; it must be 1 to 65535 and not the server's")
        if self.prometheus_port is not None and self.uds is not None:
            raise ConfigError(
                f"prometheus_port is {self.prometheus_port} beside the Unix socket {self.uds}, which has /metrics; "
                "leave one of them out"
            )
        if self.max_connections is not None and self.max_connections <= self.most_under_way:
            raise ConfigError(
                f"max_connections is {self.max_connections}, but up to {self.most_under_way} requests may be under way "
                "or waiting; raise it above that, or lower max_queued (--max-num-queued-reqs) or max_num_seqs"
            )
        if self.headless and (self.engine != "vllm" or self.node_rank == 0):
            raise ConfigError("headless is for hosts of the engine vllm whose node_rank is above 0; leave it out")
        if "" in self.api_keys:
            raise ConfigError("an API key is empty; give a key or leave the flag out")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ConfigError("TLS needs both ssl_keyfile and ssl_certfile; only one was given")

    @property
    def tgi(self) -> bool:
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
        return self.most_under_way + RESERVED if self.max_connections is None else self.max_connections
