"""The engine on a real decoder, with the native kernels or on a GPU: tokens and log probabilities are the same bits
alone and in any crowd, with and without cached prefixes, in any chunks, on however few pages."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from fakes import collect
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import check_scheduler

from squawq.backends import backend_for
from squawq.backends.cpu import library
from squawq.engine.config import EngineConfig
from squawq.engine.engine import Loop
from squawq.engine.request import FinishReason, Output, Request, SamplingParams
from squawq.engine.runner import DecoderRunner
from squawq.engine.sequence import RequestState
from squawq.errors import ConfigError
from squawq.nn.cache import Cache
from squawq.nn.decoder import Decoder
from squawq.nn.loader import Options, load
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize

on_the_cpu = pytest.mark.parametrize("device", ["cpu"], scope="session")
names = itertools.count()
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
}
PREFIX = torch.randint(2, 160, (64,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module", params=["llama, AWQ", "mistral, 16 bits, window", "qwen3_5_text, AWQ"])
def decoder(request: pytest.FixtureRequest, device: str, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    if device == "cpu" and library.load() is None:
        pytest.skip("the native kernels are not built on this machine")
    from transformers import AutoConfig, AutoModelForCausalLM

    folder: Path = tmp_path_factory.mktemp("model")
    awq = "AWQ" in request.param
    raw = tiny_config("llama") if awq else tiny_config("mistral", sliding_window=24)
    if "qwen3_5" in request.param:
        raw = tiny_config("qwen3_5_text", **HYBRID)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**raw)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder / "dense")
    if not awq:
        return load(folder / "dense", Options(device))
    quantize(folder / "dense", folder / "awq", QuantConfig(group_size=32, method="rtn"))
    return load(folder / "awq", Options(device))


class Crowd:
    """A loop over a runner of so many pages, driven by hand."""

    def __init__(self, decoder: Decoder, pages: int = 32, tokens: int = 512, caching: bool = True) -> None:
        runner = DecoderRunner(decoder, kv_tokens=16 * pages, rows=8)
        self.room = min(runner.max_positions, 16 * pages)
        self.outputs: list[Output] = []
        self.loop = Loop(runner, EngineConfig(max_num_batched_tokens=tokens, max_num_seqs=5, prefix_caching=caching))

    def add(self, asked: Request) -> None:
        eos = frozenset([1])
        state = RequestState(
            asked,
            self.outputs.append,
            room=self.room,
            matcher=None,
            tokenizer=None,
            eos_ids=eos,
        )
        self.loop.add(state)

    def finish(self) -> dict[tuple[str, int], Output]:
        for _ in range(5000):
            if not self.loop.requests:
                break
            self.loop.step()
            check_scheduler(self.loop.scheduler)
        assert not self.loop.requests
        assert self.loop.pool.available == self.loop.pool.num_pages, "pages are gone"
        return collect(self.outputs)


@st.composite
def asked(draw: st.DrawFn) -> Request:
    shared = PREFIX[: draw(st.sampled_from([0, 1, 16, 33, 64]))]
    own = draw(st.lists(st.integers(2, 159), min_size=0 if shared else 1, max_size=40))
    params = SamplingParams(
        max_tokens=draw(st.integers(1, 20)),
        temperature=draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.integers(0, 3)),
        n=draw(st.sampled_from([1, 1, 2])),
        logprobs=2,
        prompt_logprobs=draw(st.sampled_from([None, None, 1])),
        ignore_eos=draw(st.booleans()),
    )
    return Request(f"q{next(names)}", [*shared, *own], params)


def alone(decoder: Decoder, request: Request, room: int) -> Iterator[Output]:
    """The request by itself on fresh pages, its prompt in one chunk, nothing cached."""
    crowd = Crowd(decoder, caching=False)
    crowd.room = room
    crowd.add(request)
    found = crowd.finish()
    return (found[request.id, index] for index in range(request.params.n))


@settings(max_examples=40, deadline=None)
@given(
    coming=st.lists(
        st.tuples(asked(), st.integers(0, 8), st.sampled_from([None, None, None, 2, 5])), min_size=1, max_size=6
    ),
    pages=st.sampled_from([9, 12, 32]),
    tokens=st.sampled_from([10, 17, 64, 512]),
    caching=st.booleans(),
)
def test_the_same_bits_alone_and_in_a_crowd(
    decoder: Decoder, coming: list[tuple[Request, int, int | None]], pages: int, tokens: int, caching: bool
) -> None:
    crowd = Crowd(decoder, pages, tokens, caching)
    for step in range(14):
        for request, arrives, leaves in coming:
            if arrives == step:
                crowd.add(request)
            if leaves is not None and arrives + leaves == step:
                crowd.loop.abort(request.id)
        crowd.loop.step()
        check_scheduler(crowd.loop.scheduler)
    found = crowd.finish()
    for request, _, leaves in coming:
        for index, expected in enumerate(alone(decoder, request, crowd.room)):
            output = found[request.id, index]
            if leaves is not None and output.finish is FinishReason.ABORT:
                assert output.ids == expected.ids[: len(output.ids)]
            else:
                assert output == expected


def test_steps_are_prepared_for_an_engine_alone(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that captures graphs, of which a fused model in transformers has no use."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(Decoder, "steps", lambda self, cache, rows, pages, tell: asked.append((rows, pages)))
    DecoderRunner(decoder, kv_tokens=64)
    assert not asked
    DecoderRunner(decoder, kv_tokens=64, rows=3)
    assert asked == [(3, 4)]


def test_preemption_and_cached_prefixes_happen_here(decoder: Decoder) -> None:
    """The property above would be empty if neither ever took place."""
    crowd = Crowd(decoder, pages=9)
    for seed in range(4):
        crowd.add(
            Request(f"p{seed}", [*PREFIX[:33], seed + 2], SamplingParams(max_tokens=40, seed=seed, ignore_eos=True))
        )
    crowd.finish()
    assert crowd.loop.scheduler.preemptions > 0
    assert (crowd.loop.scheduler.prefix_hits > 0) == (decoder.config.delta_rule is None)


@on_the_cpu
def test_pages_take_no_memory_before_they_are_written(decoder: Decoder) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    runner = DecoderRunner(decoder, kv_tokens=1_600_000)  # 200 MB, or 400
    assert Cache.token_bytes(decoder.config) * runner.num_pages * 16 > 200e6
    assert resident() - before < 50e6


@on_the_cpu
def test_torch_has_one_thread_beside_the_kernels_and_elsewhere_what_it_had(decoder: Decoder) -> None:
    """Its OpenMP threads, which a step of many sequences would wake, spin on the cores of the kernels' threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    found: list[int] = []

    def run() -> None:
        crowd = Crowd(decoder)
        crowd.add(Request("r", [5, 6], SamplingParams(max_tokens=2)))
        crowd.finish()
        found.append(torch.get_num_threads())

    def look() -> None:
        found.append(torch.get_num_threads())

    try:
        for work in (run, look):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert found == [1, 3]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_cpu_has_its_own_dtypes(backend: str) -> None:
    for name, value in (("dtype", "bfloat16"), ("kv_cache_dtype", "fp8")):
        with pytest.raises(ConfigError, match=rf"^{name} is '{value}', but .*{backend} backend .*; choose auto"):
            backend_for("cpu", backend, **{name: value})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=rf"^{name} is 'fp4'; choose one of auto, float16"):
            EngineConfig(**{name: "fp4"})  # type: ignore[arg-type]
    assert backend_for("cpu", backend, kv_cache_dtype="float16").cache_dtype == torch.float16
