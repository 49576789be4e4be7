"""Renders chat templates in a child process, so that a hostile one cannot hang the caller, use up memory or read files.

LLM, serve and quantize all render chats through it; the child runs squawq.text.chat_template.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from squawq.errors import ConfigError, EngineClosed, QueueFull, TemplateError
from squawq.text import chat_template
from squawq.text.child import Child, ChildError

TIMEOUT_S = 10.0
MEMORY = 2**29


class TemplateProcess:
    """A model's chat template and the child process that renders it. Thread-safe.

    The process starts at the first chat or with `start`, and again after one that ended. It ends with this object.

    Args:
        variables: Template variables of every chat, such as bos_token.
        tool_template: The template for chats with tools; None: `template`.
        timeout_s: Processor seconds per chat, and seconds to wait for other chats.
        memory_bytes: Memory per chat (Linux).
    """

    def __init__(
        self,
        template: str,
        variables: Mapping[str, Any] | None = None,
        *,
        tool_template: str | None = None,
        timeout_s: float = TIMEOUT_S,
        memory_bytes: int = MEMORY,
    ) -> None:
        if not 0 < timeout_s < math.inf:
            raise ConfigError(f"timeout_s is {timeout_s}; it must be above 0")
        self._template = template
        self._tool_template = template if tool_template is None else tool_template
        self._variables = dict(variables or {})
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._turn = threading.Lock()  # one chat at a time
        self._state = threading.Lock()  # guards what follows
        self._child: Child | None = None
        self._closed = False

    def __enter__(self) -> TemplateProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the process now. Raises ConfigError where it does not start."""
        with self._my_turn():
            self._running()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        generation_prompt: bool = True,
        continue_final: bool = False,
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> str:
        """The chat as text; `variables` win over those of every chat. Otherwise as squawq.text.chat_template.render.

        Raises:
            ConfigError: The template refuses the chat.
            TemplateError: The template takes too much time or memory, or crashes.
            QueueFull: Other chats are being rendered.
            EngineClosed: After `close`.
        """
        request = {
            "template": self._tool_template if tools else self._template,
            "messages": messages,
            "tools": tools,
            "generation_prompt": generation_prompt,
            "continue_final": continue_final,
            "variables": {**self._variables, **(variables or {})},
            "now": None if now is None else now.isoformat(),
        }
        try:
            message = json.dumps(request).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"the chat cannot be written as JSON: {error!s:.200}") from error
        with self._my_turn():
            child = self._running()
            try:
                reply = json.loads(child.call(message, self._timeout_s))
            except ChildError as error:
                if self._closed:
                    raise EngineClosed("the chat template's process was closed") from error
                raise TemplateError(f"the chat template is refused: {error}") from error
            except BaseException:  # an interrupt above all
                child.close()  # its next answer would be this chat's
                raise
        if "error" in reply:
            raise (TemplateError if reply["limit"] else ConfigError)(reply["error"])
        return str(reply["text"])

    def close(self) -> None:
        """End the process and what it renders. Idempotent; may be called from any thread."""
        with self._state:
            self._closed = True
            if self._child is not None:
                self._child.kill()
        with self._turn:
            if self._child is not None:
                self._child.close()

    @contextmanager
    def _my_turn(self) -> Iterator[None]:
        if not self._turn.acquire(timeout=self._timeout_s):
            raise QueueFull("other chats are being rendered; try again later")
        try:
            yield
        finally:
            self._turn.release()

    def _running(self) -> Child:
        with self._state:
            if self._closed:
                raise EngineClosed("the chat template's process was closed")
            if self._child is None or not self._child.alive:
                load = f"{chat_template.__name__}:{chat_template.load.__name__}"
                try:
                    self._child = Child.start(load, b"", memory=self._memory_bytes, forks=False)
                except ChildError as error:
                    raise ConfigError(f"no chat can be rendered here: {error}") from error
            return self._child
