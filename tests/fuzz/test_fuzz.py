"""Hostile contents of every file of a folder, a few hundred from a fixed seed: SquawqError or a result, nothing else.

`make fuzz` goes on from here, guided by coverage, for as long as one likes.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeModel, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readers import COMMANDS, quantized_folder, read

from squawq.demo import demo_model

KEYS = [
    *tiny_config(),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "rope_scaling", "rope_parameters"),
    *("quantization_config", "text_config", "partial_rotary_factor", "attention_bias", "num_experts", "num_labels"),
    *("attn_implementation", "auto_map", "pad_token_id", "dtype", "initializer_range", "weight_map", "metadata"),
    *("bits", "group_size", "w_bit", "q_group_size", "zero_point", "version", "modules_to_not_convert", "quant_method"),
    *("rope_type", "type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    *("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "chat_template", "bos_token", "eos_token"),
    *("dtype", "shape", "data_offsets", "w", "__metadata__", "layers", "notes", "job", "config", "method"),
    *("kept_in_16_bits", "linears", "loss", "loss_rounded", "evaluation", "license", "language"),
]
NASTY: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**31 - 1, 2**63, 10**8, 10**30, 10**300, 0.0, -0.5, 1e-320, 1e38),
    *(
        1e300,
        -1e300,
        "",
        "abc",
        "\x1b[31m",
        "a" * 2000,
        "yarn",
        "linear",
        "llama3",
        "dynamic",
        "longrope",
        "awq",
        "gemm",
    ),
    *([], {}, [[]], [None], ["full_attention"], ["sliding_attention"] * 2, {"": {}}, [0, 16], [2**40, 2**40], "F32"),
    *({"rope_type": "llama3", "factor": 0}, {"rope_type": "yarn", "factor": 1e300}, {"bits": 4, "group_size": -1}),
]
VALUES = st.recursive(
    st.sampled_from(NASTY) | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)
CHANGES = st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3)
ANY = [b"", b"[" * 200_000, b"\xff\xfe", b'{"a":' * 500, b"---\n" + b"[" * 5000 + b"\n---\n", b"null", b"0" * 5000]
SLOW = {"config.json": 12, "quant_config.json": 12, "tokenizer.json": 6, "chat_template.jinja": 6}  # a process each


@pytest.fixture
def folder(make_model: MakeModel) -> Path:
    folder = make_model()
    (folder / "good.json").write_text(json.dumps(tiny_config()))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(demo_model() / name, folder / name)
    return folder


@pytest.fixture
def awq_folder(tmp_path: Path) -> Path:
    return quantized_folder(tmp_path / "model")


def content(name: str, good: bytes, changes: dict[str, Any]) -> bytes:
    """A file that is right but for some keys."""
    if name == "model.safetensors":
        length = struct.unpack("<Q", good[:8])[0]
        header = json.loads(good[8 : 8 + length])
        header = {**header, **changes} if len(changes) > 1 else {k: {**v, **changes} for k, v in header.items()}
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + good[8 + length :]
    if name == "README.md":
        return f"---\n{json.dumps(changes)}\n---\n".encode()
    if name == "chat_template.jinja":
        return good + json.dumps(changes).encode()
    return json.dumps({**json.loads(good or b"{}"), **changes}).encode()


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("quantized", [False, True])
def test_any_value_of_any_key(name: str, quantized: bool, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue("awq_folder" if quantized else "folder")
    good = (folder / name).read_bytes() if (folder / name).exists() else b""

    @settings(
        max_examples=SLOW.get(name, 60),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(CHANGES)
    def run(changes: dict[str, Any]) -> None:
        read(folder, name, content(name, good, changes))

    run()
    assert not (folder.parent / "never").exists()


def test_the_quantized_folder_is_read_to_the_end(awq_folder: Path) -> None:
    """Else what is changed in it would be refused for another reason."""
    for name in ("tokenizer.json", "generation_config.json", "model.safetensors", "squawq_report.json"):
        for command in COMMANDS[name]:
            command(awq_folder)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    "data", [b"", b"[" * 200_000, b"\xff\xfe", b'{"a":' * 500, b"---\n" + b"[" * 5000, b"null", b"0" * 5000]
)
def test_any_bytes(name: str, data: bytes, folder: Path) -> None:
    read(folder, name, data)
