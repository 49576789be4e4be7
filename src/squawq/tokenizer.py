"""Text to token ids and back, and the model's chat template. Knows no tensors and no model.

The template comes with a downloaded model, so it runs in jinja2's sandbox; nothing but rendering is possible.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from squawq.errors import CheckpointError, ConfigError
from squawq.format.reader import read_json

ROLES = ("system", "user", "assistant", "tool", "ipython")
Message = Mapping[str, str]


def check_messages(messages: object) -> list[dict[str, str]]:
    """Chat messages as a list of {"role", "content"}. Raises ConfigError saying what is wrong."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ConfigError("messages must be a list of at least one {role, content}")
    checked = []
    for message in messages:
        role = message.get("role") if isinstance(message, Mapping) else None
        content = message.get("content") if isinstance(message, Mapping) else None
        if role not in ROLES or not isinstance(content, str):
            raise ConfigError(
                f"a message must have role (one of {', '.join(ROLES)}) and content (text); got {message!r:.80}"
            )
        checked.append({"role": str(role), "content": content})
    return checked


class Tokenizer:
    """A folder's tokenizer.json and chat template. Raises CheckpointError when the folder has none."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{self.folder}: has no tokenizer.json; save a fast tokenizer there (AutoTokenizer.save_pretrained)"
            )
        try:
            self.fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path}: cannot be read as a tokenizer: {error}") from error
        self.fast.no_truncation()
        self.fast.no_padding()
        settings = self.folder / "tokenizer_config.json"
        self.settings = read_json(settings) if settings.is_file() else {}

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; `special` adds what the tokenizer puts around a text, as a begin token."""
        ids: list[int] = self.fast.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""
        text: str = self.fast.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token(self, name: str) -> str | None:
        """A special token by its name in tokenizer_config.json, such as "bos_token"."""
        value = self.settings.get(name)
        value = value.get("content") if isinstance(value, Mapping) else value
        return value if isinstance(value, str) else None

    @cached_property
    def chat_template(self) -> str | None:
        """chat_template.jinja, else tokenizer_config.json's; None for a model without one."""
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = self.settings.get("chat_template")
        if isinstance(template, list):
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def render(self, messages: Iterable[Message], generation_prompt: bool = True, now: datetime | None = None) -> str:
        """The chat as text, as the model was trained to read it; `now` is the date that some templates print.

        Raises ConfigError for a chat that the template refuses.
        """
        if self.chat_template is None:
            raise ConfigError(f"{self.folder}: the model has no chat template; use plain text (squawq generate)")
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        tokens = {name: token for name in names if (token := self.token(name)) is not None}
        checked = check_messages(list(messages))
        try:
            template = _environment(now).from_string(self.chat_template)
            return template.render(messages=checked, add_generation_prompt=generation_prompt, tools=None, **tokens)
        except Exception as error:  # a template is a program: it can fail in any way
            raise ConfigError(f"{self.folder}: the chat template refuses these messages: {error}") from error

    def encode_chat(
        self, messages: Iterable[Message], generation_prompt: bool = True, now: datetime | None = None
    ) -> list[int]:
        """Token ids of a rendered chat; the template itself writes the special tokens."""
        return self.encode(self.render(messages, generation_prompt, now), special=False)


class _Generation(jinja2.ext.Extension):
    """The tag {% generation %}, which marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(now: datetime | None) -> ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: (now or datetime.now()).strftime(form)
    environment.filters["tojson"] = tojson
    return environment
