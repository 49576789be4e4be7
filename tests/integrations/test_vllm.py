"""vLLM's plugin. A stand-in for vllm has what the plugin uses of it; one test runs vLLM itself where there is one.

That needs an environment with vLLM and squawq: this one, or the interpreter that SQUAWQ_VLLM_PYTHON names.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from squawq.backends.cpu import library
from squawq.backends.reference import Reference
from squawq.format.groupwise import PER_WORD, GroupwiseTensor, pack, quantize, to_gemm
from squawq.integrations import vllm as plugin

ROOT = Path(__file__).parents[2]
CPU = "cpu"
STANDARD = tuple(range(PER_WORD))
PROMPTS = ["Once upon a time", "The dog", "One day, Lily"]
TOKENS = 24


@dataclass
class Config:
    """What the plugin reads of vLLM's MPLinearLayerConfig."""

    partition_weight_shape: tuple[int, int]
    weight_type: str = "uint4"
    act_type: torch.dtype = torch.bfloat16
    group_size: int = 32
    zero_points: bool = True


class StandIn:
    """vLLM's MPLinearKernel."""

    @classmethod
    def can_implement(cls, c: Config) -> tuple[bool, str | None]:
        return c.partition_weight_shape[1] % 32 == 0, "the size"

    def __init__(self, c: Config, w_q: str, w_s: str, w_zp: str | None = None) -> None:
        self.config, self.w_q_name, self.w_s_name, self.w_zp_name = c, w_q, w_s, w_zp

    def _get_weight_params(self, layer: nn.Module) -> tuple[Any, ...]:
        return tuple(getattr(layer, name or "", None) for name in (self.w_q_name, self.w_s_name, self.w_zp_name))


class CPUWNA16LinearKernel(StandIn):
    pass


class ZentorchWNA16LinearKernel(StandIn):
    @classmethod
    def can_implement(cls, c: Config) -> tuple[bool, str | None]:
        return False, "another processor"


class Platform:
    _enum = CPU
    on_cpu = True

    def is_cpu(self) -> bool:
        return self.on_cpu


@pytest.fixture(scope="module")
def fake() -> Iterator[ModuleType]:
    """The stand-in's `vllm.model_executor.kernels.linear`, while `vllm` is it."""
    if library.load() is None:
        pytest.skip("the native kernels are not built on this machine")
    names = ["vllm", "vllm.platforms", "vllm.model_executor", "vllm.model_executor.kernels", "vllm.scalar_type"]
    modules = {name: ModuleType(name) for name in (*names, "vllm.model_executor.kernels.linear")}
    linear = modules["vllm.model_executor.kernels.linear"]
    vars(modules["vllm.platforms"])["current_platform"] = Platform()
    vars(modules["vllm.scalar_type"])["scalar_types"] = type("Types", (), {"uint4": "uint4", "uint4b8": "uint4b8"})
    vars(modules["vllm.model_executor.kernels"])["linear"] = linear
    vars(linear).update(MPLinearKernel=StandIn, CPUWNA16LinearKernel=CPUWNA16LinearKernel)
    before = library.threads()
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield linear
    library.set_threads(before)


@pytest.fixture
def kernels(fake: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """vLLM's list of kernels for CPUs; its library has none for INT4 yet (`own`)."""
    found: list[type] = [ZentorchWNA16LinearKernel, CPUWNA16LinearKernel]
    vars(fake)["_POSSIBLE_KERNELS"] = {CPU: found}
    monkeypatch.delenv(plugin.VARIABLE, raising=False)
    return found


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's library has a kernel for this processor, an x86 with AVX-512 and without AMX."""
    monkeypatch.setattr(torch.ops._C, "cpu_gemm_wna16", object(), raising=False)
    monkeypatch.setattr(library, "isa", lambda: "avx512")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def chosen(kernels: list[type], config: Config) -> str:
    """The kernel that vLLM takes: the first that can."""
    return next(kernel.__name__ for kernel in kernels if kernel.can_implement(config)[0])  # type: ignore[attr-defined]


OURS, THEIRS, OTHER = "SquawqInt4LinearKernel", "CPUWNA16LinearKernel", "ZentorchWNA16LinearKernel"


def test_the_package_names_the_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entry_points = project["entry-points"]["vllm.general_plugins"]
    assert entry_points["squawq"] == f"{plugin.__name__}:{plugin.register.__name__}"
    code = f"import sys, {plugin.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_ours_is_first_where_vllm_has_none(kernels: list[type]) -> None:
    for _ in range(2):  # vLLM may load plugins several times
        plugin.register()
    assert [kernel.__name__ for kernel in kernels] == [OURS, OTHER, THEIRS]
    assert chosen(kernels, Config((256, 64))) == OURS


def test_ours_is_first_where_it_is_faster(kernels: list[type], own: None, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.register()
    assert chosen(kernels, Config((256, 64))) == OURS
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert chosen(kernels, Config((256, 64))) == THEIRS
    assert chosen(kernels, Config((256, 40))) == OURS  # a size that theirs does not take
    monkeypatch.setattr(ZentorchWNA16LinearKernel, "can_implement", StandIn.can_implement)
    assert chosen(kernels, Config((256, 64))) == OTHER


def test_always_and_never(kernels: list[type], own: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setenv(plugin.VARIABLE, "never")
    plugin.register()
    assert chosen(kernels, Config((256, 64))) == THEIRS
    monkeypatch.setenv(plugin.VARIABLE, "always")
    plugin.register()
    assert chosen(kernels, Config((256, 64))) == OURS


def test_an_invalid_choice_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(plugin.VARIABLE, "yes")
    with caplog.at_level(logging.WARNING):
        assert plugin.choice() == "auto"
    assert "SQUAWQ_VLLM_KERNEL is 'yes'; choose one of auto, always, never" in caplog.text


def test_other_devices_are_left_alone(
    kernels: list[type], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Platform, "on_cpu", False)
    plugin.register()
    assert len(kernels) == 2
    assert not caplog.text


def test_an_error_does_not_stop_vllm(
    fake: ModuleType, kernels: list[type], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(fake, "_POSSIBLE_KERNELS")  # as in a version with another name for it
    plugin.register()
    assert "squawq's kernel for AWQ on CPUs is not used: AttributeError" in caplog.text


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Config((256, 64), weight_type="uint8b128"), "weights are uint8b128"),
        (Config((256, 64), act_type=torch.float64), "activations are torch.float64"),
        (Config((256, 60)), "[60, 256] in groups of 32"),
        (Config((256, 64), group_size=8), "in groups of 8"),
        (Config((240, 64)), "[64, 240] in groups of 32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_declines(kernels: list[type], config: Config, reason: str) -> None:
    from squawq.integrations.vllm_kernel import SquawqInt4LinearKernel

    can, why = SquawqInt4LinearKernel.can_implement(config)
    assert not can
    assert why is not None
    assert reason in why


def words_of_inputs(q: Tensor) -> Tensor:
    """q [out, in] as GPTQ packs it: int32 [in / 8, out], nibble i is the i-th of eight inputs."""
    return pack(q.contiguous(), STANDARD).T.contiguous()


def loaded(tensor: GroupwiseTensor, dtype: torch.dtype, *, zeros: bool, transposed: bool) -> nn.Module:
    """A layer as vLLM hands it to its kernels: AWQ converted, or compressed-tensors, whose tensors are [out, ...]."""
    layer = nn.Module()
    words, scales = words_of_inputs(tensor.q), tensor.scales.T.to(dtype).contiguous()
    packed_zeros = pack(tensor.zeros.T.contiguous(), STANDARD).T.contiguous()  # [out / 8, groups] in both
    if transposed:
        words, scales = words.T.contiguous(), scales.T.contiguous()
    parts = {"qweight": (words, transposed), "scales": (scales, transposed), "qzeros": (packed_zeros, True)}
    for name, (data, out_first) in parts.items():
        parameter: Any = nn.Parameter(data, requires_grad=False)
        parameter.input_dim, parameter.output_dim = (1, 0) if out_first else (0, 1)
        setattr(layer, name, parameter if zeros or name != "qzeros" else None)
    return layer


def kernel_of(
    tensor: GroupwiseTensor, group: int, dtype: torch.dtype, *, zeros: bool = True, transposed: bool = False
) -> tuple[Any, nn.Module]:
    from squawq.integrations.vllm_kernel import SquawqInt4LinearKernel

    out, in_features = tensor.q.shape
    kind = "uint4" if zeros else "uint4b8"
    config = Config((in_features, out), kind, dtype, group, zero_points=zeros)
    assert SquawqInt4LinearKernel.can_implement(config)[0]
    layer = loaded(tensor, dtype, zeros=zeros, transposed=transposed)
    kernel = SquawqInt4LinearKernel(config, "qweight", "scales", "qzeros")
    kernel.process_weights_after_loading(layer)
    return kernel, layer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("transposed", [False, True], ids=["awq", "compressed-tensors"])
@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "symmetric"])
@pytest.mark.parametrize("group", [32, 128, -1])
@pytest.mark.parametrize("exact", ["0", "1"], ids=["int8", "exact"])
def test_its_product_is_the_reference_backend_s(
    kernels: list[type], monkeypatch: pytest.MonkeyPatch, exact: str, group: int, zeros: bool, transposed: bool
) -> None:
    monkeypatch.setenv("SQUAWQ_VLLM_EXACT", exact)
    out, in_features = 1096, 256  # more than are repacked at a time
    whole = in_features if group == -1 else group
    tensor = quantize(random(out, in_features), whole, zero_point=zeros)
    kernel, _ = kernel_of(tensor, group, torch.float32, zeros=zeros, transposed=transposed)
    gemm = to_gemm(tensor)
    reference = Reference(torch.device("cpu"), exact=True)
    part = (gemm["qweight"], gemm["scales"], gemm["qzeros"])
    x, bias = random(5, in_features, seed=1), random(out, seed=2)
    expected = reference.matmul(x, reference.pack_int4(out, in_features, whole, [part], bias))
    found = kernel.apply_weights(nn.Module(), x, bias)
    error = (found - expected).norm() / expected.norm()
    assert error < (1e-6 if exact == "1" else 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_shapes_of_activations(kernels: list[type], dtype: torch.dtype) -> None:
    tensor = quantize(random(64, 256), 32, zero_point=True)
    kernel, _ = kernel_of(tensor, 32, dtype)
    x = random(2, 3, 256, seed=1).to(dtype)
    found = kernel.apply_weights(nn.Module(), x)
    assert (found.dtype, found.shape) == (dtype, (2, 3, 64))
    expected = x.float() @ tensor.dequantize().T
    assert (found.float() - expected).norm() / expected.norm() < 0.02
    assert kernel.apply_weights(nn.Module(), x[:0]).shape == (0, 3, 64)


def test_vllm_s_tensors_are_freed(kernels: list[type]) -> None:
    _, layer = kernel_of(quantize(random(64, 256), 32, zero_point=True), 32, torch.bfloat16)
    assert [p.numel() for p in layer.parameters()] == [0, 0, 0]
    assert layer.get_parameter("qweight").dtype == torch.int32


def test_it_is_one_operator_of_a_compiled_model(kernels: list[type]) -> None:
    tensor = quantize(random(64, 256), 32, zero_point=True)
    kernel, layer = kernel_of(tensor, 32, torch.bfloat16)
    seen: list[str] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    x, bias = random(3, 256, seed=1).bfloat16(), random(64, seed=2).bfloat16()
    with torch.no_grad():
        compiled = torch.compile(lambda x: kernel.apply_weights(layer, x, bias), backend=backend, fullgraph=True)
        assert torch.equal(compiled(x), kernel.apply_weights(layer, x, bias))
    assert "squawq.vllm_linear" in seen
    meta = torch.ops.squawq.vllm_linear(x.to("meta"), kernel.number, 64)
    assert (meta.dtype, meta.shape) == (torch.bfloat16, (3, 64))


PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, prompts, tokens = json.loads(sys.argv[1])
    llm = LLM(folder, max_model_len=256, enforce_eager=True)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens), use_tqdm=False)
    print("TEXTS", json.dumps([output.outputs[0].text for output in outputs]))
"""
NO_AVX512 = """
import torch.cpu
for name in ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
    setattr(torch.cpu, name, lambda: False)
"""


def vllm_s_python() -> str | None:
    given = os.environ.get("SQUAWQ_VLLM_PYTHON")
    return given or (sys.executable if importlib.util.find_spec("vllm") else None)


@pytest.mark.skipif(vllm_s_python() is None, reason="vLLM is neither installed here nor in SQUAWQ_VLLM_PYTHON")
def test_vllm_s_greedy_text_is_our_engine_s(tmp_path: Path) -> None:
    """vLLM takes this processor for one without AVX-512, for which it has no kernel."""
    import squawq
    from squawq.demo import demo_model

    folder = tmp_path / "awq"
    squawq.quantize(demo_model(), folder, squawq.QuantConfig(method="rtn", group_size=64))
    with squawq.LLM(folder) as llm:
        expected = llm.generate(PROMPTS, squawq.SamplingParams(temperature=0, max_tokens=TOKENS))
    (tmp_path / "sitecustomize.py").write_text(NO_AVX512)
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SQUAWQ_", "VLLM_"))}
    environment |= {"PYTHONPATH": str(tmp_path), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    python = vllm_s_python()
    assert python is not None
    arguments = [python, str(tmp_path / "program.py"), json.dumps([str(folder), PROMPTS, TOKENS])]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=280)
    said = done.stdout + done.stderr
    assert f"Using {OURS}" in said, said[-2000:]
    texts = next((line for line in done.stdout.splitlines() if line.startswith("TEXTS ")), None)
    assert texts is not None, said[-2000:]
    assert json.loads(texts.removeprefix("TEXTS ")) == expected
