"""transformers loads, runs and saves AWQ folders through `import squawq.transformers`.

Tolerances, relative to the largest logit of the dequantized dense model: float activations 1e-5 (float32), 5e-3
(float16), 5e-2 (bfloat16). Int8 activations, the default on the native kernels, have a bound for one layer, derived in
its test; the whole tiny model, whose random weights magnify differences, was seen at 4.4e-2 and is held to 1e-1.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from awq_folders import quantized, stored, write
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, AwqConfig, GenerationConfig

import squawq.transformers  # noqa: F401 (registers)
from squawq.backends.cpu import library
from squawq.errors import CheckpointError, ConfigError, KernelError
from squawq.format.groupwise import quantize, to_gemm
from squawq.integrations.linear import AwqLinear
from squawq.integrations.quantizer import _say_once
from squawq.nn.experts import Experts

IDS = torch.randint(2, 160, (2, 24), generator=torch.Generator().manual_seed(1))
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
INT8 = 1e-1


def load(folder: Path, *, auto: Any = AutoModelForCausalLM, **kwargs: Any) -> Any:
    """A model, with settings for AwqConfig among the arguments."""
    names = ("exact", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse")
    settings = {k: kwargs.pop(k) for k in names if k in kwargs}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `quantization_config`")  # that the folder's settings hold
        return auto.from_pretrained(
            folder, **({"quantization_config": AwqConfig(**settings)} if settings else {}), **kwargs
        )


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits.float()
    return found


def difference(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return quantized(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folders: tuple[Path, Path]) -> Any:
    return load(folders[0], exact=True)


@pytest.fixture(scope="module")
def reference(folders: tuple[Path, Path]) -> Tensor:
    return logits(load(folders[1], dtype=torch.float32))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "torch_awq"])
def test_logits_are_the_dense_models(
    folders: tuple[Path, Path], reference: Tensor, dtype: torch.dtype, backend: str
) -> None:
    found = load(folders[0], dtype=dtype, exact=True, backend=backend)
    assert found.dtype == dtype
    assert isinstance(found.model.layers[0].self_attn.q_proj, AwqLinear)
    assert difference(logits(found), reference) < TOLERANCES[dtype]


def test_int8_activations_are_the_default(folders: tuple[Path, Path], reference: Tensor) -> None:
    distance = difference(logits(load(folders[0])), reference)
    assert distance < INT8
    assert library.load() is None or distance > TOLERANCES[torch.float32]


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"group": -1}),
        ("llama", {"group": 16}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"zero_point": False}),
        ("llama", {"zero_point": False, "zeros": False}),
        ("llama", {"skip": ("o_proj", "layers.1.mlp.up_proj")}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {}),
    ],
)
def test_kinds_of_checkpoint(tmp_path: Path, model_type: str, settings: dict[str, Any]) -> None:
    awq, dense = quantized(tmp_path, model_type, **settings)
    expected = logits(load(dense))
    for backend in ("auto", "torch_awq"):
        found = load(awq, exact=True, backend=backend)
        assert difference(logits(found), expected) < TOLERANCES[torch.float32]
    assert type(found.lm_head) is torch.nn.Linear
    kinds = {name: type(module) for name, module in found.named_modules()}
    for part in settings.get("skip", ()):
        assert (
            kinds["model.layers.1.mlp.up_proj" if "up" in part else f"model.layers.0.self_attn.{part}"]
            is torch.nn.Linear
        )
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == settings.get("tie_word_embeddings", False)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saving_writes_the_same_bytes(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    awq, _ = quantized(tmp_path, model_type, skip=("o_proj",))
    before, settings = stored(awq), json.loads((awq / "config.json").read_text())["quantization_config"]
    found = load(awq, dtype=dtype)
    logits(found)
    found.save_pretrained(tmp_path / "saved")
    after = stored(tmp_path / "saved")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        kept = name.endswith((".qweight", ".qzeros", ".scales", ".bias"))
        expected = tensor if kept else tensor.to(dtype)
        assert after[name].dtype == expected.dtype, name
        assert torch.equal(after[name].view(torch.uint8), expected.contiguous().view(torch.uint8)), name
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"] == settings
    assert difference(logits(load(tmp_path / "saved", dtype=dtype)), logits(found)) == 0


def test_the_demo_folder_comes_back_byte_for_byte(awq_demo: Path, tmp_path: Path) -> None:
    found = load(awq_demo)
    logits(found)
    found.save_pretrained(tmp_path / "saved")
    before, after = stored(awq_demo), stored(tmp_path / "saved")
    assert after.keys() == before.keys()
    for name in before:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)), name


@pytest.mark.parametrize("fused", [False, True])
def test_the_model_cards_script(awq_demo: Path, fused: bool) -> None:
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    settings = {"fuse_max_seq_len": 512, "do_fuse": True} if fused else {}
    with pytest.warns(UserWarning, match="loading attributes"):
        model = AutoModelForCausalLM.from_pretrained(
            awq_demo,
            torch_dtype=torch.float16,
            low_cpu_mem_usage=True,
            device_map="auto",
            quantization_config=AwqConfig(bits=4, **settings),
        )
    tokenizer = AutoTokenizer.from_pretrained(awq_demo)
    prompt = [{"role": "user", "content": "Tell me a story."}]
    inputs = tokenizer.apply_chat_template(
        prompt, tokenize=True, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(0)
    outputs = model.generate(**inputs, do_sample=True, max_new_tokens=256)
    text = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    assert len(text.split()) > 20


def test_fusing_gets_its_limit(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr("squawq.integrations.fused.fuse", lambda _, limit, folder: called.append((limit, folder)))
    load(folders[0], do_fuse=True, fuse_max_seq_len=77)
    load(folders[0], fuse_max_seq_len=77)
    assert called == [(77, folders[0])]


def test_what_modules_to_fuse_lists_is_not_used(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _say_once.cache_clear()
    monkeypatch.setattr("squawq.integrations.fused.fuse", lambda *_: None)
    for _ in range(2):
        load(folders[0], fuse_max_seq_len=77, modules_to_fuse={"mlp": ["gate_proj"]})
    assert [record.message.partition(" turns")[0] for record in caplog.records if record.name == "squawq"] == [
        "modules_to_fuse"
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 64}, "group_size=64, and the checkpoint 32"),
        ({"q_group_size": 64}, "group_size=64, and the checkpoint 32"),
        ({"zero_point": False}, "zero_point=False, and the checkpoint True"),
        ({"version": "GEMV"}, "format='gemv', and the checkpoint 'gemm'"),
        ({"format": "gemv"}, "format='gemv', and the checkpoint 'gemm'"),
    ],
)
def test_settings_that_are_not_the_checkpoints(
    folders: tuple[Path, Path], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(folders[0], quantization_config=AwqConfig(**settings))


def test_settings_that_are_the_checkpoints(folders: tuple[Path, Path]) -> None:
    config = AwqConfig(4, 32, True, version="GEMM")
    assert config.given == {"bits": 4, "group_size": 32, "zero_point": True, "format": "gemm"}
    assert "given" not in config.to_dict()
    load(folders[0], quantization_config=config)


def test_awq_config_keeps_how_to_fuse() -> None:
    config = AwqConfig(do_fuse=True, fuse_max_seq_len=512, modules_to_fuse={"mlp": ["gate_proj"]})
    kept = config.get_loading_attributes()
    assert kept["do_fuse"] is True
    assert kept["fuse_max_seq_len"] == 512
    assert kept["modules_to_fuse"] == {"mlp": ["gate_proj"]}
    assert AwqConfig(w_bit=4, q_group_size=64).group_size == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_szie": 64}, "no argument 'group_szie'; it has .*group_size"),
        ({"w_bit": 4, "bits": 4}, "the same setting"),
        ({"bits": 8}, "bits is 8"),
        ({"group_size": 7}, "group_size is 7"),
        ({"do_fuse": True}, "fuse_max_seq_len is None"),
        ({"do_fuse": True, "fuse_max_seq_len": 0}, "fuse_max_seq_len is 0"),
    ],
)
def test_awq_config_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AwqConfig(**settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": "gemv"}, "version is 'gemv'"), ({"bits": 3}, "bits is 3"), ({"group_size": 64}, "scales.*needed")],
)
def test_other_checkpoints_are_refused(
    tmp_path: Path, folders: tuple[Path, Path], change: dict[str, Any], message: str
) -> None:
    config = json.loads((folders[0] / "config.json").read_text())
    config["quantization_config"] |= change
    write(tmp_path / "other", config, stored(folders[0]))
    with pytest.raises((ConfigError, CheckpointError), match=message):
        load(tmp_path / "other")


def test_keys_of_other_writers_come_back(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    config = json.loads((folders[0] / "config.json").read_text())
    config["quantization_config"] |= {"sym": False, "backend": "marlin", "do_fuse": True, "exllama_config": None}
    write(tmp_path / "other", config, stored(folders[0]))
    found = load(tmp_path / "other")
    assert found.config.to_dict()["quantization_config"] == config["quantization_config"]


def test_backends_of_gptqmodel_and_dense_models_are_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="backend is 'marlin'; squawq has auto and torch_awq"):
        load(folders[0], backend="marlin")
    with pytest.raises(ConfigError, match="squawq quantize"):
        load(folders[1], exact=True)


@pytest.mark.parametrize("name", ["layers.0.mlp.up_proj.scales", "layers.1.self_attn.q_proj.qweight"])
def test_missing_tensors_are_an_error(tmp_path: Path, folders: tuple[Path, Path], name: str) -> None:
    tensors = stored(folders[0])
    del tensors[f"model.{name}"]
    write(tmp_path / "broken", json.loads((folders[0] / "config.json").read_text()), tensors)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(tmp_path / "broken")


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_experts(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    awq, dense = quantized(tmp_path, model_type)
    found = load(awq, exact=True, dtype=dtype)
    experts = [m for m in found.modules() if isinstance(m, Experts)]
    assert len(experts) == 2
    if dtype == torch.float32:  # in 16 bits the router's choice may change
        assert difference(logits(found), logits(load(dense))) < TOLERANCES[dtype]
    states, index, weight = torch.randn(9, 64), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    stacked = load(dense).model.layers[0].mlp.experts
    with torch.no_grad():
        y = experts[0](states.to(dtype), index, weight.to(dtype))
        assert difference(y.float(), stacked(states, index, weight)) < TOLERANCES[dtype]
    assert found.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (1, 8)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("which", ["one", "all"])
def test_missing_experts_are_an_error(tmp_path: Path, model_type: str, which: str) -> None:
    awq, _ = quantized(tmp_path, model_type)
    lost = [n for n in stored(awq) if f".experts.{'2.' if which == 'one' else ''}" in n]
    tensors = {n: t for n, t in stored(awq).items() if n not in lost}
    write(tmp_path / "broken", json.loads((awq / "config.json").read_text()), tensors)
    with pytest.raises(CheckpointError, match=r"experts.*missing"):
        load(tmp_path / "broken")


def test_experts_that_stayed_dense(tmp_path: Path) -> None:
    awq, dense = quantized(tmp_path, "qwen3_moe", skip=("experts",))
    assert difference(logits(load(awq, exact=True)), logits(load(dense))) < TOLERANCES[torch.float32]


def test_generating_with_either_cache_and_in_batches(model: Any) -> None:
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(IDS, **settings)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **settings), expected)
    with torch.no_grad():
        by_hand = IDS
        for _ in range(12):
            by_hand = torch.cat([by_hand, model(by_hand).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(by_hand, expected)


@pytest.mark.filterwarnings("ignore")  # of continuous batching itself
def test_generate_batch(model: Any) -> None:
    from transformers import ContinuousBatchingConfig

    expected = model.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    found = model.generate_batch(
        IDS.tolist(),
        generation_config=GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=32, block_size=32),
    )
    tokens = [result.generated_tokens for result in found.values()]
    assert tokens == expected[:, IDS.shape[1] :].tolist()


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_compiles_whole(model: Any) -> None:
    from transformers import StaticCache

    cache: Any = StaticCache(config=model.config, max_cache_len=32)
    compiled: Any = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        found = compiled(IDS[:1, :4], past_key_values=cache, use_cache=True).logits
        assert difference(found, logits(model, IDS[:1, :4])) < TOLERANCES[torch.float32]


BIAS = torch.linspace(-1, 1, 48, dtype=torch.float16)


def layer(exact: bool = True, backend: str | None = None) -> tuple[AwqLinear, Tensor]:
    """A layer with BIAS, and its dense weight [out, in]."""
    rounded = quantize(torch.randn(48, 64, generator=torch.Generator().manual_seed(2)), 32, zero_point=True)
    made = AwqLinear(64, 48, 32, bias=torch.float16, exact=exact, backend=backend)
    made.load_state_dict({**to_gemm(rounded), "bias": BIAS})
    return made, rounded.dequantize()


def test_the_operator_is_sound() -> None:
    made, _ = layer()
    if library.load() is None:
        pytest.skip("needs the native kernels")
    operator = torch.ops.squawq.awq_linear.default
    x = torch.randn(3, 64, requires_grad=True)
    arguments = (x, made.qweight, made.scales, made.qzeros, made.bias, made._number)
    torch.library.opcheck(
        operator, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


class Raced(AwqLinear):
    """Another thread always takes the packed weight away at once."""

    _packed: Any = property(lambda _: None, lambda _, __: None)


def test_two_threads_may_pack() -> None:
    made, weight = layer()
    raced = Raced(64, 48, 32, bias=torch.float16, exact=True)
    raced.load_state_dict(made.state_dict())
    x = torch.randn(3, 64)
    assert difference(raced(x), x @ weight.T + BIAS.float()) < 1e-5


@pytest.mark.parametrize("width", [32, 96])
def test_inputs_of_another_width_are_refused(width: int) -> None:
    """Also where the operator runs without numbers, as when torch.compile traces it."""
    for backend in (None, "reference"):
        with pytest.raises((KernelError, RuntimeError), match=str(width)):
            layer(backend=backend)[0](torch.zeros(3, width))
    made = layer()[0].to("meta")
    with pytest.raises(KernelError, match=f"{width}"):
        torch.ops.squawq.awq_linear(
            torch.zeros(3, width, device="meta"), made.qweight, made.scales, made.qzeros, made.bias, made._number
        )


def test_int8_activations_are_within_half_a_step() -> None:
    made, weight = layer(exact=False)
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(4))
    step = x.view(6, 2, 32).abs().amax(-1) / 127  # one scale for the inputs of a group
    bound = step / 2 @ weight.abs().view(48, 2, 32).sum(-1).T
    expected = x @ weight.T + BIAS.float()
    assert bool(((made(x) - expected).abs() <= bound * 1.01 + 1e-5).all())


@pytest.mark.parametrize("backend", [None, "reference"])
def test_gradients_reach_the_input(backend: str | None) -> None:
    made, weight = layer(backend=backend)
    x = torch.randn(2, 5, 64, requires_grad=True)
    y = made(x)
    assert difference(y, x @ weight.T + BIAS.float()) < 1e-5
    y.square().sum().backward()
    assert x.grad is not None
    assert difference(x.grad, 2 * y.detach() @ weight) < 1e-5


def test_packs_again_when_tensors_change() -> None:
    made, _ = layer()
    x = torch.randn(4, 64)
    first = made(x)
    copied = copy.deepcopy(made)
    made.scales.mul_(2)
    bias = BIAS.float()
    assert difference(made(x), 2 * (first - bias) + bias) < 1e-5
    assert torch.equal(copied(x), first)
    made.load_state_dict(layer()[0].state_dict())
    assert torch.equal(made(x), first)


def test_a_base_model_loads(folders: tuple[Path, Path]) -> None:
    base = load(folders[0], auto=AutoModel, exact=True)
    with torch.no_grad():
        states = load(folders[1], auto=AutoModel)(IDS).last_hidden_state
        assert difference(base(IDS).last_hidden_state, states) < TOLERANCES[torch.float32]


def test_weights_are_not_in_memory_twice(folders: tuple[Path, Path]) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    model = load(folders[0])
    place = model.model.layers[0].mlp.up_proj.qweight.data_ptr()
    ranges = [line.split() for line in maps.read_text().splitlines()]
    holder = next(r for r in ranges if int(r[0].split("-")[0], 16) <= place < int(r[0].split("-")[1], 16))
    assert holder[-1].endswith("model.safetensors")


def test_layers_left_on_disk(folders: tuple[Path, Path], reference: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    found = load(folders[0], exact=True, device_map=places, offload_folder=tmp_path)
    for _ in range(2):
        assert difference(logits(found), reference) < TOLERANCES[torch.float32]
    assert found.model.layers[0].mlp.up_proj._packed is None


def test_one_line_is_enough(folders: tuple[Path, Path]) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AwqConfig; import squawq.transformers;"
        f"model = AutoModelForCausalLM.from_pretrained({str(folders[0])!r});"
        "assert AwqConfig(do_fuse=True, fuse_max_seq_len=5).do_fuse; assert model.hf_quantizer.is_compileable;"
        "sys.exit('gptqmodel' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
