"""How a model is split over ranks: parts cover every weight once, and a linear's parts are those of the whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MakeModel, tiny_config
from hypothesis import given
from hypothesis import strategies as st

import squawq
from squawq import QuantConfig
from squawq.config import ModelConfig
from squawq.errors import ConfigError
from squawq.format.layouts import part_group
from squawq.format.reader import Checkpoint
from squawq.nn.loader import linear_shapes
from squawq.nn.shard import Shard, refused, sizes

CONFIG = ModelConfig.from_dict(tiny_config())


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    kv = draw(st.sampled_from([1, 2, 3, 8]))
    return replace(
        CONFIG,
        num_kv_heads=kv,
        num_heads=kv * draw(st.sampled_from([1, 2, 5, 8])),
        head_dim=draw(st.sampled_from([16, 64, 80, 128])),
        intermediate_size=draw(st.sampled_from([96, 688, 11008, 29568, 14336])),
        vocab_size=draw(st.sampled_from([160, 32000, 32003, 128256])),
        quant=draw(st.sampled_from([None, QuantConfig(), QuantConfig(group_size=32), QuantConfig(group_size=-1)])),
    )


def span(part: slice, count: int) -> set[int]:
    return set(range(*part.indices(count)))


@given(models(), st.integers(1, 10))
def test_parts_cover_a_model(config: ModelConfig, size: int) -> None:
    if refused(config, size):
        return
    ranks = [Shard(rank, size) for rank in range(size)]
    for name, (out, in_) in linear_shapes(config).items():
        parts = [shard.part(name, config) for shard in ranks]
        outputs, inputs = [span(part[0], out) for part in parts], [span(part[1], in_) for part in parts]
        if name.endswith(("o_proj", "down_proj")):
            assert all(part == set(range(out)) for part in outputs)
            assert sum(map(len, inputs)) == len(set.union(*inputs)) == in_
        else:
            assert all(part == set(range(in_)) for part in inputs)
            assert set.union(*outputs) == set(range(out))
            if size <= config.num_kv_heads or name.endswith(("q_proj", "gate_proj", "up_proj")):
                assert sum(map(len, outputs)) == out
        for shard, part in zip(ranks, outputs, strict=True):
            assert len(part) == linear_shapes(shard.config(config))[name][0]
    tokens = [span(shard.vocabulary(config), config.vocab_size) for shard in ranks]
    assert sum(map(len, tokens)) == len(set.union(*tokens)) == config.vocab_size
    assert [len(part) for part in tokens] == ranks[0].vocabularies(config)


@given(models(), st.integers(1, 10))
def test_query_heads_find_their_keys(config: ModelConfig, size: int) -> None:
    """A rank's query head h uses its key-value head h // (query heads / key-value heads), as everywhere."""
    if refused(config, size):
        return
    for rank in range(size):
        shard = Shard(rank, size)
        own, dim = shard.config(config), config.head_dim
        queries = sorted({feature // dim for feature in span(shard.part("q_proj", config)[0], 10**9)})
        keys = sorted({feature // dim for feature in span(shard.part("k_proj", config)[0], 10**9)})
        assert (len(queries), len(keys)) == (own.num_heads, own.num_kv_heads)
        for index, query in enumerate(queries):
            assert keys[index // (own.num_heads // own.num_kv_heads)] == query // (
                config.num_heads // config.num_kv_heads
            )


def test_which_sizes() -> None:
    assert sizes(CONFIG) == [1, 2, 4]
    assert sizes(replace(CONFIG, num_heads=64, num_kv_heads=8, intermediate_size=28672, vocab_size=128256)) == [
        *(1, 2, 4, 8, 16, 32, 64)
    ]
    for config, size, reason in (
        (CONFIG, 3, "4 attention heads do not divide"),
        (replace(CONFIG, num_heads=6, num_kv_heads=2), 3, "2 key-value heads can neither be split nor repeated"),
        (replace(CONFIG, head_dim=8), 2, "head_dim of 8 is no multiple of 16"),
        (replace(CONFIG, intermediate_size=48), 4, "too small"),
        (CONFIG, 65, "1 to 64 processes"),
    ):
        with pytest.raises(ConfigError, match=rf"tensor_parallel_size is {size}, but .*{reason}.*can take 1"):
            Shard(0, size).config(config)


@pytest.mark.parametrize("group", [16, 32, -1])
def test_parts_of_a_linear(group: int, make_model: MakeModel, tmp_path: Path) -> None:
    config = QuantConfig(group_size=group, method="rtn")
    squawq.quantize(make_model(), tmp_path / "out", config, progress=False)
    checkpoint = Checkpoint(tmp_path / "out")
    size = checkpoint.group_of(96)
    for outputs, inputs in (
        (slice(8, 40), slice(None)),
        (slice(None), slice(32, 96)),
        (slice(16, 64), slice(16, 80)),
        (slice(None), slice(0, 16)),
    ):
        name = "model.layers.1.mlp.down_proj"
        whole = checkpoint.read_quantized(name, 96, 64).dequantize()
        part = checkpoint.read_quantized(name, 96, 64, (outputs, inputs))
        assert torch.equal(part.dequantize(), whole[outputs, inputs])
        assert part.q.shape[1] // part.scales.shape[1] == part_group(inputs, 96, size)
