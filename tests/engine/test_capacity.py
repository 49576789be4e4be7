"""Memory is planned from numbers: nothing here needs a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MakeModel

from squawq.backends.cuda.backend import CudaBackend
from squawq.config import ModelConfig
from squawq.demo import demo_model
from squawq.engine.capacity import check_room, default_kv_tokens, shared_kv_tokens
from squawq.engine.config import EngineConfig
from squawq.errors import ConfigError
from squawq.format.reader import Checkpoint
from squawq.nn.cache import Cache
from squawq.nn.loader import OpenModel, Options, open_model
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize

GIB = 2**30
CPU = torch.device("cpu")


@pytest.fixture
def config() -> ModelConfig:
    return Checkpoint(demo_model()).config


def test_bytes_of_a_token(config: ModelConfig) -> None:
    numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    assert Cache.token_bytes(config) == 2 * numbers
    assert Cache.token_bytes(config, torch.float8_e4m3fn) == numbers


def test_a_cpus_cache(config: ModelConfig) -> None:
    """A quarter of the memory, half for one context, a page at least, sixteen contexts at most."""
    context, free = config.max_positions, [16 * 400, 4 * 1000 * config.max_positions, 10**6 * config.max_positions]
    assert [default_kv_tokens(config, 1000, n) for n in free] == [16, context, 16 * context]
    assert default_kv_tokens(config, 1000, 4 * 1000 * 1600 * 16) == 1600 * 16


def test_a_share_of_a_gpus_memory(config: ModelConfig) -> None:
    def tokens(share: float, working: int = 0, contexts: int = 10**6) -> int:
        return shared_kv_tokens(config, 1000, working, share, 7 * GIB, 10 * GIB, contexts)

    assert tokens(0.5) == 2 * GIB // 1000 // 16 * 16
    assert tokens(0.5, working=GIB) == GIB // 1000 // 16 * 16
    assert tokens(0.5, contexts=3) == 3 * config.max_positions
    taken = r"gpu_memory_utilization is 0\.3 of the GPU's 10\.0 GiB, and 3\.0 GiB are taken and 0\.5 GiB needed"
    with pytest.raises(ConfigError, match=taken):
        tokens(0.3, working=GIB // 2)


@pytest.fixture
def model(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., OpenModel]:
    monkeypatch.setattr(CudaBackend, "declines", classmethod(lambda *_: None))

    def opened(tied: bool = False, **options: str) -> OpenModel:
        folder = tmp_path / f"awq-{tied}"
        if not folder.exists():
            config = QuantConfig(group_size=32, method="rtn", dtype="float16")
            quantize(make_model(tie_word_embeddings=tied, name=f"tied-{tied}"), folder, config)
        return open_model(folder, Options(backend="cuda", **options))  # type: ignore[arg-type]

    return opened


def tensors_of(value: object) -> int:
    """Bytes of all tensors in an object, each counted once."""
    found: dict[int, torch.Tensor] = {}

    def visit(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found[id(value)] = value
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        elif hasattr(value, "__dict__") and type(value).__module__.startswith("squawq."):
            visit(list(vars(value).values()))

    visit(value)
    return sum(tensor.nbytes for tensor in found.values())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["16-bit", "int8", "int4"])
def test_weights_from_headers(model: Callable[..., OpenModel], head: str, tied: bool) -> None:
    pytest.importorskip("triton")
    from squawq.backends.cuda import launch

    opened = model(tied=tied, head=head)
    decoder = opened.load()
    shared = isinstance(decoder.head, launch.DenseWeight) and decoder.head.weight is decoder.embedding
    assert shared == (tied and head == "16-bit")
    norms = 4 * (2 * decoder.config.num_layers + 1) * decoder.config.hidden_size
    loaded = tensors_of([decoder.embedding, decoder.operations, decoder.norm, decoder.head])
    assert opened.weight_bytes() == loaded - norms
    assert model(tied=tied).weight_bytes(head) == opened.weight_bytes()


def test_buffers_of_decode_steps() -> None:
    """What a decode step allocates is planned for, and not much more."""
    pytest.importorskip("triton")
    from squawq.backends.base import Layers, Model
    from squawq.backends.cuda import int4, launch
    from squawq.backends.cuda.decode import DecodeGraphs
    from squawq.backends.layer_ops import Buffer, Matmul

    meta, rows = torch.device("meta"), 256
    config = ModelConfig.from_dict(
        {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
        | {"rms_norm_eps": 1e-5, "hidden_act": "silu", "architectures": ["LlamaForCausalLM"]},
        "config.json",
    )
    shapes = (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)
    places = (Buffer.NORMED, Buffer.WIDE), (Buffer.NARROW, Buffer.DELTA)
    operations = [
        Matmul(int4.empty(out, in_, 128, torch.float16, meta), *places[i % 2]) for i, (out, in_) in enumerate(shapes)
    ]
    head = launch.DenseWeight(torch.empty(config.vocab_size, 4096, dtype=torch.float16, device=meta))
    norm, frequencies = torch.empty(4096, device=meta), torch.empty(2, 64, device=meta)
    layers = Layers(tuple(operations), config.heads, 1e-5)
    page = torch.empty(1, 8, 16, 128, dtype=torch.float16, device=meta)
    backend = CudaBackend(CPU)
    model = Model(layers, head.weight, frequencies, norm, head)
    graphs = DecodeGraphs(model, [(page, page)], torch.float16, rows, 512)
    buffers = {name: value for name, value in vars(graphs).items() if name not in ("_model", "_cache")}
    planned = backend.working_bytes(config, rows, 512) - backend.working_bytes(config, 0, 512)
    assert planned / 2 < tensors_of(list(buffers.values())) < planned


def test_a_card_that_is_too_small_is_told_before_loading(model: Callable[..., OpenModel]) -> None:
    opened, plain = model(), EngineConfig(device="cpu", kv_tokens=1600)
    shape, backend = opened.checkpoint.config, opened.backend
    each, steps = Cache.token_bytes(shape), (plain.max_num_seqs, plain.step_tokens)
    base = opened.weight_bytes() + backend.working_bytes(shape, *steps)
    check_room(opened, plain, base + 1600 * each, 10 * GIB)

    def remedies(room: int, opened: OpenModel = opened, config: EngineConfig = plain) -> str:
        with pytest.raises(ConfigError, match=r"needs [0-9.]+ GiB of the GPU's memory .* KV cache of") as error:
            check_room(opened, config, room, 10 * GIB)
        return str(error.value).partition("one of these would fit: ")[2]

    found = remedies(base + 1599 * each)
    assert "kv_tokens of 1584, kv_cache_dtype fp8, max_num_seqs of 8" in found
    assert re.search(r"a GPU with [0-9.]+ GiB, or device cpu$", found)
    assert "head int4" in found
    assert "kv_tokens" not in remedies(base + 15 * each)
    assert "fp8" not in remedies(base + 799 * each)
    small = model(kv_cache_dtype="fp8", head="int4")
    assert not re.search("fp8|head", remedies(GIB // 2, small))
    shared = EngineConfig(device="cpu", gpu_memory_utilization=0.01)
    assert "a larger gpu_memory_utilization" in remedies(10 * GIB, config=shared)
    check_room(opened, EngineConfig(device="cpu"), 10 * GIB, 10 * GIB)


def test_defaults_by_device() -> None:
    for device, expected in (("cpu", (64, 512)), ("cuda:1", (256, 2048))):
        config = EngineConfig(device=device)
        assert (config.max_num_seqs, config.max_num_batched_tokens) == expected
        assert EngineConfig(device=device, max_num_seqs=None) == config  # type: ignore[arg-type]
        assert EngineConfig(device=device, max_num_seqs=7).max_num_seqs == 7
