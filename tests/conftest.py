"""Tiny models made on the spot: random weights, a few tokens of vocabulary, any family. Nothing is downloaded."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # threads that wait in a loop: two workers on two cores would stand still
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("SQUAWQ_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from safetensors.torch import save_file

from squawq.backends.sampling import Chunk
from squawq.engine.runner import DecoderRunner
from squawq.families import FAMILIES
from squawq.nn.loader import Options, load

if TYPE_CHECKING:
    from running import Running

    from squawq.serve.model import Served

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
EXACT = Options(exact=True)
# Families without experts that our decoder runs, and for whose text alone transformers has a class
DECODED = sorted(
    name
    for name, row in FAMILIES.items()
    if row.decoder and not name.endswith("_vl_text") and not any("experts" in linear for linear in row.linears)
)
MakeModel = Callable[..., Path]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker more than there are cores, as some wait for servers; each takes a gigabyte, so four at most."""
    return min((os.cpu_count() or 1) + 1, 4)


def pytest_collection_finish() -> None:
    """Keep the collector from looking again and again at what the imports made: a tenth of the processor's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on a card are skipped without one, also when `-m gpu` asks for them alone."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the model runs; tests on a card have the marker gpu."""
    found: str = request.param
    return found


def shared_data(name: str) -> Path:
    """A folder of the test data beside the checkout; the test skips where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} of the shared test data, which is not on this machine")
    return path


def tiny_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    """A config.json of two small layers."""
    config: dict[str, Any] = {
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 160,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": 1,
        "pad_token_id": 0,
        "hidden_act": "silu",
    }
    return {**config, **changes}


def logits(folder: Path, ids: torch.Tensor, options: Options = EXACT) -> torch.Tensor:
    """Our logits [batch, tokens, vocab] of windows of ids, each a sequence of its own in scattered pages."""
    runner = DecoderRunner(load(folder, options), kv_tokens=4096)
    size = -(-ids.shape[1] // 16)
    order = torch.randperm(runner.num_pages, generator=torch.Generator().manual_seed(3)).tolist()
    tables = [order[size * i : size * (i + 1)] for i in range(len(ids))]
    rows = [Chunk(row, 0, table, len(row)) for row, table in zip(ids.tolist(), tables, strict=True)]
    return torch.stack([torch.from_numpy(found) for found in runner.run(rows)])


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """A function that writes a random checkpoint by transformers' own classes and returns its folder."""

    def make(model_type: str = "llama", *, name: str = "model", seed: int = 0, **changes: Any) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(seed)
        raw = tiny_config(model_type, **changes)
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(raw))
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                spread = 0.2 if parameter.dim() == 2 else 0.1
                mean = 1 - FAMILIES[model_type].norm_offset if "norm" in parameter_name else 0.0
                parameter.normal_(mean, spread)
        state = {k: v.contiguous() for k, v in model.state_dict().items()}
        if raw["tie_word_embeddings"]:
            state.pop("lm_head.weight")
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture
def rows() -> list[list[int]]:
    """Calibration rows of token ids for the tiny models."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(2, 160, (8, 32), generator=generator).tolist()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's first layer with a short context: a whole quantization of it takes seconds."""
    from squawq.demo import demo_model
    from squawq.format.reader import Checkpoint

    folder = tmp_path_factory.mktemp("small") / "model"
    shutil.copytree(demo_model(), folder, ignore=shutil.ignore_patterns("*.safetensors", "held_back.txt"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1, "max_position_embeddings": 96}))
    source = Checkpoint(demo_model())
    kept = [name for name in source.tensors if not re.match(r"model\.layers\.[1-9]", name)]
    save_file({name: source.read(name) for name in kept}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def awq_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, quantized with little search: a folder that tests read and leave as it is."""
    from squawq.demo import demo_model
    from squawq.quant_config import QuantConfig
    from squawq.quantization.pipeline import quantize

    folder = tmp_path_factory.mktemp("awq") / "demo-awq"
    quantize(demo_model(), folder, QuantConfig(samples=2, seqlen=256, n_grid=4, dtype="float16"))  # as in most folders
    return folder


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """The demo model as it is served, without a server."""
    from running import DEFAULTS

    from squawq.serve.model import Served
    from squawq.serve.settings import ServerSettings

    model = Served(ServerSettings(**{**DEFAULTS, "kv_tokens": 4096}))
    yield model
    model.close()


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    """A server with the default settings. Tests leave it idle."""
    from running import running

    with running() as found:
        yield found


@pytest.fixture(scope="session")
def tgi_server() -> Iterator[Running]:
    """The same in TGI's dialect."""
    from running import running

    with running(dialect="tgi") as found:
        yield found


@pytest.fixture(scope="module")  # Playwright's event loop runs meanwhile: other modules could not use asyncio.run
def browser() -> Iterator[Any]:
    """Chromium without a window, by Playwright; the tests are skipped where it is not installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as running:
        if path is None and not Path(running.chromium.executable_path).exists():
            pytest.skip("needs Chromium, which is not on this machine")
        root = hasattr(os, "geteuid") and os.geteuid() == 0  # Chromium has no sandbox for root
        opened = running.chromium.launch(executable_path=path, chromium_sandbox=not root)
        yield opened
        opened.close()
