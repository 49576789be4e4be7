"""The native kernels against plain torch, on every instruction set that this machine has, at sizes around the tiles'
edges; and batch invariance: a row's bits do not depend on the rows beside it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import programs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from squawq.backends import backend_for
from squawq.backends.base import Backend
from squawq.backends.cpu import library
from squawq.backends.cpu.packed import NativePacked, PackedDense, PackedInt4, PackedInt8
from squawq.backends.layer_ops import Attention, RotateAndStore
from squawq.errors import ConfigError, KernelError
from squawq.format.groupwise import GroupwiseTensor, quantize, to_gemm

if library.load() is None:
    pytest.skip("the native kernels are not built on this machine", allow_module_level=True)

CPU, REFERENCE = backend_for("cpu", "cpu"), backend_for("cpu", "reference")


def available() -> list[str]:
    here = library.isa()
    found = []
    for isa in ("avx512", "avx2", "neon", "scalar"):
        try:
            library.set_isa(isa)
            found.append(isa)
        except ConfigError:
            pass
    library.set_isa(here)
    return found


ISAS = available()


@pytest.fixture(autouse=True, params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = library.isa()
    library.set_isa(request.param)
    yield request.param
    library.set_isa(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(tensor: GroupwiseTensor, group: int, *, exact: bool, bias: Tensor | None = None) -> PackedInt4:
    out, in_ = tensor.q.shape
    weight = PackedInt4(out, in_, group, bias=bias, exact=exact)
    gemm = to_gemm(tensor)
    weight.fill(0, gemm["qweight"], gemm["scales"], gemm["qzeros"])
    return weight


def times(weight: NativePacked, x: Tensor) -> Tensor:
    return CPU.matmul(x, weight)


def row_by_row(weight: NativePacked, x: Tensor) -> Tensor:
    return torch.cat([times(weight, x[i : i + 1]) for i in range(len(x))])


ROWS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33)


@pytest.mark.parametrize(
    ("out", "in_", "group"), [(16, 128, 128), (24, 256, 64), (40, 96, 32), (8, 80, 16), (136, 512, 256)]
)
def test_int4_matmul(out: int, in_: int, group: int) -> None:
    """Exact: float32 sums of in_ products in another order. int8: half a step of 1/127 of the group's largest
    activation in each product, which adds up like noise; 2 % of the largest output is some six times that."""
    tensor, bias = quantize(random(out, in_), group, True), random(out, seed=1)
    for exact, tolerance in ((True, 1e-5), (False, 0.02)):
        weight = packed(tensor, group, exact=exact, bias=bias)
        for rows in ROWS:
            x = random(rows, in_, seed=rows)
            expected = F.linear(x, tensor.dequantize(), bias)
            found = times(weight, x)
            assert (found - expected).abs().max() <= tolerance * expected.abs().max()
            assert torch.equal(found, row_by_row(weight, x))


def test_int8_activations_are_what_the_docs_say() -> None:
    """The integer kernel equals its definition: int8 per token and group of 128, nearest even, exact integer sums."""
    tensor, x = quantize(random(32, 384), 128, True), random(5, 384, seed=2)
    groups = x.view(5, 3, 128)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    rounded = (groups * (127 / groups.abs().amax(-1, keepdim=True))).round() * scale
    expected = F.linear(rounded.view(5, 384).double().float(), tensor.dequantize())
    assert torch.allclose(
        times(packed(tensor, 128, exact=False), x), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )


def test_int4_extremes_do_not_overflow() -> None:
    """All weights 15 or 0, zeros 0 or 15, activations at the int8 limits: the largest sums that can be."""
    for q, zero in ((15, 0), (0, 15), (15, 15)):
        tensor = GroupwiseTensor(
            torch.full((16, 1024), q, dtype=torch.uint8),
            torch.ones(16, 8, dtype=torch.float16),
            torch.full((16, 8), zero, dtype=torch.uint8),
        )
        x = torch.tensor([[1.0], [-1.0]]).expand(2, 1024).contiguous()
        expected = torch.tensor([[1.0], [-1.0]]) * 1024 * (q - zero)
        assert torch.allclose(times(packed(tensor, 128, exact=False), x), expected.expand(2, 16), rtol=1e-5)


def test_symmetric_checkpoints_have_zeros_of_8() -> None:
    tensor = quantize(random(24, 128), 32, False)
    gemm = to_gemm(tensor)
    weight = PackedInt4(24, 128, 32, exact=True)
    weight.fill(0, gemm["qweight"], gemm["scales"], None)
    x = random(3, 128, seed=4)
    assert torch.allclose(times(weight, x), F.linear(x, tensor.dequantize()), atol=1e-4)


def test_parts_are_stacked() -> None:
    parts = [quantize(random(rows, 64, seed=rows), 32, True) for rows in (24, 8, 40)]
    weight = PackedInt4(72, 64, 32, exact=True)
    row = 0
    for part in parts:
        gemm = to_gemm(part)
        weight.fill(row, gemm["qweight"], gemm["scales"], gemm["qzeros"])
        row += part.q.shape[0]
    x = random(3, 64, seed=9)
    assert torch.allclose(times(weight, x), torch.cat([F.linear(x, p.dequantize()) for p in parts], 1), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_and_int8_weights(dtype: torch.dtype) -> None:
    matrix, bias = random(40, 96).to(dtype), random(40, seed=1)
    dense, int8 = PackedDense([matrix[:17], matrix[17:]], bias=bias), PackedInt8(matrix)
    for rows in ROWS:
        x = random(rows, 96, seed=rows)
        expected = x.double() @ matrix.double().T
        assert (times(dense, x) - expected - bias).abs().max() < 1e-5 * 40
        assert (times(int8, x) - expected).abs().max() < 0.02 * expected.abs().max()
        assert torch.equal(times(dense, x), row_by_row(dense, x))
        assert torch.equal(times(int8, x), row_by_row(int8, x))


def test_halves_are_read_as_the_standard_says() -> None:
    """Every float16 and bfloat16 bit pattern that is a number, through a product with 1."""
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
        values = torch.where(torch.isfinite(values), values, torch.zeros_like(values)).view(-1, 1)
        weight = PackedDense([torch.cat((values, torch.zeros(65536, 15, dtype=dtype)), 1)])
        found = times(weight, torch.eye(16)[:1])
        assert torch.equal(found[0], values[:, 0].float())


def test_add_rms_norm_and_silu() -> None:
    """A few roundings in float32 apart from torch."""
    for rows, n in ((1, 16), (3, 256), (33, 1024)):
        hidden, delta, weight = random(rows, n), random(rows, n, seed=1), random(n, seed=2)
        mine, theirs = hidden.clone(), hidden.clone()
        found = CPU.add_rms_norm(mine, delta, weight, 1e-5)
        assert torch.allclose(found, REFERENCE.add_rms_norm(theirs, delta, weight, 1e-5), atol=1e-5)
        assert torch.equal(mine, theirs)
        gate_up = random(rows, 2 * n, seed=3) * 8
        assert torch.allclose(
            CPU.activation_mul(gate_up, "silu"), REFERENCE.activation_mul(gate_up, "silu"), rtol=1e-5, atol=1e-5
        )
    wild = torch.tensor([[-1e30, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 1e30] * 2 + [1.0] * 16])
    # Far below -88 the exponential stops growing: -1e30 gives -6e-9 for 0.
    assert torch.allclose(
        CPU.activation_mul(wild, "silu"), REFERENCE.activation_mul(wild, "silu"), rtol=1e-5, atol=1e-8
    )


class Paged:
    """A cache of random keys and values, and sequences that lie across it in random pages."""

    def __init__(self, heads: tuple[int, int, int], lengths: list[tuple[int, int]], seed: int = 0) -> None:
        query, kv, dim = self.heads = heads
        generator = torch.Generator().manual_seed(seed)
        total = sum(-(-(start + rows) // 16) for start, rows in lengths)
        order = torch.randperm(total + 3, generator=generator).int()
        self.keys = torch.randn(total + 3, kv, dim, 16, generator=generator).half()
        self.values = torch.randn(total + 3, kv, 16, dim, generator=generator).half()
        rows_all = sum(rows for _, rows in lengths)
        self.qkv = torch.randn(rows_all, (query + 2 * kv) * dim, generator=generator)
        pages: list[int] = []
        positions: list[int] = []
        sequences, slots = [], []
        first = 0
        for start, rows in lengths:
            count = -(-(start + rows) // 16)
            table = order[len(pages) : len(pages) + count].tolist()
            sequences.append((first, rows, start, len(pages)))
            positions += range(start, start + rows)
            slots += [table[p // 16] * 16 + p % 16 for p in range(start, start + rows)]
            pages += table
            first += rows
        self.sequences, self.pages = torch.tensor(sequences), torch.tensor(pages, dtype=torch.int32)
        self.positions, self.slots = torch.tensor(positions), torch.tensor(slots)

    def attend(self, backend: Backend, window: int | None) -> Tensor:
        operation = Attention(0, window)
        return backend.attention(self.qkv, self.heads, operation, self.sequences, self.pages, (self.keys, self.values))


@pytest.mark.parametrize("heads", [(4, 4, 16), (8, 2, 64), (6, 1, 32), (16, 1, 128), (3, 3, 48)])
@pytest.mark.parametrize("window", [None, 1, 24, 100])
def test_attention(heads: tuple[int, int, int], window: int | None) -> None:
    lengths = [(0, 1), (15, 1), (16, 1), (200, 1), (0, 70), (31, 33), (63, 2), (127, 16)]
    paged = Paged(heads, lengths)
    assert torch.allclose(paged.attend(CPU, window), paged.attend(REFERENCE, window), atol=2e-5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 40)), min_size=1, max_size=5),
    window=st.sampled_from([None, 7, 64]),
    seed=st.integers(0, 100),
)
def test_attention_of_a_row_is_the_same_in_any_batch(
    isa: str, lengths: list[tuple[int, int]], window: int | None, seed: int
) -> None:
    paged = Paged((4, 2, 32), lengths, seed)
    together = paged.attend(CPU, window)
    for first, rows, start, place in paged.sequences.tolist():
        for row in range(rows):
            alone = CPU.attention(
                paged.qkv[first + row : first + row + 1].contiguous(),
                paged.heads,
                Attention(0, window),
                torch.tensor([[0, 1, start + row, place]]),
                paged.pages,
                (paged.keys, paged.values),
            )
            assert torch.equal(alone[0], together[first + row])


@pytest.mark.parametrize("normed", [False, True])
def test_rotate_and_store(normed: bool) -> None:
    paged = Paged((4, 2, 32), [(0, 3), (30, 5), (300, 1)])
    frequencies = torch.stack([1.0 / 10000 ** (torch.arange(0, 32, 2) / 32), torch.ones(16)])
    norms = (1 + 0.1 * random(32), 1 + 0.1 * random(32, seed=1)) if normed else (None, None)
    results = []
    for kernels in (CPU, REFERENCE):
        qkv, keys, values = paged.qkv.clone(), paged.keys.clone(), paged.values.clone()
        qkv[0, -1], qkv[1, -2] = 1e6, -1e6  # beyond float16: kept finite
        rotary = kernels.rotary(paged.positions, frequencies)
        operation = RotateAndStore(0, *norms)
        kernels.rotate_and_store(qkv, paged.heads, operation, rotary, 1e-5, paged.slots, (keys, values))
        results.append((qkv, keys.float(), values.float()))
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, atol=2e-3, rtol=1e-3)
    assert (float(results[0][2].max()), float(results[0][2].min())) == (65504.0, -65504.0)


@pytest.mark.parametrize("highest", [15, 7])
@pytest.mark.parametrize(("columns", "out"), [(1, 1), (5, 63), (64, 64), (127, 65), (128, 200)])
def test_round_columns(columns: int, out: int, highest: int) -> None:
    """A sum in another order may turn a value between two integers, and what comes after it in its channel."""
    groups = torch.randint(3, (columns,), generator=torch.Generator().manual_seed(1))
    scales, zeros = random(3, out).abs() * 0.2 + 0.1, (random(3, out, seed=2).abs() * 4).round()
    wanted, base, feedback = random(columns, out, seed=3), random(columns, out, seed=4), random(columns, columns) * 0.2
    wanted[0, 0], wanted[-1, -1] = 1e30, -1e30
    given = (wanted, base, feedback, scales, zeros, groups, highest)
    levels, errors = CPU.round_columns(*given)
    expected, _ = REFERENCE.round_columns(*given)
    assert (levels != expected).any(0).float().mean() < 0.02
    assert torch.equal(levels, levels.round().clamp(0, highest))
    assert torch.allclose(errors, base - (levels - zeros[groups]) * scales[groups], atol=1e-6)
    assert columns == 1 or (float(levels[0, 0]), float(levels[-1, -1])) == (highest, 0)


def test_isas_agree_on_integers(isa: str) -> None:
    """Integer sums are exact everywhere; the float additions differ only where fused multiply-add is missing."""
    tensor, x = quantize(random(48, 256), 128, True), random(9, 256, seed=3)
    found = times(packed(tensor, 128, exact=False), x)
    library.set_isa("scalar")
    expected = times(packed(tensor, 128, exact=False), x)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_threads_change_nothing() -> None:
    tensor, x = quantize(random(200, 256), 128, True), random(37, 256, seed=3)
    weight = packed(tensor, 128, exact=False)
    before = library.threads()
    results: list[Tensor] = []
    try:
        for count in (1, 2, 3, 5):
            library.set_threads(count)
            assert library.threads() == count
            results.extend(times(weight, x) for _ in range(20))
        for count in (1, 2, 3):
            assert library.use_openmp(count)  # torch's
            assert library.threads() == count
            results.extend(times(weight, x) for _ in range(20))
    finally:
        library.set_threads(before)
    assert library.threads() == before
    assert all(torch.equal(r, results[0]) for r in results)


def test_what_is_not_a_number_shows() -> None:
    """NaN in one row's activations or in a weight's row gives NaN there, and nowhere else."""
    tensor, x = quantize(random(40, 256), 128, True), random(9, 256)
    clean = x.clone()
    x[4, 200] = float("nan")
    matrix = random(40, 256)
    broken = matrix.clone()
    broken[7, 3] = float("nan")
    for weight in (packed(tensor, 128, exact=False), packed(tensor, 128, exact=True), PackedInt8(matrix)):
        found = times(weight, x)
        assert bool(found[4].isnan().all())
        assert torch.equal(found[[0, 1, 2, 3, 5, 6, 7, 8]], times(weight, clean)[[0, 1, 2, 3, 5, 6, 7, 8]])
    found = times(PackedInt8(broken), clean)
    assert bool(found[:, 7].isnan().all())
    assert int(found.isnan().sum()) == 9


def test_nothing_of_a_pages_last_holder_is_left() -> None:
    """A page full of NaN, taken by another sequence: places that are masked count as 0 times what stands there."""
    paged = Paged((4, 2, 32), [(0, 5)])
    paged.keys.fill_(float("nan"))
    paged.values.fill_(float("nan"))
    rotary = CPU.rotary(paged.positions, torch.ones(2, 16))
    arguments = (paged.heads, RotateAndStore(0), rotary, 1e-5, paged.slots, (paged.keys, paged.values))
    CPU.rotate_and_store(paged.qkv, *arguments)
    assert bool(torch.isfinite(paged.attend(CPU, None)).all())
    paged.qkv[1, -1] = float("nan")  # a value of token 1 itself is not hidden from those that look at it
    CPU.rotate_and_store(paged.qkv, *arguments)
    assert paged.attend(CPU, None).isnan().any(1).tolist()[1:] == [True] * 4


def test_a_forked_child_computes_alone() -> None:
    """Threads do not survive a fork: the child's calls must end all the same."""
    weight, x = packed(quantize(random(512, 256), 128, True), 128, exact=False), random(16, 256)
    expected = times(weight, x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(times(weight, x), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(KernelError, match=r"\[16, 24\] in groups of 24"):
        PackedInt4(16, 24, 24)
    weight = PackedInt4(16, 128, 128)
    gemm = to_gemm(quantize(random(32, 128), 128, True))
    with pytest.raises(KernelError, match="do not fit"):
        weight.fill(0, gemm["qweight"], gemm["scales"], gemm["qzeros"])
    small = to_gemm(quantize(random(16, 128), 128, True))
    with pytest.raises(KernelError, match="beyond float16"):
        weight.fill(0, small["qweight"], small["scales"].float() * 1e9, small["qzeros"])
    with pytest.raises(ConfigError, match="'sse9'"):
        library.set_isa("sse9")
    with pytest.raises(ConfigError, match="threads is 0"):
        library.set_threads(0)


def _isa_of_a_new_process(**environment: str) -> subprocess.CompletedProcess[str]:
    code = "from squawq.backends.cpu import library; print(library.isa(), library.threads())"
    return programs.run(["-c", code], env={**os.environ, **environment})


def test_environment_forces_an_isa(isa: str) -> None:
    assert _isa_of_a_new_process(SQUAWQ_ISA=isa, SQUAWQ_THREADS="3").stdout.split() == [isa, "3"]
    assert _isa_of_a_new_process(SQUAWQ_ISA="torch").stdout.split()[0] == "torch"
    assert "choose one of avx512, avx2" in _isa_of_a_new_process(SQUAWQ_ISA="sse9").stderr
    assert "SQUAWQ_THREADS is 'many'" in _isa_of_a_new_process(SQUAWQ_THREADS="many").stderr


def test_without_the_library_torch_runs_and_it_is_said_once() -> None:
    code = """
import torch
from squawq.backends import backend_for
from squawq.backends.cpu import library
library._find = lambda: None
library.load(), library.load()
print(library.isa(), backend_for("cpu").activation_mul(torch.ones(1, 32), "silu").shape[1])
"""
    done = programs.run(["-c", code])
    assert done.stdout.split() == ["torch", "16"]
    assert done.stderr.count("native CPU kernels are not built") == 1


def test_activations_that_pointers_would_misread_are_refused() -> None:
    int4 = packed(quantize(random(16, 64), 32, True), 32, exact=True)
    weights: list[NativePacked] = [int4, PackedInt8(random(16, 64)), PackedDense([random(16, 64)])]
    for weight in weights:
        x = random(3, 64)
        expected = times(weight, x)
        assert expected.shape == (3, 16)
        for odd in (random(3, 32), random(3, 128), random(32), x.int(), x.to("meta")):
            with pytest.raises(KernelError, match="activations"):
                times(weight, odd)
        for same in (x.T.contiguous().T, x.double(), x[:, None], x.repeat(1, 2)[:, :64]):
            assert torch.equal(times(weight, same).float().view(3, 16), expected)
