"""The GPU's kernels for mixtures of experts: on a card if there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, tiny_config
from expert_layers import EXPERTS, HIDDEN, INNER, ROUTINGS, chosen, expected, packed, random_weights, rows_of
from test_cuda import DEVICE, multiply_bfloat16, pytestmark

from squawq.backends.cuda import expert_kernels, experts, tiles
from squawq.backends.cuda.backend import CudaBackend
from squawq.backends.cuda.steps import CudaSteps
from squawq.backends.layer_ops import Packed
from squawq.backends.sampling import Chunk, Sampling
from squawq.config import ModelConfig
from squawq.engine.request import SamplingParams
from squawq.engine.runner import DecoderRunner
from squawq.nn.loader import Options, load, open_model
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize as quantize_model

__all__ = ["pytestmark"]  # for this file too
GPU = CudaBackend(DEVICE)


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("split", [True, False])
def test_against_a_plain_loop(name: str, split: bool) -> None:
    weights, routing = random_weights(), ROUTINGS[name]
    layer, x = packed(GPU, weights, routing, "int4"), rows_of(4).half()
    space = experts.expert_space([layer], 4, torch.float16, DEVICE, split=split)
    found = experts.run(x.to(DEVICE), layer, None, space, split=split).parts[0].cpu()
    wanted = expected(x.float(), weights, routing)
    assert (found - wanted).abs().max() < 5e-3 * wanted.abs().max()
    for row, ids in zip(x.float(), space.ids.view(-1, routing.top_k).tolist(), strict=True):
        logits = weights.router @ row
        scores = logits.sigmoid() if routing.scoring == "sigmoid" else logits.softmax(0)
        assert sorted(ids) == sorted(chosen(scores.tolist(), routing))


@pytest.mark.parametrize("shared", ["added", "gated"])
def test_a_shared_expert(shared: str) -> None:
    weights, routing = random_weights(), ROUTINGS["groups"]
    layer = packed(GPU, weights, routing, "int4", shared)
    x, output = rows_of(3).half().to(DEVICE), rows_of(3, seed=2).to(DEVICE)
    wanted = expected(x.float().cpu(), weights, routing, output.cpu(), shared == "gated")
    assert (GPU.experts(x, layer, output).float().cpu() - wanted).abs().max() < 5e-3 * wanted.abs().max()


def test_a_row_depends_on_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of rows, and where they are cut into pieces; the interpreter's own products may round."""
    layer = packed(GPU, random_weights(), ROUTINGS["renormalized"], "int4")
    x = rows_of(10).half().to(DEVICE)
    found = GPU.experts(x, layer, None)
    tolerance = 0.0 if DEVICE.type == "cuda" else 1e-3
    for rows in (slice(0, 1), slice(3, 5)):
        assert torch.allclose(GPU.experts(x[rows], layer, None), found[rows], rtol=0, atol=tolerance)
    monkeypatch.setattr(tiles, "PROMPT_ROWS", 8)
    assert torch.allclose(GPU.experts(x, layer, None), found, rtol=0, atol=tolerance)


def test_tiles_hold_every_pair_once() -> None:
    """Pairs of one expert in their order, over several blocks of ids, with experts that have none."""
    generator = torch.Generator().manual_seed(0)
    count, tokens, pairs = 5, 8, 70
    ids = torch.randint(0, count - 1, (pairs,), generator=generator, dtype=torch.int32).to(DEVICE)
    order, owners = (torch.full((size,), -7, dtype=torch.int32, device=DEVICE) for size in (40 * tokens, 40))
    used = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    expert_kernels.group_kernel[(count,)](ids, order, owners, used, pairs, count, tokens, 8, 32, False)
    found: dict[int, list[int]] = {}
    for tile in range(int(used)):
        found.setdefault(int(owners[tile]), []).extend(order[tile * tokens : (tile + 1) * tokens].tolist())
    for expert in range(count):
        wanted = [pair for pair, owner in enumerate(ids.tolist()) if owner == expert]
        assert [pair for pair in found.get(expert, []) if pair >= 0] == wanted
        assert len(found.get(expert, [])) == -(-len(wanted) // tokens) * tokens


def test_experts_in_16_bits_run_one_after_another() -> None:
    weights, routing = random_weights(), ROUTINGS["bias"]
    layer, x = packed(GPU, weights, routing, "16-bit"), rows_of(4).half().to(DEVICE)
    assert "not in INT4" in str(experts.declines(layer))
    wanted = expected(x.float().cpu(), weights, routing)
    assert (GPU.experts(x, layer, None).float().cpu() - wanted).abs().max() < 1e-2 * wanted.abs().max()


MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [0],
        "shared_expert_intermediate_size": 64,
    },
}


@pytest.mark.parametrize("family", MODELS)
def test_a_whole_model(family: str, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, then decode steps that replay what a graph would hold: greedy tokens of the reference."""
    quantize_model(make_model(family, **MODELS[family]), tmp_path / "awq", QuantConfig(group_size=32, method="rtn"))
    monkeypatch.setattr(CudaBackend, "declines", classmethod(lambda *_: None))
    multiply_bfloat16(monkeypatch)
    found: dict[str, list[list[int]]] = {}
    scores: dict[str, list[float]] = {}
    for name in ("cuda", "reference"):
        runner = DecoderRunner(load(tmp_path / "awq", Options(str(DEVICE), backend=name)), kv_tokens=512, rows=2)
        assert isinstance(runner._steps, CudaSteps) == (name == "cuda")
        states = [
            Sampling(SamplingParams(temperature=0), prompt=prompt, ending=(), seed=0, index=0, logprobs=0)
            for prompt in ([3, 4, 5], list(range(20, 28)))
        ]
        tokens = [list(state.prompt) for state in states]
        scores[name] = []
        starts = [0, 0]
        for _ in range(2):
            chunks = [
                Chunk(t[start:], start, [4 * i, 4 * i + 1], 1, state)
                for i, (t, start, state) in enumerate(zip(tokens, starts, states, strict=True))
            ]
            starts = [len(t) for t in tokens]
            for own, result in zip(tokens, runner.start(chunks).outputs(), strict=True):
                assert result.token is not None
                assert result.logprob is not None
                scores[name].append(result.logprob.logprob)
                own.append(result.token)
        found[name] = tokens
    assert found["cuda"] == found["reference"]
    assert torch.allclose(torch.tensor(scores["cuda"]), torch.tensor(scores["reference"]), atol=0.02)


def nbytes(weight: Packed) -> int:
    """Of the tensors that a weight is packed in, without its bias."""
    tensors = (value for name, value in vars(weight).items() if isinstance(value, torch.Tensor) and name != "bias")
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("family", MODELS)
def test_bytes_of_the_weights(
    family: str, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is counted before loading is what the packed weights take."""
    quantize_model(make_model(family, **MODELS[family]), tmp_path / "awq", QuantConfig(group_size=32, method="rtn"))
    monkeypatch.setattr(CudaBackend, "declines", classmethod(lambda *_: None))
    model = open_model(tmp_path / "awq", Options(str(DEVICE), backend="cuda"))
    decoder = model.load()
    weights = [
        value for operation in decoder.operations for value in vars(operation).values() if isinstance(value, Packed)
    ]
    total = sum(map(nbytes, [*weights, decoder.head])) + decoder.embedding.nbytes
    assert model.weight_bytes() == total


def test_steps_are_counted() -> None:
    """What a row adds to the memory of decode steps is no less than what the kernels keep of it."""
    raw = tiny_config("qwen3_moe", **{**MODELS["qwen3_moe"], "num_experts": EXPERTS, "num_experts_per_tok": 3})
    config = ModelConfig.from_dict({**raw, "moe_intermediate_size": INNER})
    counted = CudaBackend.step_bytes(config, 8, 16) - CudaBackend.step_bytes(config, 4, 16)
    plain = replace(config, moe=None)
    counted -= CudaBackend.step_bytes(plain, 8, 16) - CudaBackend.step_bytes(plain, 4, 16)
    layer = packed(GPU, random_weights(), ROUTINGS["renormalized"], "int4")

    def kept(rows: int) -> int:
        space = experts.expert_space([layer], rows, torch.float16, DEVICE, split=True)
        return sum(tensor.numel() * tensor.element_size() for tensor in vars(space).values())

    assert kept(8) - kept(4) <= counted <= 2 * (kept(8) - kept(4))
    prompts = CudaBackend.step_bytes(config, 8, 1024) - CudaBackend.step_bytes(plain, 8, 1024)
    assert prompts > tiles.PROMPT_ROWS * 3 * 4 * (2 * INNER + HIDDEN)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_for_a_card(capability: int, tmp_path: Path) -> None:
    """Without a card: every kernel compiles, INT4 words come in 16-byte pieces, and no registers are spilled."""
    code = f"""
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from squawq.backends.cuda import expert_kernels as kernels
routing = dict(EXPERTS=128, TOP_K=8, SIGMOID=False, RENORMALIZE=True, BIASED=True, GROUPS=2, TOP_GROUPS=1)
tiles = dict(EACH=8, GROUP=128, PADDED=False, TOKENS=8, OUTPUTS=64, STAGES=3, INTERPRETED=False)
combined = dict(SPLITS=2, TOP_K=8, SHARED_SPLITS=2, GATED=True, LOGIT_SPLITS=4, OUT=129, WIDTH=1024)
for kernel, pointers, values in (
    (kernels.choose_kernel, "partial:fp32 bias:fp32 ids:i32 shares:fp32",
     dict(routing, SPLITS=4, OUT=128, WIDTH=128, PLACES=8)),
    (kernels.group_kernel, "ids:i32 order:i32 owners:i32 used:i32",
     dict(EXPERTS=128, TOKENS=8, WIDTH=128, BLOCK=64)),
    (kernels.grouped_matmul_kernel, "x:fp16 words:i16 grids:i32 order:i32 owners:i32 used:i32 out:fp32", tiles),
    (kernels.combine_kernel, "partial:fp32 shares:fp32 shared:fp32 logits:fp32 out:fp32", combined),
):
    values["DEPENDENT"], names = {capability >= 90}, kernel.arg_names
    types = dict(one.split(":") for one in pointers.split())
    kinds = {{**{{name: "*" + kind for name, kind in types.items()}}, **dict.fromkeys(values, "constexpr")}}
    signature = {{name: kinds.get(name, "fp32" if name == "scale" else "i32") for name in names}}
    aligned = {{(names.index(name),): [["tt.divisibility", 16]] for name in types}}
    source = ASTSource(kernel, signature, {{(names.index(name),): value for name, value in values.items()}}, aligned)
    target = GPUTarget("cuda", {capability}, 32)
    ptx = triton.compile(source, target=target, options=dict(num_warps=2, num_stages=3)).asm["ptx"]
    copies = re.findall(r"cp.async.cg.shared.global \\[[^]]*\\], \\[[^]]*\\], 0x10", ptx)
    print(kernel.fn.__name__, len(copies), "local" if ".local" in ptx else "none spilled")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**environment, "TRITON_HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[2] for line in lines] == ["none"] * 4, done.stdout
    assert int(lines[2][1]) >= 3, done.stdout
