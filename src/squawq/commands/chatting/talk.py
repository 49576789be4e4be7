"""The loop of `squawq chat`: a message or a command is read, and answered or carried out."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from squawq.commands.chatting.answer import print_answer, view
from squawq.commands.chatting.conversation import Conversation
from squawq.commands.chatting.reasoning import OPEN
from squawq.commands.chatting.slash import EXIT, is_command, run_command
from squawq.errors import CheckpointError, ConfigError, OutputError
from squawq.progress import console

if TYPE_CHECKING:
    from squawq.commands.chatting.editor import Read

KEYS = "Enter sends, Alt-Enter begins a new line, arrows edit and go back in the history, Tab completes commands."
LEAVING = f"/help lists commands; {EXIT} or Ctrl-D ends."


def greet(llm: Any) -> None:
    """Say which model it is, and the keys."""
    model = repr(llm).strip("<>").removeprefix("squawq.LLM ")
    _say(f"squawq chat with {model}\n{KEYS}\nCtrl-C stops an answer. {LEAVING}")


def talk(llm: Any, conversation: Conversation, read: Read, plain: bool, interactive: bool = True) -> None:
    """Answer each message and carry out each command, up to /exit or the end of input."""
    while (text := _next_message(read, conversation, interactive)) != EXIT:
        try:
            if is_command(text):
                _say(run_command(text, conversation))
            elif text:
                _answer(llm, conversation, text[1:] if text.startswith("/") else text, plain, interactive)
        except (ConfigError, CheckpointError, OutputError) as error:
            _say(str(error), "red")


def _answer(llm: Any, conversation: Conversation, question: str, plain: bool, interactive: bool) -> None:
    """Print the answer; a stopped one stays in the conversation as far as it came."""
    messages = conversation.asking(question)
    prompt = llm.tokenizer.render(messages)
    ids = llm.tokenizer.encode(prompt, special=False)
    try:
        outputs = llm.stream_outputs(ids, conversation.params)
    except ConfigError as error:
        raise ConfigError(f"{error}; /reset starts over, /undo goes back") from error
    answer = print_answer(outputs, view(plain), reasoning=prompt.rstrip().endswith(OPEN))
    if interactive:
        _say(answer.summary(len(ids), llm.context), "dim")
    elif answer.stopped:
        _say("(stopped)")
    conversation.messages = [*messages, {"role": "assistant", "content": answer.text}]


def _next_message(read: Read, conversation: Conversation, interactive: bool) -> str:
    """The user's next message or command; /exit at the end of input. In a pipe Ctrl-C ends it, too."""
    draft, conversation.draft = conversation.draft, ""
    try:
        return read(draft).strip()
    except EOFError:
        if sys.stdin.isatty():  # the prompt's line ends
            console.print()
        return EXIT
    except KeyboardInterrupt:
        if not interactive:
            raise
        _say(f"Ctrl-C stops an answer, and there is none now. {LEAVING}")
        return ""


def _say(text: str, style: str = "") -> None:
    """A line on stderr; a terminal wraps it between words."""
    console.print(text, style=style, soft_wrap=not console.is_terminal)
