"""Writes random-weight checkpoints of named shapes, AWQ INT4 or 16-bit, for benchmarks without a real model.

    python benchmarks/checkpoints.py llama-3.2-1b FOLDER [--layers 4] [--dense]

Tensors, layout and config.json are those of a real checkpoint (docs/explanation/format.md); the weights are noise with
standard deviation 0.02. There is no tokenizer. One shard per layer; at most one layer (or the embedding) is in memory.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from squawq.config import ModelConfig
from squawq.format.files import write_json
from squawq.format.groupwise import PER_WORD
from squawq.format.shards import shard_name, write_index, write_shard
from squawq.nn.loader import layer_shapes
from squawq.quant_config import QuantConfig

STD = 0.02
LEVEL_STD = 4.64  # standard deviation of a nibble uniform in 0 to 15 minus a zero of 7 or 8
QUANT = QuantConfig()


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, or with `experts` a Qwen3-MoE's, of whose experts `inner` is the inner size.

    head_dim: By default hidden / heads.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int = 128256
    tied: bool = False
    head_dim: int = 0
    experts: int = 0
    top_k: int = 0

    def config(self, layers: int) -> dict[str, Any]:
        """config.json with this many layers."""
        family = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        if self.experts:
            family = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
        experts = {
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.inner,
            "norm_topk_prob": True,
        }
        return {
            **family,
            **(experts if self.experts else {}),
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim or self.hidden // self.heads,
            "num_hidden_layers": layers,
            "vocab_size": self.vocab,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
        }

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of every linear in a layer."""
        return layer_shapes(ModelConfig.from_dict(self.config(self.layers)), 0)

    def norms(self) -> dict[str, int]:
        """Weights of every norm in a layer."""
        sizes = {"input_layernorm": self.hidden, "post_attention_layernorm": self.hidden}
        return sizes | ({"self_attn.q_norm": self.head_dim, "self_attn.k_norm": self.head_dim} if self.experts else {})

    def nbytes(self) -> int:
        """Bytes of the whole model in 16 bits."""
        layer = sum(rows * columns for rows, columns in self.linears().values()) + sum(self.norms().values())
        table = self.vocab * self.hidden
        return 2 * (self.layers * layer + table + self.hidden + (0 if self.tied else table))


SHAPES = {
    "tiny": Shape(layers=2, hidden=256, inner=512, heads=4, kv_heads=2, vocab=1024, tied=True),
    "llama-3.2-1b": Shape(layers=16, hidden=2048, inner=8192, heads=32, kv_heads=8, tied=True),
    "llama-3.1-8b": Shape(layers=32, hidden=4096, inner=14336, heads=32, kv_heads=8),
    "llama-3.1-70b": Shape(layers=80, hidden=8192, inner=28672, heads=64, kv_heads=8),
    "tiny-moe": Shape(2, 256, 256, 4, 2, 1024, tied=True, head_dim=64, experts=8, top_k=2),
    # 4 of Qwen3-30B-A3B's 48 layers, with a twelfth of its vocabulary
    "qwen3-30b-a3b-4": Shape(4, 2048, 768, 32, 4, 12672, tied=True, head_dim=128, experts=128, top_k=8),
    "llama-3.1-405b": Shape(layers=126, hidden=16384, inner=53248, heads=128, kv_heads=8),
}


class Noise:
    """Random tensors; the same for the same seed."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype = dtype
        self._torch = torch.Generator().manual_seed(seed)
        self._numpy = np.random.default_rng(seed)

    def matrix(self, out_features: int, in_features: int, std: float = STD) -> dict[str, Tensor]:
        """A 16-bit linear or embedding."""
        return {"weight": torch.randn(out_features, in_features, dtype=self.dtype, generator=self._torch).mul_(std)}

    def quantized(self, out_features: int, in_features: int) -> dict[str, Tensor]:
        """An AWQ GEMM linear: random nibbles, zeros of 7 or 8, scales within a fifth of each other."""
        groups, words = in_features // QUANT.group_of(in_features), out_features // PER_WORD
        scales = self._numpy.uniform(0.9, 1.1, (groups, out_features)) * (STD / LEVEL_STD)
        zeros = (self._words(groups, words) & 0x11111111) + 0x77777777
        return {
            "qweight": torch.from_numpy(self._words(in_features, words).view(np.int32)),
            "qzeros": torch.from_numpy(zeros.view(np.int32)),
            "scales": torch.from_numpy(scales.astype(np.float16)),
        }

    def _words(self, rows: int, columns: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint32]]:
        return self._numpy.integers(0, 2**32, (rows, columns), np.uint32)


def write_checkpoint(folder: Path, shape: Shape, layers: int, *, quantized: bool, head_std: float = STD) -> int:
    """Write AWQ INT4 with float16 for the rest, or bfloat16 throughout, to a folder that must not exist yet.

    Returns the bytes of all tensors.
    """
    folder.mkdir(parents=True)
    noise = Noise(torch.float16 if quantized else torch.bfloat16)
    config = shape.config(layers) | {"torch_dtype": str(noise.dtype).removeprefix("torch.")}
    if quantized:
        config["quantization_config"] = QUANT.to_quantization_config([])
    write_json(folder / "config.json", config)

    def write(shard: int, modules: dict[str, dict[str, Tensor]]) -> None:
        tensors = {f"{name}.{part}": tensor for name, parts in modules.items() for part, tensor in parts.items()}
        write_shard(folder / shard_name(shard, layers + 2), tensors)

    def norm(size: int = shape.hidden) -> dict[str, Tensor]:
        return {"weight": torch.ones(size, dtype=noise.dtype)}

    def linear(name: str, out_features: int, in_features: int) -> dict[str, Tensor]:
        made = noise.quantized if quantized and name != "mlp.gate" else noise.matrix
        return made(out_features, in_features)

    write(1, {"model.embed_tokens": noise.matrix(shape.vocab, shape.hidden)})
    for index in range(layers):
        prefix = f"model.layers.{index}"
        modules = {f"{prefix}.{name}": linear(name, *size) for name, size in shape.linears().items()}
        modules |= {f"{prefix}.{name}": norm(size) for name, size in shape.norms().items()}
        write(index + 2, modules)
        del modules  # before the next layer is made
    head = {} if shape.tied else {"lm_head": noise.matrix(shape.vocab, shape.hidden, head_std)}
    write(layers + 2, {"model.norm": norm()} | head)
    return write_index(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path, help="the folder to create")
    parser.add_argument("--layers", type=int, help="default: as many as the model has")
    parser.add_argument("--dense", action="store_true", help="bfloat16 instead of INT4")
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} is there already")
    shape = SHAPES[args.shape]
    size = write_checkpoint(args.folder, shape, args.layers or shape.layers, quantized=not args.dense)
    print(f"{args.folder}: {size / 1e6:,.1f} MB")


if __name__ == "__main__":
    main()
