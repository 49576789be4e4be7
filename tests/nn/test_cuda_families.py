"""Every family that our decoder runs, on an NVIDIA GPU against the CPU's float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from family_models import VOCABULARY, family_model

from squawq.backends.sampling import Chunk
from squawq.engine.runner import DecoderRunner
from squawq.families import FAMILIES
from squawq.nn.loader import Options, load
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize

REMOTE = ("internlm3", "iquestcoder")  # not in every release of transformers


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", sorted(name for name, row in FAMILIES.items() if row.decoder))
def test_logits_are_those_of_the_cpu(model_type: str, tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING

    if model_type in REMOTE and model_type not in CONFIG_MAPPING:
        pytest.skip(f"this release of transformers has no {model_type}")
    family_model(model_type, tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "awq", QuantConfig(method="rtn", group_size=32), progress=False)
    ids = torch.randint(2, VOCABULARY, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for options in (Options("cpu", exact=True, head="16-bit"), Options("cuda", dtype="float16", head="16-bit")):
        runner = DecoderRunner(load(tmp_path / "awq", options), kv_tokens=512)
        found.append(runner.run([Chunk(ids, 0, [3, 1, 2], 40)])[0])
    assert np.abs(found[0] - found[1]).mean() < 0.01 * found[0].std()
