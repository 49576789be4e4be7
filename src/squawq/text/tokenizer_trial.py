"""Tests an untrusted tokenizer.json in a child process before this process loads it.

A hostile one can crash, exhaust memory or loop for ever. The child loads it and encodes a few texts under limits. Steps
that could make other texts much longer are refused by their settings. A file that passed is not tested again.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from squawq.errors import CheckpointError
from squawq.text.child import Child, ChildError

SECONDS = 30.0  # of processor time; a vocabulary of 128,000 tokens takes one or two
MEMORY = 2 * 2**30  # the same takes 0.3 GB
MAX_GROWTH = 160  # how much longer the steps one way may make a text; Qwen: 6, Llama 2: 12, T5: 132
MAX_TOKENS = 64  # for a character; bytes as tokens: 4
MAX_ADDED = 4096  # tokens around a text
ODD = "\0\t\r\n\x7f\x85\u00a0\u00ad\u0301é\u2028\u202e\u3000中ﷺﬃ\u0e33\ud7ff\ue000\ufffd\uffff😀\U0010ffff"
LONG = "".join(sign * 1000 for sign in " a0.\n-_é中") + "The quick brown fox isn't 12,345.67 years old. " * 200
GROWTH = {  # of steps that have no settings to tell it by
    "ByteLevel": 2,  # a byte above 127 becomes a character of two
    **dict.fromkeys(("NFC", "NFD"), 3),
    **dict.fromkeys(("NFKC", "NFKD"), 11),  # U+FDFA: 3 bytes become 33
    "Lowercase": 1.5,
    "BertNormalizer": 8,  # spaces around Chinese characters, NFD and lower case
    **dict.fromkeys(("WordPiece", "BPEDecoder", "CTC"), 2),  # a space for each token, or between all characters
}
# SHA-256 of the files that passed, first of all the demo model's
_passed = {bytes.fromhex("8360c2eae176c59f6b314415dd466c0a62a8972501a495450ac19c85ec832eea")}


def check_tokenizer(content: bytes, where: str) -> None:
    """Test a tokenizer.json in a child process. Raises CheckpointError, beginning with `where`, if it is refused."""
    digest = hashlib.sha256(content).digest()
    if digest in _passed:
        return
    try:
        child = Child.start(f"{__name__}:{load.__name__}", b"", memory=MEMORY, forks=False)
    except ChildError as error:
        raise CheckpointError(f"{where}: cannot be tried in a process of its own: {error}") from error
    try:
        refused = child.call(content, SECONDS).decode("utf-8", "replace")
    except ChildError as error:
        raise CheckpointError(f"{where}: cannot be used as a tokenizer: {error} when it was tried") from error
    finally:
        child.close()
    if refused:
        raise CheckpointError(f"{where}: cannot be used as a tokenizer: {refused}")
    _passed.add(digest)


def failure(error: BaseException) -> str:
    """One line about an exception of a tokenizer, Rust's panics included; re-raises other BaseExceptions."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return " ".join(str(error).split())[:500] or type(error).__name__


def load(_: bytes) -> Callable[[bytes], bytes]:
    """The child's handler: takes a tokenizer.json, returns why it is refused, or nothing."""
    from tokenizers import Tokenizer

    def answer(content: bytes) -> bytes:
        try:
            return _try(Tokenizer.from_buffer(content)).encode("utf-8", "replace")
        except BaseException as error:
            return failure(error).encode("utf-8", "replace")

    return answer


def _try(tokenizer: Any) -> str:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for way in ((tokenizer.normalizer, tokenizer.pre_tokenizer), (tokenizer.decoder,)):
        states = [json.loads(part.__getstate__()) for part in way if part is not None]  # older forms made new
        if (growth := math.prod(map(_growth, _steps(states)))) > MAX_GROWTH:
            return f"its steps may make a text {growth:.3g} times as long; at most {MAX_GROWTH} times is taken"
    for text in ("", "a", ODD, LONG):
        for special, encode in ((True, tokenizer.encode_batch), (False, tokenizer.encode_batch_fast)):
            try:
                ids = encode([text], add_special_tokens=special)[0].ids
            except Exception:  # it has no token for a character: so may a user's text, which is refused then
                continue
            if len(ids) > MAX_TOKENS * len(text) + MAX_ADDED:
                return f"it makes {len(ids):,} tokens of {len(text):,} characters"
            tokenizer.decode(ids, skip_special_tokens=special)
    for token in (*range(0, tokenizer.get_vocab_size(), 997), 2**32 - 1):
        tokenizer.decode([token])
    tokenizer.decode(list(range(tokenizer.get_vocab_size())))
    return ""


def _steps(state: Any) -> Iterator[Mapping[str, Any]]:
    """Every step, nested ones included."""
    if isinstance(state, dict):
        if isinstance(state.get("type"), str):
            yield state
        for key in ("normalizers", "pretokenizers", "decoders"):
            yield from _steps(state.get(key))
    elif isinstance(state, list):
        for step in state:
            yield from _steps(step)


def _growth(step: Mapping[str, Any]) -> float:
    """The largest factor by which a step can lengthen a text, in bytes; a prefix counts as one for each byte."""
    kind = step["type"]
    if kind == "Replace":
        content, pattern = len(step["content"].encode()), step["pattern"].get("String", "").encode()
        return max(1, content / len(pattern)) if pattern else 1 + content  # a regex may match nothing, everywhere
    if kind == "Prepend":
        return 1 + len(step["prepend"].encode())
    if kind == "Metaspace":
        return 1 + len(step["replacement"].encode())
    if kind == "Precompiled":  # a trie, and texts between zeros that it points into
        try:
            blob = base64.b64decode(step["precompiled_charsmap"])
        except binascii.Error:
            return math.inf
        texts = blob[4 + int.from_bytes(blob[:4], "little") :]
        return max(1, *map(len, texts.split(b"\0")))
    if kind == "ByteLevel" and step.get("add_prefix_space"):
        return 4
    return GROWTH.get(kind, 1)
