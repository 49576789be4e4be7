"""Converts tokenizer.json and chat templates to GGUF's `tokenizer.*` keys: byte-level BPE and SentencePiece-like BPE.

GGUF names a pre-tokenizer instead of storing it. A tokenizer that none of the known names fits is refused: llama.cpp
would read the same text as other tokens. If it differs in few texts only, a warning is logged.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from squawq.config import ModelConfig
from squawq.engine.generation_config import GenerationConfig
from squawq.errors import CheckpointError, ConfigError
from squawq.export.gguf_pre_tokenizers import pre_tokenizer_name, steps
from squawq.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # GGUF's token types
LONGEST = 2**12  # characters of a token
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")

PHI3 = ("</s>", "<unk>", "<s>", "<|endoftext|>")  # tokens that llama.cpp looks for in models named phi-3
logger = logging.getLogger("squawq")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in GGUF's terms. pre and merges: of "gpt2" only; scores and space_prefix: of "llama" only.

    strips: Special tokens strip white space to their right (`rstrip`), as llama.cpp does if the name contains phi-3.
    """

    model: str
    tokens: Sequence[str]
    types: Sequence[int]
    ids: Mapping[str, int]  # bos, eos, eot, eom, pad, unk: those that the model has
    add_bos: bool
    add_eos: bool
    templates: Mapping[str, str]
    pre: str = "default"
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()
    space_prefix: bool | None = None
    strips: bool = False

    def write(self, writer: Any) -> None:
        """Write the keys to a GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        writer.add_token_scores(self.scores)
        for name, token in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        if self.templates:
            writer.add_chat_template([{"name": name, "template": text} for name, text in self.templates.items()])


def read_vocabulary(folder: Path, config: ModelConfig) -> Vocabulary:
    """The vocabulary of a model folder. Raises ConfigError for a tokenizer that GGUF cannot express exactly."""
    tokenizer = Tokenizer(folder)
    state = json.loads(tokenizer.fast.to_str())  # as the library writes it: with every key, which the file may lack
    model = state["model"]
    where = f"{folder / 'tokenizer.json'}"
    if model.get("type") != "BPE":
        raise ConfigError(f"{where}: the model is {model.get('type')!r}; squawq writes BPE vocabularies to GGUF")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ConfigError(f"{where}: GGUF cannot store a subword prefix or word suffix")
    tokens, types = _tokens(state, config.vocab_size, where)
    ids = _special_ids(tokenizer, tokens, config)
    add_bos, add_eos = _added_around(tokenizer, ids, where)
    named = {"default": tokenizer.chat_template, "tool_use": tokenizer.tool_template}
    shared = (tokens, types, ids, add_bos, add_eos, {name: text for name, text in named.items() if text})
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    if model.get("byte_fallback"):
        scores = _scores(tokens, types, merges, where)
        prefix, strips = _space_prefix(state, where), _strips(state, tokens)
        return Vocabulary("llama", *shared, scores=scores, space_prefix=prefix, strips=strips)
    _warn_of_stripping(state, ())
    pre = pre_tokenizer_name(tokenizer, state, where)
    return Vocabulary("gpt2", *shared, pre=pre, merges=[" ".join(pair) for pair in merges])


def _tokens(state: Mapping[str, Any], size: int, where: str) -> tuple[list[str], list[int]]:
    """Every token and its type, by id; ids without a token (padded vocabularies) become unused tokens."""
    tokens, types = [f"[PAD{index}]" for index in range(size)], [UNUSED] * size
    found = [(token, index, NORMAL) for token, index in state["model"]["vocab"].items()]
    found += [(t["content"], t["id"], CONTROL if t["special"] else USER_DEFINED) for t in state["added_tokens"]]
    for token, index, kind in found:
        if not 0 <= index < size:
            raise CheckpointError(f"{where}: token {token!r} has id {index}; the model has {size} tokens")
        tokens[index], types[index] = token, kind
    known = {token for token, _, _ in found}
    for index, kind in enumerate(types):
        while kind == UNUSED and tokens[index] in known:
            tokens[index] += "_"
    if len(set(tokens)) != size:
        raise CheckpointError(f"{where}: a token has two ids")
    unknown, fallback = state["model"].get("unk_token"), state["model"].get("byte_fallback")
    for index, token in enumerate(tokens):
        if token == unknown:
            types[index] = UNKNOWN
        elif fallback and types[index] == NORMAL and len(token) == 6 and token.startswith("<0x"):
            types[index] = BYTE
    return tokens, types


def _special_ids(tokenizer: Tokenizer, tokens: Sequence[str], config: ModelConfig) -> dict[str, int]:
    """Special token ids by GGUF's names. eos is the tokenizer's, as chat templates write it; other end tokens become
    eot (end of turn, if the token's text says so) and eom (end of message)."""
    index = {token: number for number, token in enumerate(tokens)}
    ids = {}
    for name in ("bos", "eos", "pad", "unk"):
        value = index.get(tokenizer.token(f"{name}_token") or "", config.raw.get(f"{name}_token_id"))
        if isinstance(value, int) and 0 <= value < config.vocab_size:
            ids[name] = value
    ending = sorted(GenerationConfig(tokenizer.folder, config).eos_ids)
    if ending and ids.get("eos") not in ending:
        ids["eos"] = ending[0]
    others = [number for number in ending if number != ids["eos"]]
    turns = [number for number in ending if tokens[number] in TURN_ENDS] or others
    if turns:
        ids["eot"] = turns[0]
    if rest := [number for number in others if number not in turns[:1]]:
        ids["eom"] = rest[0]
    if rest[1:]:
        logger.warning("GGUF names three end tokens: llama.cpp stops at %s only if it knows their texts", rest[1:])
    return ids


def _added_around(tokenizer: Tokenizer, ids: Mapping[str, int], where: str) -> tuple[bool, bool]:
    """Whether the tokenizer adds a begin token before a text and an end token after it.

    Other tokens before a text (GLM's [gMASK]<sop>) are left to the chat template, if it writes them.
    """
    plain, whole = tokenizer.encode("a", special=False), tokenizer.encode("a")
    for add_bos in (False, True):
        for add_eos in (False, True):
            before = [ids.get("bos")] if add_bos else []
            if whole == [*before, *plain, *([ids.get("eos")] if add_eos else [])]:
                return add_bos, add_eos
    texts = [tokenizer.token_text(token) for token in whole[: -len(plain)]]
    if whole[len(texts) :] == plain and all(text in (tokenizer.chat_template or "") for text in texts):
        logger.warning("llama.cpp does not add %s to a text without the chat template", "".join(texts))
        return False, False
    raise ConfigError(f"{where}: adds other special tokens to a text than GGUF's BOS and EOS")


def _strips(state: Mapping[str, Any], tokens: Sequence[str]) -> bool:
    """Whether special tokens strip white space to their right, and llama.cpp can do so: it has a rule for Phi 3."""
    added = {token["content"] for token in state["added_tokens"]}
    strips = set(PHI3) <= set(tokens) and any(token["rstrip"] for token in state["added_tokens"])
    _warn_of_stripping(state, added - {"<unk>", "<s>", "<|endoftext|>"} if strips else ())
    return strips


def _warn_of_stripping(state: Mapping[str, Any], right: Collection[str]) -> None:
    """Warn of tokens that strip white space and not in llama.cpp, where those in `right` strip it to their right."""
    added = state["added_tokens"]
    others = [t["content"] for t in added if t["lstrip"] or t["rstrip"] != (t["content"] in right)]
    if others:
        logger.warning(
            "llama.cpp tokenizes white space beside %s differently: GGUF cannot store which tokens strip it (lstrip, "
            "rstrip)",
            ", ".join(others[:5]) + (", ..." if len(others) > 5 else ""),
        )


def _space_prefix(state: Mapping[str, Any], where: str) -> bool:
    """Whether a SentencePiece-like tokenizer prepends a space to a text."""
    normalizers = steps(state, "normalizer", "normalizers")
    kinds, cuts = [step["type"] for step in normalizers], steps(state, "pre_tokenizer", "pretokenizers")
    if kinds and [(step["type"], step.get("pattern")) for step in cuts] == [("Split", {"String": " "})]:
        cuts = []  # Gemma's: the normalizer leaves no space
    if kinds in (["Prepend", "Replace"], ["Replace"]) and not cuts:
        return kinds == ["Prepend", "Replace"]
    if not kinds and [step["type"] for step in cuts] == ["Metaspace"] and cuts[0].get("split") is False:
        if cuts[0]["prepend_scheme"] != "never":
            logger.warning(
                "llama.cpp prepends a space after each special token and before a text that begins with a space; this "
                "tokenizer (Metaspace, %s) does not, so that llama.cpp tokenizes such texts differently",
                cuts[0]["prepend_scheme"],
            )
        return bool(cuts[0]["prepend_scheme"] != "never")
    raise ConfigError(f"{where}: normalizes text differently from GGUF's 'llama' tokenizer")


def _scores(tokens: Sequence[str], types: Sequence[int], merges: Sequence[tuple[str, ...]], where: str) -> list[float]:
    """Merge ranks as SentencePiece scores: llama.cpp joins the pair whose joined token has the highest score.

    Both orders agree only if all splits of a token are merges with consecutive ranks. Raises ConfigError otherwise.
    """
    known, ranks = set(tokens), dict[str, list[int]]()
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), []).append(rank)
    for token, kind in zip(tokens, types, strict=True):
        if kind != NORMAL:
            continue
        if len(token) > LONGEST:
            raise ConfigError(f"{where}: a token has {len(token)} characters; GGUF takes up to {LONGEST}")
        splits = sum(token[:cut] in known and token[cut:] in known for cut in range(1, len(token)))
        found = ranks.get(token, [])
        if len(found) != splits or (found and found[-1] - found[0] + 1 != splits):
            raise ConfigError(f"{where}: the merges that give {token!r} cannot be expressed as GGUF's scores")
    return [-float(ranks[token][0]) if token in ranks else 0.0 for token in tokens]
