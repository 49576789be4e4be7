"""The gated delta rule: the reference against transformers, the native kernels against the reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from squawq.backends import backend_for
from squawq.backends.base import Backend, States
from squawq.backends.cpu import library
from squawq.backends.layer_ops import GatedDeltaRule
from squawq.delta_config import DeltaRuleConfig
from squawq.errors import SquawqError

SIZES = {
    "as many value heads": DeltaRuleConfig(2, 2, 32, 32, 4),
    "shared, three vectors of values": DeltaRuleConfig(2, 4, 16, 48, 4),
    "short kernel": DeltaRuleConfig(1, 3, 48, 16, 2),
    "no convolution": DeltaRuleConfig(1, 1, 16, 16, 1),
    "longest kernel, widest head": DeltaRuleConfig(1, 2, 256, 256, 16),
}
ROWS = (70, 1, 5)  # of three sequences
EPS = 1e-6
native = pytest.mark.skipif(library.load() is None, reason="the native kernels are not built on this machine")


def weights(sizes: DeltaRuleConfig) -> GatedDeltaRule:
    make = torch.Generator().manual_seed(0)
    heads = sizes.value_heads
    return GatedDeltaRule(
        0,
        sizes,
        torch.randn(sizes.kernel, sizes.channels, generator=make) * 0.5,
        -(torch.rand(heads, generator=make) * 8 + 0.01),
        torch.randn(heads, generator=make),
        1 + 0.1 * torch.randn(sizes.value_dim, generator=make),
    )


def inputs(sizes: DeltaRuleConfig, rows: int) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(rows)
    return torch.randn(rows, sizes.channels + sizes.values, generator=make), torch.randn(
        rows, 2 * sizes.value_heads, generator=make
    )


def garbage(sizes: DeltaRuleConfig, places: int = 4) -> States:
    """What other sequences have left: a new one must not see it."""
    first, second = sizes.state_shapes
    return torch.full((places, *first), torch.nan), torch.full((places, *second), torch.nan)


def run(backend: Backend, rule: GatedDeltaRule, cuts: list[int], states: States, place: int = 1) -> Tensor:
    """One sequence of ROWS[0] tokens in chunks that end at `cuts`."""
    wide, gates = inputs(rule.sizes, ROWS[0])
    found, start = [], 0
    for end in cuts:
        sequences, places = torch.tensor([[0, end - start, start, 0]]), torch.tensor([place])
        part = slice(start, end)
        arguments = wide[part].contiguous(), gates[part].contiguous(), rule, EPS, sequences, places, states
        found.append(backend.gated_delta_rule(*arguments))
        start = end
    return torch.cat(found)


def by_transformers(rule: GatedDeltaRule, rows: int) -> Tensor:
    """transformers' module, whose projections are the identity."""
    from transformers import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    sizes = rule.sizes
    config = Qwen3_5TextConfig(
        hidden_size=sizes.channels + sizes.values + 2 * sizes.value_heads,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=sizes.key_heads,
        linear_num_value_heads=sizes.value_heads,
        linear_key_head_dim=sizes.key_dim,
        linear_value_head_dim=sizes.value_dim,
        linear_conv_kernel_dim=sizes.kernel,
        rms_norm_eps=EPS,
    )
    module = Qwen3_5GatedDeltaNet(config, 0)
    every = torch.eye(config.hidden_size)
    parts = torch.split(every, [sizes.channels, sizes.values, sizes.value_heads, sizes.value_heads])
    linears = module.in_proj_qkv, module.in_proj_z, module.in_proj_b, module.in_proj_a
    with torch.no_grad():
        for linear, part in zip(linears, parts, strict=True):
            linear.weight.copy_(part)
        module.out_proj = torch.nn.Identity()
        module.conv1d.weight.copy_(rule.convolution.T[:, None])
        module.A_log.copy_((-rule.rate).log())
        module.dt_bias.copy_(rule.bias)
        module.norm.weight.copy_(rule.norm)
        found: Tensor = module(torch.cat(inputs(sizes, rows), 1)[None])[0]
    return found


@pytest.mark.parametrize("case", SIZES)
def test_the_reference_is_transformers(case: str) -> None:
    rule = weights(SIZES[case])
    found = run(backend_for("cpu", "reference"), rule, [ROWS[0]], garbage(rule.sizes))
    expected = by_transformers(rule, ROWS[0])
    assert expected.abs().mean() > 0.1
    assert torch.allclose(found, expected, atol=2e-4, rtol=1e-3)


@pytest.fixture(params=["avx512", "avx2", "neon", "scalar"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = library.isa()
    try:
        library.set_isa(request.param)
    except SquawqError as error:
        pytest.skip(str(error))
    yield request.param
    library.set_isa(before)


@native
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("case", SIZES)
def test_the_kernel_is_the_reference(case: str) -> None:
    """The outputs, and what it keeps for the next tokens."""
    rule = weights(SIZES[case])
    kept, expected_kept = garbage(rule.sizes), garbage(rule.sizes)
    found = run(backend_for("cpu", "cpu"), rule, [ROWS[0]], kept)
    expected = run(backend_for("cpu", "reference"), rule, [ROWS[0]], expected_kept)
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    for state, wanted in zip(kept, expected_kept, strict=True):
        assert torch.allclose(state, wanted, atol=1e-4, rtol=1e-4, equal_nan=True)
        assert state[0].isnan().all()
        assert not state[1].isnan().any()


@native
@pytest.mark.parametrize("case", SIZES)
def test_chunks_and_batches_change_no_bit(case: str) -> None:
    backend, rule = backend_for("cpu", "cpu"), weights(SIZES[case])
    whole = run(backend, rule, [ROWS[0]], garbage(rule.sizes))
    for size in (1, 7, 33):
        cuts = [*range(size, ROWS[0], size), ROWS[0]]
        assert torch.equal(run(backend, rule, cuts, garbage(rule.sizes)), whole)
    parts = [inputs(rule.sizes, rows) for rows in ROWS]
    wide, gates = (torch.cat(found) for found in zip(*parts, strict=True))
    ends = torch.tensor(ROWS).cumsum(0)
    sequences = torch.stack([ends - torch.tensor(ROWS), torch.tensor(ROWS), *torch.zeros(2, 3).long()], 1)
    places = torch.tensor([2, 0, 3])
    together = backend.gated_delta_rule(wide, gates, rule, EPS, sequences.contiguous(), places, garbage(rule.sizes))
    assert torch.equal(together[: ROWS[0]], whole)


@native
def test_sizes_without_a_kernel_run_on_torch() -> None:
    rule = weights(DeltaRuleConfig(1, 2, 12, 20, 3))
    found, expected = (run(backend_for("cpu", name), rule, [70], garbage(rule.sizes)) for name in ("cpu", "reference"))
    assert torch.equal(found, expected)


@native
def test_output_gate() -> None:
    x, gates = torch.randn(5, 48), torch.randn(5, 48) * 20
    found, expected = (backend_for("cpu", name).output_gate(x, gates) for name in ("cpu", "reference"))
    assert torch.allclose(found, expected, atol=1e-6)
