"""Text in pieces: never half a character, and stop strings wherever they are split."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from squawq.demo import demo_model
from squawq.engine.sequence import StopStrings
from squawq.text.tokenizer import TextStream, Tokenizer

TOKENIZER = Tokenizer(demo_model())


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
@example("\ufffd" * 30 + "🙂")
def test_stream_gives_the_whole_text_and_never_half_a_character(text: str) -> None:
    ids = TOKENIZER.encode(text, special=False)
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(i) for i in ids]
    assert "\ufffd" in text or all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == TOKENIZER.decode(ids)


def test_stream_holds_an_unfinished_character_back() -> None:
    ids = TOKENIZER.encode("🙂", special=False)
    assert len(ids) > 1
    stream = TextStream(TOKENIZER)
    assert [stream.push(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.push(ids[-1]) == "🙂"


class Counting:
    """A byte a token, and how many tokens were decoded."""

    decoded = 0

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        self.decoded += len(ids)
        return bytes(ids).decode("utf-8", "replace")


def test_bytes_that_are_no_text_cost_no_more_with_time_and_spoil_no_character() -> None:
    tokenizer = Counting()
    stream = TextStream(tokenizer)
    pieces = [stream.push(0x80) for _ in range(1000)]
    assert tokenizer.decoded < 200 * 1000
    pieces += [stream.push(byte) for byte in "🙂".encode()]
    assert "".join(pieces) == "\ufffd" * 1000 + "🙂"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(["🙂", "é", "a"]).map(str.encode), st.binary(min_size=1, max_size=20))))
def test_any_bytes_give_the_same_text_in_pieces(parts: list[bytes]) -> None:
    data = b"".join(parts)
    stream = TextStream(Counting())
    assert "".join(stream.push(byte) for byte in data) + stream.finish() == data.decode("utf-8", "replace")


def test_stream_knows_what_came_before(tmp_path: Path) -> None:
    """A tokenizer that strips a space at a text's start must not lose it in the middle of one."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models

    fast = Fast(models.WordLevel({"▁upon": 0, "▁a": 1, "▁time": 2, "<eot>": 3}, unk_token="▁a"))
    fast.add_special_tokens(["<eot>"])
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode([2]) == "time"
    stream = TextStream(tokenizer, [0, 1])
    assert [stream.push(i) for i in (2, 3, 3, 2)] == [" time", "", "", " time"]


def test_special_tokens_are_shown_on_request() -> None:
    token = TOKENIZER.encode("<|eot_id|>", special=False)[0]
    assert TextStream(TOKENIZER).push(token) == ""
    assert TextStream(TOKENIZER, skip_special=False).push(token) == "<|eot_id|>"


letters = st.text(alphabet="ab🙂", max_size=40)
words = st.lists(st.text(alphabet="ab🙂", min_size=1, max_size=6), max_size=3)


@settings(max_examples=300, deadline=None)
@given(letters, words, st.lists(st.integers(0, 40), max_size=10), st.booleans())
def test_stop_strings_cut_where_find_finds_them(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    borders = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    matcher, given_out, found = StopStrings(stops, include), "", None
    for begin, end in pairwise(borders):
        piece, found = matcher.push(text[begin:end])
        given_out += piece
        assert text.startswith(given_out)
        if found:
            break
    given_out += "" if found else matcher.finish()
    places = sorted((text.find(s) + len(s), -len(s), s) for s in stops if s in text)
    if places:
        end, _, first = places[0]
        assert (given_out, found) == (text[: end if include else end - len(first)], first)
    else:
        assert (given_out, found) == (text, None)


def test_what_is_complete_too_early_is_passed_over() -> None:
    matcher = StopStrings(["de", "ded"])
    assert matcher.push("cd", ending=False) == ("c", None)
    assert matcher.push("ex", ending=False) == ("dex", None)
    assert matcher.push("d", ending=False) == ("", None)
    assert matcher.push("ef") == ("", "de")  # begun too early, complete in time
    overlapping = StopStrings(["aba"])
    assert overlapping.push("aba", ending=False) == ("ab", None)
    assert overlapping.push("ba") == ("", "aba")


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["\n\nUser:"])
    assert matcher.push("one\n") == ("one", None)
    assert matcher.push("\n") == ("", None)
    assert matcher.push("Us") == ("", None)
    assert matcher.push("e, ") == ("\n\nUse, ", None)
    assert matcher.push("x\n\nUser: y") == ("x", "\n\nUser:")
