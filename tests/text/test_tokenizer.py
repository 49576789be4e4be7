"""Text, ids and chat templates; the templates are checked against transformers' own rendering."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from conftest import shared_data
from hypothesis import example, given, settings
from hypothesis import strategies as st

from squawq.demo import demo_model
from squawq.errors import CheckpointError, ConfigError
from squawq.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(demo_model())
CHAT = [
    {"role": "system", "content": " You are kind. "},
    {"role": "user", "content": "Grüße, नमस्ते!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Tell me a story."},
]


@pytest.mark.parametrize("where", ["demo", "llama3-tokenizer/hf"])
def test_chat_equals_transformers(where: str) -> None:
    from transformers import AutoTokenizer

    folder = demo_model() if where == "demo" else shared_data(where)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer(folder)
    assert ours.render(CHAT) == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    expected = theirs.apply_chat_template(CHAT, tokenize=True, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    assert ours.encode_chat(CHAT) == expected
    assert ours.encode("One day") == theirs("One day")["input_ids"]


def with_template(folder: Path, template: object) -> Tokenizer:
    shutil.copy(demo_model() / "tokenizer.json", folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return Tokenizer(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{% for",
    ],
)
def test_templates_run_in_a_sandbox(template: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="template refuses"):
        with_template(tmp_path, template).render(CHAT)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be used as a tokenizer"):
        Tokenizer(tmp_path)
    shutil.copy(demo_model() / "tokenizer.json", tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match="no chat template"):
        Tokenizer(tmp_path).render(CHAT)


@pytest.mark.parametrize("messages", [[], "hello", [{"role": "user"}], [{"role": "king", "content": "a"}], [7]])
def test_bad_messages(messages: object) -> None:
    with pytest.raises(ConfigError, match="message"):
        TOKENIZER.render(messages)  # type: ignore[arg-type]


def test_unset_tokens_are_not_the_word_none(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{% generation %}[{{ m.content }}]{% endgeneration %}{% endfor %}"
    assert with_template(tmp_path, template).render(CHAT[:2]) == "[ You are kind. ][Grüße, नमस्ते!]"


def test_the_date_can_be_fixed(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{{ strftime_now('%d %b %Y') }}")
    assert tokenizer.render(CHAT, now=datetime(2024, 7, 26)) == "26 Jul 2024"


def test_templates_by_name(tmp_path: Path) -> None:
    plain = with_template(tmp_path, "plain")
    assert (plain.chat_template, plain.tool_template) == ("plain", None)
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}, 7, {"name": "c"}]
    listed = with_template(tmp_path, named)
    assert (listed.chat_template, listed.tool_template) == ("a", "b")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("d")
    (tmp_path / "chat_template.jinja").write_text("e")
    filed = Tokenizer(tmp_path)
    assert (filed.chat_template, filed.tool_template) == ("e", "d")


def test_template_variables(tmp_path: Path) -> None:
    tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
    assert TOKENIZER.template_variables() == tokens
    assert with_template(tmp_path, "a").template_variables() == {}


@settings(max_examples=300, deadline=None)
@given(st.text())
@example("<|eot_id|>é\ud7ff\U0001f600\r\n\t\x00 Ġ")
def test_bytes_of_tokens_make_the_text(text: str) -> None:
    ids = TOKENIZER.encode(text, special=False)
    assert b"".join(map(TOKENIZER.token_bytes, ids)) == text.encode()


def test_bytes_of_every_token() -> None:
    """Whole characters are what decode gives; the 256 bytes are there, each once, as single tokens."""
    pieces = [TOKENIZER.token_bytes(token) for token in range(4096)]
    for token, piece in enumerate(pieces):
        assert TOKENIZER.token_text(token) == piece.decode(errors="replace")
    assert sorted(piece for piece in pieces if len(piece) == 1) == [bytes([byte]) for byte in range(256)]
    assert TOKENIZER.token_bytes(4096) == b""


def test_bytes_of_llama3_tokens() -> None:
    tokenizer = Tokenizer(shared_data("llama3-tokenizer/hf"))

    @settings(max_examples=200, deadline=None)
    @given(st.text())
    @example("<|eot_id|>नमस्ते 👩‍👩‍👧 \t\n")
    def check(text: str) -> None:
        ids = tokenizer.encode(text, special=False)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()

    check()
    assert tokenizer.token_bytes(128000) == b"<|begin_of_text|>"
    assert tokenizer.special_ids == frozenset(range(128000, 128256))


def test_bytes_of_sentencepiece_tokens() -> None:
    tokenizer = Tokenizer(shared_data("babyllama-tok361/hf"))

    @settings(max_examples=200, deadline=None)
    @given(st.text(min_size=1).filter(lambda text: "\u2581" not in text and "<" not in text))
    @example("Grüße\n 👩")
    def check(text: str) -> None:
        ids = tokenizer.encode(text, special=False)
        assert b"".join(map(tokenizer.token_bytes, ids)) == b" " + text.encode()

    check()
    assert tokenizer.token_bytes(tokenizer.encode("\n", special=False)[-1]) == b"\n"
    assert tokenizer.token_bytes(1) == b"<s>"
    assert tokenizer.special_ids == {0, 1, 2}


def test_special_tokens() -> None:
    assert TOKENIZER.special_ids == frozenset(range(8))
    assert TOKENIZER.token_text(0) == "<|begin_of_text|>"
    assert TOKENIZER.token_bytes(0) == b"<|begin_of_text|>"


def test_tokens_that_are_not_spelled_in_bytes(tmp_path: Path) -> None:
    """An added token stands for its own text, though it may read as bytes too, and may be an ordinary one."""
    shutil.copy(demo_model() / "tokenizer.json", tmp_path / "tokenizer.json")
    tokenizer = Tokenizer(tmp_path)
    tokenizer.fast.add_tokens(["qéq", "日"])
    assert [tokenizer.token_bytes(token).decode() for token in (4096, 4097)] == ["qéq", "日"]
    assert tokenizer.special_ids == frozenset(range(8))
    odd = json.loads((tmp_path / "tokenizer.json").read_text())
    odd["model"]["vocab"]["日"] = 4096
    (tmp_path / "tokenizer.json").write_text(json.dumps(odd))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.token_bytes(4096).decode() == tokenizer.token_text(4096) == "日"
