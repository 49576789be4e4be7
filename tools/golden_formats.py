"""Makes tests/format/golden/: a linear as other tools write it, and its weight as they dequantize it.

    PYTHON tools/golden_formats.py llmcompressor|gptqmodel|autoround

PYTHON is of an environment with that tool (llmcompressor 0.14.0.1, gptqmodel 7.7.0, auto-round 0.16.1 made the files
that are there); squawq is not needed. A tiny random Llama is quantized on the CPU; one of its linears is kept.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

GOLDEN = Path(__file__).parents[1] / "tests" / "format" / "golden"
LINEAR = "model.layers.0.self_attn.k_proj"
VOCAB, TOKENS = 160, 64
Weight = torch.Tensor
Made = Iterator[tuple[str, Path, Weight]]  # name, folder, dequantized weight [out, in]


def tiny_model(folder: Path, dtype: torch.dtype) -> Path:
    """A random Llama of two layers with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, head_dim=16, vocab_size=VOCAB, max_position_embeddings=256)
    model = LlamaForCausalLM(config).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, 0, 0.2)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2", pad_token="w2")
    fast.save_pretrained(folder)
    return folder


def calibration(rows: int = 8) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (rows, TOKENS), generator=generator).tolist()
    return [{"input_ids": row, "attention_mask": [1] * TOKENS} for row in ids]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of LINEAR by the last part of their names."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            names = [name for name in handle.keys() if name.startswith(f"{LINEAR}.")]  # noqa: SIM118
            found |= {name.rpartition(".")[2]: handle.get_tensor(name) for name in names}
    return found


def by_forward(model: Any) -> Weight:
    """The weight that the tool's own layer multiplies by."""
    layer = model.get_submodule(LINEAR)
    with torch.no_grad():
        weight: Weight = layer(torch.eye(64, dtype=torch.float16)).T.contiguous()
    return weight


def decompressed(folder: Path) -> Weight:
    """The weight by compressed-tensors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(written).config_groups["group_0"]
    found = BaseCompressor.get_value_from_registry("pack-quantized").decompress(tensors_of(folder), scheme)
    weight: Weight = found["weight"]
    return weight


def llmcompressor(work: Path) -> Made:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM

    for name, symmetric, size, dtype in (
        ("symmetric", True, 32, torch.float16),
        ("asymmetric", False, 32, torch.bfloat16),
        ("channel", True, None, torch.float16),
    ):
        source, out = tiny_model(work / f"{name}-source", dtype), work / name
        weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "group_size": size}
        weights["strategy"] = "channel" if size is None else "group"
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        data = {"dataset": Dataset.from_list(calibration()), "tokenizer": str(source), "max_seq_length": TOKENS}
        oneshot(model=model, recipe=[GPTQModifier(config_groups=groups, ignore=["lm_head"])], **data)
        model.save_pretrained(out, save_compressed=True)
        yield f"llmcompressor-{name}", out, decompressed(out)


def gptqmodel(work: Path) -> Made:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    source = tiny_model(work / "source", torch.float16)
    for name, settings in (
        ("symmetric", {"sym": True, "desc_act": False}),
        ("order", {"sym": True, "desc_act": True}),
        ("asymmetric", {"sym": False, "desc_act": True}),
        ("v2", {"sym": False, "desc_act": False, "format": "gptq_v2"}),
    ):
        model = GPTQModel.load(str(source), QuantizeConfig(bits=4, group_size=32, **settings))
        model.quantize(calibration(), batch_size=1)
        model.save(str(work / name))
        again = GPTQModel.load(str(work / name), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
        yield f"gptqmodel-{name}", work / name, by_forward(again.model)


def autoround(work: Path) -> Made:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tiny_model(work / "source", torch.float16)
    tokenizer = AutoTokenizer.from_pretrained(source)
    for name, form in (("gptq", "auto_round"), ("compressed", "llm_compressor")):  # asymmetric, it writes AWQ
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        rows = [torch.tensor([row["input_ids"]]) for row in calibration()]
        settings = {"bits": 4, "group_size": 32, "sym": True, "iters": 0, "dataset": rows, "seqlen": TOKENS}
        made = AutoRound(model, tokenizer, nsamples=8, device_map="cpu", **settings)
        made.quantize_and_save(str(work / name), format=form)
        out = next((work / name).rglob("config.json")).parent
        if form == "llm_compressor":
            yield f"autoround-{name}", out, decompressed(out)
        else:
            again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float16, device_map="cpu")
            yield f"autoround-{name}", out, by_forward(again)


TOOLS: dict[str, Callable[[Path], Made]] = {
    "llmcompressor": llmcompressor,
    "gptqmodel": gptqmodel,
    "autoround": autoround,
}


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        for name, folder, weight in TOOLS[sys.argv[1]](Path(work)):
            config = json.loads((folder / "config.json").read_text())["quantization_config"]
            config.pop("meta", None)  # GPTQModel's: how it ran here
            save_file({**tensors_of(folder), "dequantized": weight.contiguous()}, GOLDEN / f"{name}.safetensors")
            (GOLDEN / f"{name}.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
            print(name)


if __name__ == "__main__":
    main()
