"""What our decoder does otherwise than in Llama, for the rows of families.py that it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Traits:
    """How our decoder (`nn/`) computes a family's layers, beside what config.json says. The defaults are Llama's.

    Attributes:
        norms: Names of the norms before attention, of its output, before the MLP, of its output ("": none).
        qk_norm: Norms of queries and keys: "" (none), "head" (of each head, weights [head_dim]) or "whole" (of all
            heads together, weights [heads * head_dim]).
        qk_names: Names of those norms.
        qk_flag: Key of config.json that is true where a model has them; "": all have.
        rope_first: They come after RoPE, not before.
        interleaved: RoPE turns neighbours (2i, 2i + 1) instead of a head's two halves.
        wide: Activations exceed float16's range, so that "auto" means bfloat16 where a backend has it.
        gated: Each head of q_proj has a query and a gate of the head's output.
        by_key_heads: The inputs of a delta rule are two linears, whose outputs are ordered by key heads.
    """

    norms: tuple[str, str, str, str] = ("input_layernorm", "", "post_attention_layernorm", "")
    qk_norm: Literal["", "head", "whole"] = ""
    qk_names: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    qk_flag: str = ""
    rope_first: bool = False
    interleaved: bool = False
    wide: bool = False
    gated: bool = False
    by_key_heads: bool = False
