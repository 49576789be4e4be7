"""The conversation of `squawq chat`: messages and sampling settings, and the file that keeps both.

The file is the body of a chat request in OpenAI's API: `messages`, and settings such as `temperature` beside them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from squawq.engine.request import SamplingParams
from squawq.errors import ConfigError
from squawq.format.files import read_json, write_json
from squawq.text.tokenizer import check_messages

SETTINGS = (  # fields of SamplingParams that go by the same name in OpenAI's API and vLLM's
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("repetition_penalty", "frequency_penalty", "presence_penalty"),
)
Messages = list[dict[str, str]]


@dataclass
class Conversation:
    """Messages so far, and how the next answer is sampled.

    Attributes:
        messages: {"role", "content"}; a system message, if there is one, comes first.
        draft: A text for the editor: the question that `undo` took back.
        files: Files that this conversation was saved to or loaded from; it may overwrite these alone.
    """

    params: SamplingParams
    messages: Messages = field(default_factory=list)
    draft: str = ""
    initial: SamplingParams = field(init=False)  # for settings that a file does not have

    def __post_init__(self) -> None:
        self.initial = self.params

    files: set[Path] = field(default_factory=set)

    @property
    def system(self) -> str | None:
        """The system message."""
        first = self.messages[0] if self.messages else {"role": ""}
        return first["content"] if first["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        others = self.messages if self.system is None else self.messages[1:]
        self.messages = [*([{"role": "system", "content": text}] if text else []), *others]

    def asking(self, question: str) -> Messages:
        """The messages with one more of the user's."""
        return [*self.messages, {"role": "user", "content": question}]

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = self.messages[:1] if self.system is not None else []

    def undo(self) -> str:
        """Take back the last question and what follows it; returns it. Raises ConfigError where there is none."""
        last = max((i for i, message in enumerate(self.messages) if message["role"] == "user"), default=None)
        if last is None:
            raise ConfigError("there is no question to take back")
        question = self.messages[last]["content"]
        self.messages = self.messages[:last]
        return question

    def set(self, name: str, text: str) -> None:
        """Change a sampling setting. Raises ConfigError for another name or a value out of range."""
        if name not in SETTINGS:
            raise ConfigError(f"{name!r} is no setting; choose one of {', '.join(SETTINGS)}")
        value: Any = text
        with suppress(ValueError):
            value = None if text == "none" else json.loads(text)
        self.params = replace(self.params, **{name: value})

    def settings(self) -> dict[str, Any]:
        """The sampling settings by name."""
        return {name: getattr(self.params, name) for name in SETTINGS}

    def save(self, path: Path) -> None:
        """Write the file. Raises OutputError, and ConfigError for one that exists and is not of this session."""
        if path.resolve() not in self.files and os.path.lexists(path):
            raise ConfigError(
                f"{path} exists and was neither saved nor loaded in this session; nothing was written; choose another "
                "name"
            )
        write_json(path, {"messages": self.messages, **{k: v for k, v in self.settings().items() if v is not None}})
        self.files.add(path.resolve())

    def load(self, path: Path) -> None:
        """Take messages and settings from a file. Raises SquawqError, and changes nothing, if it is not one."""
        values = read_json(path)
        messages = read_messages(values, path)
        found = {key: value for key, value in values.items() if key not in ("messages", "model")}
        if unknown := sorted(set(found) - set(SETTINGS)):
            raise ConfigError(f"{path}: the key {unknown[0]!r:.80} is unknown; there may be {', '.join(SETTINGS)}")
        try:
            params = replace(self.initial, **found)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        self.messages, self.params = messages, params
        self.files.add(path.resolve())


def read_messages(values: Mapping[str, Any], path: Path) -> Messages:
    """The `messages` of a file; may be empty. Raises ConfigError naming the file."""
    found = values.get("messages")
    try:
        return [] if found == [] else check_messages(found)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
