"""The served model: its engine, tokenizer and chat template, and the limits that it sets to requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from squawq.engine.engine import Engine
from squawq.engine.generation_config import GenerationConfig
from squawq.engine.request import Grammar, SamplingParams
from squawq.engine.runner import load_runner
from squawq.errors import ConfigError
from squawq.format.files import has_file, read_text
from squawq.hub.download import resolve, resolve_small
from squawq.kernels import library
from squawq.kernels.devices import check_device
from squawq.serve.errors import ApiError
from squawq.serve.limits import PromptLimits
from squawq.serve.settings import Settings
from squawq.serve.tools.grammar import PLAIN_FORMAT, added_tokens, template_supports_tools, tool_format
from squawq.templates import TemplateProcess
from squawq.tokenizer import Tokenizer

MAX_LISTED = 2**17  # tokens in a reply's list, up to a hundred bytes each


class Served:
    """A loaded model.

    Raises:
        SquawqError: The model cannot be run, or the settings do not fit it.
    """

    def __init__(self, settings: Settings) -> None:
        check_device(settings.device)
        self.settings = settings
        self.folder = resolve(settings.model, revision=settings.revision)
        self.names = settings.served_names or (_name(settings.model),)
        self.started = int(time.time())
        self.tokenizer = Tokenizer(self.folder if settings.tokenizer is None else resolve_small(settings.tokenizer))
        self.template, tool_template = self._read_templates()
        runner = load_runner(
            self.folder,
            device=settings.device,
            threads=settings.threads,
            exact=settings.exact,
            head=settings.head,
            kv_tokens=settings.kv_tokens,
            gpu_share=settings.gpu_memory_utilization,
        )
        self.config = runner.config
        self.cached = runner.num_pages * runner.page_size
        self.token_bytes = runner.token_bytes
        self._check_weights()
        self.max_len = self._length(runner.max_positions, self.cached)
        self.max_input = min(settings.max_input_tokens or self.max_len, self.max_len - 1)
        self.prompt_limits = PromptLimits(self.tokenizer, self.max_len, self.max_input)
        generation = self._generation_config()
        self.eos_ids = generation.eos_ids
        self.defaults = SamplingParams() if settings.generation_config == "vllm" else generation.sampling_defaults()
        if self.defaults.temperature == 0:  # OpenAI's default, where the model asks for nothing
            self.defaults = replace(self.defaults, temperature=1.0)
        self.template_supports_tools = template_supports_tools(tool_template or self.template)
        self.tool_format = self._tool_format(tool_template or self.template)
        self.added_tokens = added_tokens(self.tokenizer)
        self.engine = Engine(
            runner,
            self.tokenizer,
            eos_ids=sorted(generation.eos_ids),
            max_batch_tokens=max(settings.max_num_batched_tokens, 2 * settings.max_num_seqs),
            max_sequences=settings.max_num_seqs,
            max_waiting=None,  # the server has limits of its own
            prefix_caching=settings.prefix_caching,
            grammar_timeout=settings.grammar_timeout,
            seed=settings.seed,
        )
        self._templates: list[TemplateProcess] = []
        self._thread = threading.local()
        if self.template is not None:
            variables = self.tokenizer.template_variables()
            self._templates = [
                TemplateProcess(
                    self.template, variables, tool_template=tool_template, timeout_s=settings.template_timeout
                )
                for _ in range(2)  # the second is `use_second_template_process`'s
            ]
            self._templates[0].start()

    @property
    def name(self) -> str:
        """The model's name in replies."""
        return self.names[0]

    def device_info(self) -> dict[str, Any]:
        """The device and the cache, for the log."""
        facts: dict[str, Any] = {"device": self.settings.device}
        if self.settings.device == "cpu":
            facts |= {"threads": library.threads(), "instructions": library.isa()}
        cache = self.cached * self.token_bytes
        return {**facts, "cache_tokens": self.cached, "cache_mib": round(cache / 2**20, 1)}

    def close(self) -> None:
        """Abort running requests, end threads and processes. Idempotent."""
        self.engine.close()
        for process in self._templates:
            process.close()

    def use_second_template_process(self) -> None:
        """Render this thread's chats in the second process, which no other thread waits for."""
        self._thread.templates = self._templates[1:]

    def check_model_name(self, name: str | None) -> None:
        """Raise ApiError for another model's name, if strict_model_name is set."""
        if self.settings.strict_model_name and name is not None and name not in self.names:
            raise ApiError("not_found", f"The model `{name:.100}` does not exist.", "model")

    def reply_model_name(self, name: str | None) -> str:
        """The model's name in a reply; in TGI's dialect, the name in the request."""
        return self.name if name is None or name == "tgi" or not self.settings.tgi else name

    def check_grammar(self, grammar: Grammar | None) -> None:
        """Raise ApiError for a grammar if --no-grammar-support is set. The engine checks the grammar itself."""
        if grammar is not None and not self.settings.grammar_support:
            raise ApiError("invalid", "grammars and tools are not supported: the server runs with --no-grammar-support")

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text. special: with the model's begin token. Raises ApiError if it cannot be encoded."""
        try:
            return self.tokenizer.encode(text, special)
        except ConfigError as error:
            raise ApiError("invalid", str(error)) from error

    @staticmethod
    def check_listed(tokens: int) -> None:
        """Raise ApiError for more tokens than a reply may list."""
        if tokens > MAX_LISTED:
            raise ApiError("invalid", f"the text has {tokens} tokens; at most {MAX_LISTED} are listed: send parts")

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Render a chat with the model's template.

        Args:
            messages: As `template_messages` makes them.
            **options: Of TemplateProcess.render: tools, generation_prompt, continue_final, variables.

        Raises:
            ApiError: The template refuses the chat, or the model has none.
        """
        templates: list[TemplateProcess] = getattr(self._thread, "templates", self._templates)
        if not templates:
            raise ApiError("template", "the model has no chat template; use /v1/completions, or start with one")
        try:
            text = templates[0].render(messages, **options)
            text.encode()
        except (ConfigError, UnicodeEncodeError) as error:  # JSON in a message may spell half a character
            raise ApiError("template", str(error), "messages") from error
        return text

    def max_new_tokens(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """New tokens that fit after the prompt, `max_tokens` at most. Raises ApiError if they do not fit."""
        if prompt_tokens > self.max_input:
            raise ApiError(
                "invalid",
                f"This model's maximum context length is {self.max_len} tokens, of which a prompt may have "
                f"{self.max_input}; this one has {prompt_tokens}. Shorten it.",
                "messages",
            )
        left = self.max_len - prompt_tokens
        if max_tokens is not None and max_tokens > left:
            raise ApiError(
                "invalid",
                f"This model's maximum context length is {self.max_len} tokens. However, you requested "
                f"{prompt_tokens + max_tokens} tokens ({prompt_tokens} in the prompt, {max_tokens} in the completion). "
                "Reduce the prompt or max_tokens.",
                "max_tokens",
            )
        return left if max_tokens is None else max_tokens

    def _generation_config(self) -> GenerationConfig:
        """The model's, or the given folder's. With "vllm", only its end tokens are used."""
        asked = self.settings.generation_config
        if asked in ("auto", "vllm"):
            return GenerationConfig(self.folder, self.config)
        if not has_file(Path(asked) / "generation_config.json"):
            raise ConfigError(
                f"generation_config is {asked!r}, which is no folder with a generation_config.json; "
                "give one, or auto or vllm"
            )
        return GenerationConfig(Path(asked), self.config)

    def _tool_format(self, template: str | None) -> str | None:
        """The format of the model's tool calls; None if they are off, or the format is unknown."""
        asked = self.settings.tool_call_parser
        if asked == "auto":
            return tool_format(template) if self.template_supports_tools else PLAIN_FORMAT
        return None if asked == "none" else asked

    def _read_templates(self) -> tuple[str | None, str | None]:
        """The chat template, and the model's separate one for chats with tools, if any."""
        path = self.settings.chat_template
        if path is None:
            return self.tokenizer.chat_template, self.tokenizer.tool_template
        return read_text(path.resolve()), None

    def _length(self, positions: int, cached: int) -> int:
        wanted, settings = self.settings.max_model_len, self.settings
        if wanted is None:
            return min(positions, cached)
        if wanted > positions:
            raise ConfigError(f"max_model_len is {wanted}; the model has {positions} positions")
        if wanted > cached:
            raise ConfigError(f"max_model_len is {wanted}; the cache holds {cached} tokens (raise kv_tokens)")
        if settings.max_input_tokens is not None and settings.max_input_tokens >= wanted:
            raise ConfigError(
                f"max_input_tokens is {settings.max_input_tokens}; it must be below max_model_len, which is {wanted}"
            )
        return wanted

    def _check_weights(self) -> None:
        """Raise ConfigError if --dtype or --quantization do not fit the weights, which are run as stored."""
        if self.settings.quantization is not None and self.config.quant is None:
            raise ConfigError(
                f"quantization is {self.settings.quantization!r}, but {self.folder} is a 16-bit model; leave it out"
            )
        stored = self.config.raw.get("dtype") or self.config.raw.get("torch_dtype") or "float16"
        quantized = self.config.quant is not None  # there vLLM and TGI mean the activations, which are float32 here
        if self.settings.dtype not in ("auto", stored) and not quantized:
            raise ConfigError(f"dtype is {self.settings.dtype!r}; the weights are run as stored: auto or {stored}")


def _name(model: str) -> str:
    """The name of a model: its Hub id, or its folder's name without the path."""
    return Path(model).resolve().name if Path(model).is_dir() else model
