"""Tokenizers in GGUF, in llama.cpp itself: cuts at random texts, white space, tokens around a text, end tokens."""

from __future__ import annotations

import json
import random
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors, trainers

from squawq.errors import ConfigError
from squawq.export.gguf_pre_tokenizers import ASCII_CAPITALS, GPT2, PRE_TYPES
from squawq.export.gguf_tokenizer import Vocabulary, read_vocabulary

llama = pytest.importorskip("test_gguf_llamacpp", reason="needs the packages gguf and llama-cpp-python")

NAMES = {name: key for key, name in PRE_TYPES.items()}
PIECES = (
    *("a", "b", "Z", "Hello", "camelCase", "HTMLParser", "don't", "I'Ll", "1", "12", "1234567", " ", "  ", "\t"),
    *("\n", "\n\n", "\r\n", "...", "//", "你好", "世界", "ひら", "カタ", "한글", "سلام"),
    *"!?.,;:'\"()[]{}<>/\\|@#$%^&*-_=+~`€±→…—“、。",
)
BEYOND = (
    *("é", "Ä", "ß", "мир", "ДОМ", "Ω", "e\u0301", "नमस्ते", "ไทย", "👍🏽", "❤️"),
    *("٣٤٥", "Ⅷ", "²", "ﬁ", "Ａ", "\u200b", "\u00a0"),
)


def texts(pieces: tuple[str, ...], count: int) -> list[str]:
    chosen = random.Random(1)
    return ["".join(chosen.choices(pieces, k=chosen.randint(1, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def uncut() -> dict[str, Any]:
    """A BPE's vocabulary and merges, learned across all cuts: other cuts give other tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=llama.SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts((*PIECES, *BEYOND), 8000), trainer)
    found: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return found


def write(vocabulary: Vocabulary, path: Path) -> Path:
    """A file of a vocabulary alone."""
    import gguf

    with closing(gguf.GGUFWriter(path, "llama")) as writer:
        for key in ("context_length", "embedding_length", "block_count", "feed_forward_length", "head_count"):
            getattr(writer, f"add_{key}")(1)
        writer.add_layer_norm_rms_eps(1e-5)
        vocabulary.write(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return path


def in_llama(tokenizer: Tokenizer, folder: Path) -> Any:
    vocabulary = read_vocabulary(llama.in_folder(tokenizer, folder), llama.config(tokenizer.get_vocab_size()))
    return llama.opened(write(vocabulary, folder / "vocabulary.gguf"), vocab_only=True)


@pytest.mark.parametrize("name", NAMES)
def test_random_texts(uncut: dict[str, Any], tmp_path: Path, name: str) -> None:
    cuts, skips = NAMES[name]
    merges = [tuple(pair) for pair in uncut["merges"]]
    vocab = uncut["vocab"]
    if name == "deepseek-llm":  # digits are single in the tokenizer and together in llama.cpp
        vocab = {token: number for number, token in enumerate(t for t in vocab if not re.search(r"[0-9]{2}", t))}
        merges = [pair for pair in merges if "".join(pair) in vocab]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=skips))
    tokenizer.add_special_tokens(llama.SPECIAL)
    tokenizer.pre_tokenizer = llama.byte_level(cuts, skips, size=300).pre_tokenizer
    pieces = PIECES if name in ASCII_CAPITALS else (*PIECES, *BEYOND)
    if name == "deepseek-llm":
        pieces = tuple(piece for piece in pieces if piece not in ("٣٤٥", "Ⅷ", "²"))
    with in_llama(tokenizer, tmp_path) as theirs:
        for text in texts(pieces, 400):
            found = theirs.tokenize(text.encode(), add_bos=False, special=False)
            assert found == tokenizer.encode(text).ids, text


def test_patterns_that_keep_what_they_match(tmp_path: Path) -> None:
    """As Granite 4's and MiniMax M2's, which keep the matches of a pattern that matches everything."""
    (pattern,), skips = NAMES["gpt-4o"]
    tokenizer = llama.byte_level((pattern,), skips)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    with in_llama(tokenizer, tmp_path) as theirs:
        for text in (text for text in llama.TEXTS if text != llama.MARKED):
            assert theirs.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text).ids, text


def test_removed_digits_are_refused(tmp_path: Path) -> None:
    tokenizer = llama.byte_level((r"\p{N}{1,3}", *NAMES["deepseek-v3"][0][1:]), False, size=300)
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    with pytest.raises(ConfigError, match="pre-tokenizers"):
        in_llama(Tokenizer.from_str(json.dumps(state)), tmp_path)


@pytest.mark.parametrize("name", ["gpt-4o", "qwen2", "tekken"])
@pytest.mark.parametrize("reached", [True, False])
def test_ignore_merges_that_changes_nothing(tmp_path: Path, name: str, reached: bool) -> None:
    """llama.cpp's names say whether merges are ignored; the other setting is the same if merges give every word."""
    cuts, skips = NAMES[name]
    tokenizer = llama.byte_level(cuts, not skips)
    if not reached:
        state = json.loads(tokenizer.to_str())
        state["model"]["vocab"]["Ġzebra"] = tokenizer.get_vocab_size()
        tokenizer = Tokenizer.from_str(json.dumps(state))
        with pytest.raises(ConfigError, match="would tokenize text differently"):
            in_llama(tokenizer, tmp_path)
        return
    with in_llama(tokenizer, tmp_path) as theirs:
        for text in (text for text in llama.TEXTS if text != llama.MARKED):
            assert theirs.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text).ids, text


def test_merged_digits_of_deepseek_llm_are_refused(tmp_path: Path) -> None:
    tokenizer = llama.byte_level(NAMES["deepseek-llm"][0], False, size=300)
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"]["12"] = tokenizer.get_vocab_size()
    state["model"]["merges"].append(["1", "2"])
    with pytest.raises(ConfigError, match="pre-tokenizers"):
        in_llama(Tokenizer.from_str(json.dumps(state)), tmp_path)


@pytest.mark.parametrize("templated", [True, False])
def test_tokens_before_a_text(tmp_path: Path, templated: bool, caplog: pytest.LogCaptureFixture) -> None:
    """GLM's: its chat template writes them, too."""
    tokenizer = llama.byte_level((GPT2,), False, size=300)
    tokenizer.add_special_tokens(["[gMASK]", "<sop>"])
    added = [(token, tokenizer.token_to_id(token)) for token in ("[gMASK]", "<sop>")]
    tokenizer.post_processor = processors.TemplateProcessing("[gMASK] <sop> $A", special_tokens=added)
    if not templated:
        with pytest.raises(ConfigError, match="other special tokens"):
            in_llama(tokenizer, tmp_path)
        return
    (tmp_path / "chat_template.jinja").write_text("[gMASK]<sop>{{ messages[0].content }}")
    with in_llama(tokenizer, tmp_path) as theirs:
        whole = theirs.tokenize(b"[gMASK]<sop>Once upon a time", add_bos=True, special=True)
        assert whole == tokenizer.encode("Once upon a time").ids
    assert "does not add [gMASK]<sop>" in caplog.text


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_metaspace(tmp_path: Path, scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    """As in Mistral 7B v0.3 (first) and ERNIE 4.5 (never)."""
    tokenizer = llama.sentencepiece_like(prefix=False)
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.add_special_tokens(["[INST]"])
    with in_llama(tokenizer, tmp_path) as theirs:

        def same(text: str) -> bool:
            found: list[int] = theirs.tokenize(text.encode(), add_bos=False, special=True)
            ours: list[int] = tokenizer.encode(text).ids
            return found == ours

        assert same("Once upon a time")
        for text in ("[INST] Once", " Once upon a time"):
            assert same(text) == (scheme == "never")
    assert ("prepends a space" in caplog.text) == (scheme != "never")


@pytest.mark.parametrize("change", [{"rstrip": True}, {"lstrip": True}, {}])
def test_white_space_that_llama_cpp_would_keep(
    tmp_path: Path, change: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = llama.byte_level((GPT2,), False, size=300)
    tokenizer.add_special_tokens([AddedToken("<|user|>", **change)])
    text = "Once <|user|> upon"
    with in_llama(tokenizer, tmp_path) as theirs:
        same = theirs.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text).ids
    assert same == (not change)
    assert ("white space beside <|user|>" in caplog.text) == bool(change)


ENDS = {  # generation_config.json's end tokens, the tokenizer's first, and what conversion for llama.cpp calls them
    "gemma": (["<eos>", "<end_of_turn>"], "<end_of_turn>"),
    "phi3": (["<|endoftext|>", "<|assistant|>", "<|end|>"], "<|end|>"),
    "glm4": (["<|endoftext|>", "<|user|>", "<|observation|>"], "<|user|>"),
    "granite": (["<|end_of_text|>"], "<|end_of_text|>"),
    "qwen2": (["<|im_end|>", "<|endoftext|>"], "<|im_end|>"),
    "llama3": (["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], "<|eot_id|>"),
}


@pytest.mark.parametrize("family", ENDS)
def test_end_tokens(tmp_path: Path, family: str) -> None:
    from llama_cpp import llama_model_get_vocab, llama_vocab_eos, llama_vocab_eot, llama_vocab_is_eog

    ends, turn = ENDS[family]
    tokenizer = llama.byte_level((GPT2,), False, size=300)
    tokenizer.add_special_tokens(ends)
    ids = [tokenizer.token_to_id(token) for token in ends]
    folder = llama.in_folder(tokenizer, tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": ends[0]}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    vocabulary = read_vocabulary(folder, llama.config(tokenizer.get_vocab_size()))
    with llama.opened(write(vocabulary, folder / "vocabulary.gguf"), vocab_only=True) as theirs:
        vocab = llama_model_get_vocab(theirs._model.model)
        assert llama_vocab_eos(vocab) == ids[0]
        assert llama_vocab_eot(vocab) == tokenizer.token_to_id(turn)
        assert all(llama_vocab_is_eog(vocab, token) for token in ids)


def test_chat_templates(tmp_path: Path) -> None:
    from llama_cpp import llama_model_chat_template

    tokenizer = llama.byte_level((GPT2,), False, size=300)
    folder = llama.in_folder(tokenizer, tmp_path)
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    vocabulary = read_vocabulary(folder, llama.config(tokenizer.get_vocab_size()))
    with llama.opened(write(vocabulary, folder / "vocabulary.gguf"), vocab_only=True) as theirs:
        assert llama_model_chat_template(theirs._model.model, None) == b"plain"
        assert llama_model_chat_template(theirs._model.model, b"tool_use") == b"tools"
