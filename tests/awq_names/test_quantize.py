"""Quantizing under AutoAWQ's names: the card's script, each argument's meaning, what lies on disk, refusals."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, logits
from transformers import AutoTokenizer

import squawq
from awq import AutoAWQForCausalLM
from awq.models import loading
from awq.models.base import BaseAWQForCausalLM, _stored_dtype
from awq.utils.calib_data import calibration_blocks
from squawq.demo import demo_model
from squawq.errors import CalibrationError, CheckpointError, ConfigError, OutputError
from squawq.format.reader import Checkpoint
from squawq.quant_config import QuantConfig
from squawq.text.tokenizer import Tokenizer

Rows = list[list[int]]
CONFIG = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
SMALL: dict[str, Any] = {"max_calib_samples": 8, "max_calib_seq_len": 32}


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary folders where the test can see them."""
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "work"))


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def made(model: Path, rows: Rows, **arguments: Any) -> BaseAWQForCausalLM:
    config = arguments.pop("quant_config", CONFIG)
    found = AutoAWQForCausalLM.from_pretrained(model)
    found.quantize(None, quant_config=config, calib_data=rows, **{**SMALL, **arguments})
    return found


def direct(model: Path, out: Path, rows: Rows, **changes: Any) -> dict[str, bytes]:
    squawq.quantize(
        model, out, QuantConfig(**{"group_size": 32, "samples": 8, "seqlen": 32, **changes}), calibration=rows
    )
    return shards(out)


def test_text_that_the_model_generates(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model() / name, model)
    found = AutoAWQForCausalLM.from_pretrained(model)
    found.quantize(None, quant_config=CONFIG, calib_data="self", **SMALL)
    found.save_quantized(tmp_path / "saved")
    assert found.search_result is not None
    assert (found.search_result["calibration"], found.search_result["calibration_tokens"]) == ("self", 8 * 32)
    config = QuantConfig(group_size=32, samples=8, seqlen=32)
    squawq.quantize(model, tmp_path / "direct", config, calibration="self")
    assert Checkpoint(tmp_path / "saved").tensors.keys() == Checkpoint(tmp_path / "direct").tensors.keys()


def test_the_cards_script(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model(
        hidden_size=128, intermediate_size=128, head_dim=32, num_hidden_layers=1, vocab_size=4096,
        max_position_embeddings=64,
    )  # fmt: skip
    AutoTokenizer.from_pretrained(demo_model()).save_pretrained(source)
    model_path, quant_path = str(source), str(tmp_path / "card-AWQ-INT4")
    quant_config = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}

    model = AutoAWQForCausalLM.from_pretrained(model_path, low_cpu_mem_usage=True, use_cache=False)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model.quantize(tokenizer, quant_config=quant_config)
    model.save_quantized(quant_path)
    assert not list(Path(quant_path).glob("tokenizer*"))  # the script saves it, as with AutoAWQ
    tokenizer.save_pretrained(quant_path)

    squawq.quantize(source, tmp_path / "direct")
    assert shards(Path(quant_path)) == shards(tmp_path / "direct")
    written = json.loads(Path(quant_path, "config.json").read_text())
    assert written == json.loads((tmp_path / "direct" / "config.json").read_text())
    assert len(squawq.LLM(quant_path).generate(["Once"], squawq.SamplingParams(max_tokens=3))) == 1


def test_a_16_bit_model_is_opened_and_not_loaded(make_model: MakeModel, rows: Rows) -> None:
    folder = make_model()
    model = AutoAWQForCausalLM.from_pretrained(folder)
    assert (model.model_type, model.is_quantized, model.search_result) == ("llama", False, None)
    assert model.config.hidden_size == 64
    model.quantize(calib_data=rows, quant_config=CONFIG, **SMALL)
    assert model._model is None  # from file to file
    assert model.is_quantized
    assert model.search_result is not None
    assert len(model.search_result["layers"]) == 2
    assert model.quant_config.to_dict() == {**CONFIG, "version": "gemm", "modules_to_not_convert": None}
    assert model.config.quantization_config["group_size"] == 32


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ({}, {}),
        ({"apply_clip": False}, {"clip": False}),
        ({"duo_scaling": False}, {"duo_scaling": False}),
        ({"quant_config": {**CONFIG, "zero_point": False}}, {"zero_point": False}),
        (
            {"quant_config": {**CONFIG, "modules_to_not_convert": ["lm_head", "down_proj"]}},
            {"modules_to_not_convert": ("down_proj",)},
        ),
        ({"max_calib_samples": 5, "n_parallel_calib_samples": 2, "max_chunk_memory": 1024}, {"samples": 5}),
        ({"max_calib_seq_len": 16}, {"seqlen": 16}),
        ({"max_calib_seq_len": 4096, "max_calib_samples": 1}, {"seqlen": 256, "samples": 1}),  # the model's context
    ],
    ids=lambda value: "-".join(value) or "card",
)
def test_arguments_are_squawqs_settings(
    make_model: MakeModel, rows: Rows, tmp_path: Path, arguments: dict[str, Any], changes: dict[str, Any]
) -> None:
    folder = make_model()
    made(folder, rows, **arguments).save_quantized(tmp_path / "out")
    assert shards(tmp_path / "out") == direct(folder, tmp_path / "direct", rows, **changes)


def test_scales_without_weights_are_another_search(make_model: MakeModel, rows: Rows) -> None:
    report = made(make_model(), rows, duo_scaling=False).search_result
    assert report is not None
    assert "xw" not in {group["formula"] for layer in report["layers"] for group in layer["scales"]}


@pytest.mark.parametrize(("asked", "stored"), [(None, "F16"), ("auto", "F16"), (torch.bfloat16, "BF16")])
def test_what_stays_in_16_bits(make_model: MakeModel, rows: Rows, tmp_path: Path, asked: object, stored: str) -> None:
    model = AutoAWQForCausalLM.from_pretrained(make_model(), torch_dtype=asked)
    model.quantize(calib_data=rows, quant_config=CONFIG, **SMALL)
    model.save_quantized(str(tmp_path / "out") + "/")
    dtype = Checkpoint(tmp_path / "out").info("lm_head.weight").dtype
    assert dtype is {"F16": torch.float16, "BF16": torch.bfloat16}[stored]


@pytest.mark.parametrize(
    ("asked", "stored"),
    [("auto", "auto"), (None, "auto"), (torch.float32, "auto"), (torch.float16, "float16"), ("bfloat16", "bfloat16")],
)
def test_the_sources_dtype_is_kept_unless_16_bits_are_asked_for(asked: object, stored: str) -> None:
    assert _stored_dtype(asked) == stored


def test_export_compatible_saves_floats_and_then_integers(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    folder = make_model()
    wanted = direct(folder, tmp_path / "direct", rows)
    model = made(folder, rows, export_compatible=True)
    model.save_quantized(tmp_path / "out")
    assert Checkpoint(tmp_path / "out").config.quant is None
    ids = torch.tensor(rows[:2])
    floats = logits(tmp_path / "out", ids)
    torch.testing.assert_close(floats, logits(tmp_path / "direct", ids), atol=2e-2, rtol=2e-2)
    model.pack()
    model.save_quantized(tmp_path / "out")
    assert shards(tmp_path / "out") == wanted
    assert Checkpoint(tmp_path / "out").config.quant == QuantConfig(group_size=32)


def test_saving_again_and_over_other_weights(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    out, second = tmp_path / "out", tmp_path / "second"
    out.mkdir()
    (out / "tokenizer.json").write_text("mine")
    (out / "model.safetensors").write_bytes(b"older")
    (out / "model-00001-of-00099.safetensors").write_bytes(b"older")
    (out / "adapter.safetensors").write_bytes(b"another's")
    model = made(make_model(), rows)
    for folder in (out, out, second):
        model.save_quantized(folder)
    assert (out / "tokenizer.json").read_text() == "mine"
    assert (out / "adapter.safetensors").read_bytes() == b"another's"
    assert len(list(out.glob("model*.safetensors"))) == 4
    assert Checkpoint(out).tensors.keys() == Checkpoint(second).tensors.keys()
    shutil.rmtree(out)
    with pytest.raises(CheckpointError, match="gone"):
        model.save_quantized(tmp_path / "third")


def test_the_temporary_folder_goes_with_the_model(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    model = made(make_model(), rows)
    assert len(list((tmp_path / "work").glob("squawq-*"))) == 1
    del model
    gc.collect()
    assert not list((tmp_path / "work").glob("squawq-*"))


def test_a_failure_leaves_nothing_behind(make_model: MakeModel, tmp_path: Path) -> None:
    model = AutoAWQForCausalLM.from_pretrained(make_model())
    with pytest.raises(CalibrationError, match="are needed"):
        model.quantize(calib_data=[[5] * 20], quant_config=CONFIG, **SMALL)
    with pytest.raises(ConfigError, match="'typo' is in no name"):
        made(make_model(name="b"), [[5] * 32] * 8, quant_config={**CONFIG, "modules_to_not_convert": ["typo"]})
    gc.collect()
    assert not list((tmp_path / "work").glob("squawq-*"))
    assert not model.is_quantized


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"quant_config": {"bits": 4}}, TypeError, "'bits'"),
        ({"quantizer_cls": dict}, ConfigError, "quantizer_cls"),
        ({"max_calib_samples": 0}, ConfigError, "max_calib_samples is 0"),
        ({"n_parallel_calib_samples": -1}, ConfigError, "n_parallel_calib_samples is -1"),
        ({"apply_clip": 1}, ConfigError, "clip is 1"),
        ({"duo_scaling": "both"}, ConfigError, "duo_scaling is 'both'"),
        ({"loss": "mse"}, TypeError, "loss"),
    ],
)
def test_what_cannot_be_had_is_refused(
    make_model: MakeModel, rows: Rows, arguments: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        made(make_model(), rows, **arguments)


def test_order_of_calls_is_checked(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    folder = make_model()
    model = AutoAWQForCausalLM.from_pretrained(folder)
    with pytest.raises(ConfigError, match="follows quantize"):
        model.save_quantized(tmp_path / "out")
    with pytest.raises(ConfigError, match="follows quantize"):
        model.pack()
    model.quantize(calib_data=rows, quant_config=CONFIG, **SMALL)
    with pytest.raises(ConfigError, match="quantized already"):
        model.quantize(calib_data=rows, quant_config=CONFIG, **SMALL)
    with pytest.raises(ConfigError, match="the model itself"):
        model.save_quantized(folder)
    with pytest.raises(ConfigError, match="pickles"):
        model.save_quantized(tmp_path / "out", safetensors=False)
    with pytest.raises(ConfigError, match="largest layer takes a file of"):
        model.save_quantized(tmp_path / "out", shard_size="2KB")
    with pytest.raises(ConfigError, match="write it as '5GB'"):
        model.save_quantized(tmp_path / "out", shard_size="5 apples")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made or locked"):
        model.save_quantized(tmp_path / "file")


def test_opening_refuses_what_it_does_not_know(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_model()
    with pytest.raises(TypeError, match=r"'load_in_4bit'.*attn_implementation"):
        AutoAWQForCausalLM.from_pretrained(folder, load_in_4bit=True)
    with pytest.raises(TypeError, match=r"'token'.*HF_TOKEN"):
        AutoAWQForCausalLM.from_pretrained(folder, download_kwargs={"token": "x", "revision": "main"})
    with pytest.raises(ConfigError, match="pickles"):
        AutoAWQForCausalLM.from_pretrained(folder, safetensors=False)
    with pytest.raises(CheckpointError, match="16-bit model; use from_pretrained"):
        AutoAWQForCausalLM.from_quantized(folder)
    with pytest.raises(CheckpointError, match="neither a model folder nor a Hub id"):
        AutoAWQForCausalLM.from_pretrained("no such folder")
    monkeypatch.setattr(loading, "say_once", loading.say_once.__wrapped__)
    with caplog.at_level(logging.WARNING):
        AutoAWQForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert "no code of a model folder is run" in caplog.text
    other = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**other, "model_type": "gpt2"}))
    with pytest.raises(ConfigError, match=r"'gpt2'; squawq quantizes .*llama"):
        AutoAWQForCausalLM.from_pretrained(folder)


def blocks(source: Any, *, samples: int = 4, seqlen: int = 16, split: str = "train") -> Rows:
    return calibration_blocks(
        source, None, demo_model(), split=split, text_column="text", samples=samples, seqlen=seqlen, vocab_size=4096
    )


def test_long_samples_are_cut_into_blocks() -> None:
    assert blocks([list(range(100, 160))], samples=3) == [list(range(i, i + 16)) for i in (100, 116, 132)]


def test_texts_are_stripped_and_joined() -> None:
    tokenizer = Tokenizer(demo_model())
    texts = ["  Once upon a time there was a cat. \n"] * 30
    stream = tokenizer.encode(texts[0].strip()) * 30
    assert blocks(texts) == [stream[i : i + 16] for i in range(0, 64, 16)]


def test_the_callers_tokenizer_is_used(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    arguments: dict[str, Any] = {"split": "train", "text_column": "text", "samples": 4, "seqlen": 8, "vocab_size": 4096}
    texts = ["A cat sat on the mat and looked at the moon."] * 10
    assert calibration_blocks(texts, tokenizer, tmp_path, **arguments) == blocks(texts, seqlen=8)


@pytest.mark.parametrize("samples", [2, 7])
def test_the_built_in_set_has_a_number_of_samples_at_most(samples: int) -> None:
    assert len(blocks(None, samples=samples)) == samples


class Streamed:
    """What `datasets` gives: rows that know how to be shuffled."""

    def __init__(self, rows: list[dict[str, object]]) -> None:
        self.rows, self.read = rows, 0

    def shuffle(self, seed: int) -> Streamed:
        assert seed == 42
        return self

    def __iter__(self) -> Iterator[dict[str, object]]:
        for row in self.rows:
            self.read += 1
            yield row


def hub(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str, str], Streamed]) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *, split, streaming: answer(name, split))


def test_a_hub_set_by_name_split_and_column(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    texts = [" ", *(f"Story {i}: the cat ran over the hill." for i in range(500))]
    stream = Streamed([{"text": text} for text in texts])

    def answer(name: str, split: str) -> Streamed:
        asked.append((name, split))
        return stream

    hub(monkeypatch, answer)
    assert len(blocks("pileval")) == len(blocks("somebody/stories", split="test")) == 4
    assert asked == [("mit-han-lab/pile-val-backup", "validation"), ("somebody/stories", "test")]
    assert stream.read < 60  # only what is needed


def test_a_hub_set_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, split: str) -> Streamed:
        raise ConnectionError("no network")

    hub(monkeypatch, refuse)
    with pytest.raises(CalibrationError, match=r"'pileval'|pile-val-backup.*no network.*built-in set"):
        blocks("pileval")
    hub(monkeypatch, lambda name, split: Streamed([{"body": "x"}]))
    with pytest.raises(CalibrationError, match="no texts in column 'text'; it has body"):
        blocks("somebody/stories")
    with pytest.raises(CalibrationError, match="is not a file"):
        blocks("missing.txt")
