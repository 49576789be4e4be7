"""What is printed of a folder is text: no markup, no control characters, in no place of a table."""

from __future__ import annotations

import pytest
from rich.table import Table

from squawq.errors import printable
from squawq.progress import LayerProgress, PlainConsole, console

NAME = "a[red]b[/]:cat:\x1b]0;title\x07\x9b31m\u202eback"
SHOWN = r"a[red]b[/]:cat:\x1b]0;title\x07\x9b31m\u202eback"


def test_printable() -> None:
    assert printable(NAME) == SHOWN
    assert printable("a\nb\tc\ud800") == r"a\x0ab\x09c\ud800"
    assert printable("a\nb\tc", keep="\n") == "a\nb\\x09c"
    assert printable("Grüße, 你好 👋 नमस्ते") == "Grüße, 你好 👋 नमस्ते"


def test_a_line_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title=NAME)
    table.add_column(NAME, footer=NAME)
    table.add_row(NAME)
    plain = PlainConsole()
    plain.width = 200
    plain.print(table, soft_wrap=False)
    plain.print(NAME, soft_wrap=True)
    out = capsys.readouterr().out
    assert out.count(SHOWN) == 4
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(out)


def test_what_quantize_says_of_a_layer(capsys: pytest.CaptureFixture[str]) -> None:
    record = {"name": NAME, "loss_rounded": 2.0, "loss": 1.0, "method": "squawq", "notes": [NAME]}
    with LayerProgress() as progress:
        progress.layer(record)
        for layers in (1, 2):
            progress.read_back(layers)
    console.print(f"{NAME} stays in 16 bits: {NAME}", soft_wrap=True)
    shown = capsys.readouterr().err.replace("\n", "")
    assert shown.count(SHOWN) == 4
    assert shown.count("comparing the finished folder with the 16-bit model") == 1
    assert "\x1b" not in shown
