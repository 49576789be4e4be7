"""llama.cpp's names of byte-level pre-tokenizers.

GGUF names a pre-tokenizer instead of storing its patterns. A name stands for patterns that split text as llama.cpp does
under that name.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from squawq.errors import ConfigError
from squawq.text.tokenizer import Tokenizer

logger = logging.getLogger("squawq")

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (  # words, split before capitals
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|"
)
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_SLASHED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SEED = "\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
_CJK = "[一-龥ࠀ-一가-\ud7ff]+"
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")
_CASED_LETTERS = (  # of alphabets with capitals
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ"
    "-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ"
    "-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_LLM = (
    "[\r\n]",
    rf"\s?[{_CASED_LETTERS}]+",
    "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
    r"\s+$",
    _CJK,
    r"\p{N}",
)
GPT2 = "GPT-2's own"
# (pre-tokenizer patterns, ignore_merges) -> llama.cpp's name of the pre-tokenizer.
PRE_TYPES = {
    ((_WORDS + r"\p{N}{1,3}" + _REST,), True): "llama-bpe",
    ((_WORDS + r"\p{N}{1,3}" + _REST,), False): "smaug-bpe",
    ((_WORDS + r"\p{N}" + _REST,), False): "qwen2",
    (
        (_WORDS.replace(r"\p{L}+", r"[\p{L}\p{M}]+") + r"\p{N}" + _REST.replace(r"\p{L}\p{N}", r"\p{L}\p{M}\p{N}"),),
        False,
    ): "qwen35",
    ((_WORDS.replace(r"\r\n", "\r\n") + _SEED,), False): "seed-coder",
    ((_CASED % ("", "") + r"\p{N}" + _SLASHED,), True): "tekken",
    ((_CASED % (_SHORT, _SHORT) + r"\p{N}{1,3}" + _SLASHED,), False): "gpt-4o",
    ((r"\p{N}{1,3}", _WORDS + r"\p{N}+" + _REST), True): "minicpm5",
    (_DEEPSEEK_V3, False): "deepseek-v3",
    (_DEEPSEEK_CODER, False): "deepseek-coder",
    (_DEEPSEEK_LLM, False): "deepseek-llm",  # which keeps digits together in llama.cpp
    ((r"\p{N}", GPT2), False): "smollm",
    ((GPT2,), False): "gpt-2",
}
# Patterns that match every character: removing what they do not match (Granite 4, MiniMax M2) removes nothing.
_COMPLETE = {cuts[0] for cuts, _ in PRE_TYPES if len(cuts) == 1}
ASCII_CAPITALS = ("tekken", "gpt-4o")  # whose patterns in llama.cpp have no other capitals and no combining marks


def pre_tokenizer_name(tokenizer: Tokenizer, state: Mapping[str, Any], where: str) -> str:
    """llama.cpp's name of a byte-level BPE's pre-tokenizer. An NFC normalizer (Qwen) is ignored, as llama.cpp does.

    Args:
        tokenizer: The tokenizer.
        state: Its tokenizer.json.
        where: The file, for messages.

    Raises:
        ConfigError: llama.cpp would tokenize text differently.
    """
    skips = bool(state["model"].get("ignore_merges"))  # a word that is a token becomes that token
    found = steps(state, "pre_tokenizer", "pretokenizers")
    cuts = tuple(pattern for pattern in map(_pattern, found) if pattern)
    last = [step["type"] == "ByteLevel" for step in found] == [*[False] * (len(found) - 1), True]
    name = PRE_TYPES.get((cuts, skips))
    if name is None and (cuts, not skips) in PRE_TYPES and _reaches_words(tokenizer):
        name = PRE_TYPES[cuts, not skips]
    merged = ("".join(pair).replace(" ", "") for pair in state["model"]["merges"])
    digits = name == "deepseek-llm" and any(re.search("[0-9]{2}", token) for token in merged)
    if name is None or digits or not last or any(s["type"] != "NFC" for s in steps(state, "normalizer", "normalizers")):
        raise ConfigError(
            f"{where}: none of llama.cpp's pre-tokenizers that squawq knows matches this tokenizer "
            f"({', '.join(PRE_TYPES.values())}); llama.cpp would tokenize text differently. "
            "Other engines take the model as compressed-tensors or gptq"
        )
    if name in ASCII_CAPITALS:
        logger.warning(
            "llama.cpp's pre-tokenizer %s, unlike this tokenizer, splits words at combining marks (as in Hindi or "
            "Thai) and does not split them before capitals beyond ASCII: it tokenizes such words differently",
            name,
        )
    return name


def steps(state: Mapping[str, Any], name: str, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, whether it is a sequence or a single one."""
    value = state.get(name)
    if value is None:
        return []
    found: list[dict[str, Any]] = value[inner] if value["type"] == "Sequence" else [value]
    return found


def _pattern(step: Mapping[str, Any]) -> str:
    """The pattern of a step; empty for one that does not split."""
    if step["type"] == "Split":
        pattern, how = step["pattern"].get("Regex"), (step["behavior"], bool(step.get("invert")))
        if pattern and (how == ("Isolated", False) or (how == ("Removed", True) and pattern in _COMPLETE)):
            return str(pattern)
    elif step["type"] == "Digits" and step["individual_digits"]:
        return r"\p{N}"
    elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return GPT2 if step.get("use_regex", True) else ""
    return json.dumps(step)


def _reaches_words(tokenizer: Tokenizer) -> bool:
    """Whether merges produce every token that is a whole word, so that ignore_merges makes no difference."""
    fast = tokenizer.fast
    texts = fast.decode_batch([[token] for token in range(fast.get_vocab_size())], skip_special_tokens=False)
    given, found = fast.model.ignore_merges, []
    for skips in (False, True):
        fast.model.ignore_merges = skips
        found.append([encoding.ids for encoding in fast.encode_batch(texts, add_special_tokens=False)])
    fast.model.ignore_merges = given
    return found[0] == found[1]
