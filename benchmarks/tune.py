"""Measures launch configurations of the fused lens on this machine's GPU and prints the lines for ``configs.py``.

    python benchmarks/tune.py OUT.json [--seconds 180] [--shape llama-3-8b] [--rows many,few]

The results of every candidate are first compared with the workspace backend. Then it is timed in turn with a bare
library product of the same shape. Candidates are ranked by their share of that product. The search is successive
halving: three rounds for all candidates, most promising first; twenty rounds for the best quarter; then other numbers
of splits for the best ones; fifty rounds for the last five. OUT.json is rewritten after every candidate. If a candidate
hangs or kills the process, its status says so, and a new process continues after it. tune_card.py measures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

from xprobe_kernels.configs import ARCHITECTURES, CONFIGS, MANY, SMALLEST, Config, candidates, choose_splits

WAITING, TRYING, OK, WRONG, FAILED, DIED = "waiting", "trying", "ok", "wrong", "failed", "died"
SAME = "same code"  # the compiler gave the code of an earlier candidate: it ignores the option that differs
PRODUCT = "bare product"
ROUNDS = (3, 20, 50)
SHARES = (0.6, 0.85, 1.0)  # shares of the time after which the three stages of the search end
SECOND_STAGE = 16  # candidates in the second stage, at most
LAST_STAGE = 5  # candidates in the last stage
NEIGHBOURS = 3  # this many of the best are also tried with other splits
HOPELESS = 0.5  # a candidate below this part of the best share gets only one launch
GAIN = 1.01  # a candidate must be faster than the current configuration by this factor to replace it
STALL = 90.0  # seconds without progress after which a measuring process is stopped
RESTARTS = 8


class WrongAnswerError(ArithmeticError):
    """A candidate disagrees with the workspace backend."""


class SameCodeError(Exception):
    """The compiler produced the same code for an earlier candidate."""


@dataclass
class Trial:
    """A configuration and the results of measuring it."""

    config: Config
    splits: int | None = None  # None: chosen by configs.choose_splits
    status: str = WAITING
    message: str | None = None
    rung: int = 0  # the last stage of the search it took part in
    share: float | None = None  # throughput as a share of the bare product's, medians of the same rounds
    seconds: float | None = None  # median of the last round
    spread: float | None = None  # interquartile range over median
    launches: int = 0  # in the last round
    about: dict[str, Any] = field(default_factory=dict)  # registers, spills, shared memory, seconds to compile

    @property
    def name(self) -> str:
        return text(self.config) + (f" x {self.splits} splits" if self.splits else "")

    def record(self) -> dict[str, Any]:
        return {"name": self.name} | asdict(self)

    @staticmethod
    def from_record(record: dict[str, Any]) -> Trial:
        known = {key: value for key, value in record.items() if key != "name"}
        return Trial(**known | {"config": Config(**record["config"])})


class Card(Protocol):
    """A GPU that checks and times trials. The tests use one that needs no GPU."""

    def check(self, trial: Trial) -> None:
        """Compiles and runs the trial once; raises if it fails or is wrong."""

    def time(self, trials: list[Trial]) -> dict[str, float]:
        """Seconds of one launch of each trial and of the bare product, measured in turn."""


def text(config: Config) -> str:
    """The configuration as ``configs.py`` writes it."""
    first = [str(getattr(config, each.name)) for each in fields(config)[:5]]
    rest = [
        f"{each.name}={getattr(config, each.name)}"
        for each in fields(config)[5:]
        if getattr(config, each.name) != each.default
    ]
    return f"Config({', '.join([*first, *rest])})"


def search_order(config: Config) -> float:
    """A sorting key; the smallest is tried first. Large tiles, tensor descriptors and deep pipelines come first."""
    shapes = [(128, 256, 8, 2), (128, 128, 8, 1), (256, 128, 8, 2), (128, 256, 8, 1), (64, 256, 8, 1), (128, 64, 4, 1),
              (64, 128, 4, 1), (64, 256, 4, 1), (128, 64, 8, 1), (128, 128, 4, 1), (64, 64, 4, 1)]  # fmt: skip
    shape = (config.block_m, config.block_n, config.warps, config.parts)
    rank = float(shapes.index(shape)) if shape in shapes else 12.0
    rank += {(64, 4): 0, (64, 3): 1, (128, 2): 2, (128, 3): 2, (32, 4): 8}.get((config.block_k, config.stages), 4)
    return rank + (0 if config.descriptors else 1) + (1 if config.flat else 0)


def initial_trials(default: Config, found: Iterable[Config], rows: int) -> list[Trial]:
    """The current configuration, then the candidates, all adapted to ``rows`` rows and without duplicates."""
    ordered = sorted((config.for_rows(rows) for config in found), key=search_order)
    return [Trial(config) for config in dict.fromkeys([default.for_rows(rows), *ordered])]


def neighbours(trial: Trial, architecture: str, itemsize: int, rows: int, vocabulary: int, slots: int) -> list[Trial]:
    """The same tile with other numbers of splits and of resident programs."""
    limits = ARCHITECTURES.get(architecture, SMALLEST)
    row_tiles, tiles = -(-rows // trial.config.block_m), -(-vocabulary // trial.config.block_n)
    own = trial.splits or choose_splits(row_tiles, tiles, slots * trial.config.resident)
    wanted = {own // 4, own // 2, 2 * own, 4 * own, slots * trial.config.resident // row_tiles, slots}
    splits = {-(-tiles // -(-tiles // each)) for each in wanted if 1 <= each <= tiles} - {own}
    found = [Trial(trial.config, each) for each in sorted(splits)]
    for resident in {1, 2} - {trial.config.resident}:
        config = replace(trial.config, resident=resident)
        if config.fits(limits, itemsize):
            found.append(Trial(config))
    return found


class Halving:
    """Successive halving over trials. The first one is the current configuration and stays to the end."""

    def __init__(
        self,
        card: Card,
        trials: list[Trial],
        *,
        seconds: float,
        neighbours_of: Callable[[Trial], list[Trial]],
        save: Callable[[], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.card, self.trials, self.neighbours_of, self.save, self.now = card, trials, neighbours_of, save, now
        self.begun, self.seconds = now(), seconds
        self.product: list[float] = []  # seconds of the bare product in the last round

    def run(self) -> Trial | None:
        """The best trial; None if nothing could be measured."""
        self.try_all(self.trials, SHARES[0])
        second = self.best(max(1, min(SECOND_STAGE, -(-len(self.trials) // 4))), self.trials)
        self.time_in_turn(second, 1)
        neighbours = [other for trial in self.best(NEIGHBOURS, second) for other in self.neighbours_of(trial)]
        known = {trial.name for trial in self.trials}
        neighbours = list({trial.name: trial for trial in neighbours if trial.name not in known}.values())
        self.trials += neighbours
        self.try_all(neighbours, SHARES[1])
        last = self.best(LAST_STAGE, second + neighbours)
        self.time_in_turn(last, 2)
        best = self.best(1, last)
        return best[0] if best else None

    def is_late(self, share: float) -> bool:
        return self.now() - self.begun >= share * self.seconds

    def best(self, count: int, among: list[Trial]) -> list[Trial]:
        """The fastest of ``among``. They must have taken part in the same rounds to be comparable."""
        done = [trial for trial in among if trial.status == OK and trial.share is not None]
        return sorted(done, key=lambda trial: -(trial.share or 0.0))[:count]

    def try_all(self, trials: list[Trial], share: float) -> None:
        for trial in trials:
            if self.is_late(share):
                break
            if trial.status == WAITING:
                self.try_one(trial)

    def try_one(self, trial: Trial) -> None:
        trial.status = TRYING
        self.save()
        try:
            self.card.check(trial)
            times = [self.card.time([trial])]
            leader = max((other.share or 0.0 for other in self.trials if other.status == OK), default=0.0)
            if times[0][PRODUCT] / times[0][trial.name] > HOPELESS * leader:
                times += [self.card.time([trial]) for _ in range(ROUNDS[0] - 1)]
            self.record_times(trial, times, 0)
            trial.status = OK
        except SameCodeError as error:
            trial.status, trial.message = SAME, str(error)
        except WrongAnswerError as error:
            trial.status, trial.message = WRONG, str(error)[:300]
        except Exception as error:  # errors of the compiler, the driver and torch are results here
            trial.status, trial.message = FAILED, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            error.__traceback__ = None  # frames hold tensors
            if fatal(trial.message):
                self.save()
                raise
        self.save()

    def time_in_turn(self, trials: list[Trial], rung: int) -> None:
        """Times the trials and the current configuration in turn, until the rounds or the time are over."""
        current = [trial for trial in self.trials[:1] if trial.status == OK and trial not in trials]
        timed = trials + current
        times: list[dict[str, float]] = []
        for number in range(ROUNDS[rung] if timed else 0):
            if self.is_late(SHARES[rung]) and number >= ROUNDS[0]:
                break
            times.append(self.card.time(timed[:: -1 if number % 2 else 1]))
            if number >= ROUNDS[0] - 1:
                for trial in timed:
                    self.record_times(trial, times, rung)
                self.save()

    def record_times(self, trial: Trial, times: list[dict[str, float]], rung: int) -> None:
        self.product = [each[PRODUCT] for each in times]
        own = [each[trial.name] for each in times]
        trial.seconds, trial.rung, trial.launches = statistics.median(own), rung, len(own)
        trial.share = statistics.median(self.product) / trial.seconds
        if len(own) >= 3:
            low, _, high = statistics.quantiles(own, n=4, method="inclusive")
            trial.spread = (high - low) / trial.seconds


def fatal(message: str) -> bool:
    """Whether the process can no longer use its GPU."""
    return any(sign in message for sign in ("illegal memory access", "unspecified launch failure", "AcceleratorError"))


def choose_winner(trials: list[Trial], best: Trial | None) -> Trial:
    """The best trial if it beats the current configuration, the first trial, by more than noise; else the latter."""
    current = trials[0]
    if best is None or (current.status == OK and (best.share or 0.0) < GAIN * (current.share or 0.0)):
        return current
    return best


def configs_entry(architecture: str, itemsize: int, winners: dict[int, Trial], device: str, date: str) -> str:
    """The entry for ``configs.CONFIGS``. A regime that was not measured keeps its configuration."""
    kept = CONFIGS.get((architecture, itemsize))
    notes, entries = [f"    # {device}, {date[:10]}"], []
    for regime, name in enumerate(("many rows", "few rows")):
        trial = winners.get(regime)
        if trial is not None and trial.share is not None:
            note = f"{trial.share:.2f} of a bare product's throughput over {trial.launches} launches"
            if trial.splits:
                note += f", with {trial.splits} splits, which choose_splits does not choose"
            notes.append(f"    # {name}: {note}")
            entries.append(text(trial.config))
        elif kept is not None:
            notes.append(f"    # {name}: not measured")
            entries.append(text(kept[regime]))
    if len(entries) < 2:
        return "\n".join([*notes, "    # one regime is missing: no entry"])
    body = f'    ("{architecture}", {itemsize}): ({entries[0]}, {entries[1]}),'
    if len(body) > 120:
        body = f'    ("{architecture}", {itemsize}): (\n        {entries[0]},\n        {entries[1]},\n    ),'
    return "\n".join([*notes, body])


def write(path: Path, report: dict[str, Any]) -> None:
    """Writes the file atomically, so that nobody reads an incomplete file."""
    fresh = path.with_name(path.name + ".part")
    fresh.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def earlier_trials(path: Path) -> dict[str, list[Trial]]:
    """The trials of an earlier process, by regime. The trial that it was measuring when it ended has status DIED."""
    if not path.exists():
        return {}
    found = {}
    for shape in json.loads(path.read_text(encoding="utf-8"))["shapes"]:
        found[shape["regime"]] = trials = [Trial.from_record(record) for record in shape["trials"]]
        for trial in trials:
            if trial.status == TRYING:
                trial.status, trial.message = DIED, "the process hung or died while measuring it"
    return found


def supervise(command: list[str], out: Path, seconds: float, *, stall: float = STALL, poll: float = 0.2) -> int:
    """Runs measuring processes, one after the other, until one succeeds or the time is over."""
    end = time.monotonic() + seconds
    out.unlink(missing_ok=True)
    code = 1
    for _ in range(RESTARTS):
        left = end - time.monotonic()
        if left <= 0:
            break
        before = _tried(out)
        worker = subprocess.Popen([*command, "--seconds", f"{left:.1f}"], start_new_session=True)
        started = time.time()
        try:
            while worker.poll() is None:
                time.sleep(poll)
                alive = max(started, out.stat().st_mtime if out.exists() else 0.0)
                if time.time() - alive > stall or time.monotonic() > end + stall:
                    break
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
        code = worker.wait()
        if code == 0 or _tried(out) == before:  # done, or no progress
            break
    return 1 if code else 0


def _tried(out: Path) -> int:
    trials = [trial for found in earlier_trials(out).values() for trial in found]
    return sum(trial.status != WAITING for trial in trials)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/tune.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=180.0, help="time limit for everything (default: 180)")
    parser.add_argument("--shape", default="llama-3-8b", help="a model's name, as for xprobe bench")
    parser.add_argument("--rows", default="many,few", help="many, few or both (default: many,few)")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    import torch

    if not torch.cuda.is_available():
        print("tune.py needs a GPU, and torch sees none", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    worker = Path(__file__).with_name("tune_card.py")
    command = [sys.executable, str(worker), str(options.out), "--shape", options.shape]
    command += ["--rows", options.rows, "--dtype", options.dtype]
    code = supervise(command, options.out, options.seconds)
    if options.out.exists():
        print(summary(json.loads(options.out.read_text(encoding="utf-8"))))
    return code


def summary(report: dict[str, Any]) -> str:
    """The best trials of every shape, and the lines to paste into configs.py."""
    lines = []
    for shape in report["shapes"]:
        done = sorted((t for t in shape["trials"] if t["status"] == OK), key=lambda t: -t["share"])
        counts = {status: sum(t["status"] == status for t in shape["trials"]) for status in (SAME, WRONG, FAILED, DIED)}
        counts["not reached"] = sum(t["status"] == WAITING for t in shape["trials"])
        lines.append(f"{shape['text']}: {len(done)} measured, " + ", ".join(f"{n} {s}" for s, n in counts.items()))
        for t in done[:5]:
            lines.append(
                f"  {t['share']:.3f} of product  {t['seconds'] * 1e3:8.3f} ms  {t['launches']:3d}  {t['name']}"
            )
        current = shape["trials"][0]
        if current["status"] == OK:
            lines.append(f"  {current['share']:.3f} of product  {current['seconds'] * 1e3:8.3f} ms  current")
        else:
            lines.append(f"  current configuration {current['status']}: {current['message']}")
    return "\n".join([*lines, report.get("paste") or ""])


def regime_index(name: str) -> int:
    return MANY if name == "many" else 1 - MANY


def trials_for(architecture: str, itemsize: int, default: Config, rows: int) -> list[Trial]:
    return initial_trials(default, candidates(architecture, itemsize), rows)


if __name__ == "__main__":
    sys.exit(main())
