"""``bench --rivals``: other projects' kernels are measured beside the lens, checked as it is, or skipped."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from xprobe_kernels.bench import command, rivals, table
from xprobe_kernels.bench.command import Settings, measure
from xprobe_kernels.bench.lens_speed import Large
from xprobe_kernels.bench.shapes import Head

CAPPED = Head("capped", "Capped", layers=3, width=32, vocabulary=700, softcap=30.0, positions=8)
PLAIN = Head("plain", "Plain", layers=3, width=32, vocabulary=700, positions=8)
FIRST = command.measured_backends(torch.device("cpu"))[0]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def tiny(monkeypatch) -> None:
    """Two tiny heads in place of the real ones, and small ceilings."""
    monkeypatch.setattr(command, "HEADS", {"capped": CAPPED, "plain": PLAIN})
    monkeypatch.setitem(rivals.LARGE, "quick", Large(64, MIB))


def measured(shape: str = "plain", **settings: Any) -> dict[str, Any]:
    result = measure(
        Settings(
            shape=shape, rows="many", rounds=3, quick=True, backends=(FIRST,), device="cpu", rivals=True, **settings
        )
    )
    (part,) = json.loads(json.dumps(result, allow_nan=False))["rivals"]
    return part


def entry(part: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in part["variants"] if entry["name"] == name)


def losses(rows: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, softcap: float | None) -> torch.Tensor:
    logits = rows.double() @ weight.double().T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, target, reduction="none").float()


class FakeQuack(ModuleType):
    @staticmethod
    def lse_target_epi(
        rows: torch.Tensor, weight: torch.Tensor, *, store_d: bool, target: torch.Tensor, tuned: bool
    ) -> dict[str, torch.Tensor]:
        logits = rows.double() @ weight.double()
        return {"lse": logits.logsumexp(-1)[None], "target_logit": logits.gather(1, target[:, None]).T}


@pytest.fixture
def installed(monkeypatch) -> dict[str, ModuleType]:
    """Stand-ins for the three packages that compute the task on the CPU, with the signatures of the real functions."""

    def liger_fused_linear_cross_entropy(
        input: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: None = None, ce_weight: None = None,
        ignore_index: int = -100, lse_square_scale: float = 0.0, label_smoothing: float = 0.0,
        reduction: str = "mean", softcap: float | None = None,
    ) -> torch.Tensor:  # fmt: skip
        assert reduction == "none"
        return losses(input, weight, target, softcap)

    def linear_cross_entropy(
        e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor, ignore_index: int = -100,
        softcap: float | None = None, reduction: str = "mean", shift: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        assert reduction == "none"
        return losses(e, c, targets, softcap)

    modules = {
        "liger_kernel.transformers.functional": ModuleType("functional"),
        "cut_cross_entropy": ModuleType("cut_cross_entropy"),
        "quack.epilogue.library": FakeQuack("library"),
    }
    modules["liger_kernel.transformers.functional"].liger_fused_linear_cross_entropy = liger_fused_linear_cross_entropy
    modules["cut_cross_entropy"].linear_cross_entropy = linear_cross_entropy
    for name, module in modules.items():
        parts = name.split(".")
        for length in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:length]), ModuleType(parts[length - 1]))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(rivals, "DEVICE_TYPES", ("cpu", "cuda"))
    return modules


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_installed_rivals_are_measured_in_turn_and_checked_against_fp64(installed, dtype) -> None:
    part = measured(dtype=dtype)
    assert [each["status"] for each in part["variants"]] == ["ok"] * 6, part["variants"]
    assert entry(part, rivals.TORCH)["times_torch"] == 1.0
    assert entry(part, rivals.BARE)["share_of_product"] == 1.0
    for name in ("liger", "cut-cross-entropy"):
        assert set(entry(part, name)["errors"]) == {"log_probability"}
        assert entry(part, name)["errors"]["log_probability"] < 1e-5
        assert len(entry(part, name)["rounds"]) == 3
    for name in ("quack", f"lens {FIRST}"):
        assert set(entry(part, name)["errors"]) == {"log_probability", "logit", "logsumexp"}
    assert "x torch" in table.rivals_text(part)


def test_only_rivals_with_a_soft_cap_are_measured_where_the_model_has_one(installed) -> None:
    part = measured("capped")
    assert (entry(part, "liger")["status"], entry(part, "cut-cross-entropy")["status"]) == ("ok", "ok")
    assert entry(part, "quack")["status"] == "skipped"
    assert entry(part, "quack")["message"] == "has no soft-cap, and Capped has one"


def test_a_wrong_rival_is_called_wrong_and_gets_no_figure(installed) -> None:
    right = installed["cut_cross_entropy"].linear_cross_entropy
    installed["cut_cross_entropy"].linear_cross_entropy = lambda *given, **named: right(*given, **named) + 1
    part = measured()
    assert entry(part, "cut-cross-entropy")["status"] == "wrong"
    assert "log_probability off by 1" in entry(part, "cut-cross-entropy")["message"]
    assert "seconds" not in entry(part, "cut-cross-entropy")
    assert "WRONG: cut-cross-entropy: " in table.rivals_text(part)
    assert entry(part, "liger")["status"] == "ok"


def test_a_rival_whose_log_sum_exp_is_wrong_is_found_although_its_loss_is_right(installed, monkeypatch) -> None:
    right = FakeQuack.lse_target_epi
    shifted = staticmethod(lambda *given, **named: {key: value + 3 for key, value in right(*given, **named).items()})
    monkeypatch.setattr(FakeQuack, "lse_target_epi", shifted)
    found = entry(measured(), "quack")
    assert found["status"] == "wrong"
    assert "logit off by 3" in found["message"]
    assert "log_probability" not in found["message"]


def test_a_rival_that_fails_stops_no_other(installed) -> None:
    del installed["liger_kernel.transformers.functional"].liger_fused_linear_cross_entropy
    part = measured()
    assert entry(part, "liger")["status"] == "failed"
    assert "liger_fused_linear_cross_entropy" in entry(part, "liger")["message"]
    assert entry(part, "quack")["status"] == "ok"


def test_a_missing_rival_is_skipped_with_its_package(installed, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    monkeypatch.setitem(sys.modules, "quack", None)
    part = measured()
    assert entry(part, "cut-cross-entropy")["status"] == "skipped"
    assert entry(part, "cut-cross-entropy")["message"] == (
        "cut-cross-entropy is not installed: pip install cut-cross-entropy"
    )
    assert "seconds" not in entry(part, "cut-cross-entropy")
    assert "SKIPPED: cut-cross-entropy: " in table.rivals_text(part)
    assert entry(part, "liger")["status"] == "ok"


def test_a_rival_that_misses_something_itself_names_it(installed, monkeypatch, tmp_path) -> None:
    (tmp_path / "cut_cross_entropy.py").write_text("import no_such_compiler\n")
    monkeypatch.delitem(sys.modules, "cut_cross_entropy")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = entry(measured(), "cut-cross-entropy")
    assert found["status"] == "skipped"
    assert found["message"] == "cut-cross-entropy cannot be imported: No module named 'no_such_compiler'"


def test_without_a_gpu_the_lens_and_torch_are_measured_and_the_rivals_skipped() -> None:
    part = measured()
    assert entry(part, rivals.TORCH)["status"] == entry(part, f"lens {FIRST}")["status"] == "ok"
    for rival in rivals.RIVALS:
        assert entry(part, rival.name)["status"] == "skipped"
        assert entry(part, rival.name)["message"] == "runs only on a GPU, and this is a CPU"


def test_the_losses_of_torch_do_not_depend_on_the_rows_at_once() -> None:
    from xprobe_kernels.bench.baselines import make
    from xprobe_kernels.bench.shapes import GPU, MANY, work

    task = rivals.normed_task(make(work(CAPPED, MANY, GPU), torch.device("cpu"), torch.float32))
    torch.testing.assert_close(rivals.torch_losses(5)(task), rivals.torch_losses(None)(task), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        rivals.torch_losses(None)(task), losses(task.hidden, task.head.weight, task.lookup, 30.0), rtol=0, atol=1e-5
    )
