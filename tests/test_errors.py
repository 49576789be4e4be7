"""Texts of folders, clients and models that are shown: none of them steers a terminal."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from squawq.errors import ConfigError, DependencyError, SquawqError, printable

ANY = st.text(st.characters(exclude_categories=()))


@given(ANY, st.sampled_from(["", "\n\t"]))
def test_printable_text_steers_no_terminal(text: str, keep: str) -> None:
    shown = printable(text, keep=keep)
    shown.encode()  # no halves of surrogate pairs
    for character in shown:
        assert character in keep or unicodedata.category(character) not in ("Cc", "Cs")
        assert unicodedata.bidirectional(character) not in (
            "LRE",
            "RLE",
            "LRO",
            "RLO",
            "PDF",
            "LRI",
            "RLI",
            "FSI",
            "PDI",
        )


def test_what_is_escaped() -> None:
    assert printable("a\x1b]0;x\x07\x9b\n\t\u202e\u2066\ud800é😀") == r"a\x1b]0;x\x07\x9b\x0a\x09\u202e\u2066\ud800é😀"
    assert printable("a\n\tb\r", keep="\n\t") == "a\n\tb\\x0d"


@pytest.mark.parametrize("kind", [SquawqError, ConfigError, DependencyError])
def test_errors_are_printable(kind: type[SquawqError]) -> None:
    assert str(kind("two\nlines \x1b]0;title\x07")) == "two\nlines \\x1b]0;title\\x07"
