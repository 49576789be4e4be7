"""The CUDA backend's Triton kernels against the reference backend: on a GPU, or in Triton's interpreter without one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel
from decoder_cases import CASES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from squawq.backends import backend_for
from squawq.backends.base import FP8, Heads
from squawq.backends.cuda.backend import CudaBackend
from squawq.backends.layer_ops import Attention, RotateAndStore
from squawq.backends.sampling import SAMPLED, Chunk, Sampling
from squawq.engine.config import EngineConfig
from squawq.engine.engine import Engine, Loop
from squawq.engine.request import Output, Request, SamplingParams
from squawq.engine.runner import DecoderRunner
from squawq.engine.sequence import RequestState
from squawq.errors import ConfigError, KernelError
from squawq.format.groupwise import GroupwiseTensor, quantize, to_gemm
from squawq.integrations.fused import _run
from squawq.integrations.fused_cache import FusedCache, Runners
from squawq.nn.loader import Options, load
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize as quantize_model

pytest.importorskip("triton")

from squawq.backends.cuda import int4, launch
from squawq.backends.cuda.steps import CudaSteps, Seats

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU, REFERENCE = CudaBackend(DEVICE), backend_for(DEVICE, "reference")
DTYPES = [torch.float16, torch.bfloat16]
ROUNDING = 1e-4 if DEVICE.type == "cuda" else 1e-5  # of float32 sums, relative to the largest
pytestmark = [
    *([pytest.mark.gpu] if DEVICE.type == "cuda" else []),
    # in the interpreter itself
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]


def random(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE) * spread


def frequencies(dim: int, pairs: int | None = None) -> Tensor:
    """Of RoPE, and magnitudes, for a head's first pairs."""
    found = 1 / 100 ** (torch.arange(0, dim, 2)[:pairs] / dim)
    return torch.stack([found, torch.ones_like(found)]).to(DEVICE)


def integers(values: object) -> Tensor:
    """int64."""
    return torch.tensor(values, device=DEVICE)


def random_int4(out: int, in_: int, group: int, seed: int = 0, spread: float = 0.05) -> GroupwiseTensor:
    return quantize(random(out, in_, seed=seed, spread=spread), group, zero_point=True)


def packed(tensor: GroupwiseTensor, group: int, dtype: torch.dtype) -> int4.Int4Weight:
    (out, in_), gemm = tensor.q.shape, to_gemm(tensor)
    backend = CudaBackend(DEVICE, dtype=str(dtype).removeprefix("torch."))
    found = backend.pack_int4(out, in_, group or in_, [(gemm["qweight"], gemm["scales"], gemm["qzeros"])])
    assert isinstance(found, int4.Int4Weight)
    return found


def scaled(tensor: GroupwiseTensor, dtype: torch.dtype) -> Tensor:
    """Weights by scales in the activations' dtype, not rounded."""
    return replace(tensor, scales=tensor.scales.to(dtype)).dequantize()


def words_and_grids(tensor: GroupwiseTensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The layout as int4.py describes it: nibble j of word i of a block is input 32 * j + i."""
    out, in_ = tensor.q.shape
    blocks = torch.nn.functional.pad(tensor.q.int(), (0, -in_ % 128)).view(out, -1, 4, 32)
    words = sum((blocks[:, :, j] << 4 * j for j in range(4)), torch.zeros((), dtype=torch.int32))
    offsets = (-(tensor.zeros.float() + int4.magic(dtype))).to(dtype)
    halves = torch.stack([tensor.scales.to(dtype).view(torch.int16), offsets.view(torch.int16)], -1)
    return words.to(torch.int16).transpose(0, 1), halves.view(torch.int32).squeeze(-1).T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "in_", "group"), [(40, 512, 128), (8, 96, 32), (72, 160, 160)])
def test_packing(out: int, in_: int, group: int, dtype: torch.dtype) -> None:
    tensor = random_int4(out, in_, group)
    words, grids = words_and_grids(tensor, dtype)
    found = packed(tensor, group, dtype)
    assert torch.equal(found.words, words)
    assert torch.equal(found.grids, grids)
    gemm = to_gemm(GroupwiseTensor(tensor.q, tensor.scales, torch.full_like(tensor.zeros, 8)))
    backend = CudaBackend(DEVICE, dtype=str(dtype).removeprefix("torch."))
    parts = [(gemm["qweight"], gemm["scales"], zeros) for zeros in (gemm["qzeros"], None)]
    twice = backend.pack_int4(2 * out, in_, group, parts)
    assert isinstance(twice, int4.Int4Weight)
    assert torch.equal(twice.words, torch.cat([words, words], 1))
    assert torch.equal(twice.grids[:, :out], twice.grids[:, out:])


def close_in_fp8(found: Tensor, wanted: Tensor) -> bool:
    """Whether numbers are rounded to three bits of mantissa. Triton's interpreter loses the carry to the next power."""
    carried = wanted.to(FP8).float().frexp().mantissa.abs() == 0.5
    return bool((((found.float() - wanted).abs() < wanted.abs() / 16 + 0.02) | carried).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "kernel"), [(32, 32), (64, 64), (128, 128), (256, 256), (512, 0), (96, 0)])
def test_dequantize(group: int, kernel: int, dtype: torch.dtype) -> None:
    tensor = random_int4(40, 96 if group == 96 else 512, group)
    out = torch.empty(tensor.q.shape, device=DEVICE)
    launch.dequantize(packed(tensor, kernel, dtype), out)
    assert torch.equal(out, scaled(tensor, dtype))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.sampled_from([1, 2, 7, 8, 9, 17]),
    out=st.sampled_from([8, 64, 72, 136]),
    blocks=st.integers(1, 5),
    group=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([1e-4, 0.05, 30.0]),
)
def test_int4_matmul(rows: int, out: int, blocks: int, group: int, dtype: torch.dtype, spread: float) -> None:
    """Sizes around the tiles' edges; a last block of which only some is there."""
    in_ = max(group, 128 * blocks - (32 if group == 32 else 0))
    tensor = random_int4(out, in_, group, spread=spread)
    weight = packed(tensor, group, dtype)
    x = random(rows, in_, seed=1).to(dtype)
    parts = torch.full((launch.splits(weight), rows, out), float("nan"), device=DEVICE)
    found = launch.matmul(x, weight, parts).parts.sum(0)
    expected = x.float() @ scaled(tensor, dtype).to(dtype).float().T
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()


@pytest.mark.parametrize("kind", ["int8", "16-bit"])
def test_dense_matmul(kind: str) -> None:
    weight = random(100, 160).half().float()
    head = GPU.pack_int8(weight) if kind == "int8" else GPU.pack_dense([weight])
    plain = REFERENCE.pack_int8(weight) if kind == "int8" else REFERENCE.pack_dense([weight])
    x = random(3, 160, seed=2).half()
    expected = REFERENCE.logits(x.float(), plain)
    assert (GPU.logits(x, head) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_products_of_prompts() -> None:
    tensor, bias = random_int4(72, 256, 64), random(72, seed=3)
    gemm = to_gemm(tensor)
    parts = [(gemm["qweight"], gemm["scales"], gemm["qzeros"])] * 2
    weight = GPU.pack_int4(144, 256, 64, parts, torch.cat([bias, bias]))
    x = random(2, 3, 256, seed=4).half()
    expected = (x.float() @ tensor.dequantize().T + bias).repeat(1, 1, 2)
    assert (GPU.matmul(x, weight).float() - expected).abs().max() < 2e-3 * expected.abs().max()
    with pytest.raises(KernelError, match=r"are \[144, 256\] in 4 groups; \[72, 256\] in 4 groups is needed"):
        GPU.pack_int4(72, 256, 64, parts)
    with pytest.raises(KernelError, match=r"are \[144, 256\]; \[216, 256\] in 4 groups is needed"):
        GPU.pack_int4(216, 256, 64, parts)


@pytest.mark.parametrize("rows", [1, 5])
def test_norm_and_activation(rows: int) -> None:
    hidden, delta, weight = random(rows, 100), random(rows, 100, seed=1).half(), random(100, seed=2)
    first, second = hidden.clone(), hidden.clone()
    found = GPU.add_rms_norm(first, delta, weight, 1e-5)
    expected = REFERENCE.add_rms_norm(second, delta.float(), weight, 1e-5)
    assert torch.equal(first, second)
    assert (found.float() - expected).abs().max() < 4e-3
    alone, bias = random(rows, 100).half(), random(100, seed=3)
    parts = random(3, rows, 100, seed=4)
    launch.add_norm(launch.Sums(parts, bias), first, weight, 1e-5, alone, residual=False)
    expected = REFERENCE.add_rms_norm(parts.sum(0) + bias, None, weight, 1e-5)
    assert torch.equal(first, second)
    assert (alone.float() - expected).abs().max() < 4e-3
    gate_up = random(rows, 80, seed=5, spread=3).half()
    for name in ("silu", "gelu", "gelu_tanh"):
        expected = REFERENCE.activation_mul(gate_up.float(), name)
        assert (GPU.activation_mul(gate_up, name).float() - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize(
    ("heads", "window", "store"),
    [
        *((heads, window, torch.float16) for heads in ((4, 2, 16), (3, 1, 24), (17, 1, 16)) for window in (None, 40)),
        ((3, 1, 24), 40, FP8),
    ],
)
def test_attention(heads: Heads, window: int | None, store: torch.dtype) -> None:
    """Prompts whole and in part, and single queries, through pages in any order."""
    query, kv, dim = heads
    sequences: list[tuple[int, int, int, int]] = []
    table: list[int] = []
    slots: list[int] = []
    positions: list[int] = []
    first = 0
    pages = torch.randperm(32, generator=torch.Generator().manual_seed(1)).tolist()
    for start, rows in ((0, 1), (0, 66), (150, 1)):
        mine = [pages.pop() for _ in range(-(-(start + rows) // 16))]
        sequences.append((first, rows, start, len(table)))
        table += mine
        first += rows
        positions += range(start, start + rows)
        slots += [mine[p // 16] * 16 + p % 16 for p in range(start, start + rows)]
    keys, values = (random(32, *shape, seed=2).to(store) for shape in GPU.page_shapes(kv, dim))
    plain = keys.half().transpose(2, 3).contiguous(), values.half()
    qkv, norms = random(first, (query + 2 * kv) * dim, seed=3).half(), (random(dim, seed=4), random(dim, seed=5))
    at, places = integers(positions), integers(slots)
    rotary = GPU.rotary(at, frequencies(dim))
    wide = qkv.float()
    turn, attention = RotateAndStore(0, *norms), Attention(0, window)
    GPU.rotate_and_store(qkv, heads, turn, rotary, 1e-5, places, (keys, values))
    REFERENCE.rotate_and_store(wide, heads, turn, rotary, 1e-5, places, plain)
    for slot in slots:
        page, place = divmod(slot, 16)
        if store == FP8:
            assert close_in_fp8(keys[page, :, place], plain[0][page, :, :, place])
            assert close_in_fp8(values[page, :, place], plain[1][page, :, place])
        else:
            assert (keys[page, :, place] - plain[0][page, :, :, place]).abs().max() < 0.02
            assert torch.equal(values[page, :, place], plain[1][page, :, place])
    if store == FP8:
        plain = keys.half().transpose(2, 3).contiguous(), values.half()
    # The reference clears a page at its first slot; what lay there before is out of every query's sight.
    listed, tables = torch.tensor(sequences), integers(table).int()
    expected = REFERENCE.attention(wide, heads, attention, listed, tables, plain)
    found = GPU.attention(qkv, heads, attention, listed, tables, (keys, values))
    assert (found.float() - expected).abs().max() < 0.02
    last = [f + r - 1 for f, r, *_ in sequences]
    own = integers([[0] * 32] * len(last)).int()
    for i, (_, r, s, place) in enumerate(sequences):
        count = -(-(s + r) // 16)
        own[i, :count] = tables[place : place + count]
    queries, space = qkv[last, : query * dim].contiguous(), launch.decode_space(len(last), heads, DEVICE)
    out = torch.empty_like(queries)
    launch.decode_attention(queries, heads, attention, (keys, values), own, at[last], out, space)
    assert (out.float() - expected[last]).abs().max() < 0.02


def test_a_row_of_padding_writes_nothing() -> None:
    heads = 2, 1, 16
    keys, values = (torch.zeros(2, *shape, dtype=torch.float16, device=DEVICE) for shape in GPU.page_shapes(1, 16))
    sums, rotary = launch.Sums(random(1, 2, 64)), (random(2, 8), random(2, 8))
    queries, slots = random(2, 32).half(), integers([-1, 17])
    launch.rotate_and_store(sums, heads, RotateAndStore(0), rotary, 1e-5, slots, queries, (keys, values), 1)
    assert [bool(page.any()) for page in keys] == [False, True]
    out, space = torch.ones_like(queries), launch.decode_space(2, heads, DEVICE)
    tables = integers([[0, 0], [0, 1]]).int()
    launch.decode_attention(queries, heads, Attention(0), (keys, values), tables, slots, out, space)
    assert not out[0].any()


def test_fp8_has_a_largest_number() -> None:
    keys, values = (torch.zeros(1, *shape).to(DEVICE, FP8) for shape in GPU.page_shapes(1, 16))
    sums = launch.Sums(torch.full((1, 1, 48), 3e4, device=DEVICE))
    rotary = torch.ones(1, 8, device=DEVICE), torch.zeros(1, 8, device=DEVICE)
    queries = torch.empty(1, 16, dtype=torch.float16, device=DEVICE)
    launch.rotate_and_store(
        sums, (1, 1, 16), RotateAndStore(0), rotary, 1e-5, integers([0]), queries, (keys, values), 1
    )
    assert (keys[0, 0, 0].float() == 448).all()
    assert (values[0, 0, 0].float() == 448).all()


def test_dtypes_by_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    def dtypes(**choice: str) -> tuple[torch.dtype, torch.dtype]:
        backend = CudaBackend(DEVICE, **choice)  # type: ignore[arg-type]
        return backend.activation_dtype, backend.cache_dtype

    assert dtypes() == dtypes(dtype="float16") == (torch.float16, torch.float16)
    assert dtypes(dtype="bfloat16") == (torch.bfloat16, torch.bfloat16)
    assert dtypes(dtype="bfloat16", kv_cache_dtype="float16") == (torch.bfloat16, torch.float16)
    assert dtypes(kv_cache_dtype="fp8") == dtypes(kv_cache_dtype="fp8_e4m3") == (torch.float16, FP8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(ConfigError, match=r"kv_cache_dtype is 'fp8', but NVIDIA A100 has no fp8.* 8\.9; choose auto"):
        CudaBackend(torch.device("cuda"), kv_cache_dtype="fp8")


def multiply_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies the bits of bfloat16 numbers as if they were integers."""
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def floats(handle: Any) -> Any:
        if handle.dtype.scalar != interpreter.tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *more: plain(self, floats(a), floats(b), *more),
    )


PLAIN: dict[str, tuple[str, dict[str, Any]]] = {"llama": ("llama", {}), "qwen3": ("qwen3", {})}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *(("llama", "auto"), ("qwen3", "auto"), ("llama", "bfloat16"), ("gemma2", "float16"), ("gemma3", "float16")),
        *((case, "auto") for case in ("ministral3", "phi3, long", "olmo2", "glm4", "hunyuan_v1_dense", "smollm3")),
    ],
)
def test_a_whole_model(
    case: str, dtype: str, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, then decode steps that replay what a graph would hold: logits and greedy tokens of the reference."""
    model_type, changes = {**PLAIN, **CASES}[case]
    source = make_model(model_type, **changes)
    quantize_model(source, tmp_path / "awq", QuantConfig(group_size=32, method="rtn"))
    monkeypatch.setattr(CudaBackend, "declines", classmethod(lambda *_: None))
    multiply_bfloat16(monkeypatch)
    found: dict[str, list[list[int]]] = {}
    scores: dict[str, list[float]] = {}
    for name in ("cuda", "reference"):
        options = Options(str(DEVICE), backend=name, dtype=dtype if name == "cuda" else "auto")
        runner = DecoderRunner(load(tmp_path / "awq", options), kv_tokens=512, rows=2)
        assert isinstance(runner._steps, CudaSteps) == (name == "cuda")
        states = [
            Sampling(SamplingParams(temperature=0), prompt=prompt, ending=(), seed=0, index=0, logprobs=0)
            for prompt in ([3, 4, 5], list(range(20, 40)))
        ]
        tokens: list[list[int]] = [list(state.prompt) for state in states]
        scores[name] = []
        chunks = [Chunk(t, 0, [4 * i, 4 * i + 1], 1, s) for i, (t, s) in enumerate(zip(tokens, states, strict=True))]
        for _ in range(3):
            for i, result in enumerate(runner.start(chunks).outputs()):
                assert result.error is None
                assert result.token is not None
                assert result.logprob is not None
                scores[name].append(result.logprob.logprob)
                tokens[i].append(result.token)
            chunks = [
                Chunk([t[-1]], len(t) - 1, [4 * i, 4 * i + 1], 1, s)
                for i, (t, s) in enumerate(zip(tokens, states, strict=True))
            ]
        found[name] = tokens
    assert found["cuda"] == found["reference"]
    assert torch.allclose(
        torch.tensor(scores["cuda"]), torch.tensor(scores["reference"]), atol=0.1 if dtype == "bfloat16" else 0.02
    )


def test_an_engine_gives_what_it_gives_alone(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are started ahead, tokens are fed on the card; some requests are sampled by the host."""
    quantize_model(make_model("llama"), tmp_path / "awq", QuantConfig(group_size=32, method="rtn"))
    monkeypatch.setattr(CudaBackend, "declines", classmethod(lambda *_: None))
    decoder = load(tmp_path / "awq", Options(str(DEVICE), backend="cuda"))
    plain = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    asked = [
        replace(plain, logprobs=0),
        replace(plain, temperature=1.5, top_p=0.9, repetition_penalty=1.5, frequency_penalty=1.0, seed=2),
        replace(plain, max_tokens=2, temperature=1.0, logit_bias={5: 3.0}, seed=3),
        replace(plain, max_tokens=2, logprobs=2, prompt_logprobs=1),
    ]
    requests = [Request(str(i), list(range(3, 6 + 5 * i)), params) for i, params in enumerate(asked)]

    def run(requests: list[Request]) -> dict[str, list[Output]]:
        runner = DecoderRunner(decoder, kv_tokens=256, rows=3)
        engine = Engine(runner, None, EngineConfig(device=DEVICE.type, max_num_seqs=3, max_num_batched_tokens=20))
        found: dict[str, list[Output]] = {}
        for output in engine.generate(requests):
            found.setdefault(output.request, []).append(output)
        engine.close()
        return found

    together = run(requests)
    assert {one.id: len(together[one.id]) for one in requests} == {one.id: one.params.max_tokens for one in requests}
    for one in requests[1::2]:
        assert together[one.id] == run([one])[one.id]


def test_a_preempted_sequence_goes_on_as_alone(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is preempted with one token generated, and comes back to other pages."""
    quantize_model(make_model("llama"), tmp_path / "awq", QuantConfig(group_size=32, method="rtn"))
    monkeypatch.setattr(CudaBackend, "declines", classmethod(lambda *_: None))
    decoder = load(tmp_path / "awq", Options(str(DEVICE), backend="cuda"))

    def run(requests: list[Request], pages: int) -> tuple[list[int], int]:
        runner = DecoderRunner(decoder, kv_tokens=16 * pages, rows=2)
        config = EngineConfig(device=DEVICE.type, max_num_seqs=2, max_num_batched_tokens=64, prefix_caching=False)
        loop, outputs = Loop(runner, config), list[Output]()
        more = {"room": 16 * pages, "matcher": None, "tokenizer": None, "eos_ids": frozenset[int]()}
        for request in requests:
            loop.add(RequestState(request, outputs.append, **more))  # type: ignore[arg-type]
        while loop.requests:
            loop.step()
        return [
            token for output in outputs if output.request == "b" for token in output.ids
        ], loop.scheduler.preemptions

    plain = SamplingParams(temperature=0, ignore_eos=True, max_tokens=3)
    first = Request("a", [7 * i % 150 + 2 for i in range(32)], replace(plain, max_tokens=5))
    second = Request("b", [5 * i % 150 + 2 for i in range(32)], plain)
    found, preemptions = run([first, second], 5)
    assert preemptions == 1
    assert found == run([second], 5)[0]


def test_next_tokens_of_a_fused_model(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """do_fuse in transformers: a graph for the rows of a batch; a later batch of as many rows takes it over."""
    quantize_model(make_model("llama"), tmp_path / "awq", QuantConfig(group_size=32, method="rtn"))
    monkeypatch.setattr(CudaBackend, "declines", classmethod(lambda *_: None))
    found: dict[str, list[Tensor]] = {"cuda": [], "reference": []}
    for name, logits in found.items():
        runners = Runners(load(tmp_path / "awq", Options(str(DEVICE), backend=name)))
        for rows in ([[3, 4, 5], [9, 8, 7]], [[2, 2], [6, 3]]):
            cache = FusedCache(runners, 20)
            logits.append(_run(cache, integers(rows), None, None, 1))
            logits.append(_run(cache, integers([[11], [12]]), None, None, 0))
            cache.reorder_cache(integers([1, 1]))
            logits.append(_run(cache, integers([[13], [14]]), None, None, 1))
            runner = cache.open(2)
            assert (runner.next_logits is None) == (name == "reference")
            del cache
        assert (runners.take(2, 20) is runner) == (name == "cuda")
    for one, other in zip(found["cuda"], found["reference"], strict=True):
        assert one.shape == other.shape == (2, 1, other.shape[-1])
        assert torch.allclose(one.cpu(), other.cpu(), atol=0.05)


@pytest.mark.parametrize(("columns", "out"), [(1, 1), (5, 33), (128, 40)])
def test_round_columns(columns: int, out: int) -> None:
    """For quantization. A sum in another order may turn a value between two integers, and what comes after it."""
    groups = torch.randint(3, (columns,), generator=torch.Generator().manual_seed(1))
    scales, zeros = random(3, out).abs() * 0.2 + 0.1, (random(3, out, seed=2).abs() * 4).round()
    wanted, base, feedback = random(columns, out, seed=3), random(columns, out, seed=4), random(columns, columns) * 0.2
    wanted[0, 0], wanted[-1, -1] = 1e30, -1e30
    given = (wanted, base, feedback, scales, zeros, groups, 15)
    levels, errors = GPU.round_columns(*given)
    expected, _ = REFERENCE.round_columns(*given)
    assert (levels != expected).any(0).float().mean() < 0.04
    assert torch.equal(levels, levels.round().clamp(0, 15))
    own = groups.to(DEVICE)
    assert torch.allclose(errors, base - (levels - zeros[own]) * scales[own], atol=1e-6)
    assert columns == 1 or (float(levels[0, 0]), float(levels[-1, -1])) == (15, 0)


def test_rows_of_sequences() -> None:
    """A row stays while its sequence runs, is new with other pages, and rows close up once few are left."""
    seats = Seats(32)
    states = [Sampling(SamplingParams(), [1] * 20, (), 0, i) for i in range(32)]
    pages = [[i] for i in range(32)]
    prompts = [Chunk([1] * 20, 0, p, 1, s) for p, s in zip(pages, states, strict=True)]
    taken, fresh = seats.take(prompts)
    assert [seat.row for seat in taken] == list(range(32))
    assert fresh == list(range(32))
    (seat,), fresh = seats.take([Chunk([SAMPLED], 20, pages[31], 1, states[31])])
    assert (seat.row, fresh) == (31, [])
    assert not seats.compact(1)
    (seat,), fresh = seats.take([Chunk([5], 21, pages[31], 1, states[31])])
    assert (seat.row, fresh) == (0, [0])
    assert seats.compact(1)
    (seat,), fresh = seats.take([Chunk([6], 22, list(pages[31]), 1, states[31])])  # admitted again
    assert (seat.row, fresh) == (0, [0])


def test_what_it_declines() -> None:
    with pytest.raises(KernelError, match="it is for NVIDIA GPUs"):
        backend_for("cpu", "cuda")
    assert GPU.int4_declines(64, 96, 96) is None
    assert "groups of 48" in str(GPU.int4_declines(64, 96, 48))
    gemm = to_gemm(random_int4(64, 96, 48))
    weight = GPU.pack_int4(64, 96, 48, [(gemm["qweight"], gemm["scales"], gemm["qzeros"])])
    x = random(3, 96).half()
    expected = x.float() @ random_int4(64, 96, 48).dequantize().T
    assert (GPU.matmul(x, weight).float() - expected).abs().max() < 2e-3 * expected.abs().max()


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_compiled_for_a_card(capability: int, tmp_path: Path) -> None:
    """Without a card: INT4 words come in 16-byte pieces, and no registers are spilled."""
    code = f"""
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from squawq.backends.cuda import int4
kernel, names = int4.matmul_kernel, int4.matmul_kernel.arg_names
for kind, tokens, outputs, warps in (("fp16", 8, 64, 2), ("fp16", 128, 128, 8), ("bf16", 16, 64, 4)):
    types = dict(x="*" + kind, words="*i16", grids="*i32", out="*fp32", M="i32", N="i32", K="i32", blocks="i32")
    values = dict(GROUP=128, PADDED=False, TOKENS=tokens, OUTPUTS=outputs, STAGES=3, DEPENDENT={capability >= 90})
    values |= dict(INTERPRETED=False)
    signature = types | dict(split="i32") | dict.fromkeys(values, "constexpr")
    aligned = {{(names.index(name),): [["tt.divisibility", 16]] for name in ("x", "words", "grids", "out", "N", "K")}}
    source = ASTSource(kernel, signature, {{(names.index(n),): v for n, v in values.items()}}, aligned)
    target = GPUTarget("cuda", {capability}, 32)
    ptx = triton.compile(source, target=target, options=dict(num_warps=warps, num_stages=3)).asm["ptx"]
    copies = re.findall(r"cp.async.cg.shared.global \\[[^]]*\\], \\[[^]]*\\], 0x10", ptx)
    print(kind, tokens, len(copies), "local" if ".local" in ptx else "none spilled")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**environment, "TRITON_HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")
    assert len(lines) == 4, done.stdout
    for line in lines[:3]:
        words = line.split()
        assert int(words[2]) >= 3, done.stdout
        assert words[3] == "none", done.stdout
