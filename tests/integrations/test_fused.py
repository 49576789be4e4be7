"""A fused model: transformers' face over our decoder. Tokens are the engine's, logits those of the dense weights."""

from __future__ import annotations

import copy
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from awq_folders import stored
from conftest import logits as engine_logits
from conftest import tiny_config
from safetensors.torch import save_file
from torch import Tensor

import squawq.transformers
from squawq.backends.base import PAGE
from squawq.backends.cpu import library
from squawq.backends.threads import one_thread
from squawq.engine.config import EngineConfig
from squawq.engine.engine import Engine
from squawq.engine.request import Request, SamplingParams
from squawq.engine.runner import load_runner
from squawq.errors import CheckpointError, ConfigError, FusionError
from squawq.format.reader import Checkpoint
from squawq.integrations.fused import fuse
from squawq.integrations.fused_cache import FusedCache
from squawq.nn.loader import Options
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize

assert squawq.transformers
LIMIT = 96
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral": {"sliding_window": 24},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
}
Prompts = list[list[int]]


def make(folder: Path, family: str, **changes: Any) -> Path:
    """A tiny random checkpoint, AWQ in groups of 32, with weights wide enough that tokens differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**tiny_config(family, **changes)), dtype=torch.float16
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder / "dense")
    quantize(folder / "dense", folder / "awq", QuantConfig(group_size=32, method="rtn"))
    return folder / "awq"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp(request.param), request.param, **FAMILIES[request.param])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("llama"), "llama")


def load(folder: Path, **changes: Any) -> Any:
    """The checkpoint in transformers, with our quantizer, not fused."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float16, **changes})
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model


def fused(folder: Path, **changes: Any) -> Any:
    model = load(folder, **changes)
    fuse(model, LIMIT)
    return model


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return fused(folder)


def prompts(*lengths: int, seed: int = 1) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 160, (length,), generator=generator).tolist() for length in lengths]


def padded(rows: Prompts) -> dict[str, Tensor]:
    """Pads on the left."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def greedy(model: Any, rows: Prompts, tokens: int = 20, **changes: Any) -> list[list[int]]:
    out = model.generate(**padded(rows), max_new_tokens=tokens, do_sample=False, **changes)
    found: list[list[int]] = out[:, -tokens:].tolist()
    return found


def dense_logits(folder: Path, rows: Prompts) -> list[Tensor]:
    """float32 logits of transformers' own layers over the dequantized weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = Checkpoint(folder)
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = model.state_dict()
    for name, tensor in state.items():
        linear = name.removesuffix(".weight")
        if checkpoint.is_quantized(linear):
            tensor.copy_(checkpoint.read_quantized(linear, tensor.shape[1], tensor.shape[0]).dequantize())
        elif name in checkpoint.tensors:
            tensor.copy_(checkpoint.read(name))
    with torch.no_grad():
        return [model(torch.tensor([row])).logits[0] for row in rows]


def test_greedy_tokens_are_the_engines(family: Path) -> None:
    rows = prompts(5, 40, 17)
    model = fused(family)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    engine = Engine(load_runner(family, EngineConfig(kv_tokens=1024)))
    ours: list[list[int]] = [[] for _ in rows]
    try:
        for output in engine.generate([Request(str(index), row, params) for index, row in enumerate(rows)]):
            ours[int(output.request)].extend(output.ids)
    finally:
        engine.close()
    assert greedy(model, rows) == ours
    assert [greedy(model, [row])[0] for row in rows] == ours


@pytest.mark.parametrize(("exact", "bound"), [(True, 2e-3), (False, 5e-2)])
def test_logits_are_the_dense_ones(family: Path, exact: bool, bound: float) -> None:
    """Root mean square of the difference by the spread of the reference. Keys and values are float16, which is all the
    difference of `exact` (in float32 it is below 1e-5); else activations are int8 too. The engine has the same bits.
    """
    from transformers import AwqConfig

    rows = prompts(50, 9)
    with warnings.catch_warnings():  # transformers tells that the checkpoint's settings hold where both have them
        warnings.filterwarnings("ignore", "You passed `quantization_config`")
        model = load(family, quantization_config=AwqConfig(bits=4, exact=exact))
    fuse(model, LIMIT)
    found = model(**padded(rows)).logits
    assert found.dtype == torch.float32
    assert not found.is_inference()
    for reference, row, logits in zip(dense_logits(family, rows), rows, found, strict=True):
        difference = (logits[-len(row) :] - reference).square().mean().sqrt() / reference.std()
        assert difference < bound
        assert not logits[: -len(row)].any()
    assert torch.equal(found[:1], engine_logits(family, torch.tensor(rows[:1]), Options(exact=exact)))


def test_the_quantizer_fuses(folder: Path) -> None:
    from transformers import AwqConfig

    with pytest.warns(UserWarning, match="quantization_config"):
        model = load(folder, quantization_config=AwqConfig(bits=4, do_fuse=True, fuse_max_seq_len=64))
    assert greedy(model, prompts(9)) == greedy(fused(folder), prompts(9))
    with pytest.raises(ConfigError, match="fuse_max_seq_len, which is 64"):
        greedy(model, prompts(45))


@pytest.mark.skipif(library.load() is None, reason="torch does not promise it")
def test_rows_do_not_depend_on_the_batch(model: Any) -> None:
    rows = prompts(5, 40, 17, 16)
    together = model(**padded(rows), logits_to_keep=1).logits[:, -1]
    for row, logits in zip(rows, together, strict=True):
        assert torch.equal(model(torch.tensor([row])).logits[0, -1], logits)


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """To the bit, whatever else is in the step, as the native kernels promise; torch promises less."""
    return torch.equal(found, wanted) if library.load() else torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_forward_in_pieces(model: Any) -> None:
    (row,) = prompts(50)
    ids = torch.tensor([row])
    whole = model(ids)
    first = model(ids[:, :20], use_cache=True)
    name = "cache" if "cache" in first else "past_key_values"
    second = model(ids[:, 20:], **{name: first[name]})
    assert same(torch.cat([first.logits, second.logits], 1), whole.logits)
    assert second[name].get_seq_length() == 50
    assert same(model(ids, logits_to_keep=3).logits, whole.logits[:, -3:])
    assert same(model(ids, logits_to_keep=torch.tensor([4, 2, -1])).logits, whole.logits[:, [4, 2, -1]])
    assert name not in model(ids, use_cache=False)
    assert same(model(ids, return_dict=False)[0], whole.logits)


def test_long_prompts_run_in_steps(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = padded(prompts(50, 23, 40))
    whole = model(**batch).logits
    monkeypatch.setattr("squawq.integrations.fused.STEP_TOKENS", 17)
    assert same(model(**batch).logits, whole)
    assert same(model(**batch, logits_to_keep=30).logits, whole[:, -30:])


def test_pads_on_the_right_get_no_logits(model: Any) -> None:
    ids, mask = torch.tensor(prompts(12, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    found = model(ids, attention_mask=mask).logits
    assert torch.equal(found[1, :8], model(ids[1:, :8]).logits[0])
    assert not found[1, 8:].any()
    with pytest.raises(ConfigError, match="pad on the left"):
        model(ids, attention_mask=mask, logits_to_keep=1)


def test_generate_again_and_without_a_cache(model: Any) -> None:
    rows = prompts(9, 20)
    threads = torch.get_num_threads()
    first = greedy(model, rows)
    assert torch.get_num_threads() == threads
    assert greedy(model, rows) == first
    assert greedy(model, rows, use_cache=False) == first
    assert greedy(model, rows, prefill_chunk_size=7) == first
    assert greedy(model, rows[:1], prompt_lookup_num_tokens=3) == first[:1]


def test_sampling(model: Any) -> None:
    batch = padded(prompts(9, 20))
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(model.generate(**batch, do_sample=True, max_new_tokens=12, num_return_sequences=2))
    assert found[0].shape == (4, 32)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0][0], found[0][1])


@pytest.mark.parametrize("beams", [2, 5])
def test_beam_search(folder: Path, model: Any, beams: int) -> None:
    """Beams share pages; without a cache nothing is shared, and the tokens are the same."""
    rows = prompts(9, 15)
    assert greedy(model, rows, 40, num_beams=beams) == greedy(model, rows, 40, num_beams=beams, use_cache=False)


def test_pages_are_shared_copied_and_given_back(model: Any) -> None:
    cache = FusedCache(model._fused.runners, 40)
    cache.open(3)
    cache.extend([20, 20, 20], 20)
    cache.reorder_cache(torch.tensor([1, 1, 1]))
    assert cache.tables[0] == cache.tables[1] == cache.tables[2]
    assert cache._pool.available == 9 - 2
    cache.extend([1, 1, 1], 1)
    assert len({table[0] for table in cache.tables}) == 1
    assert len({table[1] for table in cache.tables}) == 3
    cache.extend([19, 19, 19], 19)
    assert cache.lengths == [40, 40, 40]
    cache.crop(-PAGE)
    assert [len(table) for table in cache.tables] == [2, 2, 2]
    with pytest.raises(ConfigError, match="which is 40"):
        cache.extend([0, 17, 0], 17)
    assert cache.lengths == [24, 24, 24]
    cache.batch_select_indices(torch.tensor([2]))
    assert cache._pool.available == 9 - 2
    with pytest.raises(ConfigError, match="3 rows, its cache 1"):
        cache.open(3)


def test_a_copied_cache_goes_on_by_itself(model: Any) -> None:
    """transformers' recipe for prompts with the same beginning."""
    beginning, *ends = prompts(21, 6, 9)
    start = model(torch.tensor([beginning]))
    name = "cache" if "cache" in start else "past_key_values"
    for end in ends:
        ids = torch.tensor([beginning + end])
        out = model.generate(ids, max_new_tokens=20, do_sample=False, **{name: copy.deepcopy(start[name])})
        assert out[:, -20:].tolist() == greedy(model, [beginning + end])
        assert start[name].lengths == [21]
    assert copy.deepcopy(FusedCache(model._fused.runners, 40)).open(2).num_pages == 6


def test_copies_keep_shared_pages(model: Any) -> None:
    cache = FusedCache(model._fused.runners, 40)
    cache.open(2)
    cache.extend([20, 20], 20)
    cache.reorder_cache(torch.tensor([0, 0]))
    copied = copy.deepcopy(cache)
    copied.extend([1, 1], 1)
    assert [len(set(pages)) for pages in zip(*copied.tables, strict=True)] == [1, 2]
    assert copied._pool.available == 3
    assert cache.tables[0] == cache.tables[1]
    assert (cache.lengths, cache.width, cache._pool.available) == ([20, 20], 20, 4)


def test_torchs_threads_come_back() -> None:
    """Of two threads that generate at once, whichever leaves first; and of threads that start later."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    inside, leave = threading.Event(), threading.Event()
    found: list[int] = []

    def other() -> None:
        with one_thread():
            inside.set()
            leave.wait(60)
        found.append(torch.get_num_threads())

    try:
        with one_thread():
            thread = threading.Thread(target=other)
            thread.start()
            assert inside.wait(60)
            with one_thread():
                pass
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        leave.set()
        thread.join()
        last = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        last.start()
        last.join()
        assert found == [2, 2]
    finally:
        torch.set_num_threads(before)


def test_pads_alone(model: Any) -> None:
    """As a piece of a padded prompt can be. What they are does not matter."""
    rows = prompts(9, 5)
    batch = padded(rows)
    expected = model(**batch).logits
    wide = {name: torch.nn.functional.pad(tensor, (8, 0)) for name, tensor in batch.items()}
    wide["input_ids"][wide["attention_mask"] == 0] = -1
    piece = model(wide["input_ids"][:, :8], attention_mask=wide["attention_mask"][:, :8])
    assert piece.logits.shape == (2, 8, 160)
    assert not piece.logits.any()
    name = "cache" if "cache" in piece else "past_key_values"
    rest = model(wide["input_ids"][:, 8:], attention_mask=wide["attention_mask"], **{name: piece[name]})
    assert same(rest.logits, expected)


def test_beyond_the_limit(model: Any) -> None:
    ran: list[Any] = []
    rows = prompts(60, 20)
    hook = model.register_forward_hook(lambda *_: ran.append(0))
    assert len(greedy(model, rows, LIMIT - 60)[0]) == LIMIT - 60
    ran.clear()
    with pytest.raises(ConfigError, match=r"97 tokens.*fuse_max_seq_len, which is 96.*fuse_max_seq_len=97"):
        greedy(model, rows, LIMIT - 59)
    assert not ran
    hook.remove()
    with pytest.raises(ConfigError, match="97 tokens"):
        model(torch.tensor(prompts(97)))
    copied = copy.deepcopy(model)
    fuse(copied, 128)
    assert len(greedy(copied, rows, LIMIT - 59)[0]) == LIMIT - 59
    fuse(copied, LIMIT)


def test_saving_writes_the_checkpoint(family: Path, tmp_path: Path) -> None:
    model = fused(family)
    greedy(model, prompts(5))
    model.save_pretrained(tmp_path / "saved")
    source, saved = Checkpoint(family), Checkpoint(tmp_path / "saved")
    assert source.tensors.keys() == saved.tensors.keys()
    for name in source.tensors:
        before, after = source.read(name), saved.read(name)
        assert before.dtype == after.dtype
        assert before.shape == after.shape
        assert before.numpy().tobytes() == after.numpy().tobytes()
    assert saved.config.raw["architectures"] == source.config.raw["architectures"]
    assert saved.config.raw["quantization_config"] == source.config.raw["quantization_config"]
    with pytest.raises(ConfigError, match="another one"):
        model.save_pretrained(family)


def test_weights_lie_in_memory_once(folder: Path) -> None:
    model = fused(folder)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer._packed is None
    files = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    spans = [[int(end, 16) for end in words[0].split("-")] for words in files]
    for tensor in model.parameters():
        assert any(start <= tensor.data_ptr() < end for start, end in spans)


def test_loss(model: Any) -> None:
    ids = torch.tensor(prompts(20))
    found = model(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(found.logits[0, :-1], ids[0, 1:])
    assert torch.allclose(found.loss, expected)


REFUSALS: dict[str, tuple[str, Callable[[Any, Tensor], Any]]] = {
    "embeddings": ("inputs_embeds", lambda m, _: m(inputs_embeds=torch.zeros(1, 4, 64))),
    "attentions": ("output_attentions", lambda m, ids: m(ids, output_attentions=True)),
    "hidden states": ("output_hidden_states", lambda m, ids: m.generate(
        ids, max_new_tokens=2, return_dict_in_generate=True, output_hidden_states=True)),
    "mask of four": ("attention_mask has shape", lambda m, ids: m(ids, attention_mask=torch.zeros(1, 1, 8, 8))),
    "short mask": ("attention_mask has shape", lambda m, ids: m(ids, attention_mask=torch.ones(1, 3))),
    "positions": ("position_ids of row 0", lambda m, ids: m(ids, position_ids=torch.arange(8)[None] + 1)),
    "static cache": ("cache_implementation is 'static'", lambda m, ids: m.generate(
        ids, max_new_tokens=2, cache_implementation="static")),
    "typo": ("no argument 'atention_mask'", lambda m, ids: m(ids, atention_mask=ids)),
    "token": ("beyond 0 to 159", lambda m, ids: m(ids + 160)),
    "floats": ("input_ids is torch.float32", lambda m, ids: m(ids.float())),
    "a list": ("input_ids is list", lambda m, ids: m(ids.tolist())),
    "mask of kinds": ("attention_mask is a dict", lambda m, ids: m(ids, attention_mask={"full_attention": None})),
    "empty row": ("row 0 of attention_mask has no token", lambda m, ids: m.generate(
        ids, max_new_tokens=2, attention_mask=torch.zeros_like(ids))),
    "columns less than none": ("logits_to_keep is -2", lambda m, ids: m(ids, logits_to_keep=-2)),
    "column beyond": ("columns of input_ids are -8 to 7", lambda m, ids: m(ids, logits_to_keep=torch.tensor([20]))),
    "no column": ("must list columns", lambda m, ids: m(ids, logits_to_keep=torch.tensor([]))),
    "no tokens": (r"\(1, 0\)", lambda m, ids: m(ids[:, :0])),
    "batching": ("no generate_batch", lambda m, ids: m.generate_batch(ids.tolist())),
    "adapters": ("no add_adapter", lambda m, ids: m.add_adapter(None)),
    "resizing": ("no resize_token_embeddings", lambda m, ids: m.resize_token_embeddings(200)),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSALS)
def test_what_is_refused(model: Any, what: str) -> None:
    message, call = REFUSALS[what]
    with pytest.raises(ConfigError, match=message):
        call(model, torch.tensor(prompts(8)))


def test_a_foreign_cache_is_refused(model: Any) -> None:
    from transformers import DynamicCache

    with pytest.raises(ConfigError, match="DynamicCache"):
        model(torch.tensor(prompts(8)), None, None, DynamicCache())


def test_a_subfolder_is_fused_from_there(folder: Path, tmp_path: Path) -> None:
    """And not from the folder above, which has another model of the same shape."""
    from transformers import AwqConfig

    above, seed = tmp_path / "above", torch.Generator().manual_seed(9)
    shutil.copytree(folder, above)
    tensors = stored(above)
    for name in [name for name in tensors if name.endswith("embed_tokens.weight")]:
        tensors[name] = torch.randn(tensors[name].shape, generator=seed).half()
    for file in above.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, above / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(folder, above / "below")
    with pytest.raises(FusionError, match=r"embed_tokens\.weight is not what .*above has"):
        fuse(load(above, subfolder="below"), LIMIT)
    config = AwqConfig(do_fuse=True, fuse_max_seq_len=LIMIT)
    with pytest.warns(UserWarning, match="quantization_config"):
        model = load(above, subfolder="below", quantization_config=config)
    assert greedy(model, prompts(9)) == greedy(fused(folder), prompts(9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_edited_weights_are_not_reverted(folder: Path, dtype: torch.dtype) -> None:
    model = load(folder, dtype=dtype)
    kind, place = type(model), model.model.layers[0].mlp.up_proj.qweight.data_ptr()
    model.model.norm.weight.data.mul_(2)
    with pytest.raises(FusionError, match=r"model\.norm\.weight is not what"):
        fuse(model, LIMIT)
    assert type(model) is kind
    assert model.model.layers[0].mlp.up_proj.qweight.data_ptr() == place
    model.model.norm.weight.data.div_(2)
    fuse(model, LIMIT)
    assert type(model) is not kind


def test_what_cannot_be_fused(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    with pytest.raises(ConfigError, match="fuse_max_seq_len is 0"):
        fuse(model, 0)
    model.config.rope_parameters["rope_theta"] = 5.0
    with pytest.raises(ConfigError, match="ropes is RopeConfig"):
        fuse(model, LIMIT)
    gone = tmp_path / "gone"
    shutil.copytree(folder, gone)
    model = load(gone)
    shutil.rmtree(gone)
    with pytest.raises(CheckpointError, match="no folder of one"):
        fuse(model, LIMIT)
    model.config.model_type = "gpt2"
    with pytest.raises(ConfigError, match="llama, minimax_m2, ministral"):
        fuse(model, LIMIT)
    assert type(model).forward is type(load(folder)).forward
