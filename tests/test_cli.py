"""The command line as a user meets it: in a process of its own, streams apart, exit codes, one line for a misuse."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import programs
import pytest
import torch
from conftest import MakeModel

from squawq.commands.export import Formats
from squawq.commands.options import Heads
from squawq.demo import demo_model
from squawq.export.run import FORMATS
from squawq.nn.loader import HEADS
from squawq.quant_config import GROUP_SIZES, METHODS

DEMO = str(demo_model())
ROWS = ["--samples", "8", "--seqlen", "64"]


def run(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return programs.run(["-W", "error", "-m", "squawq", *arguments], stdin=stdin, env=environment)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "demo-awq"
    done = run("quantize", DEMO, out, *ROWS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    assert "8 layers, 512 calibration tokens" in done.stderr
    assert done.stderr.startswith("the result runs in: squawq generate, chat, serve and LLM; transformers")
    assert re.search(r"model\.layers\.7  output off by \d+\.\d+% \(plain rounding: \d+\.\d+%\)", done.stderr)
    assert "14.7 MB → 5.4 MB: " in done.stderr
    assert "the embedding is 2.1 MB of them" in done.stderr
    compared = r"read back and compared with the 16-bit model on 256 tokens \(calibration text\): mean KL [\d.e-]+ nats"
    assert re.search(compared, done.stderr)
    assert f"squawq eval {out} --reference {DEMO}\n" in done.stderr  # one line, however long
    assert f"squawq chat {out}, or squawq serve {out}\n" in done.stderr
    assert "━" not in done.stderr  # no bar in a log
    return out


def test_quantize_again_is_done_at_once(quantized: Path) -> None:
    done = run("quantize", DEMO, quantized, *ROWS)
    assert done.returncode == 0
    assert "model.layers" not in done.stderr
    assert f"already done: {quantized} holds the result" in done.stderr
    assert "MB" not in done.stderr
    other = run("quantize", DEMO, quantized, *ROWS, "--group-size", "64")
    assert other.returncode == 2
    assert "with another config (group_size 128, now 64); choose another folder" in other.stderr


def test_eval_table_json_and_plot(quantized: Path, tmp_path: Path) -> None:
    text = demo_model() / "held_back.txt"
    plot = tmp_path / "loss.png"
    common: list[str | Path] = ["eval", quantized, "--text", text, "--max-tokens", "1024", "--window", "128"]
    done = run(*common, "--reference", DEMO, "--json", "--plot", plot)
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert 0 < scores["kl_mean"] < scores["kl_p99"] < 2
    assert 0.5 < scores["top1_agreement"] < 1
    assert plot.read_bytes().startswith(b"\x89PNG")
    report = json.loads((quantized / "squawq_report.json").read_text(encoding="utf-8"))
    added = {key: value for key, value in scores.items() if key != "model"}
    assert report["evaluation"] == {**added, "reference": "demo_model"}  # no way to a folder of this machine
    page = (quantized / "report.html").read_text(encoding="utf-8")
    assert f"mean KL {scores['kl_mean']:.3g} nats" in page
    assert f"KL {scores['kl_mean']:.3g}: " in page  # the verdict
    assert scores["text"] == "held_back.txt"
    assert not list(quantized.glob(".*"))
    table = run(*common).stdout
    assert "perplexity" in table
    assert "KL" not in table
    assert "1,023 tokens of held_back.txt" in table
    assert "unlike" not in table
    own = run("eval", quantized, "--max-tokens", "600", "--window", "128")
    assert "the built-in text (general prose in eight languages)" in own.stdout
    assert "this text is unlike what the model was trained on" in own.stdout
    itself = run("eval", quantized, "--reference", quantized)
    assert itself.returncode == 2
    assert "is the model itself, so that KL is 0; give the 16-bit model" in itself.stderr


def test_generate_gives_the_continuation_alone(quantized: Path) -> None:
    done = run("generate", quantized, "-p", "Once upon a time", "--max-tokens", "8", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(", there was")
    assert done.stdout.endswith("\n")


def test_chat_reads_until_the_end(quantized: Path) -> None:
    lines = "Tell me a story.\n\n/new\nTell me a story.\n/exit\n"
    done = run("chat", quantized, "--max-tokens", "12", "--temperature", "0", stdin=lines)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()
    assert first == second
    assert first.startswith("Once upon a time")
    assert ">" not in done.stderr  # no prompt where nobody types


def test_bench_measures_a_folder_without_a_tokenizer(make_model: MakeModel) -> None:
    folder = make_model()
    sizes = ["--prompt-tokens", "20", "--new-tokens", "8", "--streams", "3"]
    done = run("bench", folder, *sizes, "--threads", "2", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name in ("prefill_tok_s", "decode_tok_s", "ttft_ms", "itl_ms_p50", "itl_ms_p99", "peak_rss_bytes", "load_s"):
        assert found[name] > 0, name
    assert found["itl_ms_p50"] <= found["itl_ms_p99"]
    assert (found["streams"], found["prompt_tokens"], found["new_tokens"], found["threads"]) == (3, 20, 8, 2)
    assert found["device"] == "cpu"
    assert found["isa"] in ("avx512", "avx2", "neon", "scalar", "torch")
    table = run("bench", folder, *sizes).stdout
    assert "prefill" in table
    assert "tokens/s" in table


@pytest.mark.parametrize("command", ["generate -p Once", "chat", "bench --prompt-tokens 4 --new-tokens 2"])
def test_model_impl_chooses_what_runs_a_model(command: str) -> None:
    for impl in ("squawq", "transformers"):
        name, *options = command.split()
        if name != "bench":
            options += ["--max-tokens", "4"]
        done = run(name, DEMO, *options, "--model-impl", impl, stdin="Hello\n")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        reason = "runs on transformers' model class, which is slower than our decoder: model_impl is transformers"
        assert (reason in done.stderr) == (impl == "transformers")


MISUSES: dict[str, tuple[list[str], str]] = {
    "unknown command": (["quantise"], r"No such command 'quantise'.* \(see squawq --help\)"),
    "missing argument": (["quantize", DEMO], r"Missing argument 'OUT' \(see squawq quantize --help\)"),
    "unknown option": (["quantize", DEMO, "OUT", "--groupsize", "4"], r"--groupsize.* \(see squawq quantize --help\)"),
    "bad group size": (
        ["quantize", DEMO, "OUT", "--group-size", "7"],
        r"'--group-size': '7' is not one of '16', '32', '64', '128', '256', '-1' \(see squawq quantize --help\)",
    ),
    "bad method": (["quantize", DEMO, "OUT", "--method", "gptq"], "'gptq' is not one of 'squawq', 'awq', 'rtn'"),
    "bad head": (["chat", DEMO, "--head", "int2"], r"'int2' is not one of 'int8', .* \(see squawq chat --help\)"),
    "bad class": (["bench", DEMO, "--model-impl", "vllm"], "'vllm' is not one of 'auto', 'squawq', 'transformers'"),
    "shared class": (
        ["generate", DEMO, "-p", "x", "--model-impl", "transformers", "-tp", "2"],
        "tensor_parallel_size is 2, but transformers' model runs this one",
    ),
    "bad format": (["export", DEMO, "OUT", "--format", "exl2"], "'exl2' is not one of 'awq', 'gptq'"),
    "bad device": (["quantize", DEMO, "OUT", "--device", "gpu"], "device 'gpu' is not there; choose one of cpu"),
    "no such model": (["quantize", "nowhere", "OUT"], "neither a model folder nor a Hub id"),
    "hub out of reach": (["quantize", "nobody/nothing", "OUT"], "the Hub could not be asked"),
    "no such calibration": (["quantize", DEMO, "OUT", "--calibration", "none.txt"], "'none.txt' is not a file"),
    "too many samples": (["quantize", DEMO, "OUT", "--samples", "9999"], "5,119,488 are needed"),
    "seed": (
        ["quantize", DEMO, "OUT", "--seed", "3"],
        "seed is 3, but only calibration 'self', token_weights and tune sample tokens",
    ),
    "self, streamed": (["quantize", DEMO, "OUT", "--calibration", "self", "--stream"], "calibration 'self' runs the"),
    "self, rounding": (["quantize", DEMO, "OUT", "--calibration", "self", "--method", "rtn"], "'rtn' needs no text"),
    "seqlen": (["quantize", DEMO, "OUT", "--seqlen", "100000"], "the model has 4096 positions"),
    "eval without text": (["eval", DEMO, "--text", "none.txt"], "none.txt"),
    "eval reference": (["eval", DEMO, "--reference", "nowhere"], "'nowhere' is neither"),
    "eval device": (["eval", DEMO, "--device", "gpu"], "device 'gpu' is not there"),
    "chat device": (
        ["chat", DEMO, "--device", "cuda:7"],
        "device is 'cuda:7', but this torch .* is built for the CPU alone"
        if torch.version.cuda is None
        else "device (is )?'cuda:7'",
    ),
    "plot name": (["eval", DEMO, "--window", "9000"], "the model has 4096 positions"),
    "skip nothing": (["quantize", DEMO, "OUT", "--skip", "down_porj"], "'down_porj' is in no name"),
    "json calibration": (["quantize", DEMO, "OUT", "--calibration", "x.json"], "give a .txt or .jsonl file"),
    "plot nowhere": (["eval", DEMO, "--plot", "no/such/folder/x.png"], "no such folder"),
    "bench streams": (["bench", DEMO, "--streams", "0"], "streams is 0; it must be at least 1"),
    "bench positions": (["bench", DEMO, "--prompt-tokens", "5000"], "5128 together; the model has 4096 positions"),
    "bench nowhere": (["bench", "nowhere"], "'nowhere' is neither a model folder"),
    "threads": (["generate", DEMO, "-p", "x", "--threads", "0"], "--threads"),
    "temperature": (["generate", DEMO, "-p", "x", "--temperature", "-1"], "temperature is -1.0; it must be 0 to 100"),
    "max tokens": (["generate", DEMO, "-p", "x", "--max-tokens", "0"], "max_tokens is 0"),
    "serve nothing": (["serve"], "no model: squawq serve MODEL"),
    "serve nowhere": (["serve", "nowhere", "--port", "0"], "'nowhere' is neither a model folder"),
    "serve option": (["serve", DEMO, "--speculative-config", "{}"], r"--speculative-config.*\(see squawq serve --help"),
    "serve shards": (
        ["serve", DEMO, "-tp", "3"],
        "tensor_parallel_size is 3, but its 4 attention heads .* this model can take 1, 2, 4",
    ),
    "not a number": (["generate", DEMO, "-p", "x", "--max-tokens", "many"], "--max-tokens.*valid integer"),
}


@pytest.mark.parametrize("case", MISUSES)
def test_misuse_is_one_line_and_code_2(case: str, tmp_path: Path) -> None:
    arguments, message = MISUSES[case]
    out = tmp_path / "OUT"
    done = run(*[str(out) if a == "OUT" else a for a in arguments])
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("squawq: error: ")
    assert re.search(message, lines[0]), lines[0]
    assert list(tmp_path.iterdir()) == []


def test_not_our_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = run("quantize", DEMO, tmp_path)
    assert done.returncode == 2
    assert "squawq did not make it" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_chat_needs_a_template(make_model: MakeModel) -> None:
    folder = make_model(vocab_size=4096)
    shutil.copy(demo_model() / "tokenizer.json", folder)
    done = run("chat", folder, stdin="hello\n")
    assert done.returncode == 2
    assert "no chat template" in done.stderr


def test_help_has_examples() -> None:
    assert "quantize" in run("--help").stdout
    for command in (
        "quantize",
        "eval",
        "generate",
        "chat",
        "bench",
        "demo",
        "serve",
        "export",
        "inspect",
        "push",
        "models",
        "run",
    ):
        done = run(command, "-h")
        assert done.returncode == 0
        assert done.stdout == run(command, "--help").stdout
        assert re.search(f"Examples?:\n +squawq {command}", done.stdout)
        assert " | squawq" not in done.stdout  # pasted, it would be a pipe
        assert not re.search(r"^ +\| ", done.stdout, re.MULTILINE)


def test_choices_stand_in_the_help_and_are_the_librarys() -> None:
    assert get_args(Heads) == HEADS
    assert get_args(Formats) == FORMATS
    shown = run("quantize", "-h").stdout
    assert f"--method <{'|'.join(METHODS)}>" in shown
    assert f"--group-size <{'|'.join(map(str, GROUP_SIZES))}>" in shown
    shown = run("serve", "-h").stdout
    for choices in (
        "--dtype auto|half|float16|bfloat16",
        "--dialect openai|tgi",
        "--model-impl auto|squawq|transformers",
        "--tool-call-parser auto|llama3_json",
    ):
        assert choices in shown


def test_demo(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    code = """
from squawq import cli, demo
demo.CALIBRATION_BLOCKS, demo.EVALUATED_TOKENS = 2, 2048  # the work of a minute in seconds
cli.main()
"""
    done = programs.run(["-c", code, "demo", "--out", out])
    assert done.returncode == 0, done.stderr
    for words in (
        "weights",
        "14.7 MB",
        "perplexity",
        "KL to 16-bit",
        "Once upon a time",
        f" chat {out}",
        f"vllm serve {out}",
    ):
        assert words in done.stdout, words
    assert (out / "squawq_report.json").is_file()


def test_demo_without_its_model(tmp_path: Path) -> None:
    code = "import sys; sys.modules['squawq_demo'] = None; from squawq.cli import entry; entry()"  # as if not installed
    done = programs.run(["-c", code, "demo", "--out", tmp_path / "demo"])
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "squawq: error: the demo model is not installed: pip install 'squawq[demo]'\n"
    assert not list(tmp_path.iterdir())
