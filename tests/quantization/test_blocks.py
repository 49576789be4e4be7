"""transformers' layers, materialized one at a time, against the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import MakeModel

from squawq.families import family_of
from squawq.format.reader import Checkpoint
from squawq.layerwise.blocks import Blocks

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}),
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}),
    ],
)
def test_layer_by_layer_equals_the_whole_model(model_type: str, changes: dict[str, Any], make_model: MakeModel) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_model(model_type, **changes)
    ids = torch.randint(0, 160, (3, 40), generator=torch.Generator().manual_seed(1))
    checkpoint = Checkpoint(folder)
    blocks = Blocks(checkpoint, family_of(model_type), "cpu")
    states = blocks.embed(ids)
    for index in range(2):
        with blocks.open(index) as block:
            assert torch.equal(block.run(states), block.run(states.clone(), in_place=True))
            states = block.run(states)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole.model(ids).last_hidden_state
        assert (whole.model.norm(states) - expected).abs().max() < 1e-5
        assert (blocks.logits()(states) - whole(ids).logits).abs().max() < 1e-5


def test_inspect_is_the_module_in_its_place(make_model: MakeModel) -> None:
    checkpoint = Checkpoint(make_model())
    blocks = Blocks(checkpoint, family_of("llama"), "cpu")
    states = blocks.embed(torch.randint(0, 160, (2, 16)))
    with blocks.open(0) as block:
        seen: dict[str, list[torch.Tensor]] = {"self_attn": [], "mlp": []}
        with block.input_hooks({name: pieces.append for name, pieces in seen.items()}):
            out = block.run(states)
        attention = block.inspect("self_attn", torch.cat(seen["self_attn"]))
        mlp = block.inspect("mlp", torch.cat(seen["mlp"]))
        assert torch.allclose(states + attention + mlp, out, atol=1e-5)
