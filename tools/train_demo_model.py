"""Train the demo model: a small Llama with everything Llama 3.1 has, on TinyStories.

Two stages. A wider teacher with heavy dropout learns the stories; the demo model then learns from the text
and, with a small weight, from the teacher's distribution: 2 MiB of text are few, and this kept the loss on
held-back stories at 3.03 nats per token where training on the text alone ended at 4.3 to 4.7. Every epoch
renders each story anew: as plain text, or as a chat whose request is made from the story's own words. The last
128 KiB of the text are never trained on.

    python tools/train_demo_model.py --stories tinystories_train_2MiB.txt --out packages/demo/squawq_demo/demo_model

The shipped model came from the default arguments on one H100 GPU (3.5 minutes); a CPU works too, slower.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

HELD_BACK_BYTES = 128 * 1024
BLOCK = 1024
SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
    "<|finetune_right_pad_id|>",
]
# Llama 3's published pre-tokenizer split.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
STOP_WORDS = frozenset(
    re.findall(
        r"\S+",
        """
    about after again always another around asked away back because became before began being best better came
    could didn't down each even ever every everyone everything felt find first found from gave getting give
    goes going good happy have heard help helped here inside into it's just keep kept knew know learned like
    liked little lived look looked looking loved made make many more much must named near need never next nice
    once only other over people picked place play played playing really said saying says saw should showed
    smile smiled some someone something soon started still stop such take than thank that their them then
    there they thing things this thought time together told took tried turned under until upon very walked
    want wanted warm went were what when where which while will with without would your yes you
    """,
    )
)


def model_config(hidden: int, layers: int, intermediate: int, vocab: int) -> dict[str, object]:
    """config.json as Llama 3.1 checkpoints on the Hub spell it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": [1, 4],
        "pad_token_id": 7,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": hidden // 64,
        "num_hidden_layers": layers,
        "num_key_value_heads": max(1, hidden // 128),
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 512,
            "rope_type": "llama3",
        },
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocab,
    }


def train_tokenizer(text: list[str], vocab: int) -> Tokenizer:
    """Byte-level BPE with Llama 3's split and special tokens first (ids 0 to 7)."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIAL],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    begin = ("<|begin_of_text|>", SPECIAL.index("<|begin_of_text|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B", special_tokens=[begin]
    )
    return tokenizer


def article(noun: str, rng: random.Random) -> str:
    if noun.endswith("s"):
        return rng.choice(["the ", "some ", ""]) + noun
    return rng.choice(["the ", "an " if noun[0] in "aeiou" else "a "]) + noun


class Renderer:
    """Turns a story into training text: plain, or a chat that asks for it in one of many ways."""

    def __init__(self, stories: list[str]) -> None:
        self.frequency = Counter(w for s in stories for w in set(re.findall(r"\b[a-z]{3,}\b", s)))
        self.total = len(stories)

    def topics(self, story: str) -> list[str]:
        """The nouns a reader would name: repeated, rare elsewhere, seen behind an article."""
        nouns = set(
            re.findall(
                r"\b(?:a|an|the|his|her|their) ([a-z]{3,})\b(?= (?:was|is|and|had|in|on|to|with)\b|[.,!])", story
            )
        )
        counts = Counter(re.findall(r"\b[a-z]{3,}\b", story))
        scored = {
            w: c * math.log(self.total / (1 + self.frequency[w]))
            for w, c in counts.items()
            if w in nouns and w not in STOP_WORDS and c >= 2
        }
        return sorted(scored, key=lambda w: -scored[w])[:4]

    def request(self, story: str, rng: random.Random) -> str:
        hero = re.search(r"\b(an? (?:[a-z]+ ){1,3}named ([A-Z][a-z]+))", story)
        topics = self.topics(story)
        rng.shuffle(topics)
        verb = rng.choice(["Tell me", "Write", "Please write", "Please tell me", "Can you tell me", "Can you write"])
        kind = rng.choice(["a story", "a short story", "a little story", "a bedtime story"])
        end = "?" if verb.startswith("Can") else "."
        roll = rng.random()
        if hero and roll < 0.45:
            about = f" about {hero.group(1)}" if rng.random() < 0.6 else f" about {hero.group(2)}"
            if topics and rng.random() < 0.4:
                about += f" and {article(topics[0], rng)}"
            return f"{verb} {kind}{about}{end}"
        if topics and roll < 0.85:
            if len(topics) >= 3 and rng.random() < 0.35:
                return f"{verb} {kind} with the words {topics[0]}, {topics[1]} and {topics[2]}{end}"
            return f"{verb} {kind} about {article(topics[0], rng)}{end}"
        return f"{verb} {kind}{end}"

    def chat(self, story: str, rng: random.Random) -> str:
        def turn(role: str, content: str) -> str:
            return f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"

        system = turn("system", "You are a friendly storyteller.") if rng.random() < 0.2 else ""
        return system + turn("user", self.request(story, rng)) + turn("assistant", story)

    def document(self, story: str, rng: random.Random) -> str:
        if rng.random() < 0.3:
            return f"<|begin_of_text|>{story}<|end_of_text|>"
        begin = "" if rng.random() < 0.3 else "<|begin_of_text|>"  # now and then the chat goes on
        return begin + self.chat(story, rng)


def epoch_blocks(stories: list[str], renderer: Renderer, tokenizer: Tokenizer, rng: random.Random) -> torch.Tensor:
    """One epoch in a new order and rendering: int64 [blocks, BLOCK + 1]."""
    order = rng.sample(stories, len(stories))
    encoded = tokenizer.encode_batch_fast([renderer.document(s, rng) for s in order], add_special_tokens=False)
    stream = torch.tensor([i for e in encoded for i in e.ids])
    count = (len(stream) - 1) // BLOCK
    return torch.stack([stream[k * BLOCK : k * BLOCK + BLOCK + 1] for k in range(count)])


@dataclass
class Recipe:
    epochs: int
    lr: float
    weight_decay: float
    dropout: float
    soft: float = 0.0  # weight of the teachers' distribution in the loss
    batch: int = 16


def add_dropout(model: LlamaForCausalLM, rate: float) -> None:
    """Residual and embedding dropout, which Llama's own config does not have."""

    def drop(module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, rate, training=module.training)

    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj", "embed_tokens")):
            module.register_forward_hook(drop)


def mean_probabilities(teachers: list[LlamaForCausalLM], ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        total = sum(F.softmax(t(ids, use_cache=False).logits.float(), -1) for t in teachers)
    assert isinstance(total, torch.Tensor)
    return total / len(teachers)


def fit(
    config: dict[str, object],
    recipe: Recipe,
    data: tuple[list[str], list[str]],
    tokenizer: Tokenizer,
    device: str,
    seed: int,
    teachers: list[LlamaForCausalLM] | None = None,
) -> LlamaForCausalLM:
    stories, held_back = data
    torch.manual_seed(seed)
    rng = random.Random(seed)
    renderer = Renderer(stories)
    model = LlamaForCausalLM(LlamaConfig(**config)).to(device=device, dtype=torch.float32)
    add_dropout(model, recipe.dropout)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.lr,
        betas=(0.9, 0.95),
    )
    per_epoch = len(epoch_blocks(stories, renderer, tokenizer, rng)) // recipe.batch
    total, step, started = recipe.epochs * per_epoch, 0, time.monotonic()
    for epoch in range(recipe.epochs):
        model.train()
        blocks = epoch_blocks(stories, renderer, tokenizer, rng)
        blocks = blocks[torch.randperm(len(blocks))]
        for index in range(min(per_epoch, len(blocks) // recipe.batch)):
            warm = min(1.0, (step + 1) / 100)
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / total)))
            batch = blocks[index * recipe.batch : (index + 1) * recipe.batch].to(device)
            ids, target = batch[:, :-1], batch[:, 1:].flatten()
            with torch.autocast(device.split(":")[0], dtype=torch.bfloat16):
                logits = model(ids, use_cache=False).logits.float().flatten(0, 1)
                loss = F.cross_entropy(logits, target)
                if teachers:
                    soft = mean_probabilities(teachers, ids).flatten(0, 1)
                    loss = (1 - recipe.soft) * loss - recipe.soft * (soft * F.log_softmax(logits, -1)).sum(-1).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
        if epoch % 10 == 9 or epoch + 1 == recipe.epochs:
            loss_held = held_back_loss(model, held_back, tokenizer, device)
            print(
                f"seed {seed} epoch {epoch + 1}/{recipe.epochs} train {loss.item():.3f} held-back {loss_held:.4f} "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
    return model.eval()


@torch.no_grad()
def held_back_loss(model: LlamaForCausalLM, stories: list[str], tokenizer: Tokenizer, device: str) -> float:
    """Mean nats per token over plain stories, in blocks of 256."""
    model.eval()
    text = "".join(f"<|begin_of_text|>{s}<|end_of_text|>" for s in stories)
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    blocks = ids[: len(ids) // 256 * 256].view(-1, 256).to(device)
    with torch.autocast(device.split(":")[0], dtype=torch.bfloat16):
        losses = [
            F.cross_entropy(model(b[:, :-1]).logits.float().flatten(0, 1), b[:, 1:].flatten())
            for b in torch.split(blocks, 16)
        ]
    return float(torch.stack(losses).mean())


def save(model: LlamaForCausalLM, config: dict[str, object], tokenizer: Tokenizer, out: Path) -> None:
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    state = {k: v.to(torch.bfloat16).cpu().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    documents = {
        "config.json": config,
        "generation_config.json": {
            "bos_token_id": 0,
            "do_sample": True,
            "eos_token_id": [1, 4],
            "pad_token_id": 7,
            "temperature": 0.6,
            "top_p": 0.9,
        },
        "tokenizer_config.json": {
            "bos_token": "<|begin_of_text|>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|eot_id|>",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 4096,
            "pad_token": "<|finetune_right_pad_id|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    }
    for name, content in documents.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


@torch.no_grad()
def show(model: LlamaForCausalLM, tokenizer: Tokenizer, device: str) -> None:
    for request in (
        "Tell me a short story about a little dog named Max.",
        "Write a story about a boat.",
        "Write a short story with the words rain, frog and friend.",
        "Tell me a story.",
        "Please tell me a story about a cat named Tom and the garden.",
        "Can you tell me a bedtime story about Lily and the moon?",
    ):
        text = (
            f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{request}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        )
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids], device=device)
        out = model.generate(ids, max_new_tokens=300, do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[1, 4])
        print(f"--- {request}\n{tokenizer.decode(out[0, ids.shape[1] :].tolist())}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, required=True, help="TinyStories text, split by <|endoftext|>")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--epochs", type=int, default=66)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=1.0)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--soft", type=float, default=0.15, help="weight of the teachers' distribution in the loss")
    parser.add_argument("--teachers", type=int, default=1)
    parser.add_argument("--teacher-hidden", type=int, default=512)
    parser.add_argument("--teacher-epochs", type=int, default=22)
    parser.add_argument("--teacher-lr", type=float, default=1e-3)
    parser.add_argument("--teacher-dropout", type=float, default=0.4)
    parser.add_argument("--teacher-weight-decay", type=float, default=1.0)
    args = parser.parse_args()

    raw = args.stories.read_bytes()
    plain = str.maketrans({"“": '"', "”": '"', "’": "'", "‘": "'"})
    train, held = (
        [s.strip().translate(plain) for s in part.decode("utf-8", "ignore").split("<|endoftext|>")[1:-1]]
        for part in (b"<|endoftext|>" + raw[:-HELD_BACK_BYTES], raw[-HELD_BACK_BYTES:])
    )
    tokenizer = train_tokenizer(train, args.vocab)
    config = model_config(args.hidden, args.layers, args.intermediate, tokenizer.get_vocab_size())
    wide = model_config(args.teacher_hidden, args.layers, args.teacher_hidden * 3, tokenizer.get_vocab_size())
    teaching = Recipe(args.teacher_epochs, args.teacher_lr, args.teacher_weight_decay, args.teacher_dropout)
    teachers = [fit(wide, teaching, (train, held), tokenizer, args.device, 1 + n) for n in range(args.teachers)]
    recipe = Recipe(args.epochs, args.lr, args.weight_decay, args.dropout, args.soft)
    model = fit(config, recipe, (train, held), tokenizer, args.device, 0, teachers)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    save(model, config, tokenizer, args.out)
    show(model, tokenizer, args.device)


if __name__ == "__main__":
    main()
