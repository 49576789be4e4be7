"""What the proofs share: a peer's own environment, our side's figures, the comparison and its table.

A proof is a script with cases. For each, its `theirs` runs in a process of the peer's environment, where squawq is not
installed, and its `ours` here; both give arrays by name. Logits may differ by the case's bound, all else not at all.
Peers import this file too, so only the standard library and numpy stand at the top.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Arrays = dict[str, Any]  # numpy arrays by name: logits, weights, token ids, text
Side = Callable[[Path, str], Arrays]  # takes the folder of the models and the case's name
WINDOWS, TOKENS = 2, 128  # of the held-back stories; logits are compared at every position
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 24, 40  # of greedy text
SKIPPED = "skipped"  # an array of this name says why a case cannot be tried on this machine
SHOWN = 3000  # characters of a failed child's output


@dataclass(frozen=True)
class Proof:
    """A peer. pip: commands that make its environment, in this order. versions: the packages to name in the title.

    cases: by name, by how much logits may differ. prepare: makes what the cases read in the folder of the models, which
    holds "awq", the demo model quantized, and the inputs.
    """

    name: str
    pip: Sequence[str]
    versions: Sequence[str]
    cases: Mapping[str, float]
    theirs: Side
    ours: Side
    prepare: Callable[[Path], None] = lambda models: None


def prove(script: str, doc: str | None, proof: Proof) -> int:
    """Run a proof as the command line says. Returns 0 where everything agrees, else 1."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder that keeps the peer's environment for the next run")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)  # in the peer: the case, the folder of the models
    args = parser.parse_args()
    if args.case:
        case, models = args.case[0], Path(args.case[1])
        _numpy().savez(_result(models), **proof.theirs(models, case))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        python = _environment(proof, (args.work or Path(temporary)).resolve())
        models = Path(temporary, "models")
        _models(proof, models)
        rows = [row for case in proof.cases for row in _try(script, proof, python, models, case)]
        _print(f"{proof.name}: {_versions(python, proof)}", rows)
    return 1 if any(row[-1] == "FAILED" for row in rows) else 0


def inputs(models: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Windows for logits and prompts for greedy text, as token ids; on either side."""
    with _numpy().load(models / "inputs.npz") as file:
        return file["windows"].tolist(), file["prompts"].tolist()


def our_logits(folder: Path, windows: list[list[int]]) -> torch.Tensor:
    """float32 [windows, tokens, vocab] of a folder, with float32 activations and the head as it is stored."""
    import torch

    from squawq.backends.sampling import Chunk
    from squawq.engine.config import EngineConfig
    from squawq.engine.runner import load_runner

    runner = load_runner(folder, EngineConfig(exact=True, kv_tokens=4096))
    size = -(-len(windows[0]) // runner.page_size)
    chunks = [Chunk(ids, 0, range(size * n, size * (n + 1)), len(ids)) for n, ids in enumerate(windows)]
    return torch.stack([torch.from_numpy(found) for found in runner.run(chunks)])


def our_text(folder: Path, prompts: list[list[int]]) -> Arrays:
    """Greedy continuations of a folder: "ids" [prompts, NEW_TOKENS] and "text" [prompts]."""
    from squawq import LLM, SamplingParams

    np = _numpy()
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with LLM(folder, exact=True) as llm:
        found = [output for (output,) in llm.complete(prompts, params, progress=False)]
    return {"ids": np.array([output.ids for output in found]), "text": np.array([output.text for output in found])}


def our_weights(folder: Path) -> Any:
    """The weights of all 4-bit linears, (q - zero) * scale in float32, sorted by name, each [out, in], flat."""
    import torch

    from squawq.format.reader import Checkpoint

    checkpoint = Checkpoint(folder)
    names = sorted(name.removesuffix(".qweight") for name in checkpoint.tensors if name.endswith(".qweight"))
    weights = []
    for name in names:
        in_features, out = checkpoint.info(f"{name}.qweight").shape[0], checkpoint.info(f"{name}.scales").shape[1]
        weights.append(checkpoint.read_quantized(name, in_features, out).dequantize().flatten())
    return torch.cat(weights).numpy()


def export_both(models: Path) -> None:
    """`squawq export` of "awq" as "compressed-tensors" and "dense"."""
    from squawq.export.run import export

    for name in ("compressed-tensors", "dense"):
        export(models / "awq", models / name, name)


def _numpy() -> Any:
    import numpy as np

    return np


def _result(models: Path) -> Path:
    return models / "theirs.npz"


def _environment(proof: Proof, work: Path) -> str:
    """The peer's interpreter; made anew where there is none, or the commands were others."""
    folder = work / proof.name
    python, done = folder / "bin" / "python", folder / "made-by.txt"
    commands = "\n".join(proof.pip)
    if done.exists() and done.read_text() == commands:
        return str(python)
    print(f"making an environment in {folder}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    for command in proof.pip:
        print(f"  pip {command}", flush=True)
        ran = subprocess.run([python, "-m", "pip", *command.split()], capture_output=True, text=True)
        if ran.returncode:
            sys.exit(f"pip {command} failed:\n{(ran.stdout + ran.stderr)[-SHOWN:]}")
    done.write_text(commands)
    return str(python)


def _versions(python: str, proof: Proof) -> str:
    code = "import sys, importlib.metadata as m; print(', '.join(f'{n} {m.version(n)}' for n in sys.argv[1:]))"
    return subprocess.run([python, "-c", code, *proof.versions], check=True, capture_output=True, text=True).stdout


def _models(proof: Proof, models: Path) -> None:
    from squawq import quantize
    from squawq.demo import demo_model
    from squawq.text.tokenizer import Tokenizer

    np = _numpy()
    models.mkdir()
    print("quantizing the demo model", flush=True)
    quantize(demo_model(), models / "awq")
    text = (demo_model() / "held_back.txt").read_text(encoding="utf-8")
    ids = np.array(Tokenizer(demo_model()).encode(text[:20_000])[: WINDOWS * TOKENS + PROMPTS * PROMPT_TOKENS])
    windows, prompts = ids[: WINDOWS * TOKENS], ids[WINDOWS * TOKENS :]
    np.savez(models / "inputs.npz", windows=windows.reshape(WINDOWS, -1), prompts=prompts.reshape(PROMPTS, -1))
    proof.prepare(models)


def _try(script: str, proof: Proof, python: str, models: Path, case: str) -> list[list[str]]:
    """Rows of the table: case, what, largest difference, bound, verdict."""
    print(f"trying {case}", flush=True)
    _result(models).unlink(missing_ok=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PATH"] = os.pathsep.join([str(Path(python).parent), environment.get("PATH", "")])
    command = [python, script, "--case", case, str(models)]
    ran = subprocess.run(command, env=environment, cwd=models, capture_output=True, text=True, errors="replace")
    if ran.returncode or not _result(models).exists():
        print((ran.stdout + ran.stderr)[-SHOWN:], file=sys.stderr)
        return [[case, "", "", "", "FAILED"]]
    with _numpy().load(_result(models)) as file:
        theirs = dict(file)
    if SKIPPED in theirs:
        return [[case, str(theirs[SKIPPED]), "", "", "skipped"]]
    ours = proof.ours(models, case)
    if ours.keys() != theirs.keys():
        sys.exit(f"{case}: ours has {sorted(ours)}, theirs {sorted(theirs)}")
    return [[case, *_compare(name, ours[name], theirs[name], proof.cases[case])] for name in ours]


def _compare(name: str, ours: Any, theirs: Any, bound: float) -> list[str]:
    np = _numpy()
    if ours.shape != theirs.shape:
        return [name, f"shapes {ours.shape}, {theirs.shape}", "", "FAILED"]
    if ours.dtype.kind != "f":
        different = int((ours != theirs).sum())
        return [f"{name}, {ours.size}", f"{different} differ", "0", "FAILED" if different else "ok"]
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    difference = float(np.abs(ours - theirs).max())
    if name == "weights":
        name, bound = f"weights, {ours.size}", 0
    else:
        same = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
        name = f"{name} up to {np.abs(ours).max():.1f}, likeliest token the same at {same:.1%}"
    verdict = "ok" if difference <= bound else "FAILED"  # a NaN fails
    return [name, f"{difference:.2g}", f"{bound:g}", verdict]


def _print(title: str, rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "what", "largest difference", "allowed", "", title=title.strip())
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
