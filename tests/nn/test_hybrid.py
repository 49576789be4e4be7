"""Qwen3.5's decoder, whose layers have linear attention and a state of each sequence, against transformers."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import dense_folder, family_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from squawq.backends import REFERENCE, backend_for
from squawq.backends.cpu import library
from squawq.backends.sampling import Chunk
from squawq.config import ModelConfig
from squawq.decoder_support import check_decoder
from squawq.delta_config import LINEAR
from squawq.engine.capacity import states_that_fit
from squawq.engine.runner import DecoderRunner
from squawq.errors import CheckpointError, ConfigError
from squawq.format.files import read_config
from squawq.format.reader import Checkpoint
from squawq.nn.cache import Cache
from squawq.nn.linears import Linear, load_linear
from squawq.nn.loader import Options, load, rank_bytes
from squawq.nn.shard import ALONE, Shard
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize

FAMILIES = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
SHARED_HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_value_head_dim": 32}
TOKENS = 70
WAYS = {"torch": Options(backend="reference"), "native": Options(exact=True)}
FLOAT16_CACHE = 3e-2  # keys and values are float16, see test_decoder.py


def some_ids(seed: int = 1) -> list[int]:
    return torch.randint(0, 160, (TOKENS + 6,), generator=torch.Generator().manual_seed(seed)).tolist()


def in_chunks(folder: Path, options: Options, size: int) -> Tensor:
    """Logits of a prompt in chunks of `size`, then token by token; in a place that another sequence had before."""
    runner = DecoderRunner(load(folder, options), kv_tokens=1024)
    pages, ids = [5, 2, 9, 11, 12], some_ids()
    runner.run([Chunk(some_ids(2), 0, [*pages, 13], 1, slot=3)])
    cuts = [*range(0, TOKENS, size), *range(TOKENS, len(ids) + 1)]
    chunks = [Chunk(ids[start:end], start, pages, end - start, slot=3) for start, end in pairwise(cuts)]
    return torch.cat([torch.from_numpy(runner.run([chunk])[0]) for chunk in chunks])


def by_transformers(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor([some_ids()])).logits[0]
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{}, SHARED_HEADS, {"attention_bias": True}])
def test_logits_equal_transformers(changes: dict[str, Any], family: str, way: str, tmp_path: Path) -> None:
    expected = by_transformers(family_model(family, tmp_path / "model", **changes))
    assert expected.abs().max() > 1
    for size in (TOKENS, 7):
        found = in_chunks(tmp_path / "model", WAYS[way], size)
        assert (found - expected).abs().max() < FLOAT16_CACHE
        assert (found - expected).abs().mean() < 1e-3


def test_the_text_model_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    """Other names, a config within a config, and tensors for speculation (MTP) and images, which are left alone."""
    folder = tmp_path / "model"
    family_model("qwen3_5_text", folder)
    expected = in_chunks(folder, WAYS["torch"], TOKENS)
    tensors, raw = load_file(folder / "model.safetensors"), read_config(folder)
    renamed = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    others = ("mtp.layers.0.self_attn.q_proj.weight", "mtp.fc.weight", "model.visual.patch_embed.proj.weight")
    save_file(renamed | {name: torch.ones(8, 8) for name in others}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": raw}))
    assert torch.equal(in_chunks(folder, WAYS["torch"], TOKENS), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized(family: str, tmp_path: Path) -> None:
    """INT4 weights in the order of the operations, against transformers with the weights that they stand for."""
    from transformers import AutoModelForCausalLM

    family_model(family, tmp_path / "model", **SHARED_HEADS)
    quantize(tmp_path / "model", tmp_path / "awq", QuantConfig(group_size=32, method="rtn"))
    dense = dense_folder(tmp_path / "awq", tmp_path / "model", tmp_path / "dense")
    expected = by_transformers(AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval())
    for options in WAYS.values():
        found = in_chunks(tmp_path / "awq", options, 33)
        assert (found - expected).abs().max() < FLOAT16_CACHE
    if library.load() is not None:
        rounded = in_chunks(tmp_path / "awq", Options(), 33)  # int8 activations and head: some tokens change experts
        assert (rounded - expected).abs().mean() < 0.1 * float(expected.abs().mean())


@pytest.mark.parametrize("quantized", [False, True])
def test_chunks_and_crowds_change_no_bit(quantized: bool, tmp_path: Path) -> None:
    if library.load() is None:
        pytest.skip("the native kernels are not built on this machine")
    family_model("qwen3_5_text", tmp_path / "model", **SHARED_HEADS)
    folder = tmp_path / "model"
    if quantized:
        folder = tmp_path / "awq"
        quantize(tmp_path / "model", folder, QuantConfig(group_size=32, method="rtn"))
    whole = in_chunks(folder, Options(), TOKENS)
    for size in (1, 7, 33):
        assert torch.equal(in_chunks(folder, Options(), size), whole)
    runner = DecoderRunner(load(folder), kv_tokens=1024)
    assert runner._decoder.native(runner._cache)
    ids, others = some_ids(), [some_ids(seed) for seed in (2, 3)]
    for start in range(0, len(ids), 19):
        end = min(start + 19, len(ids))
        tables = range(10, 15), range(15, 20)
        crowd = [Chunk(other[start:end], start, tables[i], 1, slot=i) for i, other in enumerate(others)]
        step = [crowd[0], Chunk(ids[start:end], start, range(5), end - start, slot=2), crowd[1]]
        assert torch.equal(torch.from_numpy(runner.run(step)[1]), whole[start:end])


def config(**changes: Any) -> ModelConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8, "num_attention_heads": 4}
    return ModelConfig.from_dict({"model_type": "qwen3_5_text", "vocab_size": 160, "head_dim": 16, **sizes, **changes})


def test_defaults_are_transformers() -> None:
    """Of what config.json may leave out."""
    from transformers import Qwen3_5TextConfig

    found, theirs = config(), Qwen3_5TextConfig(num_hidden_layers=8)
    assert list(found.layer_types) == theirs.layer_types
    assert found.delta_rule is not None
    sizes = ["num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim"]
    ours = found.delta_rule
    assert [getattr(theirs, f"linear_{name}") for name in sizes] == [
        ours.key_heads,
        ours.value_heads,
        ours.key_dim,
        ours.value_dim,
        ours.kernel,
    ]
    assert list(config(full_attention_interval=2).layer_types[:2]) == [LINEAR, "full_attention"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_conv_kernel_dim": 10**9}, "linear_conv_kernel_dim is 1000000000; .* up to 16"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim is 0"),
        ({"linear_num_value_heads": 2**40}, "linear_num_value_heads is 1099511627776"),
        ({"linear_key_head_dim": "128"}, "linear_key_head_dim is '128'"),
        ({"linear_num_value_heads": 24}, "24 value heads cannot share 16 key heads"),
        ({"full_attention_interval": -1}, "full_attention_interval is -1"),
        ({"layer_types": [LINEAR]}, "layer_types must list"),
    ],
)
def test_hostile_numbers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["mamba"] * 8}, "a layer's attention is 'mamba'"),
        ({"linear_value_head_dim": 12}, "a head has 12 dimensions"),
        ({"model_type": "llama", "layer_types": [LINEAR] * 8}, f"a layer's attention is '{LINEAR}'"),
    ],
)
def test_what_the_decoder_does_not_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_decoder(config(**changes))


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    family_model("qwen3_5_text", tmp_path / "model")
    raw = read_config(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({**raw, "linear_conv_kernel_dim": 3}))
    with pytest.raises(CheckpointError, match=r"conv1d.weight' has shape \[64, 1, 4\]; \[64, 1, 3\] is needed"):
        load(tmp_path / "model")


def test_memory(tmp_path: Path) -> None:
    """Pages for layers with keys and values alone; a float32 state of each sequence for the others."""
    family_model("qwen3_5_text", tmp_path / "model", **SHARED_HEADS)
    decoder = load(tmp_path / "model")
    found = decoder.config
    assert found.delta_rule is not None
    assert Cache.token_bytes(found) == 2 * 2 * 16 * 2
    state = sum(tensor[0].nbytes for tensor in Cache(found, 2, decoder.backend, 3).layers[0])
    assert Cache.state_bytes(found) == state == 4 * (3 * (2 * 2 * 16 + 4 * 32) + 4 * 16 * 32)
    assert DecoderRunner(decoder, kv_tokens=64, rows=5).cache_bytes == 64 * 128 + 5 * state
    checkpoint = Checkpoint(tmp_path / "model")
    linears = sum(info.nbytes for name, info in checkpoint.tensors.items() if info.shape[1:] and "conv1d" not in name)
    embedding = checkpoint.info("model.embed_tokens.weight").nbytes
    assert rank_bytes(found, ALONE, "16-bit", lambda *_: None, embedding, True, itemsize=4) == linears
    with pytest.raises(ConfigError, match="its linear attention cannot be split yet; this model can take 1"):
        Shard(0, 2).config(found)


def test_fewer_sequences_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    family_model("qwen3_5_text", tmp_path / "model")
    decoder = load(tmp_path / "model")
    each = Cache.state_bytes(decoder.config)
    monkeypatch.setattr("squawq.engine.runner.free_memory", lambda: 7 * each)
    runner = DecoderRunner(decoder, kv_tokens=64, rows=64)
    assert runner.max_sequences == 3
    assert "max_num_seqs is 64, and memory has room for the states of 3 sequences" in caplog.text
    with pytest.raises(ConfigError, match=r"a sequence's state takes 0\.0 GiB, and 0\.0 GiB of memory are free"):
        states_that_fit(decoder.config, 64, each)


def test_rows_that_are_no_words_of_a_quantized_weight(tmp_path: Path) -> None:
    """As `in_proj_ba` of Qwen3-Next would have, if somebody quantized it: dequantized, and the rows wanted."""
    family_model("llama", tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "awq", QuantConfig(method="rtn", group_size=32), progress=False)
    checkpoint, name = Checkpoint(tmp_path / "awq"), "model.layers.0.self_attn.q_proj"
    rows, backend = torch.tensor([3, 2, 9, 40, 41, 0, 1, 63]), backend_for("cpu", REFERENCE)
    packed = load_linear(checkpoint, [Linear(name, 64, 64, rows=rows)], backend)
    found = backend.matmul(torch.eye(64), packed).T
    assert torch.equal(found, checkpoint.read_weight(name, 64, 64)[rows])
