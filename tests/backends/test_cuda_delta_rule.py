"""The CUDA backend's gated delta rule against the reference: on a GPU, or in Triton's interpreter without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_models import family_model
from test_delta_rule import EPS, garbage, inputs, weights
from torch import Tensor

from squawq.backends import backend_for
from squawq.backends.base import States
from squawq.backends.cuda.backend import CudaBackend
from squawq.backends.layer_ops import GatedDeltaRule
from squawq.backends.sampling import Chunk, Sampling
from squawq.delta_config import DeltaRuleConfig
from squawq.engine.request import SamplingParams
from squawq.engine.runner import DecoderRunner
from squawq.nn.loader import Options, load
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize

pytest.importorskip("triton")

from squawq.backends.cuda import delta_rule, launch
from squawq.backends.cuda.steps import CudaSteps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU, REFERENCE = CudaBackend(DEVICE), backend_for(DEVICE, "reference")
CASES = {"shared heads": DeltaRuleConfig(1, 2, 16, 24, 4), "no convolution": DeltaRuleConfig(1, 1, 24, 16, 1)}
ROWS, LATER = 5, 2  # tokens of a prompt, and after it
pytestmark = [
    *([pytest.mark.gpu] if DEVICE.type == "cuda" else []),
    # in the interpreter itself
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]


def on_device(rule: GatedDeltaRule) -> GatedDeltaRule:
    tensors = (tensor.to(DEVICE) for tensor in (rule.convolution, rule.rate, rule.bias, rule.norm))
    return GatedDeltaRule(rule.layer, rule.sizes, *tensors)


def states(rule: GatedDeltaRule) -> States:
    first, second = garbage(rule.sizes)
    return first.to(DEVICE), second.to(DEVICE)


def prompt(backend: CudaBackend, rule: GatedDeltaRule, cuts: list[int], kept: States) -> Tensor:
    """One sequence of ROWS + LATER tokens in chunks that end at `cuts`."""
    wide, gates = (tensor.half().to(DEVICE) for tensor in inputs(rule.sizes, ROWS + LATER))
    found, start = [], 0
    for end in cuts:
        sequences, places = torch.tensor([[0, end - start, start, 0]]), torch.tensor([2])
        part = slice(start, end)
        found.append(backend.gated_delta_rule(wide[part], gates[part], rule, EPS, sequences, places, kept))
        start = end
    return torch.cat(found)


@pytest.mark.parametrize("case", CASES)
def test_prompts(case: str) -> None:
    """Two sequences side by side: outputs and states, the same bits in any chunks."""
    rule = on_device(weights(CASES[case]))
    (wide, gates), (other, other_gates) = (inputs(rule.sizes, rows) for rows in (ROWS + LATER, 2))
    wide, gates = torch.cat([other, wide]).half().to(DEVICE), torch.cat([other_gates, gates]).half().to(DEVICE)
    sequences, places = torch.tensor([[0, 2, 0, 0], [2, ROWS + LATER, 0, 0]]), torch.tensor([0, 2])
    kept, expected_kept = states(rule), states(rule)
    found = GPU.gated_delta_rule(wide, gates, rule, EPS, sequences, places, kept)
    expected = REFERENCE.gated_delta_rule(wide.float(), gates.float(), rule, EPS, sequences, places, expected_kept)
    assert found.dtype == torch.float16
    assert torch.allclose(found.float(), expected, atol=2e-3, rtol=2e-3)
    for state, wanted in zip(kept, expected_kept, strict=True):
        assert torch.allclose(state, wanted, atol=1e-4, rtol=1e-4, equal_nan=True)
    for cuts in ([1, ROWS, ROWS + LATER], [ROWS, ROWS + LATER]):
        assert torch.equal(prompt(GPU, rule, cuts, states(rule)), found[2:])


@pytest.mark.parametrize("case", CASES)
def test_next_tokens(case: str) -> None:
    """After a prompt, one token after another beside a row of padding, from partial sums as a decode step has them."""
    rule = on_device(weights(CASES[case]))
    kept = states(rule)
    prompt(GPU, rule, [ROWS], kept)
    expected = prompt(REFERENCE, rule, [ROWS, ROWS + LATER], states(rule))[ROWS:]  # type: ignore[arg-type]
    wide, gates = (tensor.half().float().to(DEVICE) for tensor in inputs(rule.sizes, ROWS + LATER))
    untouched = torch.tensor([0, 1, 3])
    for step in range(LATER):
        row = wide[ROWS + step : ROWS + step + 1].expand(2, -1)
        sums = launch.Sums(torch.stack([row * 0.25, row * 0.5]), row[0] * 0.25)
        gate_sums = launch.Sums(gates[ROWS + step : ROWS + step + 1].expand(1, 2, -1).contiguous())
        numbers = ([0, 1], [2, 1], [ROWS + step, -1])
        of = delta_rule.Rows(*(torch.tensor(each, device=DEVICE) for each in numbers))
        out = torch.zeros(2, rule.sizes.values, dtype=torch.float16, device=DEVICE)
        between = delta_rule.space(2, rule.sizes, DEVICE)
        delta_rule.gated_delta_rule(sums, gate_sums, rule, EPS, of, kept, between, out)
        assert torch.allclose(out[0].float(), expected[step].float(), atol=4e-3, rtol=4e-3)
    assert all(state[untouched].isnan().all() for state in kept)


def test_a_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, then decode steps that replay what a graph would hold, in places in which other sequences were."""
    family_model("qwen3_5_text", tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "awq", QuantConfig(group_size=32, method="rtn"))
    monkeypatch.setattr(CudaBackend, "declines", classmethod(lambda *_: None))
    found: dict[str, list[tuple[int, float]]] = {}
    for name in ("cuda", "reference"):
        runner = DecoderRunner(load(tmp_path / "awq", Options(str(DEVICE), backend=name)), kv_tokens=64, rows=2)
        assert isinstance(runner._steps, CudaSteps) == (name == "cuda")
        runner.run([Chunk([9, 8, 7], 0, [0], 1, slot=0), Chunk([9, 8], 0, [1], 1, slot=1)])
        prompts = [3, 4], [20, 21, 22, 23, 24]
        params = SamplingParams(temperature=0)
        states = [Sampling(params, prompt=prompt, ending=(), seed=0, index=0, logprobs=0) for prompt in prompts]
        chunks = [Chunk(prompts[i], 0, [2 + i], 1, states[i], slot=1 - i) for i in (0, 1)]
        ends, found[name] = [len(prompt) for prompt in prompts], []
        for _ in range(2):
            results = runner.start(chunks).outputs()
            tokens = []
            for result in results:
                assert result.token is not None
                assert result.logprob is not None
                tokens.append(result.token)
                found[name].append((result.token, result.logprob.logprob))
            chunks = [Chunk([tokens[i]], ends[i], [2 + i], 1, states[i], slot=1 - i) for i in (0, 1)]
            ends = [end + 1 for end in ends]
    (ours, logprobs), (theirs, expected) = (zip(*found[name], strict=True) for name in ("cuda", "reference"))
    assert ours == theirs
    assert torch.allclose(torch.tensor(logprobs), torch.tensor(expected), atol=0.02)


def test_output_gate() -> None:
    x, gates = (torch.randn(3, 1500, device=DEVICE).half() for _ in range(2))
    assert torch.allclose(GPU.output_gate(x, gates), REFERENCE.output_gate(x, gates), atol=2e-3)
