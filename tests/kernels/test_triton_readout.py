"""The fused lens of many rows: blocks, groups of final rows, the k largest logits found after the pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.lens_cases import random_case
from support.lens_truth import Case, Truth, assert_top
from support.triton_launches import SMALL, assert_right, launched
from xprobe_kernels import Unembedding
from xprobe_kernels.request import LensRequest

pytest.importorskip("triton")

from xprobe_kernels import triton_readout, triton_rows


@pytest.mark.parametrize("final_rows", [list(range(11, -1, -1)), [7, 0] * 6, [3] * 5 + [11] * 7, [11, 9] * 6], ids=str)
@pytest.mark.parametrize("finals", [1, 2, 100])
def test_kl_is_right_however_many_final_rows_fit_in_the_workspace(final_rows, finals) -> None:
    case = replace(random_case(torch.float32, 12, 33, 200), final_rows=torch.tensor(final_rows))
    columns = 4 * 64  # the vocabulary in tiles
    assert_right(case, launched(case, SMALL, 2, workspace_bytes=4 * columns * finals))


def test_many_rows_are_read_in_blocks_and_give_the_same(monkeypatch) -> None:
    case = random_case(torch.float16, 75, 512, 300, gamma=True, softcap=20.0, top_k=7)
    whole = launched(case, SMALL, 2)
    monkeypatch.setattr(triton_readout, "SMALLEST_BLOCK", 20)
    sizes = []
    prepare = triton_rows.prepare

    def counted(request: LensRequest) -> triton_rows.Prepared:
        sizes.append(request.rows)
        return prepare(request)

    monkeypatch.setattr(triton_readout, "prepare", counted)
    blocks = launched(case, SMALL, 2, workspace_bytes=4 * 25 * 320)  # the weights of 25 final rows; 22 rows
    assert sizes == [25, 16, 16, 16, 16, 10]  # the final rows, then all that are compared with another row
    assert_right(case, blocks)
    for name, value in vars(whole).items():
        assert not isinstance(value, torch.Tensor) or value.equal(getattr(blocks, name)), name


def test_the_largest_logits_of_one_tile_and_of_many_are_found() -> None:
    """The k largest logits lie in one tile, in k tiles, or are equal on both sides of the end of a tile."""
    weight, bias = torch.zeros(640, 4), torch.zeros(640)
    weight[128:134, 0] = torch.arange(6, 0, -1.0)
    weight[torch.arange(6) * 100 + 30, 1] = torch.arange(1, 7.0)
    weight[[63, 64, 127, 128, 600, 639], 2] = 5.0
    case = Case(
        torch.eye(4), Unembedding(weight, norm="none", bias=bias), torch.zeros(4, 1, dtype=torch.int64),
        torch.arange(4), 6,
    )  # fmt: skip
    readout = launched(case, SMALL, 2)
    assert readout.top_ids is not None
    assert readout.top_ids.tolist() == [
        [128, 129, 130, 131, 132, 133],
        [530, 430, 330, 230, 130, 30],
        [63, 64, 127, 128, 600, 639],
        [0, 1, 2, 3, 4, 5],
    ]
    assert_right(case, readout)


@pytest.mark.parametrize("backend", ["triton"])
def test_asking_for_the_largest_logits_of_many_rows_changes_no_other_bit(backend) -> None:
    case = random_case(torch.float32, 300, 8, 700, top_k=3)
    full, bare = case.read(backend, final_rows=None), case.read(backend, top_k=0, final_rows=None)
    for name in ("logits", "logsumexp", "rank", "entropy"):
        assert getattr(full, name).equal(getattr(bare, name)), name
    assert_top(Truth(case), backend, full, 3)


def test_equal_logits_in_different_parts_list_the_lowest_id_first() -> None:
    hidden, weight = torch.zeros(3, 4), torch.zeros(500, 4)
    bias = torch.zeros(500)
    bias[[499, 130, 7, 260]] = 1.0
    case = Case(
        hidden, Unembedding(weight, norm="none", bias=bias), torch.tensor([[130], [7], [3]]), torch.arange(3), 6
    )
    readout = launched(case, SMALL, 4)
    assert readout.top_ids is not None
    assert readout.top_ids.tolist() == [[7, 130, 260, 499, 0, 1]] * 3
    assert readout.rank.flatten().tolist() == [1, 1, 5]
