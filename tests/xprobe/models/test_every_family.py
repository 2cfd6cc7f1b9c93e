"""docs/families.md is complete, and a part of it is computed again and compared."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")

# kind of family -> model type
KINDS = {
    "dense": "qwen3",
    "tied embeddings and soft-cap": "gemma2",
    "mixture of experts": "mixtral",
    "latent attention": "deepseek_v3",
    "attention and recurrence": "jamba",
    "recurrence alone": "mamba",
    "convolution": "lfm2",
    "multi-query attention": "gpt_bigcode",
    "own attention code": "gptj",
    "attention bias by distance": "bloom",
    "several residual streams": "gemma3n_text",
    "an encoder": "roberta",
}


@pytest.fixture(scope="module")
def table():
    spec = spec_from_file_location("family_table", ROOT / "benchmarks" / "family_table.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def same_transformers():
    made_with = re.search(r"with xprobe \S+, transformers (\S+),", DOCUMENT).group(1)
    if transformers.__version__ != made_with:
        pytest.skip(f"docs/families.md was made with transformers {made_with}; this is {transformers.__version__}")


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> dict:
    """Results of a new run over ``KINDS``, by row."""
    results = tmp_path_factory.mktemp("families") / "results.json"
    command = [
        sys.executable,
        ROOT / "benchmarks" / "families.py",
        "--only",
        ",".join(KINDS.values()),
        "--json",
        results,
    ]
    paths = [str(ROOT / part) for part in (".", "kernels", "cli")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run(command, env=environment, check=True, timeout=1200)
    return json.loads(results.read_text(encoding="utf-8"))["cases"]


def test_every_causal_model_type_of_the_installed_transformers_has_a_row(table):
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    rows = {name.split()[0] for name in table.outcomes(DOCUMENT)}
    assert rows == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_no_row_shows_a_wrong_result_or_an_unexpected_error(table):
    words = {(name, column): word for name, row in table.outcomes(DOCUMENT).items() for column, word in row.items()}
    assert [key for key, word in words.items() if word in ("fault", "wrong", "unfinished")] == []


@pytest.mark.slow
@pytest.mark.parametrize("model_type", KINDS.values(), ids=KINDS)
def test_a_family_has_the_documented_outcome(table, swept, model_type):
    documented = table.outcomes(DOCUMENT)
    rows = [row for row in table.causal_rows(swept) if row["model type"].strip("`").split()[0] == model_type]
    assert rows
    for row in rows:
        assert table.outcome(row) == documented[row["model type"].strip("`")]
