"""The parts of `squawq chat`: conversation and its file, commands, completion, reasoning, markdown."""

from __future__ import annotations

import json
import stat
from io import StringIO
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from rich.console import Console

from squawq.commands.chatting import markdown
from squawq.commands.chatting.answer import Answer, TerminalView
from squawq.commands.chatting.conversation import SETTINGS, Conversation
from squawq.commands.chatting.editor import CommandCompleter, history
from squawq.commands.chatting.markdown import Block, MarkdownStream, finished_blocks
from squawq.commands.chatting.reasoning import ReasoningSplitter
from squawq.commands.chatting.slash import COMMANDS, run_command
from squawq.engine.request import SamplingParams
from squawq.errors import SquawqError

TEXT = """# Title

Some **bold** text,
in two lines.

- one
- two

  of two paragraphs

```python
a = 1

# no heading
```
| a | b |
|---|---|
| 1 | 2 |

The end."""


@pytest.fixture
def conversation() -> Conversation:
    """A system message and two answers."""
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]
    return Conversation(SamplingParams(max_tokens=50, temperature=0.5), messages)


def test_a_conversation_is_saved_and_loaded(conversation: Conversation, tmp_path: Path) -> None:
    path = tmp_path / "talk about cats.json"
    run_command("/set seed 3", conversation)
    assert run_command(f"/save {path}", conversation) == f"saved: {path}"
    body = json.loads(path.read_text())
    assert body["messages"] == conversation.messages
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0.5, 50, 3)
    assert set(body) <= {"messages", *SETTINGS}
    other = Conversation(SamplingParams())
    assert "5 messages" in run_command(f"/load {path}", other)
    assert (other.messages, other.params) == (conversation.messages, conversation.params)
    run_command("/set frequency_penalty 1", other)
    path.write_text(json.dumps({key: value for key, value in body.items() if key != "seed"}))
    run_command(f"/load {path}", other)  # what the file does not have is as at the start
    assert (other.params.seed, other.params.frequency_penalty) == (None, 0)
    path.write_text(json.dumps(body))
    run_command(f"/load {path}", other)
    conversation.reset()
    run_command(f"/save {path}", conversation)  # over a file of this session
    assert json.loads(path.read_text())["messages"] == [{"role": "system", "content": "system 0"}]
    other.save(path)  # which it was loaded from
    assert json.loads(path.read_text()) == body
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "bad.json"),
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object"),
        ('{"text": 1}', "messages must be a list"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "a message must have role"),
        ('{"messages": [], "temprature": 1}', "the key 'temprature' is unknown; there may be max_tokens"),
        ('{"messages": [], "temperature": "hot"}', "bad.json: temperature is 'hot'"),
    ],
)
def test_a_bad_file_changes_nothing(
    content: str | None, message: str, conversation: Conversation, tmp_path: Path
) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    before = (list(conversation.messages), conversation.params)
    with pytest.raises(SquawqError, match=message):
        run_command(f"/load {path}", conversation)
    assert (conversation.messages, conversation.params) == before


@pytest.mark.parametrize("command", ["/save ~nobody-here/x.json", "/load ~nobody-here/x.json"])
def test_a_home_of_nobody_is_an_error(command: str, conversation: Conversation) -> None:
    with pytest.raises(SquawqError, match="~nobody-here"):
        run_command(command, conversation)


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', '{"messages": []}'])
def test_no_other_file_is_overwritten(content: str, conversation: Conversation, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(SquawqError, match="neither saved nor loaded in this session; nothing was written; choose anot"):
        run_command(f"/save {path}", conversation)
    assert path.read_text() == content


def test_commands_change_the_conversation(conversation: Conversation) -> None:
    assert run_command("/undo", conversation) == "taken back: user 3"
    assert (conversation.draft, len(conversation.messages)) == ("user 3", 3)
    run_command("/undo", conversation)
    with pytest.raises(SquawqError, match="no question to take back"):
        run_command("/undo", conversation)
    assert run_command("/system", conversation) == "system message: system 0"
    run_command("/system Be brief.\nBe kind.", conversation)
    assert conversation.messages == [{"role": "system", "content": "Be brief.\nBe kind."}]
    assert run_command('/system ""', conversation) == "no system message"
    assert conversation.messages == []
    assert "temperature 0.7" in run_command("/set temperature 0.7", conversation)
    assert "max_tokens none" in run_command("/set max_tokens none", conversation)
    assert conversation.params.max_tokens is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/sett x", "/sett is no command; choose one of /help"),
        ("/set", None),
        ("/set heat 1", "'heat' is no setting; choose one of max_tokens"),
        ("/set top_p", "needs a value, such as"),
        ("/set top_p 7", "top_p is 7; it must be above 0, at most 1"),
        ("/set top_p much", "top_p is 'much'"),
        ("/save", "needs the name of a file"),
    ],
)
def test_bad_commands_say_what_is_possible(text: str, message: str | None, conversation: Conversation) -> None:
    if message is None:
        assert "temperature 0.5" in run_command(text, conversation)
        return
    with pytest.raises(SquawqError, match=message):
        run_command(text, conversation)


def test_help_names_every_command(conversation: Conversation) -> None:
    lines = run_command("/help", conversation).splitlines()
    assert [line.split("  ")[0] for line in lines] == list(COMMANDS)


def test_tab_completes(tmp_path: Path) -> None:
    def completed(text: str) -> list[str]:
        return [found.text for found in CommandCompleter().get_completions(Document(text), CompleteEvent())]

    (tmp_path / "notes.json").touch()
    assert completed("/s") == ["/system", "/set", "/save"]
    assert completed("/set te") == ["temperature"]
    assert completed(f"/load {tmp_path}/no") == ["tes.json"]
    assert completed("") == completed("Hello /s") == completed("/set top_p 0") == []


def test_history_is_for_its_owner_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "state" / "squawq" / "chat_history"
    found = history(path)
    assert isinstance(found, FileHistory)
    found.append_string("hello")
    assert [stat.S_IMODE(place.stat().st_mode) for place in (path, path.parent)] == [0o600, 0o700]
    assert list(history(path).load_history_strings()) == ["hello"]
    blocked = tmp_path / "file"
    blocked.touch()
    assert isinstance(history(blocked / "chat_history"), InMemoryHistory)
    assert "no history is kept" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("text", "begun", "reasoning", "answer"),
    [
        ("<think>\nI think < so.</think>\n\nYes </think>.", False, "\nI think < so.", "Yes </think>."),
        ("I think.</think>Yes.", True, "I think.", "Yes."),
        (" No <think> here.", False, "", " No <think> here."),
        ("<thin", False, "", "<thin"),
        ("  ", False, "", "  "),
        ("<think>stopped </thi", False, "stopped </thi", ""),
    ],
)
def test_reasoning_is_told_from_the_answer(text: str, begun: bool, reasoning: str, answer: str, size: int) -> None:
    splitter = ReasoningSplitter(begun)
    parts = [part for at in range(0, len(text), size) for part in splitter.push(text[at : at + size])]
    parts += splitter.finish()
    assert "".join(text for thinking, text in parts if thinking) == reasoning
    assert "".join(text for thinking, text in parts if not thinking) == answer


def terminal(width: int = 60, height: int = 20) -> tuple[Console, StringIO]:
    output = StringIO()
    size = {"width": width, "height": height}
    return Console(file=output, force_terminal=True, color_system=None, legacy_windows=False, **size), output  # type: ignore[arg-type]


def printed(text: str) -> str:
    """What a terminal shows of markdown, without styles."""
    output = StringIO()
    Console(file=output, width=60).print(Block(text))
    return output.getvalue()


def test_finished_blocks_are_whole() -> None:
    rest, found = "", []
    for character in TEXT + "\n":
        blocks, rest = finished_blocks(rest + character)
        found += blocks
    assert [block.split("\n")[0] for block in [*found, rest]] == [
        *("# Title", "Some **bold** text,", "- one", "```python", "| a | b |", "The end."),
    ]


def test_streamed_markdown_is_printed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is finished stays; only the last one is drawn again."""
    monkeypatch.setattr(markdown, "REDRAWN_S", 1e9)  # nothing is drawn before it is finished
    console, output = terminal()
    stream = MarkdownStream(console)
    for character in TEXT:
        stream.write(character)
    stream.close()
    lines = [line for line in output.getvalue().splitlines() if "\x1b[?25" not in line]
    assert sum("Some bold text, in two lines." in line for line in lines) == 1
    assert "\na = 1\n\n# no heading\n\n" in output.getvalue()  # the code as it is, without a margin
    assert output.getvalue().count("The end.") == 1


def test_a_block_higher_than_the_terminal_is_drawn_by_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "REDRAWN_S", 0)
    console, output = terminal(height=8)
    stream = MarkdownStream(console)
    stream.write("".join(f"line {i}  \n" for i in range(30)))
    drawn = output.getvalue()
    assert "line 29" in drawn
    assert "line 20\n" not in drawn
    stream.close()
    assert "line 20" in output.getvalue()


def test_what_would_steer_the_terminal_is_shown() -> None:
    shown = printed("a \x1b[31mred **b\u202eold** &#x202e; <b>x</b> [site](https://evil.example) \x9b1m")
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    for words in ("\\x1b[31mred", "\\u202eold", "&#x202e;", "<b>x</b>", "https://evil.example", "\\x9b1m"):
        assert words in " ".join(shown.split()), words


def test_reasoning_is_dimmed_and_no_markdown() -> None:
    output = StringIO()
    console = Console(file=output, force_terminal=True, color_system="standard", width=60)
    view = TerminalView(console, markdown=False)
    for part in ((True, "\nhm **x**"), (True, "\n\n"), (False, "yes **y**")):
        view.write(part[1], [part])
    view.close()
    assert output.getvalue() == "\x1b[2mhm **x**\x1b[0m\n\nyes **y**\n"


def test_the_line_after_an_answer() -> None:
    assert Answer(tokens=101, seconds=2.0).summary(1000, 4096) == "101 tokens, 50.0 tokens/s, context 1,101 of 4,096"
    assert (
        Answer(tokens=1, cut=True).summary(9, 10) == "1 token, context 10 of 10, cut off by max_tokens or the context"
    )
