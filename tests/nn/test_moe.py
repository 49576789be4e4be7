"""Mixture-of-experts families: our decoder against transformers, in 16 bits and quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, logits
from family_models import dense_folder, family_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from squawq.backends import backend_for
from squawq.backends.base import Batch, Layers
from squawq.backends.cpu import library
from squawq.backends.layer_ops import ActivationMul, Buffer, Matmul, MixtureOfExperts, Norm
from squawq.backends.sampling import Chunk
from squawq.config import ModelConfig
from squawq.engine.runner import DecoderRunner
from squawq.errors import CheckpointError, ConfigError
from squawq.families import FAMILIES
from squawq.format.groupwise import from_gemm
from squawq.format.reader import Checkpoint
from squawq.inspection import inspect
from squawq.moe_config import EXPERTS, MOE_FAMILIES
from squawq.nn.loader import OpenModel, Options, load, load_layer
from squawq.nn.shard import Shard
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize

QWEN: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5, "norm_topk_prob": True}
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    **GROUPS,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {**QWEN, "norm_topk_prob": True}),
    "qwen3_moe, a dense layer": ("qwen3_moe", {**QWEN, "mlp_only_layers": [1]}),
    "qwen3_moe, every second layer": ("qwen3_moe", {**QWEN, "decoder_sparse_step": 2}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**QWEN, "shared_expert_intermediate_size": 48}),
    "dots1": ("dots1", {**DEEPSEEK, "first_k_dense_replace": 1}),
    "glm4_moe": ("glm4_moe", {**DEEPSEEK, "first_k_dense_replace": 1}),
    "glm4_moe, norms": ("glm4_moe", {**DEEPSEEK, "use_qk_norm": True, "n_shared_experts": 1}),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 2}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1},
    ),
    "minimax_m2": ("minimax_m2", {"num_local_experts": 6, "num_experts_per_tok": 2, "rotary_dim": 8}),
}
FLOAT16_CACHE = 3e-2  # see test_decoder.py
WAYS = {"torch": Options(backend="reference"), "native": Options(exact=True)}
IDS = torch.randint(0, 160, (2, 40), generator=torch.Generator().manual_seed(1))


def transformers_logits(folder: Path, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


def model_of(case: str, make_model: MakeModel) -> Path:
    """A random checkpoint whose routers decide, with biases that change what is chosen."""
    model_type, changes = CASES[case]
    folder = make_model(model_type, **changes)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if "e_score_correction_bias" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def close(found: Tensor, expected: Tensor) -> bool:
    """All but a few tokens, whose experts are chosen by scores that hardly differ."""
    error = (found - expected).abs().amax(-1).flatten()
    return bool(expected.abs().max() > 1 and (error < FLOAT16_CACHE).float().mean() > 0.97)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, way: str, make_model: MakeModel) -> None:
    """In 16 bits; transformers' class stacks the experts in the file."""
    folder = model_of(case, make_model)
    assert close(logits(folder, IDS, WAYS[way]), transformers_logits(folder, IDS))


def dequantized(awq: Path, out: Path) -> Path:
    """The same model with the numbers that the integers say, for transformers."""
    out.mkdir()
    config = json.loads((awq / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    tensors = {name: t for file in sorted(awq.glob("*.safetensors")) for name, t in load_file(file).items()}
    dense = {name: t for name, t in tensors.items() if name.rpartition(".")[2] not in ("qweight", "qzeros", "scales")}
    for name in tensors:
        if name.endswith(".qweight"):
            linear = name.removesuffix(".qweight")
            parts = (tensors[f"{linear}.{kind}"] for kind in ("qweight", "scales", "qzeros"))
            dense[f"{linear}.weight"] = from_gemm(*parts).dequantize()
    save_file(dense, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("case", CASES)
def test_quantized_logits_equal_transformers(case: str, make_model: MakeModel, tmp_path: Path) -> None:
    """Experts as our quantizer and the Hub's checkpoints write them, in float32 activations and in int8 ones."""
    folder = model_of(case, make_model)
    quantize(folder, tmp_path / "awq", QuantConfig(group_size=32, method="rtn"))
    expected = transformers_logits(dequantized(tmp_path / "awq", tmp_path / "dense"), IDS)
    for way in WAYS.values():
        assert close(logits(tmp_path / "awq", IDS, way), expected)
    if library.load() is not None:
        rounded = logits(tmp_path / "awq", IDS, Options(head="16-bit"))
        error = (rounded - expected).abs().amax(-1).flatten()
        assert error.median() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("case", ["qwen3_moe", "qwen2_moe", "mixtral"])
@pytest.mark.parametrize("quantized", [False, True])
def test_chunks_and_batches_change_no_bit(case: str, quantized: bool, make_model: MakeModel, tmp_path: Path) -> None:
    """The native kernels: a sequence in one chunk, in several, token by token, alone and beside others."""
    if library.load() is None:
        pytest.skip("the native kernels are not built on this machine")
    folder = model_of(case, make_model)
    if quantized:
        quantize(folder, tmp_path / "out", QuantConfig(group_size=32, method="rtn"))
        folder = tmp_path / "out"
    runner = DecoderRunner(load(folder), kv_tokens=1024)
    ids = IDS[0].tolist()
    (whole,) = runner.run([Chunk(ids, 0, [5, 2, 9], 40)])
    pieces = [runner.run([Chunk(ids[:9], 0, [1, 7, 4], 9)])[0], runner.run([Chunk(ids[9:24], 9, [1, 7, 4], 15)])[0]]
    for at in range(24, 40):
        other = Chunk(ids[at - 20 : at], 0, [20, 21], 1)
        pieces.append(runner.run([other, Chunk([ids[at]], at, [1, 7, 4], 1), other])[1])
    assert (torch.cat([torch.from_numpy(p) for p in pieces]) == torch.from_numpy(whole)).all()


def config_of(case: str, **changes: Any) -> ModelConfig:
    from conftest import tiny_config

    model_type, given = CASES[case]
    return ModelConfig.from_dict(tiny_config(model_type, **given, **changes))


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("qwen3_moe", {"num_experts": 0}, "num_experts is 0; it must be a positive whole number"),
        ("qwen3_moe", {"num_experts": 10**6}, "num_experts is 1000000; it must be at most 16384"),
        ("qwen3_moe", {"num_experts_per_tok": 7}, "a token cannot take 7 of 6 experts"),
        ("qwen3_moe", {"num_experts_per_tok": True}, "num_experts_per_tok is True"),
        ("qwen3_moe", {"moe_intermediate_size": -3}, "moe_intermediate_size is -3"),
        ("qwen3_moe", {"moe_intermediate_size": 2**30}, "moe_intermediate_size is 1073741824; it must be at most"),
        ("qwen3_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'; it must be true or false"),
        ("qwen3_moe", {"mlp_only_layers": "all"}, "mlp_only_layers must list numbers of layers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size is 0"),
        ("dots1", {"n_group": 3}, "cannot take 3 experts from 2 of 3 groups of 8 experts"),
        ("dots1", {"topk_group": 5}, "cannot take 3 experts from 5 of 4 groups"),
        ("dots1", {"topk_group": 1}, "cannot take 3 experts from 1 of 4 groups"),
        ("dots1", {"routed_scaling_factor": float("inf")}, "routed_scaling_factor is inf"),
        ("dots1", {"n_shared_experts": -1}, "n_shared_experts is -1"),
    ],
)
def test_hostile_numbers(case: str, changes: dict[str, Any], message: str) -> None:
    model_type, given = CASES[case]
    from conftest import tiny_config

    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_dict(tiny_config(model_type, **{**given, **changes}))


def test_which_layers_have_experts() -> None:
    def layers(case: str, **changes: Any) -> tuple[bool, ...]:
        moe = config_of(case, num_hidden_layers=4, **changes).moe
        assert moe is not None
        return moe.layers

    assert layers("qwen2_moe") == (True,) * 4
    assert layers("qwen3_moe, every second layer") == (False, True, False, True)
    assert layers("qwen3_moe, a dense layer") == (True, False, True, True)
    assert layers("dots1") == (False, True, True, True)


def test_numbers_that_config_json_leaves_out() -> None:
    """transformers' defaults."""
    from conftest import tiny_config
    from transformers import AutoConfig

    for family in MOE_FAMILIES:
        if family in ("dots1", "qwen3_next", "qwen3_5_moe_text"):  # no default, or hybrids
            continue
        theirs = AutoConfig.for_model(family)
        raw = {**tiny_config(family), "intermediate_size": theirs.intermediate_size}
        moe = ModelConfig.from_dict(raw).moe
        assert moe is not None
        top_k = getattr(theirs, "moe_k", None) or theirs.num_experts_per_tok
        experts = {getattr(theirs, key, moe.experts) for key in EXPERTS}
        assert (experts, moe.top_k) == ({moe.experts}, top_k), family
        assert moe.inner == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size), family
        assert moe.renormalize in (getattr(theirs, "norm_topk_prob", True), True), family


def test_every_family_with_experts_that_we_run_has_its_numbers_read() -> None:
    with_experts = {name for name, row in FAMILIES.items() if any("*" in linear for linear in row.linears)}
    ours = {name for name in with_experts if FAMILIES[name].decoder}
    assert {case for case, _ in CASES.values()} <= ours
    assert ours <= set(MOE_FAMILIES) <= with_experts


def rewritten(folder: Path, drop: str = "", **added: Tensor) -> None:
    tensors = {name: t for name, t in load_file(folder / "model.safetensors").items() if not drop or drop not in name}
    save_file({**tensors, **added}, folder / "model.safetensors", metadata={"format": "pt"})


def test_damaged_experts(make_model: MakeModel, tmp_path: Path) -> None:
    folder = model_of("dots1", make_model)
    whole = (folder / "model.safetensors").read_bytes()
    experts, gate = "model.layers.1.mlp.experts", "model.layers.1.mlp.gate"
    cases: list[tuple[str, dict[str, Tensor], str]] = [
        (f"{experts}.down_proj", {}, "experts.down_proj' is missing"),
        (experts, {}, "experts.0.gate_proj.weight' is missing"),
        (f"{gate}.weight", {}, "mlp.gate.weight' is missing"),
        ("e_score_correction_bias", {}, "e_score_correction_bias' is missing"),
        ("", {f"{gate}.e_score_correction_bias": torch.zeros(3)}, "must be 8 numbers"),
        ("", {f"{gate}.e_score_correction_bias": torch.full((8,), torch.nan)}, "must be 8 numbers"),
        ("", {f"{experts}.gate_up_proj": torch.zeros(8, 60, 64)}, r"\[8, 64, 64\] is needed"),
        ("", {f"{experts}.down_proj": torch.zeros(7, 64, 32)}, r"\[8, 64, 32\] is needed"),
        ("mlp.shared_experts.up_proj", {}, "shared_experts.up_proj.weight' is missing"),
    ]
    for drop, added, message in cases:
        (folder / "model.safetensors").write_bytes(whole)
        rewritten(folder, drop, **added)
        with pytest.raises(CheckpointError, match=message):
            load(folder)


def test_damaged_quantized_experts(make_model: MakeModel, tmp_path: Path) -> None:
    quantize(model_of("qwen3_moe", make_model), tmp_path / "awq", QuantConfig(group_size=32, method="rtn"))
    (shard,) = [
        file
        for file in sorted((tmp_path / "awq").glob("*.safetensors"))
        if "model.layers.1.mlp.experts.5.up_proj.qweight" in load_file(file)
    ]
    tensors = load_file(shard)
    name = "model.layers.1.mlp.experts.5.up_proj"
    without = {key: t for key, t in tensors.items() if not key.startswith(name)}
    for changed, message in (
        (without, "experts.5.up_proj.weight' is missing"),
        ({**tensors, f"{name}.bias": torch.zeros(32)}, "experts.5.up_proj has a bias"),
        ({**tensors, f"{name}.qweight": torch.zeros(64, 3, dtype=torch.int32)}, "is needed"),
    ):
        save_file(changed, shard, metadata={"format": "pt"})
        (tmp_path / "awq" / "model.safetensors.index.json").unlink(missing_ok=True)
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "awq")


STACKS = {"as transformers saves them": False, "as published": True}


def vision_model(folder: Path, published: bool) -> Tensor:
    """Qwen3-VL-MoE's text model, whose published checkpoints stack weights as [experts, in, out]; its logits."""
    model = family_model("qwen3_vl_moe_text", folder, moe_intermediate_size=96)
    if published:
        stacks = {n: t.mT.contiguous() for n, t in load_file(folder / "model.safetensors").items() if t.dim() == 3}
        rewritten(folder, "", **stacks)
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("stacks", STACKS)
def test_stacks_of_either_layout(stacks: str, tmp_path: Path) -> None:
    expected = vision_model(tmp_path / "model", STACKS[stacks])
    for way in WAYS.values():
        assert close(logits(tmp_path / "model", IDS, way), expected)
    checkpoint, x = Checkpoint(tmp_path / "model"), torch.randn(7, 64, generator=torch.Generator().manual_seed(4))
    whole = mlp_output(checkpoint, x, Shard())
    parts = sum(mlp_output(checkpoint, x, Shard(rank, 2)) for rank in range(2))
    assert (whole - parts).abs().max() < 1e-3 * whole.abs().max()


def test_quantized_from_stacks_of_either_layout(tmp_path: Path) -> None:
    for name, published in (("a", False), ("b", True)):
        vision_model(tmp_path / name, published)
        quantize(tmp_path / name, tmp_path / f"{name}-awq", QuantConfig(group_size=32, method="rtn"))
    for file in (tmp_path / "a-awq").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b-awq" / file.name).read_bytes()
    expected = transformers_logits(dense_folder(tmp_path / "a-awq", tmp_path / "a", tmp_path / "dense"), IDS)
    for way in WAYS.values():
        assert close(logits(tmp_path / "b-awq", IDS, way), expected)


def test_stacks_of_another_shape(tmp_path: Path) -> None:
    vision_model(tmp_path, published=True)
    for shape in ((4, 64, 190), (3, 64, 192)):
        rewritten(tmp_path, "", **{"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(shape)})
        with pytest.raises(CheckpointError, match=r"gate_up_proj' .* is needed"):
            load(tmp_path)


def test_clipped_queries(make_model: MakeModel) -> None:
    with pytest.raises(ConfigError, match="clip_qkv is set"):
        load(make_model("olmoe", num_experts=4, num_experts_per_tok=2, clip_qkv=8.0))


def test_windows_that_the_family_has_otherwise(make_model: MakeModel) -> None:
    folder = make_model("qwen3_moe", **QWEN, use_sliding_window=True, sliding_window=8)
    with pytest.raises(ConfigError, match="use_sliding_window is true"):
        load(folder)


def mlp_output(checkpoint: Checkpoint, x: Tensor, shard: Shard) -> Tensor:
    """What the last layer's MLP, or a rank's part of it, adds for x."""
    backend = backend_for("cpu", "reference", exact=True)
    operations = load_layer(checkpoint, checkpoint.config.num_layers - 1, backend, shard)
    first = max(place for place, operation in enumerate(operations) if isinstance(operation, Norm)) + 1
    buffers = {Buffer.NORMED: x}
    empty = torch.empty(0)
    batch = Batch(*(empty for _ in range(6)))
    for operation in operations[first:]:
        if isinstance(operation, Matmul | ActivationMul | MixtureOfExperts):
            backend._apply(operation, Layers((), (4, 2, 16), 1e-5), buffers, (empty, empty), batch, [])
    return buffers[Buffer.DELTA]


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "glm4_moe"])
@pytest.mark.parametrize("quantized", [False, True])
def test_ranks_add_up(case: str, quantized: bool, make_model: MakeModel, tmp_path: Path) -> None:
    """Tensor parallelism: each rank has a part of every expert's inner features, and all of the router."""
    folder = model_of(case, make_model)
    if quantized:
        quantize(folder, tmp_path / "awq", QuantConfig(group_size=32, method="rtn"))
        folder = tmp_path / "awq"
    checkpoint = Checkpoint(folder)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(4))
    whole = mlp_output(checkpoint, x, Shard())
    parts = sum(mlp_output(checkpoint, x, Shard(rank, 2)) for rank in range(2))
    assert whole.abs().max() > 0.1
    assert (whole - parts).abs().max() < 1e-3 * whole.abs().max()


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "glm4_moe"])
def test_inspect_counts_what_is_loaded(case: str, make_model: MakeModel, tmp_path: Path) -> None:
    """Bytes of each GPU, from headers under the model's names, against those under the checkpoint's."""
    quantize(model_of(case, make_model), tmp_path / "awq", QuantConfig(group_size=32, method="rtn"))
    found = inspect(tmp_path / "awq", device_memory=2**34)["devices"]["int4"]
    checkpoint = Checkpoint(tmp_path / "awq")
    for row in found:
        backend = backend_for("cpu", "reference")
        backend.activation_dtype = torch.float16
        ranks = [OpenModel(checkpoint, backend, "16-bit", Shard(rank, row["size"])) for rank in range(row["size"])]
        assert row["weights"] == max(rank.weight_bytes() for rank in ranks)
    assert [row["size"] for row in found][:2] == [1, 2]
