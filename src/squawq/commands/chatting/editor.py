"""The prompt of `squawq chat`: several lines, a history kept between sessions, completion of commands and files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.output import create_output

from squawq.commands.chatting.conversation import SETTINGS
from squawq.commands.chatting.slash import FILE_COMMANDS, NAMES
from squawq.progress import console

Read = Callable[[str], str]  # the user's next message; given: text to begin with


def editor(keep_history: bool = True) -> Read:
    """A prompt on the terminal. It takes pasted lines as one text; Alt-Enter begins a new line."""
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")  # terminals need not say where the cursor is
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        "> ",
        key_bindings=keys,
        output=create_output(sys.stderr),
        history=history(history_path()) if keep_history else InMemoryHistory(),
        completer=CommandCompleter(),
        complete_while_typing=False,
    )
    return lambda draft: session.prompt(default=draft)


def history_path() -> Path:
    """The file of messages typed so far, in the user's state folder (XDG_STATE_HOME)."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "squawq" / "chat_history"


def history(path: Path) -> History:
    """The history in a file that its owner alone can read; of this conversation alone where it cannot be written."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        path.chmod(0o600)
    except OSError as error:
        console.print(f"no history is kept: {path}: {error.strerror}", style="yellow")
        return InMemoryHistory()
    return _KeptHistory(str(path))


class _KeptHistory(FileHistory):
    """A history file; a disk that is full ends no conversation."""

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
        except (OSError, UnicodeError) as error:
            console.print(f"not in the history: {error}", style="yellow")


class CommandCompleter(Completer):
    """Completes commands, the names of settings, and file names after /save and /load."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        command, space, rest = document.text_before_cursor.partition(" ")
        if not space:
            yield from (Completion(name, -len(command)) for name in NAMES if command and name.startswith(command))
        elif command in FILE_COMMANDS:
            yield from self._paths.get_completions(Document(rest), complete_event)
        elif command == "/set" and " " not in rest:
            yield from (Completion(name, -len(rest)) for name in SETTINGS if name.startswith(rest))
