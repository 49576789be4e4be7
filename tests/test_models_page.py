"""docs/models.md is what tools/docs_models.py writes, and each of its columns is tested for every family it names."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import docs_models
import pytest

from squawq.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
EVERY, DECODED = "CASES", "sorted((name for name, row in FAMILIES.items() if row.decoder))"


def test_cases_are_all_families() -> None:
    sys.path.append(str(ROOT / "tests" / "quantization"))
    from family_models import CASES

    assert {case.split()[0] for case in CASES} == set(FAMILIES)


def test_the_page_is_the_generator_s() -> None:
    written = (ROOT / "docs" / "models.md").read_text()
    assert written == docs_models.page(), "run: python tools/docs_models.py docs/models.md"


@pytest.mark.parametrize(
    ("file", "test", "families"),
    [
        ("quantization/test_families.py", "test_quantized_loaded_and_measured", EVERY),
        ("nn/test_cuda_families.py", "test_logits_are_those_of_the_cpu", DECODED),  # the CPU: test_decoder_families.py
        ("engine/test_transformers_runner.py", "test_every_family", EVERY),
        ("export/test_every_family.py", "test_there_and_back", EVERY),
    ],
)
def test_each_column_is_tested(file: str, test: str, families: str) -> None:
    module = ast.parse((ROOT / "tests" / file).read_text())
    (function,) = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == test]
    over = [
        ast.unparse(call.args[1])
        for call in function.decorator_list
        if isinstance(call, ast.Call) and len(call.args) == 2
    ]
    assert families in over
