"""Tokenizers of hostile folders: each is one line of error, whatever the library does with it, and costs little."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import shared_data
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import Replace as Decoder
from tokenizers.normalizers import Replace as Normalizer

from squawq.demo import demo_model
from squawq.errors import CheckpointError, ConfigError
from squawq.text import tokenizer_trial
from squawq.text.child import Child
from squawq.text.tokenizer import Tokenizer
from squawq.text.tokenizer_trial import load

DEMO = json.loads((demo_model() / "tokenizer.json").read_text(encoding="utf-8"))


def replace(text: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: text}, "content": content}


def precompiled(blob: bytes) -> dict[str, Any]:
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(blob).decode()}}


def split(regex: str) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}}


def normalizers(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


def around(count: int, name: str = "A") -> dict[str, Any]:
    pieces = [{"Sequence": {"id": name, "type_id": 0}}] * count
    return {"post_processor": {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": {}}}


UNKNOWN = [{"SpecialToken": {"id": "no", "type_id": 0}}]
# what the folder's tokenizer.json has in place of the demo model's keys, and what is said of it
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "a length that aborts": (precompiled(struct.pack("<I", 0xFFFFFFFC) + b"abc"), "it died"),
    "an empty map": (precompiled(b""), "Cannot parse precompiled_charsmap"),
    "a map out of range": (precompiled(struct.pack("<I", 4) + b"\xff\xff\xff\xff"), "out of bounds"),
    "a map to long texts": (precompiled(struct.pack("<I", 4) + bytes(4) + b"a" * 10**5), "times as"),
    "texts that grow": ({"normalizer": {"type": "Sequence", "normalizers": [replace("a", "aaaa")] * 16}}, "times as"),
    "rare texts that grow": (
        {"normalizer": {"type": "Sequence", "normalizers": [replace("zqx", "zqx" * 4)] * 16}},
        "times as",
    ),
    "decoded texts that grow": (
        {"decoder": {"type": "Sequence", "decoders": [DEMO["decoder"], *[replace("a", "aaaa")] * 16]}},
        "times as",
    ),
    "bytes of bytes": ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 30}}, "times as"),
    "matches of nothing": (normalizers(*[replace("(?=z)", "z", "Regex")] * 24), "times as"),
    "texts that grow, and a map of nothing": (
        normalizers(*[replace("q", "qqqq")] * 16, precompiled(struct.pack("<I", 4) + bytes(4))["normalizer"]),
        "times as|charsmap|out of",
    ),
    "a long prefix of each piece": (normalizers({"type": "Prepend", "prepend": "z" * 200}), "times as"),
    "compatibility forms": (normalizers(*[{"type": "NFKC"}, replace("\u0627", "\ufdfa")] * 4), "times as"),
    "a text many times": (around(10**4), "tokens of|it died|it took"),
    "an invalid regex": (split("("), "Oniguruma error"),
    "a regex that never ends": (split("(a|a)*(a|a)*(a|a)*$b"), "retry-limit"),
    "an empty pattern": ({"normalizer": replace("", "x")}, "out of bounds"),
    "a token that is not there": (
        {"post_processor": {**around(0)["post_processor"], "single": UNKNOWN}},
        "no entry found",
    ),
    "a strip out of range": ({"decoder": {"type": "Strip", "content": "a", "start": 10**9, "stop": 1}}, "slice index"),
    "a prefix out of range": ({"model": {**DEMO["model"], "continuing_subword_prefix": "é" * 99}}, "out of range"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    def write(changes: dict[str, Any]) -> Path:
        (tmp_path / "tokenizer.json").write_text(json.dumps({**DEMO, **changes}))
        return tmp_path

    return write


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tokenizers_are_refused(
    folder: Callable[[dict[str, Any]], Path], name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    changes, message = HOSTILE[name]
    with pytest.raises(CheckpointError, match=rf"tokenizer.json: cannot be used as a tokenizer: .*({message})"):
        Tokenizer(folder(changes))
    assert "panicked" not in capfd.readouterr().err


def test_time_and_memory_are_limited(folder: Callable[[dict[str, Any]], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    cut = {"truncation": {"direction": "Right", "max_length": 6, "strategy": "LongestFirst", "stride": 0}}
    monkeypatch.setattr(tokenizer_trial, "MEMORY", 2**20)
    with pytest.raises(CheckpointError, match="it died"):
        Tokenizer(folder(cut))
    monkeypatch.undo()
    monkeypatch.setattr(tokenizer_trial, "SECONDS", 0.001)
    with pytest.raises(CheckpointError, match=r"it took more than 0\.001 s of processor time when it was tried"):
        Tokenizer(folder(cut))


def test_what_passes_is_tried_once_and_the_demo_models_never(
    folder: Callable[[dict[str, Any]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = {"truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}}
    Tokenizer(folder(cut))
    monkeypatch.setattr(Child, "start", None)
    assert len(Tokenizer(folder(cut)).encode("a b c d e f g h")) > 5
    assert Tokenizer(demo_model()).encode("a")
    with pytest.raises(TypeError):  # another one would be tried
        Tokenizer(folder({"version": "2"}))


@pytest.mark.parametrize("where", ["llama3-tokenizer/hf", "babyllama-tok361/hf"])
def test_real_tokenizers_pass(where: str) -> None:
    content = (shared_data(where) / "tokenizer.json").read_bytes()
    assert load(b"")(content) == b""


def test_tokenizers_like_sentencepiece_pass(folder: Callable[[dict[str, Any]], Path]) -> None:
    spaces = replace(" ", "\u2581")
    for steps in ([spaces], [{"type": "Prepend", "prepend": "\u2581"}, spaces], [{"type": "NFKC"}, spaces]):
        assert Tokenizer(folder(normalizers(*steps))).encode("a")


def test_growth_is_counted_one_way_at_a_time() -> None:
    tokenizer = FastTokenizer.from_str((demo_model() / "tokenizer.json").read_text(encoding="utf-8"))
    long = replace("zzz", "z" * 90)
    tokenizer.normalizer = Normalizer(long["pattern"]["String"], long["content"])
    tokenizer.decoder = Decoder(long["pattern"]["String"], long["content"])
    assert load(b"")(tokenizer.to_str().encode()) == b""


@pytest.mark.parametrize("kind", ["Unigram", "WordLevel"])
def test_a_tokenizer_without_an_unknown_token_is_taken(folder: Callable[[dict[str, Any]], Path], kind: str) -> None:
    """Texts of its tokens are all that it can encode; others are refused when they come."""
    models: dict[str, dict[str, Any]] = {
        "Unigram": {"unk_id": None, "vocab": [["a", 0.0]]},
        "WordLevel": {"unk_token": "?", "vocab": {"a": 0}},
    }
    plain: dict[str, Any] = {
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
    }
    tokenizer = Tokenizer(folder({**plain, "model": {"type": kind, **models[kind]}}))
    assert tokenizer.encode("a") == [0]
    with pytest.raises(ConfigError, match="cannot encode the text"):
        tokenizer.encode("b")


def test_panics_after_the_trial_are_errors(folder: Callable[[dict[str, Any]], Path]) -> None:
    tokenizer = Tokenizer(folder(split("(q|q)*(q|q)*(q|q)*$b")))
    with pytest.raises(ConfigError, match=r"cannot encode the text: .*retry-limit"):
        tokenizer.encode("q" * 64 + " b")
    with pytest.raises(ConfigError, match=r"cannot encode the text: .*retry-limit"):
        tokenizer.places("q" * 64 + " b")
    with pytest.raises(ConfigError, match="cannot decode the tokens"):
        tokenizer.decode([-1])
    assert tokenizer.decode(tokenizer.encode("a")) == "a"


def test_half_of_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(ConfigError, match="cannot encode the text"):
        Tokenizer(demo_model()).encode("a\ud800")
