"""GGUF files in llama.cpp itself: the same tokens for a text, the same logits for tokens, the same greedy text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from squawq import LLM, SamplingParams
from squawq.config import ModelConfig
from squawq.demo import demo_model
from squawq.errors import ConfigError
from squawq.export.gguf import export_gguf
from squawq.export.gguf_pre_tokenizers import ASCII_CAPITALS, GPT2, PRE_TYPES
from squawq.export.gguf_tokenizer import read_vocabulary

if TYPE_CHECKING:
    from conftest import MakeModel

pytest.importorskip("gguf", reason="needs the package gguf")
llama_cpp = pytest.importorskip("llama_cpp", reason="needs the package llama-cpp-python")

MARKED = "e\u0301te\u0301, n\u0303andu\u0301; नमस्ते ไทย"
TEXTS = (
    "Hello, world! I'LL say: don't, we'Re 12345 years old; 3.14",
    "  two\n\n three \t\t tabs\r\n\r\nand   spaces   ",
    "Grüße, naïve 你好 мир 👍🏽 …—“quotes”",
    "Once upon a time there was a little girl named Lily.",
    "x=1;y+=22//z\n",
    "camelCase HTMLParser ABCdef iPhone's DON'T a/b//\n\n(c) [d]/ /e",
    MARKED,
    "日本語のテキスト、12,345円です。カタカナ123456",
    "!important #tag $x @you_and_me <b>bold</b> €5 ±2 …\t\n  indented",
    " ",
)
SPECIAL = ["<unk>", "<s>", "</s>"]


@contextmanager
def opened(path: Path, **settings: Any) -> Iterator[Any]:
    """A file in llama.cpp."""
    with closing(llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, verbose=False, **settings)) as found:
        yield found


def corpus() -> list[str]:
    return (demo_model() / "held_back.txt").read_text().splitlines()[:400]


def byte_level(cuts: tuple[str, ...], skip_merges: bool, size: int = 900) -> Tokenizer:
    """A byte-level BPE that cuts text in this way."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=skip_merges))
    steps: list[Any] = []
    for cut in cuts:
        if cut == r"\p{N}":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif cut != GPT2:
            steps.append(pre_tokenizers.Split(Regex(cut), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in cuts))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*corpus(), *TEXTS * 50], trainer)  # so that TEXTS have whole words
    return tokenizer


def sentencepiece_like(prefix: bool) -> Tokenizer:
    """Pieces and bytes, and as merges all splits of every piece in the pieces' order, as Llama 2's are converted."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False)
    learned.train_from_iterator(corpus(), trainer)
    pieces = sorted(learned.get_vocab().items(), key=lambda item: item[1])
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *(piece for piece, _ in pieces[len(SPECIAL) :])]
    vocab = {name: number for number, name in enumerate(names)}
    merges = [
        (name[:cut], name[cut:])
        for name in names[len(SPECIAL) + 256 :]
        for cut in range(1, len(name))
        if name[:cut] in vocab and name[cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prefix else [spaces])
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def in_folder(tokenizer: Tokenizer, folder: Path) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}')
    return folder


def check_tokens(folder: Path, tokenizer: Tokenizer, marks: bool = True) -> None:
    """marks: llama.cpp leaves combining marks in their words."""
    path = folder / "model.gguf"
    export_gguf(in_folder(tokenizer, folder), path)
    with opened(path, vocab_only=True) as theirs:
        for text in (*TEXTS, *corpus()[:100]):
            found = theirs.tokenize(text.encode(), add_bos=True, special=False)
            assert (found == tokenizer.encode(text).ids) == (marks or text != MARKED), text


@pytest.mark.parametrize(("key", "name"), PRE_TYPES.items(), ids=PRE_TYPES.values())
def test_byte_level_text_to_tokens(
    make_model: MakeModel, key: tuple[tuple[str, ...], bool], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = byte_level(*key)
    folder = make_model(vocab_size=tokenizer.get_vocab_size() + 3, eos_token_id=2)
    check_tokens(folder, tokenizer, marks=name not in ASCII_CAPITALS)
    assert ("splits words at combining marks" in caplog.text) == (name in ASCII_CAPITALS)


@pytest.mark.parametrize("kind", ["llama", "plain", "gemma"])
def test_sentencepiece_like_text_to_tokens(make_model: MakeModel, kind: str) -> None:
    tokenizer = sentencepiece_like(kind == "llama")
    if kind == "gemma":  # whose normalizer leaves its pre-tokenizer nothing to cut
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.add_tokens(["\n", "\n\n", "<table>"])
    check_tokens(make_model(vocab_size=tokenizer.get_vocab_size(), eos_token_id=2), tokenizer)


def test_tokens_that_swallow_white_space(make_model: MakeModel, tmp_path: Path) -> None:
    """As Phi 3's, whose chat template has line breaks after them."""
    tokenizer = sentencepiece_like(prefix=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.add_special_tokens([AddedToken("<|user|>", rstrip=True), AddedToken("<|end|>", rstrip=True)])
    folder = in_folder(tokenizer, make_model(vocab_size=tokenizer.get_vocab_size(), eos_token_id=2))
    export_gguf(folder, tmp_path / "model.gguf")
    text = "<|user|>\nOnce upon a time<|end|>\n<|user|> There"
    with opened(tmp_path / "model.gguf", vocab_only=True) as theirs:
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text).ids


@pytest.mark.parametrize(
    "prompt",
    ["Once upon a time", "The little dog", "A big red ball", "One day, a girl named Sue"],
)
def test_greedy_text_of_the_demo_model(awq_demo: Path, tmp_path: Path, prompt: str) -> None:
    export_gguf(awq_demo, tmp_path / "demo.gguf")
    with LLM(awq_demo, exact=True, threads=2) as llm:
        ids = llm.tokenizer.encode(prompt)
        ours = list(llm.generate_ids(ids, SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)))
    with opened(tmp_path / "demo.gguf") as llama:
        assert llama.tokenize(prompt.encode()) == ids
        pieces = llama.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0)
        assert [next(pieces) for _ in ours] == ours


@pytest.mark.parametrize("change", ["cuts", "normalizer", "merges"])
def test_a_tokenizer_without_a_name_is_refused(tmp_path: Path, change: str) -> None:
    if change == "merges":  # one split of each piece, not all
        tokenizer = Tokenizer(
            models.BPE(
                {"a": 0, "b": 1, "ab": 2, "ba": 3, "aba": 4}, [("a", "b"), ("b", "a"), ("ab", "a")], byte_fallback=True
            )
        )
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    else:
        tokenizer = byte_level((r"\w+|\s+",) if change == "cuts" else (GPT2,), skip_merges=False, size=300)
        if change == "normalizer":
            tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(
        ConfigError, match="cannot be expressed as GGUF's scores" if change == "merges" else "pre-tokenizers"
    ):
        read_vocabulary(in_folder(tokenizer, tmp_path), config(tokenizer.get_vocab_size()))


def config(size: int) -> ModelConfig:
    """Of a small Llama with this many tokens."""
    numbers = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ModelConfig.from_dict({"model_type": "llama", "vocab_size": size, **numbers})
