"""Warnings of transformers are collected; wrong tokenizers are corrected or refused."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import save_tiny_model

from xprobe.errors import ModelError
from xprobe.models import loading
from xprobe.models.messages import quiet


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A copy of the tiny model that a test may change."""
    return shutil.copytree(tiny, tmp_path / "model")


def configure(folder: Path, **entries: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', ""])
def test_a_damaged_tokenizer_is_refused(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="tokenizer"):
        loading.load(loading.resolve(str(folder)))


def test_a_mistral_tokenizer_with_the_wrong_rule_is_corrected_with_a_warning(tmp_path):
    from transformers import AutoTokenizer

    folder = save_tiny_model(tmp_path / "mistral", "mistral")
    configure(folder, transformers_version="4.50.0")
    entries = json.loads((folder / "tokenizer.json").read_text())
    entries["model"]["vocab"] |= {
        f"<filler {number}>": number for number in range(300, 100_100)
    }  # as large as Mistral's
    (folder / "tokenizer.json").write_text(json.dumps(entries))
    source = loading.resolve(str(folder))
    warnings: list[str] = []
    tokenizer = loading.load_tokenizer(source, warnings=warnings)
    assert any("used with the right one" in message for message in warnings)
    right = AutoTokenizer.from_pretrained(folder, fix_mistral_regex=True)
    wrong = AutoTokenizer.from_pretrained(folder, fix_mistral_regex=False)
    text = "Numbers like 1234567 and CamelCaseWords'll differ."
    assert tokenizer(text)["input_ids"] == right(text)["input_ids"]
    assert right.backend_tokenizer.to_str() != wrong.backend_tokenizer.to_str()
    configure(folder, transformers_version="5.0.0")
    warnings.clear()
    loading.load_tokenizer(source, warnings=warnings)
    assert warnings == []


def test_warnings_of_transformers_reach_the_run_and_its_manifest(folder, tmp_path):
    import xprobe

    configure(folder, tie_word_embeddings=True)
    events: list[str] = []
    study = xprobe.run(
        folder, languages=["en", "de"], limit=2, probes=(), bootstrap=20, out=tmp_path / "run",
        progress=lambda event: events.append(str(event)),
    )  # fmt: skip
    kept = [message for message in study.manifest.warnings if "different values" in message]
    assert len(kept) == 1
    assert kept[0] in events


def test_quiet_restores_the_loggers_and_prints_nothing(capsys):
    logger = logging.getLogger("transformers")
    before = (logger.handlers[:], logger.level, logger.propagate)
    collected: list[str] = []

    def read() -> None:
        with quiet(collected):
            logging.getLogger("transformers.models").warning("the weights\nare odd")
            logging.getLogger("transformers.models").info("nothing")
            logging.getLogger("transformers.models").warning("`torch_dtype` is deprecated! Use `dtype` instead!")
            warnings.warn("tokens were lost", stacklevel=1)
            warnings.warn("old name", DeprecationWarning, stacklevel=1)
            logging.getLogger("transformers_modules.odd.modeling_odd").warning("odd layers")
            warnings.warn_explicit("odd heads", UserWarning, "/cache/transformers_modules/odd/modeling_odd.py", 3)
            warnings.warn_explicit("no kernels", UserWarning, torch.__file__, 7)
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        read()
    assert collected == [
        "transformers: the weights are odd",
        "the model's own code: odd layers",
        f"{Path(__file__).name}: tokens were lost",
        "the model's own code: odd heads",
        "torch: no kernels",
    ]
    assert (logger.handlers[:], logger.level, logger.propagate) == before
    assert capsys.readouterr().err == ""
