"""The tokenizer of a model folder: text to token ids and back, the bytes of a token, and the folder's chat templates.

Chat templates are rendered by template_process.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Protocol

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as FastTokenizer

from squawq.errors import CheckpointError, ConfigError
from squawq.format.files import has_file, read_bytes, read_json, read_text
from squawq.text.template_process import TemplateProcess
from squawq.text.tokenizer_trial import check_tokenizer, failure

CONTEXT = 8  # tokens before a text that a tokenizer may need to see to spell its beginning
_HELD = 16  # more tokens than this that end in half a character are not going to become one
ROLES = ("system", "user", "assistant", "tool", "ipython")
Message = Mapping[str, str]


def check_messages(messages: object) -> list[dict[str, str]]:
    """Validate chat messages: a list of {"role", "content"}. Raises ConfigError."""
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
    """A folder's tokenizer.json and chat template, both untrusted.

    Raises CheckpointError for a folder without tokenizer.json, or with one that is refused (tokenizer_trial.py).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not has_file(path):
            raise CheckpointError(
                f"{self.folder}: has no tokenizer.json; save a fast tokenizer there (AutoTokenizer.save_pretrained)"
            )
        content = read_bytes(path)
        check_tokenizer(content, str(path))
        try:
            self.fast = FastTokenizer.from_buffer(content)
        except BaseException as error:
            raise CheckpointError(f"{path}: cannot be used as a tokenizer: {failure(error)}") from error
        self.fast.no_truncation()
        self.fast.no_padding()
        settings = self.folder / "tokenizer_config.json"
        self.settings = read_json(settings) if has_file(settings) else {}

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text; `special` adds the special tokens that the tokenizer puts around it.

        Raises ConfigError for a text that cannot be encoded, such as one with half of a surrogate pair.
        """
        ids: list[int] = self._encoded(self.fast.encode_batch_fast, text, special).ids
        return ids

    def places(self, text: str, special: bool = True) -> list[tuple[int, tuple[int, int]]]:
        """Token ids, each with its offsets in the text: the first character and one past the last.

        Takes ten times as long as `encode`, and raises as that does.
        """
        found = self._encoded(self.fast.encode_batch, text, special)
        return list(zip(found.ids, found.offsets, strict=True))

    def _encoded(self, encode: Callable[..., list[Encoding]], text: str, special: bool) -> Encoding:
        try:
            (found,) = encode([text], add_special_tokens=special)  # releases the GIL, unlike `encode`
        except BaseException as error:
            raise ConfigError(f"{self.folder}: the tokenizer cannot encode the text: {failure(error)}") from error
        return found

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids. Raises ConfigError for ids that cannot be decoded."""
        try:
            text: str = self.fast.decode(list(ids), skip_special_tokens=skip_special)
        except BaseException as error:
            raise ConfigError(f"{self.folder}: the tokenizer cannot decode the tokens: {failure(error)}") from error
        return text

    def token(self, name: str) -> str | None:
        """A special token by its name in tokenizer_config.json, such as "bos_token"."""
        value = self.settings.get(name)
        value = value.get("content") if isinstance(value, Mapping) else value
        return value if isinstance(value, str) else None

    def template_variables(self) -> dict[str, str]:
        """The model's special tokens by name, for chat templates."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return {name: token for name in names if (token := self.token(name)) is not None}

    @property
    def chat_template(self) -> str | None:
        """The model's chat template; None for a model without one."""
        return self._templates.get("default")

    @property
    def tool_template(self) -> str | None:
        """The template for chats with tools; None if the chat template handles tools too."""
        return self._templates.get("tool_use")

    @cached_property
    def _templates(self) -> dict[str, str]:
        """Templates by name: tokenizer_config.json's, a text or a list of named ones, and before those the files."""
        given = self.settings.get("chat_template")
        rows = given if isinstance(given, list) else [{"name": "default", "template": given}]
        pairs = [(row.get("name"), row.get("template")) for row in rows if isinstance(row, Mapping)]
        found = {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
        for name, file in (
            ("default", "chat_template.jinja"),
            ("tool_use", "additional_chat_templates/tool_use.jinja"),
        ):
            path = self.folder / file
            if has_file(path, self.folder):
                found[name] = read_text(path, self.folder)
        return found

    def render(self, messages: Iterable[Message], generation_prompt: bool = True, now: datetime | None = None) -> str:
        """The chat as text, as the model was trained to read it; `now` is the date that some templates print.

        Raises ConfigError for a chat that the template refuses, TemplateError for a template that goes over its limits.
        """
        if self._renderer is None:
            raise ConfigError(f"{self.folder}: the model has no chat template; use plain text (squawq generate)")
        return self._renderer.render(check_messages(list(messages)), generation_prompt=generation_prompt, now=now)

    @cached_property
    def _renderer(self) -> TemplateProcess | None:
        """The template process, started at the first chat."""
        template = self.chat_template
        return None if template is None else TemplateProcess(template, self.template_variables())

    def encode_chat(
        self, messages: Iterable[Message], generation_prompt: bool = True, now: datetime | None = None
    ) -> list[int]:
        """Token ids of a rendered chat; the template itself writes the special tokens."""
        return self.encode(self.render(messages, generation_prompt, now), special=False)

    def close(self) -> None:
        """End the process that renders chats, if one was started; another chat starts it again. Idempotent."""
        renderer: TemplateProcess | None = self.__dict__.pop("_renderer", None)
        if renderer is not None:
            renderer.close()

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token, which may be part of a character; empty for an unknown id.

        Keeps the leading space that `decode` may strip at the start of a text.
        """
        if token in self._added:
            return self._added[token].content.encode()
        piece = self.fast.id_to_token(token) or ""
        if "ByteLevel" in self._decoders:
            try:
                return bytes(map(_BYTES.__getitem__, piece))
            except KeyError:  # not spelled in bytes: it stands for itself
                return piece.encode()
        if "ByteFallback" in self._decoders and (byte := re.fullmatch("<0x([0-9A-F]{2})>", piece)):
            return bytes.fromhex(byte[1])
        return piece.replace("\u2581", " ").encode()

    def token_text(self, token: int) -> str:
        """The decoded text of a single token; the replacement character for part of a character."""
        return self.decode([token], skip_special=False)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens, which `decode` can skip."""
        return frozenset(token for token, added in self._added.items() if added.special)

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        return dict(self.fast.get_added_tokens_decoder())

    @cached_property
    def _decoders(self) -> frozenset[str]:
        """Types of the decoder's steps."""
        if self.fast.decoder is None:
            return frozenset()
        state = json.loads(self.fast.decoder.__getstate__())
        return frozenset(step["type"] for step in state.get("decoders", [state]))


class TokenDecoder(Protocol):
    """A tokenizer's decode method."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""


class TextStream:
    """Turns token ids into text as they come, never half a character.

    `before` are the last ids of what the text follows: some tokenizers drop a space at a text's start. Text is held
    back while it ends in the replacement character, which byte-level tokens give for an unfinished one.
    """

    def __init__(self, tokenizer: TokenDecoder, before: Sequence[int] = (), skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._given = list(before[-CONTEXT:])  # ids whose text has been output, the last piece of them
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes; often empty."""
        self._held.append(token)
        text = self._text(self._held)
        if not text.endswith("\ufffd"):
            return self._emit(len(self._held), text)
        if len(self._held) > _HELD:
            return self._settle(text)
        return ""

    def finish(self) -> str:
        """What was held back."""
        return self._emit(len(self._held), self._text(self._held)) if self._held else ""

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special)

    def _text(self, ids: Sequence[int]) -> str:
        return self._decode([*self._given, *ids])[len(self._decode(self._given)) :]

    def _emit(self, count: int, text: str) -> str:
        piece = (
            self._held[:count] if text else [*self._given, *self._held[:count]][-CONTEXT:]
        )  # special tokens give none
        self._given, self._held = piece, self._held[count:]
        return text

    def _settle(self, text: str) -> str:
        """Output bytes that are no text, but keep the last few: they may begin a character.

        A cut that parts a character shows, since its halves give other text than the whole.
        """
        for cut in range(len(self._held) - 4, len(self._held)):
            head = self._text(self._held[:cut])
            if head + self._decode(self._held[cut:]) == text:
                return self._emit(cut, head)
        return self._emit(len(self._held), text)


def _byte_characters() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 characters stand for themselves, 256 and on for the others."""
    printable = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_characters()
