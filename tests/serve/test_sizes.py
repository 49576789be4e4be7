"""What is refused by its size can never fit: no text is refused whose tokens would."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from squawq.demo import demo_model
from squawq.serve.errors import ApiError
from squawq.serve.model import MARGIN, PromptLimits, Served, longest_token
from squawq.serve.openai.chat import ChatBody, chat, read
from squawq.text.tokenizer import Tokenizer as Ours

TOKENIZER = Ours(demo_model())
LONGEST = max(TOKENIZER.fast.get_vocab(), key=len)
TEXTS = st.text(st.characters(codec="utf-8")) | st.lists(
    st.sampled_from([LONGEST.replace("\u0120", " "), "a", "\U0001f642"])
)


@given(TEXTS, st.integers(1, 20))
def test_what_fits_is_not_refused(parts: str | list[str], most: int) -> None:
    text = "".join(parts)
    sizes = PromptLimits(TOKENIZER, most + 1, most)
    if len(TOKENIZER.encode(text, special=False)) <= most:
        sizes.check_text(text, "prompt")


def test_the_bound_is_reached(served: Served) -> None:
    most = served.prompt_limits.max_bytes
    served.prompt_limits.check_text("a" * most, "prompt")
    for text in ("a" * (most + 1), "\U0001f642" * (most // 4 + 1)):
        with pytest.raises(ApiError, match=r"maximum context length is \d+ tokens.*bytes of text"):
            served.prompt_limits.check_text(text, "prompt")


def byte_level(**parts: object) -> Ours:
    fast = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(fast, name, part)
    ours = Ours(demo_model())
    ours.fast = fast
    return ours


def test_a_tokenizer_that_drops_characters_has_a_bound_further_away() -> None:
    assert longest_token(byte_level()) == 1
    assert longest_token(byte_level(normalizer=normalizers.NFC())) == MARGIN
    stripping = byte_level()
    stripping.fast.add_special_tokens([AddedToken("<a>", rstrip=True)])
    assert longest_token(stripping) == 3 * MARGIN
    removed = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])
    assert longest_token(byte_level(pre_tokenizer=removed)) == MARGIN
    assert longest_token(byte_level(pre_tokenizer=None)) == MARGIN * len("\u0120".encode())


def test_messages_are_counted_before_they_are_looked_at(served: Served) -> None:
    served.prompt_limits.check_messages([{}] * served.max_input)
    with pytest.raises(ApiError, match=rf"this one has {served.max_input + 1} messages"):
        served.prompt_limits.check_messages([{}] * (served.max_input + 1))


@given(TEXTS, st.integers(1, 20))
def test_contents_that_fit_are_not_refused(parts: str | list[str], most: int) -> None:
    text = "".join(parts)
    sizes = PromptLimits(TOKENIZER, most + 1, most)
    if len(TOKENIZER.encode(text, special=False)) <= most:
        sizes.check_messages([{"content": text}])
        sizes.check_messages([{"content": [{"type": "text", "text": text}]}])


def test_contents_are_measured_before_they_are_rendered(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "render_chat", lambda *_, **__: "short")
    large = "a" * (MARGIN * served.prompt_limits.max_bytes // 2 + 1)
    parts = [{"type": "text", "text": large}]
    given: list[Any] = [[{"content": large}, {"content": large}], [{"content": parts}, {"content": [*parts, *parts]}]]
    for messages in given:
        body = {"messages": [{"role": "user", **message} for message in messages]}
        with pytest.raises(ApiError, match=r"maximum context length is \d+ tokens.*bytes of text"):
            chat(body, served)
        read(ChatBody, {"messages": [{"role": "user", **messages[0]}]}, served)
        assert read(ChatBody, {**body, "truncate_prompt_tokens": 5}, served).messages
    odd: list[Any] = [None, 1, "a", {}, [1, None, {"content": 5}, {"content": [1, {"text": 1}]}]]
    for messages in odd:
        served.prompt_limits.check_messages(messages)
