"""Runs every check of ``families.py`` on one saved model, in the order of a run.

The first section holds the functions that depend on how xprobe works inside.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from support.prompts import family_of_prompts, forced, requests
from torch import Tensor
from xprobe_kernels import lens
from xprobe_kernels.reference import logits as reference_logits

import xprobe
from xprobe.capture.engine import Engine
from xprobe.config import Execution, StudyConfig
from xprobe.errors import XprobeError
from xprobe.forecast import forecast
from xprobe.models import loading
from xprobe.models.anatomy import inspect, watch_states
from xprobe.models.parity import check_parity
from xprobe.runs.folder import RunFolder
from xprobe.stages.requests import strategy_sample

PROBE_TOKENS = 12
RUN = {"data": "builtin", "languages": ("en", "de"), "limit": 2, "probes": (), "bootstrap": 20, "permutations": 20}
Record = dict[str, Any]


# -- xprobe's internals, in one place ---------------------------------------------------------------------------------


def load(folder: Path, dtype: str) -> Any:
    """The model of a folder as a run loads it."""
    return loading.load(loading.resolve(str(folder)), dtype=dtype).model


def strategy(engine: Engine, prompts: list[Any]) -> tuple[str, list[str]]:
    """The strategy that the engine chooses for these prompts, and its warnings."""
    engine.choose_strategy(strategy_sample(requests(prompts)))
    return engine.strategy, list(engine.warn.messages)


def rows_of(engine: Engine, prompts: list[Any], name: str, budget: int) -> Tensor:
    """Answer and question rows [L + 1, P + N, D] of ``prompts`` with one strategy."""
    rows = engine._capture(requests(prompts), name, budget)  # type: ignore[arg-type]
    return torch.cat([rows["answer"], rows["question"]], 1).clone()


def log_probabilities_of_run(study: Any) -> dict[str, Tensor]:
    """Lens log-probabilities [P, L + 1] of the gold tokens of every stored group."""
    folder = RunFolder.open(study.path)
    by_group = {}
    for key in study.manifest.groups:
        arrays, _ = folder.read_shard(folder.shard_name(key), ("logit", "logsumexp"))
        by_group[key] = torch.as_tensor(arrays["logit"]) - torch.as_tensor(arrays["logsumexp"])
    return by_group


# -- the checks -------------------------------------------------------------------------------------------------------


class Checks:
    """Results of the checks of one model.

    ``save`` is called before and after each check. So the saved record also shows a check that never ended.
    """

    def __init__(self, folder: Path, record: Record, save: Callable[[Record], None]) -> None:
        self.folder, self.record, self._save = folder, record, save

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Record]:
        """One check. What it raises is kept: ``refused`` for an XprobeError, ``fault`` for anything else."""
        entry: Record = {"unfinished": True}
        self.record[name] = entry
        self._save(self.record)
        start = time.perf_counter()
        try:
            yield entry
        except XprobeError as error:
            entry["refused"] = str(error)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            own = [f for f in traceback.extract_tb(error.__traceback__) if "/xprobe/" in f.filename][-1:]
            place = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in (last, *own))
            entry["fault"] = " ".join(f"{type(error).__name__}: {error}".split())[:300] + f" [{place}]"
        entry["seconds"] = round(time.perf_counter() - start, 2)
        del entry["unfinished"]
        self._save(self.record)

    def succeeded(self, name: str) -> bool:
        """Whether a check neither was refused nor failed."""
        return not {"refused", "fault"} & self.record[name].keys()

    def run(self) -> Record:
        """All checks that make sense for this model."""
        anatomies: dict[str, tuple[Any, Any]] = {}
        for dtype in ("float32", "float64", "bfloat16"):
            with self.step(f"open {dtype}") as entry:
                model = load(self.folder, dtype)
                entry["class"] = type(model).__name__
                anatomy = inspect(model)
                entry["anatomy"] = {**anatomy.names, "blocks_found": len(anatomy.blocks), "scale": anatomy.head.scale,
                                    "softcap": anatomy.head.softcap}  # fmt: skip
                anatomies[dtype] = model, anatomy
        if "float64" not in anatomies and "float32" in anatomies and hasattr(model, "set_experts_implementation"):
            with self.step("open float64, plain experts"):
                model = load(self.folder, "float64")
                model.set_experts_implementation("eager")
                anatomies["float64"] = model, inspect(model)
        prompts = family_of_prompts(vocab=300)
        self._runs()
        for dtype, name in (("float32", "run"), ("bfloat16", "run bfloat16")):
            if not self.succeeded(name):
                anatomies.pop(dtype, None)
        widest = next((dtype for dtype in ("float64", "float32") if dtype in anatomies), None)
        if widest is not None:
            with self.step("read") as entry:
                entry |= {"dtype": widest, **_read(*anatomies[widest])}
        for dtype in ("float32", "bfloat16"):
            if dtype in anatomies:
                with self.step(f"parity {dtype}") as entry:
                    entry["nats"] = check_parity(*anatomies[dtype], forced(prompts[:4]))
        for dtype in ("float32", "float64"):
            if dtype in anatomies:
                with self.step(f"sharing {dtype}") as entry:
                    entry.update(_sharing(*anatomies[dtype], prompts))
        # the strategies that runs chose for their own prompts, and the one chosen in bf16 for the random prompts:
        # bf16 rounding may hide the error of a strategy, so the error of each is measured in fp32
        chosen = {
            "run": self.record["run"].get("strategy"),
            "run bfloat16": self.record["run bfloat16"].get("strategy"),
        }
        if "bfloat16" in anatomies:
            with self.step("sharing bfloat16") as entry:
                entry["strategy"], _ = strategy(Engine(*anatomies["bfloat16"], 4096), prompts)
                chosen["sharing bfloat16"] = entry["strategy"]
        if "float32" in anatomies:
            with self.step("strategies in float32") as entry:
                entry |= {
                    name: _strategy_error(name, *anatomies["float32"], prompts) for name in {*chosen.values()} if name
                }
        return self.record

    def wrapper(self) -> Record:
        """The checks of a vision-language model: opening it, and ``--dry-run``."""
        with self.step("open float32") as entry:
            model = load(self.folder, "float32")
            entry["class"] = type(model).__name__
            inspect(model)
        with self.step("dry run") as entry:
            entry["strategy"] = forecast(StudyConfig(model=str(self.folder), languages=("en", "de"), limit=2)).strategy
        return self.record

    def _runs(self) -> None:
        studies: Record = {}
        for name, dtype, stream in (("run", "float32", 0), ("stream", "float32", 1), ("run bfloat16", "bfloat16", 0)):
            with self.step(name) as entry:
                study = xprobe.run(str(self.folder), out=self.folder / name, dtype=dtype, stream=bool(stream), **RUN)
                studies[name] = study
                states = study.manifest.stages["states"]
                plan = states.results["plan"]
                entry |= {"strategy": plan["strategy"], "warnings": states.warnings}
                entry |= {"parity": states.results["parity_error"], "prompt_tokens": plan["tokens"]}
        if {"run", "stream"} <= studies.keys():
            with self.step("stream against run") as entry:
                one, other = (log_probabilities_of_run(study) for study in (studies["run"], studies["stream"]))
                entry["nats"] = max(_difference(one[key], other[key]) for key in one)
        for name, stream in (("dry run", False), ("dry run, stream", True)):
            with self.step(name) as entry:
                config = StudyConfig(model=str(self.folder), data="builtin", languages=("en", "de"), limit=2)
                expected = forecast(config, Execution(stream=stream))
                entry |= {"strategy": expected.strategy, "blocks": expected.n_blocks}


def _read(model: Any, anatomy: Any) -> Record:
    """Compares the lens at every layer with the model's own final modules, over the whole vocabulary."""
    ids = torch.randint(10, 300, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(1))
    states: list[Tensor] = []
    with torch.inference_mode(), watch_states(anatomy.blocks, lambda layer, hidden: states.append(hidden.clone())):
        model(input_ids=ids, use_cache=False)
    worst, wrong_ranks, largest = 0.0, 0, 0.0
    gold = torch.arange(10, 10 + PROBE_TOKENS)
    for state in states:
        rows = state[0]
        expected_log_p = _own_lens(model, anatomy, rows)
        logits = reference_logits(rows, anatomy.head)
        largest = max(largest, float(logits[logits.isfinite()].abs().max()))
        reference_log_p = logits.log_softmax(-1)
        values = lens(rows, anatomy.head, gold)
        target = expected_log_p.gather(1, gold[:, None])
        worst = max(worst, _difference(reference_log_p, expected_log_p), _difference(values.log_probability, target))
        wrong_ranks += int((values.rank[:, 0] != 1 + (expected_log_p > target).sum(-1)).sum())
    return {"nats": worst, "wrong_ranks": wrong_ranks, "largest_logit": largest, "layers": len(states)}


def _own_lens(model: Any, anatomy: Any, hidden: Tensor) -> Tensor:
    """Log-probabilities that the model's own final modules give for ``hidden`` [T, D].

    A hook replaces the last block's output by ``hidden``.
    """

    def replace_output(module: Any, args: tuple, output: Any) -> Any:
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        return rows if isinstance(output, Tensor) else (rows, *output[1:])

    hook = anatomy.blocks[-1].register_forward_hook(replace_output)
    ids = torch.randint(10, 300, (1, len(hidden)), generator=torch.Generator().manual_seed(2))
    try:
        with torch.inference_mode():
            return model(input_ids=ids, use_cache=False).logits[0, :, : anatomy.head.vocab_size].log_softmax(-1)
    finally:
        hook.remove()


def _sharing(model: Any, anatomy: Any, prompts: list[Any]) -> Record:
    """Lens differences, in nats, between prompts run one by one and the chosen strategy, and plain batches."""
    engine = Engine(model, anatomy, 4096)
    name, warnings = strategy(engine, prompts)
    alone = _lens_of(rows_of(engine, prompts, "plain", 1), anatomy)
    shared = _lens_of(rows_of(engine, prompts, name, 4096), anatomy)
    batched = shared if name == "plain" else _lens_of(rows_of(engine, prompts, "plain", 4096), anatomy)
    return {
        "strategy": name,
        "warnings": warnings,
        "nats": _difference(shared, alone),
        "plain_batch_nats": _difference(batched, alone),
    }


def _strategy_error(name: str, model: Any, anatomy: Any, prompts: list[Any]) -> float:
    """The lens error, in nats, of a strategy that the engine need not have chosen. Infinite if the strategy fails."""
    engine = Engine(model, anatomy, 4096)
    try:
        shared = rows_of(engine, prompts, name, 4096)
    except Exception:  # the strategy does not work with this model in this dtype
        return float("inf")
    return _difference(_lens_of(shared, anatomy), _lens_of(rows_of(engine, prompts, "plain", 1), anatomy))


def _lens_of(rows: Tensor, anatomy: Any) -> Tensor:
    return reference_logits(rows.reshape(-1, rows.shape[-1]), anatomy.head).log_softmax(-1)


def _difference(one: Tensor, other: Tensor) -> float:
    """Largest difference; infinite where one is infinite or NaN and the other is not."""
    one, other = one.double().flatten(), other.double().flatten()
    same = (one == other) | (one.isnan() & other.isnan())
    return float((one - other).abs().masked_fill(same, 0.0).nan_to_num(nan=float("inf")).max())
