"""Calibration text: the built-in set, files of every kind, lists; too little is an error with figures."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import pytest
import torch

from squawq.demo import demo_model
from squawq.errors import CalibrationError, ConfigError
from squawq.quantization.calibration import builtin_rows, token_blocks
from squawq.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(demo_model())


def blocks(source: Any, samples: int | None = None, seqlen: int = 32) -> torch.Tensor:
    return token_blocks(source, lambda: TOKENIZER, seqlen=seqlen, samples=samples, vocab_size=4096)


def test_builtin_set_is_large_and_varied() -> None:
    rows = list(builtin_rows())
    texts = [row if isinstance(row, str) else "\n".join(m["content"] for m in row) for row in rows]
    whole = "\n".join(texts)
    assert len(whole.encode()) > 150_000
    assert sum(isinstance(row, list) for row in rows) >= 30
    for word in ("the ", " und ", " les ", " della ", " não ", " las ", "है", "ที่", "def ", "\\frac", "| "):
        assert word in whole, word
    assert len(set(texts)) == len(texts)


def test_builtin_set_is_the_default_and_spread_evenly() -> None:
    few, all_of_it = blocks(None, samples=16), blocks(None, samples=None)
    assert few.shape == (16, 32)
    assert all_of_it.shape == (128, 32)
    assert not torch.equal(few, all_of_it[:16])


def test_long_rows_are_cut_not_dropped(tmp_path: Path) -> None:
    text = "Once upon a time there was a little dog. " * 100
    path = tmp_path / "one.txt"
    path.write_text(text)
    found = blocks(path)
    ids = TOKENIZER.encode(text)
    assert found.flatten().tolist() == ids[: found.numel()]
    assert len(found) == len(ids) // 32
    assert torch.equal(blocks([text]), found)
    assert torch.equal(blocks(path, samples=5), found[:5])
    assert torch.equal(blocks([ids[:50], ids[50:]]), found)


def test_jsonl_of_text_and_chats(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Tell me a story. " * 20}, {"role": "assistant", "content": "Once. " * 60}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps({"text": "a dog " * 50}), "", json.dumps({"messages": chat})]))
    found = blocks(path).flatten().tolist()
    expected = TOKENIZER.encode("a dog " * 50) + TOKENIZER.encode_chat(chat, generation_prompt=False)
    assert found == expected[: len(found)]
    assert len(found) > len(expected) - 32


def test_too_little_text(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("Once upon a time.")
    with pytest.raises(CalibrationError, match=r"short.txt' gives 6 tokens; 128 are needed \(4 blocks of 32\)"):
        blocks(path)
    with pytest.raises(CalibrationError, match=r"the built-in calibration set gives .* tokens; 3,200,000 are needed"):
        blocks(None, samples=100_000)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{broken', "line 2 is not JSON"),
        ("a.jsonl", b'{"prompt": "a"}', "line 1: needs a 'text' or 'messages'; has prompt"),
        ("a.jsonl", b'{"messages": [{"role": "robot", "content": "a"}]}', "role"),
        ("a.jsonl", b'"a"\n' + b"[" * 100_000, "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a \\ud800 b"}', "line 1: holds half of a surrogate pair"),
        ("a.jsonl", b'{"text": "a"}\n\xc3\x28', r"a.jsonl' line 2 is not UTF-8 text: .* \(byte 14 of the file\)"),
        ("a.txt", b"abc \xff\xfe", r"a.txt' line 1 is not UTF-8 text: .* \(byte 4 of the file\)"),
        (
            "a.txt",
            b"one line\n" * 200 + b"\xe2\x82",
            r"line 201 is not UTF-8 text: .* \(byte 1,800 of the file\)",
        ),
        ("a.txt", "abc".encode("utf-16"), r"line 1 is not UTF-8 text: .* \(byte 0 of the file\)"),
        ("a.txt", b"abc\na\0b", "line 2 holds a NUL byte"),
        ("a.txt", b"", "a.txt' is empty"),
        ("a.txt", gzip.compress(b"a dog", mtime=0), "is a gzip file; give the text in it, unpacked"),
        ("a.jsonl", gzip.compress(b'{"text": "a"}', mtime=0), "is a gzip file"),
    ],
)
def test_bad_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        blocks(tmp_path / name)


def test_missing_file_and_wrong_kind(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="is not a file"):
        blocks(str(tmp_path / "none.txt"))
    with pytest.raises(CalibrationError, match="is a folder; give"):
        blocks(str(tmp_path))
    with pytest.raises(ConfigError, match="dict"):
        blocks({"a": 1})


def test_equal_tokens_on_every_day_and_for_templates_without_system(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(demo_model())
    monkeypatch.setattr(
        Tokenizer,
        "chat_template",
        "{{ strftime_now('%f') }}{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    first, second = (token_blocks(None, lambda: tokenizer, seqlen=32, samples=None, vocab_size=4096) for _ in range(2))
    assert torch.equal(first, second)
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(CalibrationError, match=r"row 1: .*template refuses"):
        blocks_of_chat(tokenizer, chat)


def blocks_of_chat(tokenizer: Tokenizer, chat: list[dict[str, str]]) -> None:
    with NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write(json.dumps({"messages": chat}))
        file.flush()
        token_blocks(file.name, lambda: tokenizer, seqlen=32, samples=None, vocab_size=4096)


def test_ids_that_the_model_has_not() -> None:
    rows = [[1] * 200, [2] * 5 + [2**70]]
    with pytest.raises(CalibrationError, match=rf"token id {2**70}; the model knows 0 to 4095 \(place 205\)"):
        blocks([*rows, [1] * 200])


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    text = json.dumps({"text": "a dog " * 200})
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text(text, encoding="utf-8")
    assert torch.equal(blocks(tmp_path / "a.jsonl"), blocks(tmp_path / "b.jsonl"))
