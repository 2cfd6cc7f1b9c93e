"""The choices of tune.py and the cases of sanitize.py, without a GPU: the tests replace the measuring."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from xprobe_kernels.configs import CONFIGS, Config, candidates
from xprobe_kernels.readout import interpreted

from benchmarks import tune
from benchmarks.tune import DIED, FAILED, OK, PRODUCT, TRYING, WAITING, WRONG, Halving, Trial

ROOT = Path(__file__).parents[2]
DEFAULT = CONFIGS["sm_90", 2][0]


class FakeCard:
    """Launches that take as long as they are told to, on a clock of its own."""

    def __init__(self, seconds: dict[str, float], *, wrong: str = "", broken: str = "", noise: float = 0.0) -> None:
        self.seconds, self.wrong, self.broken, self.noise = seconds, wrong, broken, noise
        self.clock, self.timed, self.calls = 0.0, 0, []

    def now(self) -> float:
        return self.clock

    def check(self, trial: Trial) -> None:
        self.clock += 0.1
        if trial.name == self.broken:
            raise RuntimeError("out of resource: shared memory")
        if trial.name == self.wrong:
            raise tune.WrongAnswerError("logsumexp off by 1")

    def time(self, trials: list[Trial]) -> dict[str, float]:
        self.timed += 1
        drift = 1 + self.noise * (self.timed % 7)  # a card that warms up slows the bare product as well
        found = {trial.name: self.seconds.get(trial.name, 0.040) * drift for trial in trials}
        self.calls.append(list(found))
        found[PRODUCT] = 0.025 * drift
        self.clock += sum(found.values())
        return found


def trials(rows: int = 16896) -> list[Trial]:
    return tune.initial_trials(DEFAULT, candidates("sm_90", 2), rows)


def halving(card: FakeCard, found: list[Trial], seconds: float = 180.0, near: list[Trial] | None = None) -> Halving:
    return Halving(
        card, found, seconds=seconds, neighbours_of=lambda trial: near or [], save=lambda: None, now=card.now
    )


def test_the_fastest_candidate_wins_whatever_its_place_in_the_line() -> None:
    for at in (1, 57, -1):
        found = trials()
        card = FakeCard({found[at].name: 0.028}, noise=0.05)
        best = halving(card, found).run()
        assert best is found[at]
        assert best.share == pytest.approx(0.025 / 0.028)
        assert best.launches == tune.ROUNDS[-1]
        assert tune.choose_winner(found, best) is best


def test_the_current_configuration_comes_first_and_stays_to_the_end() -> None:
    found = trials()
    assert found[0].config == DEFAULT
    assert len({trial.name for trial in found}) == len(found)
    card = FakeCard({found[0].name: 0.050, found[3].name: 0.030})
    halving(card, found).run()
    assert found[0].launches == tune.ROUNDS[-1]
    assert found[0].share == pytest.approx(0.5)


def test_a_gain_within_noise_changes_nothing() -> None:
    found = trials()
    best = halving(FakeCard({found[0].name: 0.0300, found[9].name: 0.0299}), found).run()
    assert best is found[9]
    assert tune.choose_winner(found, best) is found[0]


def test_wrong_and_failing_candidates_are_noted_and_never_timed() -> None:
    found = trials()
    card = FakeCard({}, wrong=found[2].name, broken=found[4].name)
    halving(card, found).run()
    assert (found[2].status, found[4].status) == (WRONG, FAILED)
    assert "logsumexp" in found[2].message
    assert "RuntimeError: out of resource" in found[4].message
    assert not any(found[at].name in names for at in (2, 4) for names in card.calls)


def test_the_same_code_is_not_timed_twice() -> None:
    found = trials()[:5]
    card = FakeCard({})
    plain = card.check

    def check(trial: Trial) -> None:
        plain(trial)
        if trial is found[3]:
            raise tune.SameCodeError(f"as {found[1].name}")

    card.check = check
    halving(card, found).run()
    assert (found[3].status, found[3].message) == (tune.SAME, f"as {found[1].name}")
    assert found[3].seconds is None


def test_a_current_configuration_that_fails_is_replaced() -> None:
    found = trials()
    best = halving(FakeCard({}, broken=found[0].name), found).run()
    assert tune.choose_winner(found, best) is best is not found[0]


def test_a_lost_gpu_stops_the_process_and_is_noted() -> None:
    found, saved = trials()[:3], []
    card = FakeCard({})
    card.check = lambda trial: (_ for _ in ()).throw(RuntimeError("CUDA error: an illegal memory access"))
    search = Halving(card, found, seconds=9, neighbours_of=lambda _: [], save=lambda: saved.append(found[0].status))
    with pytest.raises(RuntimeError, match="illegal"):
        search.run()
    assert saved[-1] == FAILED


def test_it_ends_in_time_with_the_best_so_far() -> None:
    found = trials()
    card = FakeCard({found[5].name: 0.026})
    best = halving(card, found, seconds=20.0).run()
    assert card.clock < 25.0
    assert best is found[5]
    assert found[-1].status == WAITING


def test_hopeless_candidates_get_one_launch() -> None:
    found = trials()[:3]
    halving(FakeCard({found[2].name: 0.2}), found).run()
    assert found[2].status == OK
    assert found[2].launches == 1


def test_other_splits_of_the_best_are_tried_and_may_win() -> None:
    found = trials()[:20]
    near = [replace(found[1], splits=8), replace(found[1], splits=2)]
    card = FakeCard({near[0].name: 0.026})
    best = halving(card, found, near=near).run()
    assert best is near[0]
    assert len(found) == 22


def test_neighbours_keep_the_tile_and_fit() -> None:
    for trial in trials(99)[:40]:
        for near in tune.neighbours(trial, "sm_90", 2, 99, 128256, 132):
            assert near.name != trial.name
            assert replace(near.config, resident=trial.config.resident) == trial.config
            assert near.splits is None or 1 <= near.splits <= 128256 // trial.config.block_n + 1


def test_few_rows_shrink_the_tiles_before_they_are_measured() -> None:
    assert {trial.config.block_m for trial in trials(99)} <= {64, 128}


def test_what_is_to_be_pasted_is_an_entry_of_configs() -> None:
    many = Trial(Config(128, 256, 64, 8, 4, parts=2, descriptors=True), share=0.9, launches=50)
    few = Trial(Config(64, 64, 128, 4, 3, resident=2, flat=True), share=1.2, launches=50)
    entry = tune.configs_entry("sm_90", 2, {0: many, 1: few}, "NVIDIA H200", "2026-11-23T10:00:00")
    assert eval(f"{{{entry}}}", {"Config": Config}) == {("sm_90", 2): (many.config, few.config)}
    assert all(len(line) <= 120 for line in entry.splitlines())
    half = eval(f"{{{tune.configs_entry('sm_90', 2, {1: few}, 'x', 'y')}}}", {"Config": Config})
    assert half == {("sm_90", 2): (DEFAULT, few.config)}
    assert "no entry" in tune.configs_entry("sm_89", 2, {1: few}, "x", "y")


def test_configurations_are_written_as_they_are_read() -> None:
    for config in candidates("sm_90", 2):
        assert eval(tune.text(config)) == config


def test_what_a_process_died_of_is_not_tried_again(tmp_path) -> None:
    found = trials()[:3]
    found[0].status, found[1].status = OK, TRYING
    report = {"shapes": [{"regime": "many", "trials": [trial.record() for trial in found]}]}
    tune.write(tmp_path / "tune.json", report)
    again = tune.earlier_trials(tmp_path / "tune.json")["many"]
    assert [trial.status for trial in again] == [OK, DIED, WAITING]
    assert [trial.config for trial in again] == [trial.config for trial in found]
    assert tune.earlier_trials(tmp_path / "none.json") == {}


def worker(folder: Path, body: str) -> list[str]:
    """A measuring process that notes in ``runs`` that it ran; ``record`` writes a report of the given statuses."""
    head = f"""
import json, pathlib, sys, time
folder = pathlib.Path({str(folder)!r})
runs = folder / "runs"
runs.write_text((runs.read_text() if runs.exists() else "") + "x")
run = len(runs.read_text())
def record(*statuses):
    config = dict(block_m=1, block_n=1, block_k=1, warps=1, stages=1)
    trials = [dict(name="a", config=config, status=status) for status in statuses]
    (folder / "tune.json").write_text(json.dumps(dict(shapes=[dict(regime="many", trials=trials)])))
"""
    (folder / "worker.py").write_text(head + body)
    return [sys.executable, str(folder / "worker.py")]


def test_a_process_that_hangs_is_replaced_by_one_that_goes_on(tmp_path) -> None:
    command = worker(tmp_path, "record(*['ok'] * run, 'waiting')\nif run < 3: time.sleep(60)\n")
    assert tune.supervise(command, tmp_path / "tune.json", 30, stall=0.5, poll=0.05) == 0
    assert (tmp_path / "runs").read_text() == "xxx"  # a process that was waited for would be the last one


def test_a_process_that_gets_nowhere_is_not_repeated(tmp_path) -> None:
    command = worker(tmp_path, "sys.exit(3)")
    assert tune.supervise(command, tmp_path / "tune.json", 30, stall=5, poll=0.05) == 1
    assert (tmp_path / "runs").read_text() == "x"


@pytest.mark.parametrize("script", ["gpu.py", "tune.py", "sanitize.py"])
def test_without_a_gpu_each_says_so_in_one_line(script, tmp_path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = [] if script == "sanitize.py" else [str(tmp_path / "out")]
    command = [sys.executable, str(ROOT / "benchmarks" / script), *out]
    environment = {"PYTHONPATH": str(ROOT / "kernels"), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"{script} needs a GPU, and torch sees none\n"
    assert not (tmp_path / "out").exists()


def test_candidates_are_compiled_with_the_arguments_of_a_launch(monkeypatch) -> None:
    from xprobe_kernels import triton_lens

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tune_card = pytest.importorskip("tune_card")
    kernel, compiled = triton_lens.lens_kernel, []

    class Kernel:
        def warmup(self, *args: object, grid: tuple[int, ...], **options: object) -> None:
            compiled.append([*kernel.arg_names[: len(args)], *(name for name in options if name in kernel.arg_names)])

    monkeypatch.setattr(triton_lens, "lens_kernel", Kernel())
    trial = Trial(Config(16, 64, 16, 4, 2))
    assert tune_card.compile_only(trial, (19, 32, 700), torch.float32, "cpu") >= 0
    assert [sorted(names) for names in compiled] == [sorted(kernel.arg_names)]


@pytest.fixture
def sanitize(monkeypatch):
    """The sanitizer's cases under the interpreter, which knows no bf16."""
    from benchmarks import sanitize

    if interpreted():
        monkeypatch.setattr(sanitize, "DEVICE", "cpu")
        monkeypatch.setattr(sanitize, "DTYPE", torch.float16)
    return sanitize


@pytest.mark.slow
def test_what_the_sanitizer_runs_is_right(sanitize) -> None:
    for name, _, error in sanitize.cases():
        if "default" not in name:  # those take long under the interpreter
            assert error() <= 1, name
