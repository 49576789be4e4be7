"""The commands of `squawq chat`, which begin with a slash."""

from __future__ import annotations

from pathlib import Path

from squawq.commands.chatting.conversation import Conversation
from squawq.errors import ConfigError

EXIT = "/exit"
COMMANDS = {
    "/help": "show this list",
    "/system [TEXT]": 'show or set the system message; "" removes it',
    "/set [NAME VALUE]": "show or set how answers are sampled, as in /set temperature 0.7",
    "/undo": "take back the last question and its answer",
    "/reset": "start over; the system message stays",
    "/save FILE": "write messages and settings to a new JSON file, or one of this session",
    "/load FILE": "read them from a file",
    EXIT: "end (or Ctrl-D)",
}
NAMES = [usage.partition(" ")[0] for usage in COMMANDS]
FILE_COMMANDS = ("/save", "/load")


def is_command(text: str) -> bool:
    """Whether a message is a command; // begins a message with a slash."""
    return text.startswith("/") and not text.startswith("//")


def run_command(text: str, conversation: Conversation) -> str:
    """Carry out a command; returns what to print.

    Raises SquawqError for an unknown command or one that fails; the conversation is then as it was.
    """
    name, _, argument = text.partition(" ")
    argument = argument.strip()
    match name:
        case "/help":
            return help_text()
        case "/system":
            return _system(argument, conversation)
        case "/set":
            return _set(argument, conversation)
        case "/undo":
            conversation.draft = conversation.undo()
            return f"taken back: {conversation.draft}"
        case "/reset":
            conversation.reset()
            return "the conversation starts over"
        case "/save":
            path = _path(name, argument)
            conversation.save(path)
            return f"saved: {path}"
        case "/load":
            path = _path(name, argument)
            conversation.load(path)
            return f"loaded: {path}, {len(conversation.messages)} messages"
    choices = ", ".join(NAMES)
    raise ConfigError(f"{name:.80} is no command; choose one of {choices}; // begins a message with a slash")


def help_text() -> str:
    """The commands and what they do."""
    width = max(map(len, COMMANDS))
    return "\n".join(f"{usage:<{width}}  {what}" for usage, what in COMMANDS.items())


def _system(text: str, conversation: Conversation) -> str:
    if text:
        conversation.system = None if text == '""' else text
    return "no system message" if conversation.system is None else f"system message: {conversation.system}"


def _set(text: str, conversation: Conversation) -> str:
    if text:
        name, _, value = text.partition(" ")
        if not value:
            raise ConfigError(f"/set {name:.80} needs a value, such as /set temperature 0.7")
        conversation.set(name, value.strip())
    shown = {name: "none" if value is None else value for name, value in conversation.settings().items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _path(name: str, text: str) -> Path:
    if not text:
        raise ConfigError(f"{name} needs the name of a file")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~NAME of nobody
        raise ConfigError(f"{text:.200}: {error}") from error
