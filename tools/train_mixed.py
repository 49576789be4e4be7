"""Train the benchmarks' model of mixed text: a Llama with 10 M parameters and grouped-query attention.

    python tools/train_mixed.py prepare DATA PREPARED     # CPU: texts to tokens; DATA is laid out like ../shared/data
    python tools/train_mixed.py train PREPARED OUT        # a GPU, minutes

The texts are stories, plays, speeches, Genesis in eight languages, maths questions and an encyclopedia. The last 5 % of
every source are held out; they only select the step whose weights are kept. OUT gets the model in bfloat16,
`calibration.txt` (from the training texts) and `held_back.txt`. Model, tokenizer and files are made as for the demo
model.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from train_demo_model import SPECIAL, add_dropout, held_back_loss, model_config, save, train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

HELD_BACK = 0.05
SEPARATOR = "\n=====\n"  # between documents, as `squawq eval` and calibration files have it
PIECE = 2000  # characters of a document cut from running text
CALIBRATION_CHARACTERS = 600_000
BLOCK = 512


def sources(data: Path) -> Iterator[tuple[str, list[str]]]:
    """(name, documents) of every source, in its own order."""
    stories = (data / "tinystories-text" / "tinystories_train_2MiB.txt").read_bytes().decode("utf-8", "ignore")
    yield "stories", [s.strip() for s in stories.split("<|endoftext|>")[:-1]]
    yield "plays", pieces((data / "tinyshakespeare" / "tinyshakespeare.txt").read_text(encoding="utf-8"))
    for name in ("inaugural", "state_union", "genesis"):
        with zipfile.ZipFile(data / "nltk-public-domain" / f"{name}.zip") as archive:
            texts = [
                archive.read(n).decode("utf-8", "ignore") for n in sorted(archive.namelist()) if n.endswith(".txt")
            ]
        if name == "genesis":  # one language each
            yield from ((f"{name} {number}", pieces(text)) for number, text in enumerate(texts))
        else:  # by year: the last speeches are held out
            yield name, [piece for text in texts for piece in pieces(text)]
    with (data / "gsm8k" / "train.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    yield "maths", [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
    yield "encyclopedia", pieces((data / "wikitext2-valid" / "wiki.valid.raw").read_text(encoding="utf-8"))


def pieces(text: str) -> list[str]:
    """Running text cut at line ends into documents of about PIECE characters."""
    documents, lines, size = [], [], 0
    for line in text.replace("\r\n", "\n").splitlines():
        lines.append(line)
        size += len(line) + 1
        if size >= PIECE:
            documents.append("\n".join(lines).strip())
            lines, size = [], 0
    return [d for d in [*documents, "\n".join(lines).strip()] if d]


def prepare(data: Path, out: Path, vocab: int) -> None:
    """Write tokenizer.json, train.npy (uint16, one stream), calibration.txt and held_back.txt."""
    train: list[str] = []
    held: list[str] = []
    for name, documents in sources(data):
        kept = len(documents) - max(1, round(len(documents) * HELD_BACK))
        train += documents[:kept]
        held += documents[kept:]
        print(f"{name}: {kept} documents to train on, {len(documents) - kept} held back")
    for documents in (train, held):  # so that the start of either file is a mixture
        random.Random(0).shuffle(documents)
    tokenizer = train_tokenizer(train, vocab)
    encoded = tokenizer.encode_batch_fast([marked(d) for d in train], add_special_tokens=False)
    stream = np.array([i for e in encoded for i in e.ids], dtype=np.uint16)
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "train.npy", stream)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "held_back.txt").write_text(SEPARATOR.join(held), encoding="utf-8")
    (out / "calibration.txt").write_text(SEPARATOR.join(train)[:CALIBRATION_CHARACTERS], encoding="utf-8")
    print(f"{len(stream):,} tokens to train on, {sum(map(len, held)):,} characters held back")


def marked(document: str) -> str:
    return f"{SPECIAL[0]}{document}{SPECIAL[1]}"


def fit(
    model: LlamaForCausalLM, stream: torch.Tensor, held: list[str], tokenizer: Tokenizer, args: argparse.Namespace
) -> None:
    """Train on random windows of the stream; keeps the weights with the lowest held-out loss."""
    device = args.device
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() == 2], "weight_decay": args.weight_decay},
            {"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=(0.9, 0.95),
    )
    stream = stream.to(device)
    offsets = torch.arange(BLOCK + 1, device=device)
    best, best_state, started = math.inf, model.state_dict(), time.monotonic()
    for step in range(args.steps):
        model.train()
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        starts = torch.randint(len(stream) - BLOCK - 1, (args.batch, 1), device=device)
        batch = stream[starts + offsets].long()
        with torch.autocast(device.split(":")[0], dtype=torch.bfloat16):
            logits = model(batch[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            now = held_back_loss(model, held, tokenizer, device)
            print(
                f"step {step + 1} train {loss.item():.3f} held-back {now:.4f} {time.monotonic() - started:.0f} s",
                flush=True,
            )
            if now < best:
                best, best_state = now, {k: v.detach().clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best_state)
    print(f"kept: held-back {best:.4f} nats per token, {sum(p.numel() for p in parameters):,} parameters")


def train(prepared: Path, out: Path, args: argparse.Namespace) -> None:
    """From a prepared folder to a model folder."""
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    stream = torch.from_numpy(np.load(prepared / "train.npy").astype(np.int32))
    held = (prepared / "held_back.txt").read_text(encoding="utf-8").split(SEPARATOR)
    config = model_config(args.hidden, args.layers, args.inner, tokenizer.get_vocab_size())
    config["num_key_value_heads"] = args.kv_heads
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config)).to(args.device)
    add_dropout(model, args.dropout)
    fit(model, stream, held, tokenizer, args)
    save(model, config, tokenizer, out)
    for name in ("calibration.txt", "held_back.txt"):
        shutil.copyfile(prepared / name, out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare")
    preparing.add_argument("data", type=Path)
    preparing.add_argument("out", type=Path)
    preparing.add_argument("--vocab", type=int, default=6144)
    training = commands.add_parser("train")
    training.add_argument("prepared", type=Path)
    training.add_argument("out", type=Path)
    training.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    training.add_argument("--hidden", type=int, default=384)
    training.add_argument("--layers", type=int, default=5)
    training.add_argument("--inner", type=int, default=1024)
    training.add_argument("--kv-heads", type=int, default=2)
    training.add_argument("--steps", type=int, default=3000)
    training.add_argument("--batch", type=int, default=64, help=f"windows of {BLOCK} tokens a step")
    training.add_argument("--lr", type=float, default=2e-3)
    training.add_argument("--weight-decay", type=float, default=0.5)
    training.add_argument("--dropout", type=float, default=0.2)
    training.add_argument("--every", type=int, default=200, help="steps between evaluations of the held-out loss")
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(args.data, args.out, args.vocab)
    else:
        train(args.prepared, args.out, args)


if __name__ == "__main__":
    main()
