"""The served model: its engine, tokenizer and chat template, and the limits that it sets to requests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from squawq.backends import backend_for
from squawq.engine.loaded_model import LoadedModel
from squawq.engine.protocol import InferenceEngine
from squawq.engine.request import Grammar, SamplingParams
from squawq.errors import ConfigError
from squawq.serve.errors import ApiError
from squawq.serve.settings import ServerSettings
from squawq.serve.tools.grammar import PLAIN_FORMAT, added_tokens, template_supports_tools, tool_format
from squawq.text.template_process import TemplateProcess
from squawq.text.tokenizer import Tokenizer

MAX_LISTED = 2**17  # tokens in a reply's list, up to a hundred bytes each
MARGIN = 4  # NFC composes four characters into one at most
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")  # set by models
_BYTES = 256


class Served:
    """A loaded model. Raises SquawqError if it cannot be run, or the settings do not fit it."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.model = model = LoadedModel(
            settings.model,
            replace(settings, dtype="auto") if self._float32 else settings,  # the log says so
            revision=settings.revision,
            tokenizer=settings.tokenizer,
            chat_template=settings.chat_template,
            generation_config=settings.generation_config,
        )
        self.folder, self.config = model.folder, model.config
        self.tokenizer = model.tokenizer
        self.engine: InferenceEngine = model.engine
        self.template, self.eos_ids = model.chat_template, model.eos_ids
        path = Path(settings.model)  # of a Hub id, all is the name
        self.names = settings.served_names or (path.resolve().name if path.is_dir() else settings.model,)
        self.started = int(time.time())
        self._templates: list[TemplateProcess] = []
        self._thread = threading.local()
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        """Check the settings against the model and start the template processes."""
        settings = self.settings
        self._check_weights()
        self.max_len = self._length(self.engine.max_positions, self.engine.cache_tokens)
        self.max_input = min(settings.max_input_tokens or self.max_len, self.max_len - 1)
        self.prompt_limits = PromptLimits(self.tokenizer, self.max_len, self.max_input)
        self.defaults = SamplingParams(temperature=1.0) if settings.tgi else self.model.sampling_defaults()
        if self.defaults.temperature == 0:  # OpenAI's default, where the model asks for nothing
            self.defaults = replace(self.defaults, temperature=1.0)
        tool_template = self.model.tool_template or self.template
        self.template_supports_tools = template_supports_tools(tool_template)
        self.tool_format = self._tool_format(tool_template)
        self.added_tokens = added_tokens(self.tokenizer)
        processes = (self.model.template_process(settings.template_timeout) for _ in range(2))
        self._templates = [process for process in processes if process]  # the second is `use_second_template_process`'s
        if self._templates:
            self._templates[0].start()

    @property
    def name(self) -> str:
        return self.names[0]

    def sampling_defaults(self) -> dict[str, float]:
        """Sampling parameters of an OpenAI request that sets none."""
        return {name: getattr(self.defaults, name) for name in SAMPLING_DEFAULTS}

    def device_info(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"device": self.settings.device}
        if self.settings.engine == "squawq":
            facts |= backend_for(self.settings.device).describe()
        else:
            facts["engine"] = self.settings.engine
        cache = round(self.model.cache_bytes / 2**20, 1)
        return {**facts, "cache_tokens": self.engine.cache_tokens, "cache_mib": cache}

    def close(self) -> None:
        """Abort running requests, end threads and processes. Idempotent."""
        self.model.close()
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
        """Render a chat with the model's template; `options` are TemplateProcess.render's.

        Raises ApiError if the template refuses the chat, or the model has none.
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

    def limit_by_logprobs(self, prompt: int, each: int, tokens: int, *, asked: bool) -> int:
        """Limit new tokens so that the reply's log probabilities stay within `max_logprob_entries`.

        Args:
            prompt: Log probabilities of the prompts in the reply.
            each: Log probabilities for one more token of all sequences.
            tokens: New tokens without this limit.
            asked: The request asked for `tokens`, so that fewer are an error.

        Raises:
            ApiError: The reply would be too large.
        """
        most = self.settings.max_logprob_entries
        if each and not asked:
            tokens = min(tokens, max(1, (most - prompt) // each))
        size = prompt + each * tokens
        if size > most:
            raise ApiError(
                "invalid",
                f"The reply would list {size} log probabilities (prompts x tokens x (logprobs + 1) x n); at most "
                f"{most} are listed (--max-logprob-entries). Ask for fewer prompts, tokens, logprobs or choices.",
                "logprobs",
            )
        return tokens

    def _tool_format(self, template: str | None) -> str | None:
        """The format of the model's tool calls; None if they are off, or the format is unknown."""
        asked = self.settings.tool_call_parser
        if asked == "auto":
            return tool_format(template) if self.template_supports_tools else PLAIN_FORMAT
        return None if asked == "none" else asked

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

    @property
    def _float32(self) -> bool:
        """Whether activations are float32 whatever `dtype` is."""
        return self.settings.device == "cpu" and self.settings.engine == "squawq"

    def _check_weights(self) -> None:
        """Raise ConfigError if --quantization, or on a CPU --dtype, do not fit the weights, which are run as stored."""
        if self.settings.quantization is not None and self.config.quant is None:
            raise ConfigError(
                f"quantization is {self.settings.quantization!r}, but {self.folder} is a 16-bit model; leave it out"
            )
        if self.settings.quantization not in (None, self.config.quant_method):
            raise ConfigError(
                f"quantization is {self.settings.quantization!r}, but {self.folder} says {self.config.quant_method!r}; "
                "leave it out"
            )
        stored = self.config.raw.get("dtype") or self.config.raw.get("torch_dtype") or "float16"
        quantized = self.config.quant is not None  # there vLLM and TGI mean the activations: float32 on a CPU
        if self._float32 and self.settings.dtype not in ("auto", stored) and not quantized:
            raise ConfigError(f"dtype is {self.settings.dtype!r}; the weights are run as stored: auto or {stored}")


class PromptLimits:
    """Refuses prompts that cannot fit by their size, before they are rendered or tokenized.

    A text with more bytes than `max_input` tokens can stand for never fits. This is exact for byte-level tokenizers.
    One that normalizes, strips or drops characters may read more, so its bound is MARGIN times larger. The bound of a
    chat has the same margin, since its template may leave out some of it.
    """

    def __init__(self, tokenizer: Tokenizer, max_len: int, max_input: int) -> None:
        self._max_len, self._max_input = max_len, max_input
        self.max_bytes = max_input * longest_token(tokenizer)
        self._max_contents = max_input * MARGIN * _longest_piece(tokenizer)

    def check_text(self, text: str, param: str) -> None:
        """Raise ApiError for a text that cannot fit."""
        self._check_bytes([text], self.max_bytes, param)

    def check_messages(self, messages: object, *, truncated: bool = False) -> None:
        """Raise ApiError for unvalidated messages that cannot fit, by their number and their texts.

        truncated: The prompt will be truncated, so only the number counts.
        """
        if not isinstance(messages, list):
            return
        if len(messages) > self._max_input:
            raise ApiError(
                "invalid", f"{self._context()}; this one has {len(messages)} messages. Shorten it.", "messages"
            )
        if not truncated:
            self._check_bytes([*_texts(messages)], self._max_contents, "messages")

    def _check_bytes(self, texts: Sequence[str], most: int, param: str) -> None:
        if sum(map(len, texts)) * 4 <= most:
            return
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        if size > most:
            raise ApiError(
                "invalid",
                f"{self._context()}; this one has {size} bytes of text, and {self._max_input} tokens stand for "
                f"{most} at most. Shorten it.",
                param,
            )

    def _context(self) -> str:
        return (
            f"This model's maximum context length is {self._max_len} tokens, of which a prompt may have "
            f"{self._max_input}"
        )


def _texts(messages: Sequence[Any]) -> Iterator[str]:
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                yield text


def longest_token(tokenizer: Tokenizer) -> int:
    """The most bytes of a text that one token can stand for."""
    fast = tokenizer.fast
    steps = list(_steps(fast.pre_tokenizer))
    added = fast.get_added_tokens_decoder().values()
    exact = (
        any(step["type"] == "ByteLevel" for step in steps)
        and sum(len(piece) == 1 for piece in fast.get_vocab(with_added_tokens=False)) >= _BYTES  # no byte is dropped
        and fast.normalizer is None
        and not any(step.get("behavior") == "Removed" for step in steps)
        and not any(token.lstrip or token.rstrip for token in added)  # which take in any number of spaces
    )
    return _longest_piece(tokenizer) * (1 if exact else MARGIN)


def _longest_piece(tokenizer: Tokenizer) -> int:
    """Bytes of the vocabulary's longest token."""
    fast = tokenizer.fast
    byte_level = any(step["type"] == "ByteLevel" for step in _steps(fast.pre_tokenizer))
    lengths = [len(piece) if byte_level else len(piece.encode()) for piece in fast.get_vocab(with_added_tokens=False)]
    added = (len(token.content.encode()) for token in fast.get_added_tokens_decoder().values())
    return max([*lengths, *added], default=1)


def _steps(pre_tokenizer: Any) -> Iterator[dict[str, Any]]:
    if pre_tokenizer is not None:
        state = json.loads(pre_tokenizer.__getstate__())
        yield from state.get("pretokenizers", [state])
