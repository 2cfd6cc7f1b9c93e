"""Every refusal names the argument, what it got and, where there is a choice, what was expected."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from xprobe_kernels import Unembedding, available_backends, lens

WEIGHT = torch.ones(50, 8)
HEAD = Unembedding(WEIGHT)
ROWS = torch.ones(3, 8)
LOOKUP = torch.zeros(3, dtype=torch.int64)
META = torch.device("meta")

Call = Callable[[], object]


def refused(call: Call, *parts: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the parts are the match)
        call()
    message = str(error.value)
    assert [part for part in parts if part not in message] == [], message


HEAD_REFUSALS: list[tuple[Call, tuple[str, ...]]] = [
    (lambda: Unembedding([[1.0]]), ("weight", "[V, D]", "list")),
    (lambda: Unembedding(None), ("weight", "[V, D]", "NoneType")),
    (lambda: Unembedding(torch.ones(8)), ("weight", "[V, D]", "[8]")),
    (lambda: Unembedding(torch.ones(2, 3, 4)), ("weight", "[V, D]", "[2, 3, 4]")),
    (lambda: Unembedding(torch.ones(5, 8, dtype=torch.int64)), ("weight", "floating", "torch.int64")),
    (lambda: Unembedding(torch.ones(5, 8, dtype=torch.complex64)), ("weight", "floating", "torch.complex64")),
    (lambda: Unembedding(torch.ones(0, 8)), ("weight", "[V, D]", "[0, 8]")),
    (lambda: Unembedding(torch.ones(5, 0)), ("weight", "[V, D]", "[5, 0]")),
    (lambda: Unembedding(WEIGHT, norm="batch"), ("norm", "'batch'", "rms", "layer", "none")),
    (lambda: Unembedding(WEIGHT, norm=None), ("norm", "None", "rms", "layer", "none")),
    (lambda: Unembedding(WEIGHT, eps=-1e-6), ("eps", "-1e-06")),
    (lambda: Unembedding(WEIGHT, eps=math.nan), ("eps", "nan")),
    (lambda: Unembedding(WEIGHT, scale=0.0), ("scale", "0.0")),
    (lambda: Unembedding(WEIGHT, scale=math.inf), ("scale", "inf")),
    (lambda: Unembedding(WEIGHT, scale=math.nan), ("scale", "nan")),
    (lambda: Unembedding(WEIGHT, softcap=0.0), ("softcap", "0.0", "None means no soft-cap")),
    (lambda: Unembedding(WEIGHT, softcap=-30.0), ("softcap", "-30.0")),
    (lambda: Unembedding(WEIGHT, softcap=math.inf), ("softcap", "inf")),
    (lambda: Unembedding(WEIGHT, softcap=math.nan), ("softcap", "nan")),
]


@pytest.mark.parametrize(("call", "parts"), HEAD_REFUSALS, ids=[" ".join(parts) for _, parts in HEAD_REFUSALS])
def test_a_head_refuses(call, parts) -> None:
    refused(call, *parts)


@pytest.mark.parametrize(("name", "length"), [("gamma", 8), ("beta", 8), ("bias", 50)])
@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (1.0, ("float",)),
        ([1.0] * 8, ("list",)),
        (torch.ones(7), ("[7]",)),
        (torch.ones(8, 1), ("[8, 1]",)),
        (torch.ones(()), ("[]",)),
    ],
)
def test_a_head_refuses_a_vector_of_another_shape(name, length, value, parts) -> None:
    refused(lambda: Unembedding(WEIGHT, **{name: value}), name, f"[{length}]", *parts)


@pytest.mark.parametrize(("name", "length"), [("gamma", 8), ("beta", 8), ("bias", 50)])
def test_a_head_refuses_whole_numbers_and_other_devices(name, length) -> None:
    whole = torch.ones(length, dtype=torch.int32)
    refused(lambda: Unembedding(WEIGHT, **{name: whole}), name, "floating", "torch.int32")
    elsewhere = torch.ones(length, device=META)
    refused(lambda: Unembedding(WEIGHT, **{name: elsewhere}), name, "meta", "cpu")


LENS_REFUSALS: list[tuple[Call, tuple[str, ...]]] = [
    (lambda: lens(ROWS, WEIGHT, LOOKUP), ("head", "Unembedding", "[50, 8]")),
    (lambda: lens(ROWS, None, LOOKUP), ("head", "Unembedding", "NoneType")),
    (lambda: lens([[1.0] * 8], HEAD, LOOKUP), ("hidden", "[R, 8]", "list")),
    (lambda: lens(torch.ones(8), HEAD, LOOKUP), ("hidden", "[R, 8]", "[8]")),
    (lambda: lens(torch.ones(1, 3, 8), HEAD, LOOKUP), ("hidden", "[R, 8]", "[1, 3, 8]")),
    (lambda: lens(torch.ones(3, 8, dtype=torch.int64), HEAD, LOOKUP), ("hidden", "floating", "torch.int64")),
    (lambda: lens(torch.ones(3, 9), HEAD, LOOKUP), ("hidden", "9", "weight", "8")),
    (lambda: lens(torch.ones(3, 8, device=META), HEAD, LOOKUP), ("hidden", "meta", "cpu")),
    (lambda: lens(ROWS, HEAD, [0, 0, 0]), ("lookup", "[R] or [R, A]", "list")),
    (lambda: lens(ROWS, HEAD, torch.tensor(0)), ("lookup", "[R] or [R, A]", "[]")),
    (lambda: lens(ROWS, HEAD, LOOKUP[:, None, None]), ("lookup", "[R] or [R, A]", "[3, 1, 1]")),
    (lambda: lens(ROWS, HEAD, LOOKUP[:2]), ("lookup", "[3, 1]", "[2, 1]")),
    (lambda: lens(ROWS, HEAD, LOOKUP.expand(2, 3)), ("lookup", "[3, 3]", "[2, 3]")),
    (lambda: lens(ROWS, HEAD, LOOKUP.int()), ("lookup", "int64", "torch.int32")),
    (lambda: lens(ROWS, HEAD, LOOKUP.float()), ("lookup", "int64", "torch.float32")),
    (lambda: lens(ROWS, HEAD, LOOKUP.to(META)), ("lookup", "meta", "cpu")),
    (lambda: lens(ROWS, HEAD, LOOKUP + 50), ("lookup", "50", "-1 to 49")),
    (lambda: lens(ROWS, HEAD, LOOKUP - 2), ("lookup", "-2", "-1 to 49")),
    (lambda: lens(ROWS, HEAD, torch.tensor([[0, 1], [2, 77], [4, -1]])), ("lookup", "77", "-1 to 49")),
    (lambda: lens(ROWS, HEAD, LOOKUP, top_k=-1), ("top_k", "-1", "0 to 32")),
    (lambda: lens(ROWS, HEAD, LOOKUP, top_k=33), ("top_k", "33", "0 to 32")),
    (lambda: lens(ROWS, Unembedding(WEIGHT[:7]), LOOKUP, top_k=8), ("top_k", "8", "0 to 7")),
    (lambda: lens(ROWS, HEAD, LOOKUP, top_k=5.0), ("top_k", "5.0", "0 to 32")),
    (lambda: lens(ROWS, HEAD, LOOKUP, top_k=True), ("top_k", "True", "0 to 32")),
    (lambda: lens(ROWS, HEAD, LOOKUP, top_k=None), ("top_k", "None", "0 to 32")),
    (lambda: lens(ROWS, HEAD, LOOKUP, final_rows=[0, 0, 0]), ("final_rows", "int64", "[3]", "list")),
    (lambda: lens(ROWS, HEAD, LOOKUP, final_rows=LOOKUP.int()), ("final_rows", "int64", "torch.int32")),
    (lambda: lens(ROWS, HEAD, LOOKUP, final_rows=LOOKUP[:2]), ("final_rows", "[3]", "[2]")),
    (lambda: lens(ROWS, HEAD, LOOKUP, final_rows=LOOKUP[:, None]), ("final_rows", "[3]", "[3, 1]")),
    (lambda: lens(ROWS, HEAD, LOOKUP, final_rows=LOOKUP.to(META)), ("final_rows", "meta", "cpu")),
    (lambda: lens(ROWS, HEAD, LOOKUP, final_rows=LOOKUP - 1), ("final_rows", "-1", "0 to 2")),
    (lambda: lens(ROWS, HEAD, LOOKUP, final_rows=LOOKUP + 3), ("final_rows", "3", "0 to 2")),
    (
        lambda: lens(ROWS, HEAD, LOOKUP, backend="abacus"),
        ("backend", "'abacus'", "auto", *available_backends("cpu")),
    ),
    (lambda: lens(ROWS, HEAD, LOOKUP, backend=None), ("backend", "None", "auto")),
    (lambda: lens(ROWS, HEAD, LOOKUP, precision="bf16"), ("precision", "'bf16'", "ieee", "tf32")),
    (lambda: lens(ROWS, HEAD, LOOKUP, precision=None), ("precision", "None", "ieee", "tf32")),
    (lambda: lens(ROWS, HEAD, LOOKUP, workspace_bytes=0), ("workspace_bytes", "0", "1048576")),
    (lambda: lens(ROWS, HEAD, LOOKUP, workspace_bytes=(1 << 20) - 1), ("workspace_bytes", "1048575", "1048576")),
    (lambda: lens(ROWS, HEAD, LOOKUP, workspace_bytes=1e9), ("workspace_bytes", "1000000000.0", "whole number")),
    (lambda: lens(ROWS, HEAD, LOOKUP, workspace_bytes=True), ("workspace_bytes", "True", "whole number")),
]


@pytest.mark.parametrize(("call", "parts"), LENS_REFUSALS, ids=[" ".join(parts) for _, parts in LENS_REFUSALS])
def test_the_lens_refuses(call, parts) -> None:
    refused(call, *parts)


def test_the_bounds_themselves_are_welcome() -> None:
    lookup = torch.tensor([[-1, 49]] * 3)
    final_rows = torch.tensor([0, 2, 1])
    for backend in ("auto", *available_backends("cpu")):
        readout = lens(
            ROWS,
            HEAD,
            lookup,
            top_k=32,
            final_rows=final_rows,
            backend=backend,
            workspace_bytes=1 << 20,
            precision="tf32",
        )
        assert readout.rank.shape == (3, 2)
    assert Unembedding(WEIGHT, eps=0.0, scale=-1e-3, softcap=1e-3).width == 8
