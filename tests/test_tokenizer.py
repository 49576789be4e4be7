"""Text, ids and chat templates; the templates are checked against transformers' own rendering."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from conftest import shared_data

from squawq.demo import demo_model
from squawq.errors import CheckpointError, ConfigError
from squawq.tokenizer import Tokenizer

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


def with_template(folder: Path, template: str) -> Tokenizer:
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
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
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
