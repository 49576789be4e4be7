"""Families on transformers' model class behind our engine: what it computes is what the class itself does.

Keys and values are float16 in our cache and float32 in transformers', so log probabilities agree to a tolerance. A
wrong window, scale or position is far outside of it.
"""

from __future__ import annotations

import logging
import queue
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import collect, request
from running import running
from torch import Tensor

import squawq
from squawq import LLM
from squawq.backends import backend_for
from squawq.backends.sampling import Chunk
from squawq.config import ModelConfig
from squawq.demo import demo_model
from squawq.engine.config import EngineConfig
from squawq.engine.engine import Engine
from squawq.engine.loaded_model import LoadedModel
from squawq.engine.request import FinishReason, Output
from squawq.engine.transformers_runner import Caches, Paged, TransformersRunner
from squawq.errors import ConfigError
from squawq.nn.cache import Cache
from squawq.quant_config import QuantConfig

sys.path.append(str(Path(__file__).parents[1] / "quantization"))
from family_models import CASES, VOCABULARY, dense_folder, family_model

SMALL = QuantConfig(group_size=32, seqlen=32, samples=8, n_grid=3)
TOLERANCE = 0.1  # of the logits' standard deviation
PROMPTS = [
    torch.randint(2, VOCABULARY, (count,), generator=torch.Generator().manual_seed(count)).tolist() for count in (37, 5)
]
CHANGES: dict[str, dict[str, Any]] = {  # chunks, and layers that take positions from transformers' cache
    "llama4_text": {"attention_chunk_size": 16, "no_rope_layer_interval": 2, "floor_scale": 4}
}
QUANTIZED = ("deepseek_v3", "gemma2", "gemma4_text per layer", "llama4_text", "mixtral", "phi3", "qwen3_next")
STATEFUL = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "llama4_text")


@contextmanager
def opened(folder: Path, **knobs: Any) -> Iterator[Engine]:
    """An engine on transformers' class, which cuts the longer prompt in three."""
    settings = {"exact": True, "kv_tokens": 1024, "max_num_seqs": 2, "max_num_batched_tokens": 16, **knobs}
    loaded = LoadedModel(folder, EngineConfig(device="cpu", model_impl="transformers", **settings), text=False)
    assert isinstance(loaded.engine, Engine)
    try:
        yield loaded.engine
    finally:
        loaded.close()


def runner_of(engine: Engine) -> TransformersRunner:
    assert isinstance(engine._runner, TransformersRunner)
    return engine._runner


def outputs(engine: Engine, prompts: Sequence[Sequence[int]], **settings: Any) -> list[Output]:
    """Greedy, all at once, with log probabilities of prompts and outputs."""
    asked = [request(p, ignore_eos=True, logprobs=0, **settings) for p in prompts]
    found = collect(list(engine.generate(asked)))
    return [found[one.id, 0] for one in asked]


def check(output: Output, prompt: Sequence[int], model: Any) -> None:
    """A greedy output, and its log probabilities, are transformers' own."""
    ids = torch.tensor([*prompt, *output.ids])
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].float()
    logprobs, spread = logits.log_softmax(-1), logits.std()
    expected = logprobs.gather(1, ids[1:, None])[:, 0]
    chosen = slice(len(prompt) - 1, None)
    assert (expected[chosen] > logprobs[chosen].amax(-1) - TOLERANCE * spread).all()
    assert output.logprobs is not None
    found = [one.logprob for one in output.logprobs]
    if output.prompt_logprobs is None:
        expected = expected[chosen]
    else:
        found = [one.logprob for one in output.prompt_logprobs if one is not None] + found
    assert (torch.tensor(found) - expected).abs().max() < TOLERANCE * spread


@pytest.mark.parametrize("model_type", CASES)
def test_every_family(model_type: str, tmp_path: Path) -> None:
    """Two sequences at once, the longer beyond every sliding window, and its prompt in several steps."""
    model = family_model(model_type, tmp_path, **CHANGES.get(model_type, {}))
    with opened(tmp_path) as engine:
        assert isinstance(runner_of(engine)._steps, Caches if model_type in STATEFUL else Paged)
        for prompt, output in zip(PROMPTS, outputs(engine, PROMPTS, max_tokens=12, prompt_logprobs=0), strict=True):
            assert len(output.ids) == 12
            check(output, prompt, model)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("model_type", QUANTIZED)
def test_quantized(model_type: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    family_model(model_type, tmp_path / "model", **CHANGES.get(model_type, {}))
    rows = torch.randint(2, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(5)).tolist()
    squawq.quantize(tmp_path / "model", tmp_path / "awq", SMALL, calibration=rows)
    dense = dense_folder(tmp_path / "awq", tmp_path / "model", tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    with opened(tmp_path / "awq") as engine:
        for prompt, output in zip(PROMPTS, outputs(engine, PROMPTS, max_tokens=4), strict=True):
            check(output, prompt, model)


@pytest.mark.parametrize("model_type", ["gemma2", "qwen3_next"])
def test_preempted_sequences_end_as_alone(model_type: str, tmp_path: Path) -> None:
    """In pages and in caches by slot, which begin anew."""
    model = family_model(model_type, tmp_path)
    prompts = [PROMPTS[0][start : start + 20] for start in range(3)]
    with opened(tmp_path, kv_tokens=96, max_num_seqs=3) as engine:
        for prompt, output in zip(prompts, outputs(engine, prompts, max_tokens=30), strict=True):
            check(output, prompt, model)
        assert engine.stats().preemptions > 0


def test_caches_go_with_their_sequences(tmp_path: Path) -> None:
    """After the last token and after an abort, before another sequence takes the slot."""
    family_model("qwen3_next", tmp_path)
    with opened(tmp_path) as engine:
        steps = runner_of(engine)._steps
        assert isinstance(steps, Caches)
        held: list[int] = []
        long = request(PROMPTS[1], ignore_eos=True)

        def leave(output: Output) -> None:
            held.append(len(steps._slots))
            engine.abort(long.id)

        engine.submit(long, leave)
        outputs(engine, [PROMPTS[0]], max_tokens=4)
        assert max(held) > 0
        assert not steps._slots


@pytest.mark.parametrize(("model_type", "hits"), [("phi3", 32), ("qwen3_5_text", 0)])
def test_prefixes_are_shared_where_pages_hold_the_past(model_type: str, hits: int, tmp_path: Path) -> None:
    model = family_model(model_type, tmp_path)
    prompt = PROMPTS[0]
    with opened(tmp_path) as engine:
        for _ in range(2):
            (output,) = outputs(engine, [prompt], max_tokens=6)
            check(output, prompt, model)
        assert engine.stats().prefix_hits == hits


def test_an_aborted_sequence_leaves_the_others_alone(tmp_path: Path) -> None:
    model = family_model("qwen3_next", tmp_path)
    with opened(tmp_path) as engine:
        ended: queue.SimpleQueue[Output] = queue.SimpleQueue()
        long = request(PROMPTS[0], ignore_eos=True)
        engine.submit(long, lambda output: engine.abort(long.id) if not output.finish else ended.put(output))
        (output,) = outputs(engine, [PROMPTS[1]], max_tokens=12)
        check(output, PROMPTS[1], model)
        assert ended.get(timeout=20).finish is FinishReason.ABORT
        (output,) = outputs(engine, [PROMPTS[0]], max_tokens=4)  # in the slot that is free again
        check(output, PROMPTS[0], model)


class Forgetful:
    """A model whose state is lost before several tokens: logits are the sum of the tokens that it remembers."""

    def __call__(self, ids: Tensor, rows: Tensor, *, use_cache: bool, cache: Tensor | None) -> Any:
        assert use_cache
        before = cache if cache is not None and ids.shape[1] == 1 else torch.zeros(1)
        sums = before + ids[0].float().cumsum(0)
        return type("Found", (dict,), {"logits": sums[rows][None, :, None]})(cache=sums[-1:])


def test_a_model_that_forgets_runs_later_chunks_token_by_token() -> None:
    config = SimpleNamespace(num_layers=1, kv_layers=1, cached_heads=(1, 1))
    model: Any = Forgetful()
    steps = Caches(model, "cache", config, backend_for("cpu"))  # type: ignore[arg-type]
    assert not steps._cuts
    chunks = [Chunk([1, 2, 3], 0, [0], 1, slot=4), Chunk([10], 0, [1], 1, slot=2)]
    assert steps.logits(chunks).tolist() == [[6], [10]]
    chunks = [Chunk([4, 5], 3, [0], 2, slot=4), Chunk([20, 30, 40], 1, [1], 1, slot=2)]
    assert steps.logits(chunks).tolist() == [[10], [15], [100]]
    assert steps.logits([Chunk([7], 0, [0], 1, slot=4)]).tolist() == [[7]]


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 2 with the demo model's tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("gemma2")
    family_model("gemma2", folder, vocab_size=ModelConfig.from_dict(squawq_config()).vocab_size)
    for file in demo_model().iterdir():
        if "token" in file.name or "template" in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def squawq_config() -> dict[str, Any]:
    from squawq.format.files import read_config

    return read_config(demo_model())


def test_llm_says_once_what_runs_the_model(chatting: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "squawq"), LLM(chatting, model_impl="transformers", kv_tokens=512) as llm:
        one = llm.generate("Once upon a time", max_tokens=8)
        assert llm.generate(["Once upon a time", "There was"], max_tokens=8)[0] == one
        assert "".join(llm.stream("Once upon a time", max_tokens=8)) == one
    assert [record.message for record in caplog.records if "transformers" in record.message] == [
        f"{chatting} runs on transformers' model class, which is slower than our decoder: model_impl is transformers"
    ]


@pytest.mark.parametrize("dialect", ["openai", "tgi"])
def test_a_server(dialect: str, chatting: Path) -> None:
    knobs = {"model": str(chatting), "model_impl": "transformers", "kv_tokens": 1024, "dialect": dialect}
    with running(**knobs) as server:
        if dialect == "tgi":
            found = server.post("/generate", {"inputs": "Once", "parameters": {"max_new_tokens": 4, "details": True}})
            assert len(found.json()["details"]["tokens"]) == 4
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "logprobs": True}
        found = server.post("/v1/chat/completions", body).json()["choices"][0]
        assert len(found["logprobs"]["content"]) == 4
        assert server.idle()


def test_which_class_runs_a_model(tmp_path: Path) -> None:
    """Ours where it can, unless one asks otherwise."""
    family_model("llama", tmp_path / "llama")
    family_model("llama4_text", tmp_path / "llama4")
    for name, impl, kind in (
        ("llama", "auto", "DecoderRunner"),
        ("llama", "transformers", "TransformersRunner"),
        ("llama", "squawq", "DecoderRunner"),
        ("llama4", "auto", "TransformersRunner"),
    ):
        config = EngineConfig(device="cpu", model_impl=impl, kv_tokens=64)  # type: ignore[arg-type]
        loaded = LoadedModel(tmp_path / name, config, text=False)
        assert type(loaded._runner).__name__ == kind
        loaded.close()
    with pytest.raises(ConfigError, match="our decoder does not run this model"):
        LoadedModel(tmp_path / "llama4", EngineConfig(device="cpu", model_impl="squawq"), text=False)
    with pytest.raises(ConfigError, match="model_impl is 'vllm'"):
        EngineConfig(model_impl="vllm")  # type: ignore[arg-type]


def test_one_process_has_all_of_transformers_model(tmp_path: Path) -> None:
    family_model("mixtral", tmp_path)
    config = EngineConfig(device="cpu", tensor_parallel_size=2, model_impl="transformers")
    with pytest.raises(ConfigError, match="tensor_parallel_size is 2, but transformers' model"):
        LoadedModel(tmp_path, config, text=False)


def test_the_head_in_fewer_bits_is_close(tmp_path: Path) -> None:
    """By default the head is int8 and 4-bit products have int8 activations, as in our decoder."""
    model = family_model("cohere2", tmp_path, hidden_size=64)
    found = []
    for head in ("int8", "int4", "16-bit"):
        with opened(tmp_path, exact=False, head=head) as engine:
            (output,) = outputs(engine, [PROMPTS[0]], max_tokens=1, prompt_logprobs=0)
            assert output.prompt_logprobs is not None
            found.append(torch.tensor([one.logprob for one in output.prompt_logprobs if one is not None]))
    with torch.no_grad():
        spread = model(torch.tensor([PROMPTS[0]])).logits.std()
    errors = [(found[2] - one).abs().max() / spread for one in found]
    assert 0 < errors[0] < 0.1
    assert errors[0] < errors[1] < 1


def test_rotary_embeddings_by_length_are_each_sequences_own(tmp_path: Path) -> None:
    """transformers takes the frequencies from the longest sequence of a batch."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = family_model("llama", tmp_path, rope_parameters=rope, max_position_embeddings=64)
    with opened(tmp_path) as engine:
        assert isinstance(runner_of(engine)._steps, Caches)
        for prompt, output in zip(PROMPTS, outputs(engine, PROMPTS, max_tokens=4), strict=True):
            check(output, prompt, model)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama"])
def test_the_memory_of_a_token_is_known_from_the_config(model_type: str, tmp_path: Path) -> None:
    family_model(model_type, tmp_path)
    with opened(tmp_path) as engine:
        runner = runner_of(engine)
        assert runner.token_bytes == Cache.token_bytes(runner.config)
        assert runner.cache_bytes == engine.cache_tokens * runner.token_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", QUANTIZED)
def test_on_a_gpu(model_type: str, tmp_path: Path) -> None:
    """In float16, which random weights of these sizes suit badly: only the likeliest tokens are compared."""
    model = family_model(model_type, tmp_path)
    config = EngineConfig(device="cuda", model_impl="transformers", kv_tokens=1024, max_num_seqs=2)
    loaded = LoadedModel(tmp_path, config, text=False)
    assert isinstance(loaded.engine, Engine)
    try:
        for prompt, output in zip(PROMPTS, outputs(loaded.engine, PROMPTS, max_tokens=12), strict=True):
            ids = torch.tensor([*prompt, *output.ids])
            with torch.no_grad():
                logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(output.ids)[:, None])[:, 0]
            assert (chosen > logits.amax(-1) - 0.3 * logits.std()).all()
    finally:
        loaded.close()
