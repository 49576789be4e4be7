"""The whole quantizer on tiny models: what is written, what stays in 16 bits, what is refused, and resuming."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from conftest import MakeModel, logits, shared_data
from results import contents, settled
from safetensors.torch import load_file, save_file

import squawq
from squawq.demo import demo_model
from squawq.errors import CalibrationError, CheckpointError, ConfigError, OutputError
from squawq.format.files import locked
from squawq.format.reader import Checkpoint
from squawq.quant_config import QuantConfig

Rows = list[list[int]]
SMALL = {"group_size": 32, "seqlen": 32, "samples": 8}


def quantize(folder: Path, out: Path, rows: Rows, **changes: Any) -> dict[str, Any]:
    return squawq.quantize(folder, out, QuantConfig(**{**SMALL, **changes}), calibration=rows)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    state = {name: tensor.clone() for name, tensor in state.items()}
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
def test_every_family(
    model_type: str, changes: dict[str, Any], make_model: MakeModel, rows: Rows, tmp_path: Path
) -> None:
    folder = make_model(model_type, **changes)
    report = quantize(folder, tmp_path / "out", rows)
    checkpoint = Checkpoint(tmp_path / "out")
    assert report["kept_in_16_bits"] == []
    for index in range(2):
        for linear in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            assert checkpoint.is_quantized(f"model.layers.{index}.{linear}")
    assert ("lm_head.weight" in checkpoint.tensors) != changes.get("tie_word_embeddings", False)
    assert all(t.dtype in (torch.float16, torch.int32) for t in checkpoint.tensors.values())
    for layer in report["layers"]:
        assert layer["method"] == "squawq"  # wrongly folded scales would lose to plain rounding
        assert layer["loss"] < layer["loss_rounded"]
        assert {row["name"] for row in layer["linears"]} == {
            *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
            *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        }
    if changes.get("num_key_value_heads") == 4:
        assert any(s["linears"] == ["self_attn.o_proj"] for layer in report["layers"] for s in layer["scales"])
    ids = torch.randint(0, 160, (1, 32), generator=torch.Generator().manual_seed(9))
    original = logits(folder, ids)
    assert (
        logits(tmp_path / "out", ids) - original
    ).abs().mean() < 0.5 * original.abs().mean()  # unrelated logits: 1.4
    assert not (tmp_path / "out.partial").exists()


def test_kept_linears_take_the_inverse_scale_of_the_next(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    """up_proj stays in 16 bits, down_proj is scaled: each row of up_proj is divided by one factor, biases too."""
    folder = make_model(mlp_bias=True)
    edit(folder, lambda state: state["model.layers.0.mlp.up_proj.weight"][:4].mul_(8))
    report = quantize(folder, tmp_path / "out", rows, modules_to_not_convert=("up_proj",))
    scaled = [layer for layer in report["layers"] for s in layer["scales"] if s["linears"] == ["mlp.down_proj"]]
    assert scaled
    prefix = f"{scaled[0]['name']}.mlp.up_proj"
    source, out = Checkpoint(folder), Checkpoint(tmp_path / "out")
    ratio = source.read(f"{prefix}.weight") / out.read(f"{prefix}.weight").float()
    factor = ratio.median(1).values
    assert (factor - 1).abs().max() > 0.05
    assert torch.allclose(
        out.read(f"{prefix}.weight").float() * factor[:, None], source.read(f"{prefix}.weight"), atol=2e-3
    )
    assert torch.allclose(out.read(f"{prefix}.bias").float() * factor, source.read(f"{prefix}.bias"), atol=2e-3)


@pytest.mark.parametrize("skip", ["v_proj", "layers.1.mlp.gate_proj"])
def test_linears_that_engines_fuse_stay_together(skip: str, make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    report = quantize(make_model(), tmp_path / "out", rows, modules_to_not_convert=(skip,))
    names = {row["name"].removeprefix("model.") for row in report["kept_in_16_bits"]}
    if skip == "v_proj":
        assert names == {f"layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qkv"}
    else:
        assert names == {"layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(config["quantization_config"]["modules_to_not_convert"]) == len(names)
    logits(tmp_path / "out", torch.tensor(rows[:1]))


def test_what_does_not_fit_stays_in_16_bits_and_is_listed(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    report = quantize(make_model(intermediate_size=88), tmp_path / "out", rows)
    names = [row["name"] for row in report["kept_in_16_bits"]]
    assert names == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert "in_features 88" in report["kept_in_16_bits"][0]["reason"]
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["modules_to_not_convert"] == names
    logits(tmp_path / "out", torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("group_size", [16, 32, 64, -1])
@pytest.mark.parametrize("zero_point", [True, False])
def test_group_sizes_and_symmetry(
    group_size: int, zero_point: bool, make_model: MakeModel, rows: Rows, tmp_path: Path
) -> None:
    folder = make_model(intermediate_size=128)
    quantize(folder, tmp_path / "out", rows, group_size=group_size, zero_point=zero_point)
    ids = torch.tensor(rows[:1])
    original = logits(folder, ids)
    assert (
        logits(tmp_path / "out", ids) - original
    ).abs().mean() < 0.5 * original.abs().mean()  # unrelated logits: 1.4


def test_plain_rounding_needs_no_text(make_model: MakeModel, tmp_path: Path) -> None:
    report = squawq.quantize(make_model(), tmp_path / "out", QuantConfig(group_size=32, method="rtn"))
    assert report["calibration_tokens"] == 0
    assert all(layer["method"] == "rtn" for layer in report["layers"])


def test_companions_travel(tmp_path: Path) -> None:
    squawq.quantize(demo_model(), tmp_path / "out", QuantConfig(method="rtn"))
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= files
    assert not {"README.md", "held_back.txt"} & files
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (demo_model() / name).read_bytes()


def test_bad_values_in_the_source(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    folder = make_model()
    name = "model.layers.1.mlp.up_proj.weight"
    edit(folder, lambda state: state[name][3, 4:6].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=f"{name}' holds 2 values that are not finite"):
        quantize(folder, tmp_path / "out", rows)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists()  # layer 0 is done, and not lost
    edit(folder, lambda state: state["model.embed_tokens.weight"][3, :2].fill_(float("inf")))
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight' holds 2 values"):
        quantize(folder, tmp_path / "out2", rows)
    assert not (tmp_path / "out2.partial").exists()


def test_values_beyond_float16(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    folder = make_model()
    edit(folder, lambda state: state["lm_head.weight"][0].fill_(1e6))
    with pytest.raises(CheckpointError, match=r"lm_head.*bfloat16"):
        quantize(folder, tmp_path / "out", rows)
    quantize(folder, tmp_path / "out", rows, dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_surplus_and_missing_tensors(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    folder = make_model()
    edit(folder, lambda state: state.update({"model.layers.0.adapter.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"adapter.*does not belong"):
        quantize(folder, tmp_path / "out", rows)
    edit(folder, lambda state: (state.pop("model.layers.0.adapter.weight"), state.pop("model.norm.weight"))[0])
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is missing"):
        quantize(folder, tmp_path / "out2", rows)
    assert not (tmp_path / "out2.partial").exists()


def test_misshapen_head(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    folder = make_model()
    edit(folder, lambda state: state.update({"lm_head.weight": torch.zeros(100, 64)}))
    with pytest.raises(CheckpointError, match=r"lm_head.weight' has shape \[100, 64\]; \[160, 64\] is needed"):
        quantize(folder, tmp_path / "out", rows)
    assert not (tmp_path / "out.partial").exists()


def test_choices_that_do_nothing_are_refused(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    folder = make_model()
    with pytest.raises(ConfigError, match=r"'down_porj' is in no name; names are like model\.layers\.0"):
        quantize(folder, tmp_path / "out", rows, modules_to_not_convert=("down_porj",))
    with pytest.raises(ConfigError, match=r"no linear can be quantized .* group size 256"):
        quantize(folder, tmp_path / "out", rows, group_size=256)
    with pytest.raises(ConfigError, match="leave the calibration out"):
        quantize(folder, tmp_path / "out", rows, method="rtn")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_dead_channels_and_layers_without_signal(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    folder = make_model()

    def kill(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.0.mlp.up_proj.weight"][:8] = 0
        state["model.layers.1.post_attention_layernorm.weight"].zero_()

    edit(folder, kill)
    report = quantize(folder, tmp_path / "out", rows)
    notes = "\n".join(report["notes"])
    assert "layers.0: mlp.down_proj: 8 input channels without signal" in notes
    assert "layers.1: mlp.gate_proj: no calibration signal; rounded to nearest" in notes
    assert torch.isfinite(logits(tmp_path / "out", torch.tensor(rows[:1]))).all()


def test_activations_that_are_not_finite(
    make_model: MakeModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model()
    edit(folder, lambda state: state["model.layers.0.mlp.down_proj.weight"].fill_(3e38))
    with pytest.raises(CheckpointError, match=r"^model\.layers\.0: .*not finite in float32 either"):
        quantize(folder, tmp_path / "refused", rows, modules_to_not_convert=("layers.0",), dtype="bfloat16")
    monkeypatch.setattr("squawq.quantization.check.DtypeCheck._compare", lambda *_: 0.0)
    with pytest.raises(CheckpointError, match="read back, the 16-bit model's own logits are not finite; remove"):
        quantize(folder, tmp_path / "unchecked", rows, modules_to_not_convert=("layers.0",), dtype="bfloat16")
    monkeypatch.setattr("squawq.quantization.check.SlicedDivergence.result", lambda _: (0.0, 1.0))
    report = quantize(folder, tmp_path / "out", rows, modules_to_not_convert=("layers.0",), dtype="bfloat16")
    notes = "\n".join(report["notes"])
    assert "layers.1: self_attn.q_proj: 256 inputs were not finite" in notes
    assert report["layers"][1]["method"] == "rtn"


def test_plain_rounding_is_kept_where_the_search_made_it_worse(
    make_model: MakeModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model()

    def bad_limits(weight: torch.Tensor, blocks: torch.Tensor, zero_point: bool) -> tuple[torch.Tensor, torch.Tensor]:
        shape = weight.shape[0], weight.shape[1] // blocks.shape[1]
        return torch.full(shape, -0.01), torch.full(shape, 0.01)

    monkeypatch.setattr("squawq.quantization.rounding.clip_limits", bad_limits)
    report = quantize(folder, tmp_path / "out", rows)
    monkeypatch.undo()
    assert [layer["method"] for layer in report["layers"]] == ["rtn", "rtn"]
    assert "plain rounding is kept" in report["notes"][0]
    squawq.quantize(folder, tmp_path / "plain", QuantConfig(group_size=32, method="rtn"))
    for name in ("model-00002-of-00004.safetensors", "model-00003-of-00004.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_quantized_source_and_unknown_family(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    folder = make_model()
    quantize(folder, tmp_path / "out", rows)
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize(tmp_path / "out", tmp_path / "again", rows)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ConfigError, match=r"'gpt2'; squawq knows .*llama, .*takes a row in squawq/families.py"):
        quantize(folder, tmp_path / "other", rows)


def test_folders_that_are_not_ours_are_never_touched(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    folder = make_model()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="squawq did not make it"):
        quantize(folder, theirs, rows)
    with pytest.raises(ConfigError, match="the model itself"):
        quantize(folder, folder, rows)
    partial = tmp_path / "new.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="squawq did not make it"):
        quantize(folder, tmp_path / "new", rows)
    assert contents(theirs) == {"thesis.txt": b"mine"}
    assert contents(partial) == {"notes.txt": b"mine"}


def test_a_finished_job_is_recognized_and_another_refused(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    folder = make_model()
    report = quantize(folder, tmp_path / "out", rows)
    before = contents(tmp_path / "out")
    assert quantize(folder, tmp_path / "out", rows) == report
    with pytest.raises(OutputError, match=r"another run, with another config \("):
        quantize(folder, tmp_path / "out", rows, clip=False)
    assert contents(tmp_path / "out") == before


def test_files_are_readable_like_any_others(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    quantize(make_model(), tmp_path / "out", rows)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}


def test_a_finished_folder_that_lost_a_file_is_not_called_done(
    make_model: MakeModel, rows: Rows, tmp_path: Path
) -> None:
    folder = make_model()
    quantize(folder, tmp_path / "out", rows)
    (tmp_path / "out" / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002"):
        quantize(folder, tmp_path / "out", rows)


def test_a_damaged_part_is_done_again(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    folder, out = make_model(), tmp_path / "out"
    quantize(folder, tmp_path / "straight", rows)
    assert killed_runs(folder, rows, [(out, "before", 11)]) == [-signal.SIGKILL]
    shard = tmp_path / "out.partial" / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-50])
    quantize(folder, out, rows)
    assert settled(out) == settled(tmp_path / "straight")


def test_two_runs_at_once(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    folder, out = make_model(), tmp_path / "out"
    assert killed_runs(folder, rows, [(out, "before", 8)]) == [-signal.SIGKILL]
    busy = r"another process is at work on .*out\.partial; wait until it ends"
    with locked(tmp_path / "out.partial"), pytest.raises(OutputError, match=busy):
        quantize(folder, out, rows)
    quantize(folder, out, rows)


def test_places_that_cannot_be_renamed_into(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    folder = make_model()
    with pytest.raises(OutputError, match="mount point"):
        quantize(folder, Path("/"), rows)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    quantize(folder, tmp_path / "link", rows)
    assert (tmp_path / "real" / "config.json").is_file()


KILLED = """
# Imports everything once, then forks a child for every case; each child quantizes and is killed with -9: at a rename
# (before or after it), or some milliseconds after its start. Prints how the children ended.
import json, os, signal, sys, time
import squawq
from squawq.quant_config import QuantConfig
from squawq.format import shards
from squawq.quantization import pipeline
from transformers.models.llama import modeling_llama

folder, rows, cases = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])

def work(out, moment, point):
    replace, count = os.replace, 0
    def killing(a, b):
        nonlocal count
        count += 1
        if (count, moment) == (point, "before"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(a, b)
        if (count, moment) == (point, "after"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.replace = killing
    if moment == "while writing":
        def save_file(tensors, path, metadata):
            nonlocal saved
            saved += 1
            if saved == point:
                path.with_name(".tmpXyZ12").write_bytes(bytes(10_000))  # what safetensors leaves
                os.kill(os.getpid(), signal.SIGKILL)
            original(tensors, path, metadata=metadata)
        original, shards.save_file = shards.save_file, save_file
        saved = 0
    squawq.quantize(folder, out, QuantConfig(group_size=32, seqlen=32, samples=8), calibration=rows)

ends = []
for out, moment, point in cases:
    child = os.fork()
    if child == 0:
        work(out, moment, point)
        os._exit(0)
    if moment == "milliseconds":
        time.sleep(point / 1000)
        os.kill(child, signal.SIGKILL)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(ends))
"""


def killed_runs(folder: Path, rows: Rows, cases: list[tuple[Path, str, int]]) -> list[int]:
    """Exit codes of one killed run for each (out, moment, point)."""
    arguments = json.dumps(rows), json.dumps([[str(out), moment, point] for out, moment, point in cases])
    done = programs.run(["-c", KILLED, folder, *arguments])
    assert done.returncode == 0, done.stderr
    ends: list[int] = json.loads(done.stdout.splitlines()[-1])
    return ends


def test_killed_inside_a_shard_leaves_nothing_behind(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    folder = make_model()
    quantize(folder, tmp_path / "straight", rows)
    cases = [(tmp_path / f"out{point}", "while writing", point) for point in range(1, 5)]
    counted = killed_runs(folder, rows, cases)
    assert counted == [-signal.SIGKILL] * 4
    for out, _, _ in cases:
        quantize(folder, out, rows)
        assert settled(out) == settled(tmp_path / "straight")


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_every_rename_ends_byte_identical(
    moment: str, make_model: MakeModel, rows: Rows, tmp_path: Path
) -> None:
    """Every file comes by a rename; 14 of them make this job, OUT's own the last."""
    folder = make_model()
    quantize(folder, tmp_path / "straight", rows)
    expected = settled(tmp_path / "straight")
    cases = [(tmp_path / f"out{point}", moment, point) for point in range(1, 15)]
    assert killed_runs(folder, rows, cases) == [-signal.SIGKILL] * 14
    for out, _, point in cases:
        assert out.exists() == ((moment, point) == ("after", 14))
        quantize(folder, out, rows)
        assert settled(out) == expected, f"killed {moment} rename {point}"
        assert not out.with_name(out.name + ".partial").exists()


def test_killed_at_any_moment_and_again_ends_byte_identical(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    """The same job killed ten times in a row, wherever it happens to be."""
    folder = make_model(num_hidden_layers=4)
    quantize(folder, tmp_path / "straight", rows)
    out = tmp_path / "out"
    ends = killed_runs(folder, rows, [(out, "milliseconds", wait) for wait in range(200, 1200, 100)])
    assert -signal.SIGKILL in ends
    quantize(folder, out, rows)
    assert settled(out) == settled(tmp_path / "straight")


def test_an_unfinished_job_with_other_settings_is_refused(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    folder, out = make_model(), tmp_path / "out"
    assert killed_runs(folder, rows, [(out, "after", 4)]) == [-signal.SIGKILL]
    before = contents(tmp_path / "out.partial")
    with pytest.raises(OutputError, match="another config"):
        quantize(folder, out, rows, clip=False)
    with pytest.raises(OutputError, match="another calibration"):
        quantize(folder, out, rows[::-1])
    assert contents(tmp_path / "out.partial") == before


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 2, 3]], "gives 3 tokens; 256 are needed"),
        ([[1, 2000] * 200], "token id 2000; the model knows 0 to 159"),
        ([[1, -7] * 200], "token id -7"),
        ([[1.5] * 300], "row 0 is"),
    ],
)
def test_bad_calibration_rows(rows: Any, message: str, make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=message):
        quantize(make_model(), tmp_path / "out", rows)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_seqlen_beyond_the_model(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the model has 256 positions"):
        quantize(make_model(), tmp_path / "out", rows, seqlen=300)


def test_babyllama_with_352_columns(tmp_path: Path) -> None:
    """AutoAWQ dies on these rows; here down_proj stays in 16 bits, or takes a smaller group when asked."""
    folder = shared_data("babyllama-tok361") / "hf"
    rows = torch.randint(3, 361, (8, 64), generator=torch.Generator().manual_seed(1)).tolist()
    report = squawq.quantize(folder, tmp_path / "a", QuantConfig(samples=8, seqlen=64), calibration=rows)
    assert [row["name"] for row in report["kept_in_16_bits"]] == [f"model.layers.{i}.mlp.down_proj" for i in range(5)]
    report = squawq.quantize(folder, tmp_path / "b", QuantConfig(samples=8, seqlen=64, group_size=32), calibration=rows)
    assert report["kept_in_16_bits"] == []
