"""Chat templates of hostile folders: whoever renders them gets one line of error, in bounded time and memory."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_child import wait_until_ended

from squawq.cli import main
from squawq.demo import demo_model
from squawq.engine.request import SamplingParams
from squawq.errors import CheckpointError, ConfigError, TemplateError
from squawq.llm import LLM
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize
from squawq.serve.errors import ApiError
from squawq.serve.model import Served
from squawq.serve.settings import ServerSettings
from squawq.text.child import Child
from squawq.text.template_process import TemplateProcess
from squawq.text.tokenizer import Tokenizer

SAY = [{"role": "user", "content": "a"}]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {ENDLESS: r"it took more than 0\.5 s", "{{ 'a' * 10**9 * 20 }}": "out of memory"}
TITLE = "{{ raise_exception('\\x1b]0;pwned\\x07\\u202e') }}"
SHOWN = r"refuses these messages: \x1b]0;pwned\x07\u202e"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_model(), tmp_path / "model", ignore=shutil.ignore_patterns("*.txt", "*.md")))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = TemplateProcess.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "timeout_s", 0.5)


def by_quantize(folder: Path) -> None:
    quantize(folder, folder.parent / "out", QuantConfig(samples=2, seqlen=64))


def by_llm(folder: Path) -> None:
    with LLM(folder, kv_tokens=256) as llm:
        assert llm.generate("a")
        assert llm.tokenizer.__dict__.get("_renderer") is None  # no process for who does not chat
        llm.chat(SAY)


def child_of(tokenizer: Tokenizer) -> Child:
    assert tokenizer._renderer is not None
    assert tokenizer._renderer._child is not None
    return tokenizer._renderer._child


def test_the_process_ends_with_the_model() -> None:
    with LLM(demo_model(), kv_tokens=256) as llm:
        llm.chat(SAY, SamplingParams(max_tokens=1))
        left = child_of(llm.tokenizer).pid
        assert left is not None
        os.kill(left, 0)
    wait_until_ended(left)


def by_llm_in_lists(folder: Path) -> None:
    with LLM(folder, kv_tokens=256) as llm:
        llm.chat([SAY, SAY])


def by_serve(folder: Path) -> None:
    served = Served(ServerSettings(model=str(folder), kv_tokens=256, template_timeout=0.5))
    try:
        served.render_chat(SAY)
    except ApiError as error:
        raise TemplateError(str(error)) from error
    finally:
        served.close()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("template", HOSTILE, ids=["endless", "large"])
@pytest.mark.parametrize("use", [by_quantize, by_llm, by_llm_in_lists, by_serve])
def test_templates_are_confined_for_all(model: Path, use: Callable[[Path], None], template: str) -> None:
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(TemplateError, match=f"chat template .*{HOSTILE[template]}"):
        use(model)


def test_chat_refuses_a_hostile_template_in_a_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "chat_template.jinja").write_text("{{ 'a' * 10**9 * 20 }}")
    assert main(["chat", str(model)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "squawq: error: the chat template ran out of memory"


def test_a_template_steers_no_terminal(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "chat_template.jinja").write_text(TITLE)
    assert main(["chat", str(model)]) == 2
    shown = capsys.readouterr().err
    assert SHOWN in shown
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)
    with pytest.raises(ConfigError, match=re.escape(SHOWN)):
        Tokenizer(model).render(SAY)


def test_a_process_for_all_chats_of_a_tokenizer() -> None:
    tokenizer = Tokenizer(demo_model())
    for _ in range(3):
        tokenizer.encode_chat(SAY)
    first = child_of(tokenizer).pid
    assert first is not None
    tokenizer.encode_chat(SAY)
    assert child_of(tokenizer).pid == first
    tokenizer.close()
    wait_until_ended(first)
    tokenizer.encode_chat(SAY)
    tokenizer.close()
    tokenizer.close()


BROKEN = {
    "chat_template.jinja": b"a\xff",
    "additional_chat_templates/tool_use.jinja": b"\xc3(",
    "tokenizer_config.json": json.dumps({"chat_template": "\ud800"}).encode(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_no_text(model: Path, name: str) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(BROKEN[name])
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read as (text|JSON)"):
        print(Tokenizer(model).tool_template)


@pytest.mark.parametrize("name", [[1], {"a": 1}, None, 7, "\ud83d\ude00"])
def test_names_of_templates(model: Path, name: object) -> None:
    """A pair of surrogates is a character."""
    (model / "chat_template.jinja").unlink()
    rows = [{"name": name, "template": "a"}, {"name": "default", "template": "b"}, {"name": "tool_use"}, 7]
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": rows}))
    tokenizer = Tokenizer(model)
    assert (tokenizer.chat_template, tokenizer.tool_template) == ("b", None)
    assert tokenizer.render(SAY) == "b"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_what_a_model_writes_steers_no_terminal(stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    from squawq.commands.generate import write

    pieces = ["one\n\t", "\x1b]0;", "title\x07", " é😀"]
    out = stream()
    monkeypatch.setattr("sys.stdout", out)
    write(piece for piece in pieces)
    written = out.getvalue()
    if stream is Terminal:
        assert written == "one\n\t\\x1b]0;title\\x07 é😀\n"
    else:
        assert written == "".join(pieces) + "\n"


def test_names_steer_no_terminal_and_are_no_markup() -> None:
    from rich.table import Table

    from squawq.progress import PlainConsole

    out = io.StringIO()
    console = PlainConsole()
    console.file, console.width = out, 200
    table = Table("\x1bhead", title="\x1btitle")
    table.add_row("\x9bcell [/x]")
    console.print(table, "\x1b]0;text\x07 [/x]")
    written = out.getvalue()
    assert not re.search(r"[\x1b\x07\x9b]", written)
    for part in (r"\x1bhead", r"\x1btitle", r"\x9bcell [/x]", r"\x1b]0;text\x07 [/x]"):
        assert part in written


def test_a_folder_named_as_markup_or_control(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model.parent / "a\x1b]0;b\x07[").mkdir()
    folder = model.rename(model.parent / "a\x1b]0;b\x07[" / "x]")
    assert main(["generate", str(folder), "-p", "a", "--max-tokens", "1"]) == 0
    (folder / "config.json").write_text("{")
    assert main(["generate", str(folder), "-p", "a", "--max-tokens", "1"]) == 2
    shown = capsys.readouterr().err
    assert r"a\x1b]0;b\x07[/x]" in shown
    assert "\x1b" not in shown
