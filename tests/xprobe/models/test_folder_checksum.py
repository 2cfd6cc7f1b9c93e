"""Two checkpoints of one shape have different checksums, wherever they differ; large files are read in blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.families import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import xprobe
from xprobe.errors import UsageError
from xprobe.models.folder_checksum import BLOCK, SPACING, WHOLE, folder_checksum
from xprobe.models.sources import resolve
from xprobe.runs.folder import SHARDS

MIB = 1 << 20
SIZE = 300 * MIB  # more than is read whole; the disk holds only what is written into it


def large_file(folder: Path, offsets: list[int]) -> Path:
    """A file of zeros with tensors that begin at these bytes after the header."""
    header = {
        f"t{index}": {"dtype": "U8", "data_offsets": [offset, offset + 9]} for index, offset in enumerate(offsets)
    }
    text = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(SIZE)
    return path


def change(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        old = file.read(1)
        file.seek(position)
        file.write(bytes([old[0] ^ 1]))


@pytest.mark.parametrize("position", [0, WHOLE // 2, WHOLE - 1], ids=["first byte", "a byte inside", "last byte"])
def test_every_byte_of_a_file_that_is_not_large_counts(position: int, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    with path.open("wb") as file:
        file.truncate(WHOLE)
    before = folder_checksum(tmp_path)
    change(path, position)
    assert folder_checksum(tmp_path) != before


def test_a_change_of_many_values_in_a_large_file_is_seen_and_so_is_one_of_a_small_tensor(tmp_path: Path) -> None:
    small = 100 * MIB + 3 * BLOCK  # a tensor between two sampled blocks
    path = large_file(tmp_path, [0, small])
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    seen = {folder_checksum(tmp_path)}
    positions = [150 * MIB + 5, SIZE - 1, start + small, start + small + BLOCK - 1]
    for position in positions:
        change(path, position)
        seen.add(folder_checksum(tmp_path))
    assert len(seen) == 1 + len(positions)
    with path.open("r+b") as file:  # a tensor as long as the space between two blocks holds the start of one
        file.seek(200 * MIB + BLOCK)
        file.write(b"x" * SPACING)
    assert folder_checksum(tmp_path) not in seen


@pytest.mark.parametrize("header", [b"\xff" * 16, b"\x02" + b"\0" * 7 + b"[]", b"\x04" + b"\0" * 7 + b'{"a"'])
def test_a_large_file_whose_header_is_broken_has_a_checksum_too(header: bytes, tmp_path: Path) -> None:
    path = large_file(tmp_path, [])
    with path.open("r+b") as file:
        file.write(header)
    before = folder_checksum(tmp_path)
    change(path, 150 * MIB)
    assert folder_checksum(tmp_path) != before


def test_files_that_no_weights_and_no_tokens_come_from_do_not_count(tiny: Path, tmp_path: Path) -> None:
    before = folder_checksum(tiny)
    assert resolve(str(tiny)).fingerprint() == before
    large_file(tmp_path, [])
    alone = folder_checksum(tmp_path)
    (tmp_path / "README.md").write_text("notes")
    assert folder_checksum(tmp_path) == alone != before


def test_a_run_is_not_resumed_with_a_checkpoint_that_differs_in_the_middle_of_its_file(tmp_path: Path) -> None:
    """Larger than two MiB: its first and last MiB are those of the other checkpoint."""
    tokenizer = tiny_tokenizer("byte_bpe")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=4096,
    )  # fmt: skip
    model, folder, out = LlamaForCausalLM(config), tmp_path / "model", tmp_path / "run"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    before = (folder / "model.safetensors").read_bytes()
    options = {"languages": ("en",), "limit": 4, "bootstrap": 20, "probes": ()}
    xprobe.run(folder, out=out, **options)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(2)
    model.save_pretrained(folder)
    after = (folder / "model.safetensors").read_bytes()
    assert before != after
    assert (before[:MIB], before[-MIB:]) == (after[:MIB], after[-MIB:])
    for unfinished in (False, True):
        if unfinished:
            next((out / SHARDS).iterdir()).unlink()
        with pytest.raises(UsageError, match="other bytes"):
            xprobe.run(folder, out=out, resume=True, **options)
