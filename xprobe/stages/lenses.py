"""Stage "lenses": the states of a run, read by several lenses. Whose reading are the phases?

lens files, model -> prompts -> one forward pass -> every lens -> lenses.jsonl -> phases under each lens, scripts of the
top tokens, latent language -> lenses.parquet
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from xprobe_kernels import Unembedding
from xprobe_kernels.transfer import upload

from xprobe.capture.requests import group_requests
from xprobe.capture.rows import Rows
from xprobe.errors import UsageError, XprobeError
from xprobe.events import Note, Stage, Step
from xprobe.lenses.files import lens_checksum, load_lens
from xprobe.lenses.reading import read_top, start_reading
from xprobe.lenses.settings import LensesSettings, LensName
from xprobe.lenses.transport import Transport
from xprobe.models.anatomy import input_device
from xprobe.phases.lens_tables import compare_lenses, depth_layers, latent_signals, script_shares
from xprobe.phases.signals import example_signals
from xprobe.qa.prompts import Prompt, build_prompts
from xprobe.runs.identity import checksum_of, run_key
from xprobe.runs.lines import KeptLines
from xprobe.runs.manifest import ExecutionEntry
from xprobe.runs.places import lens_in_folder, study_here
from xprobe.scoring.scripts import SCRIPTS, token_script
from xprobe.stages.opening import AskedModel, ExampleKey, first_questions, key_of, key_of_line, open_prompts
from xprobe.stages.requests import ANSWER, strategy_sample, study_request
from xprobe.stages.run import Run
from xprobe.stages.shards import read_signals
from xprobe.timing import Stopwatch

NAME = "lenses"
LINES, TABLE = "lenses.jsonl", "lenses.parquet"
BY_LAYER, BY_EXAMPLE = "lenses_by_layer.parquet", "lenses_by_example.parquet"
DEFINITION = 1  # raised when lines hold other figures
ENGLISH, PARALLEL_SETTING = "en", "x-x"  # the setting in which answers are in the language of the question
NO_TOKEN = -1
KEYS = ("setting", "language", "question_id", "paragraph")
DIGITS = 6  # of the signals that no phase follows from
Line = dict[str, Any]


@dataclass
class _Lens:
    """One lens: its name, the same for this working directory, the checksum of its file, its lines, and its maps once
    they are loaded."""

    name: str
    place: str
    sha256: str
    kept: KeptLines
    have: set[ExampleKey]
    transport: Transport | None = None
    warnings: list[str] = field(default_factory=list)


def compute(run: Run, settings: LensesSettings, open_model: Callable[[], AskedModel]) -> None:
    """Writes the tables ``lenses``, ``lenses_by_layer`` and ``lenses_by_example``, and enters the stage.

    Parameters
    ----------
    run : Run
    settings : LensesSettings
    open_model : callable () -> AskedModel
        Called only if ``lenses.jsonl`` lacks an example under one of the lenses.

    Raises
    ------
    UsageError
        There is no file of a lens, or that of the run's own lens has other bytes than it had.
    ModelError
        A lens is of another model.
    XprobeError
        Says what is wrong and what is kept.
    """
    watch, study = Stopwatch(), run.manifest.study
    wanted = first_questions(run, settings.limit)
    before = run.manifest.stages.get(NAME)
    lenses = _open_lenses(run, settings)
    if any(set(wanted) - lens.have for lens in lenses):
        executions = [_compute_missing(run, open_model(), lenses, wanted, watch)]
    else:
        run.notify(Note(f"the readings are those in {LINES}"))
        executions = before.executions if before is not None else [run.execution_entry()]
    run.notify(Stage("phases and tables"))
    with watch.timed("tables"):
        found = {lens.name: _lines_of(lens, wanted) for lens in lenses}
        frame = pd.DataFrame([{name: line[name] for name in KEYS} for line in found[study.lens]])
        readings = {name: _signals(lines) for name, lines in found.items()}
        compared = compare_lenses(
            frame, readings, _more_signals(found), own=study.lens,
            permutations=study.permutations, draws=study.bootstrap, seed=study.seed,
        )  # fmt: skip
        tables = {TABLE: compared.summary, BY_LAYER: compared.by_layer, BY_EXAMPLE: compared.by_example}
        difference = _difference_from_run(run, wanted, readings[study.lens])
        with run.folder.writing_tables(tables) as digests:
            pass
    for lens in reversed(lenses):  # so that the lines of the first lens come first
        lens.kept.tidy(wanted)
    results = {
        "own": study.lens,
        "lenses": {lens.name: lens.sha256 for lens in lenses},
        "places": {lens.name: lens.place for lens in lenses},
        "limit": settings.limit,
        "definition": DEFINITION,
        "depth_layers": {str(depth): layer for depth, layer in depth_layers(run.manifest.model.n_blocks).items()},
        "difference_from_run": difference,
        "settings": compared.settings,
    }
    warnings = [warning for one in executions for warning in one.warnings]
    run.entry(NAME, watch, tables=digests, results=results, warnings=warnings, executions=executions)


def kept_readings(run: Run, name: str, sha256: str) -> KeptLines:
    """The lines of one lens in ``lenses.jsonl``, by example: the same for the same bytes, wherever the file lies."""
    parts = {"run": run_key(run.manifest.to_dict()), "definition": DEFINITION}
    key = checksum_of(parts | {"kind": LensName.parse(name).kind, "sha256": sha256})
    return KeptLines(run.folder.path / LINES, key, key_of_line)


def _places(run: Run, settings: LensesSettings) -> dict[str, str]:
    """Name of each lens -> the same for this working directory: own, those that read this run before, those asked for.

    One that read before stays if its file is still the same.
    """
    own, before = run.manifest.study.lens, run.manifest.stages.get(NAME)
    asked = {name: lens_in_folder(name, Path()) for name in settings.lenses if name != own}
    found = {own: study_here(run.manifest).lens}
    results = before.results if before is not None else {}
    known = results.get("places", {})
    asked = {name: known.get(name, place) if place == name else place for name, place in asked.items()}
    for name, digest in results.get("lenses", {}).items():
        if name == own:
            continue
        place = asked.get(name) or known.get(name, name)
        try:
            same = lens_checksum(place) == digest
        except XprobeError:
            same = False
        if same and name not in asked:
            found[name] = place
        elif not same:
            why = "another file has its name now" if name in asked else "its file is gone or was changed"
            run.notify(Note(f"the lens {name} read this run before and is left out: {why}"))
    return found | asked


def _open_lenses(run: Run, settings: LensesSettings) -> list[_Lens]:
    own = run.manifest.study.lens
    lenses: dict[str, _Lens] = {}  # by what their lines depend on
    for name, place in _places(run, settings).items():
        digest = lens_checksum(place)
        if name == own and digest != run.manifest.lens_sha256:
            raise UsageError(
                f"the file of the run's own lens {own!r} has other bytes than it had when the run was made"
            )
        kept = kept_readings(run, name, digest)
        same = lenses.get(kept.key)
        if same is not None and name in settings.lenses and same.name in (own, *settings.lenses):
            raise UsageError(f"{name!r} and {same.name!r} are the same lens: leave out one")
        lenses[kept.key] = _Lens(name, place, digest, kept, set(kept.read()))  # it has the name that was given last
    return list(lenses.values())


def _compute_missing(
    run: Run, asked: AskedModel, lenses: Sequence[_Lens], wanted: Sequence[ExampleKey], watch: Stopwatch
) -> ExecutionEntry:
    """Reads the examples that ``lenses.jsonl`` lacks, wave by wave, with every lens that lacks them."""
    model = run.manifest.model
    for lens in lenses:  # before the model: a lens of another model is refused at once
        lens.transport, lens.warnings = load_lens(lens.place, model.width, model.n_blocks + 1, model.name)
    runner, tokenizer, every = open_prompts(run, asked, watch)
    chosen = set(wanted)
    prompts = [prompt for prompt in every if key_of(prompt) in chosen]
    execution = run.execution_entry(str(input_device(runner.model)))
    for message in [warning for lens in lenses for warning in lens.warnings]:
        runner.warn(message)
    pairs = parallel_tokens(asked, tokenizer, prompts, runner.warn)
    requests = [study_request(prompt) for prompt in prompts]
    by_group: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_group.setdefault(prompt.example.group, []).append(prompt)
    with run.failing(lambda: f"what {run.folder.path} holds stays"), watch.timed("check of sharing"):
        runner.choose_strategy(strategy_sample(requests))
    plan = runner.plan(group_requests(requests))
    missing = {
        key for key, members in by_group.items()
        if any(key_of(prompt) not in lens.have for prompt in members for lens in lenses)
    }  # fmt: skip
    total, done = len(prompts) * len(lenses), sum(len(chosen & lens.have) for lens in lenses)
    script = cache(lambda token: token_script(tokenizer, token))
    head, device = runner.anatomy.head, runner.anatomy.head.weight.device
    waves = runner.run(plan, missing)
    run.notify(Step(NAME, done, total))
    with run.failing(lambda: f"{done} of {total} readings are kept in {run.folder.path / LINES}"):
        while True:
            with watch.timed("forward", device):
                wave, rows = next(waves, (None, None))
            if wave is None or rows is None:
                break
            members = [prompt for group in wave.groups for prompt in by_group[group.key]]
            for lens in lenses:
                if all(key_of(prompt) in lens.have for prompt in members):
                    continue
                with watch.timed("lens", device):
                    lines = read_wave(
                        rows, members, head, pairs, script, run.execution.backend, lens.transport, lens.name
                    )
                new = [line for prompt, line in zip(members, lines, strict=True) if key_of(prompt) not in lens.have]
                lens.kept.append(new)
                done += len(new)
                run.notify(Step(NAME, done, total))
    watch.collect()
    report = runner.report()
    execution.strategy, execution.warnings = report.strategy, list(report.warnings)
    return execution


def parallel_tokens(
    asked: AskedModel, tokenizer: Any, prompts: Sequence[Prompt], warn: Callable[[str], None]
) -> dict[ExampleKey, tuple[int, int]]:
    """The first tokens of the answer in English and in the language of the question, by example of x-x.

    Each is the first token of the gold answer as the prompt of its language has it. Examples in English, those without
    an English answer, and those whose two tokens are the same are left out.
    """
    parallel = [prompt for prompt in prompts if prompt.example.setting == PARALLEL_SETTING]
    others = [prompt for prompt in parallel if prompt.example.language != ENGLISH]
    if not others:
        return {}
    english = {one.example.question_id: one.targets[0] for one in parallel if one.example.language == ENGLISH}
    data = asked.questions.data
    if not english and ENGLISH in data.languages:  # read for the order of the questions, or for en-x
        ids = {prompt.example.question_id for prompt in others}
        examples = [one for one in data.examples((PARALLEL_SETTING,), (ENGLISH,)) if one.question_id in ids]
        built, _ = build_prompts(examples, tokenizer, asked.questions.template, None)
        english = {prompt.example.question_id: prompt.targets[0] for prompt in built}
    if not english:
        warn("the latent language is left out: the run has read no English answers (add en to its languages)")
    pairs = {
        key_of(prompt): (english[prompt.example.question_id], prompt.targets[0])
        for prompt in others
        if prompt.example.question_id in english
    }
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def read_wave(
    rows: Rows,
    prompts: Sequence[Prompt],
    head: Unembedding,
    pairs: Mapping[ExampleKey, tuple[int, int]],
    script: Callable[[int], str],
    backend: str,
    transport: Transport | None,
    name: str = "logit",
) -> list[Line]:
    """Reads a wave with one lens: the signals of the run, and the top token at the last prompt token.

    Scripts are those of the last prompt token alone: at later positions the answer's own tokens are given, and say
    which script to go on with.

    Parameters
    ----------
    rows : Rows
        Of the study's requests.
    prompts : sequence of Prompt
        In the order of the requests.
    head : Unembedding
    pairs : mapping of example to (int, int)
        As ``parallel_tokens`` gives them.
    script : callable (token) -> str
    backend : str
    transport : Transport, optional
        None: the logit lens.
    name : str
        Of the lens, for the error.

    Returns
    -------
    list of dict
        One for each prompt: what the example is, ``signals`` (by name, L + 1 numbers), ``scripts`` (L + 1 names), and
        ``parallel``: null, or ``tokens`` (English, own) and their log-probabilities ``values`` [L + 1, 2] in nats.

    Raises
    ------
    RuntimeError
        A row is not a number.
    """
    answers, device = rows[ANSWER], rows[ANSWER].device
    targets = upload(torch.tensor([token for prompt in prompts for token in prompt.targets]), device)
    lookup = torch.tensor([pairs.get(key_of(prompt), (NO_TOKEN, NO_TOKEN)) for prompt in prompts])
    readout = start_reading(answers, targets, head, backend, transport).values()
    top = read_top(rows.first(ANSWER), upload(lookup, device), head, backend, transport)
    if not readout.finite:
        raise RuntimeError(f"states hold NaN or infinity under the lens {name}; try dtype='float32' (--dtype float32)")
    signals = example_signals(readout, rows.offsets[ANSWER].numpy(), head.vocab_size)
    lines = []
    for place, prompt in enumerate(prompts):
        known = {
            signal: values[place].tolist() if signal == "readiness" else np.round(values[place], DIGITS).tolist()
            for signal, values in signals.items()
        }
        pair = pairs.get(key_of(prompt))
        parallel = None
        if pair is not None:
            values = np.round(top.log_probability[place].astype(np.float64), DIGITS)
            parallel = {"tokens": list(pair), "values": values.tolist()}
        lines.append(
            {
                **{key: getattr(prompt.example, key) for key in KEYS},
                "signals": known,
                "scripts": [script(token) for token in top.top[place].tolist()],
                "parallel": parallel,
            }
        )
    return lines


def _lines_of(lens: _Lens, wanted: Iterable[ExampleKey]) -> list[Line]:
    found = lens.kept.read()
    return [found[key] for key in wanted]


def _signals(lines: Sequence[Line]) -> dict[str, NDArray[np.float64]]:
    """The signals of one lens, [N, L + 1] each."""
    return {name: np.array([line["signals"][name] for line in lines], dtype=np.float64) for name in lines[0]["signals"]}


def _more_signals(found: Mapping[str, Sequence[Line]]) -> dict[str, dict[str, NDArray[np.float64]]]:
    """By lens: the scripts that occur under any lens, and the latent language."""
    present = {script for lines in found.values() for line in lines for script in line["scripts"]}
    names = [name for name in SCRIPTS if name in present]
    more = {}
    for lens, lines in found.items():
        nothing = np.full((len(lines[0]["scripts"]), 2), np.nan)
        values = [nothing if line["parallel"] is None else line["parallel"]["values"] for line in lines]
        more[lens] = script_shares([line["scripts"] for line in lines], names) | latent_signals(np.array(values))
    return more


def _difference_from_run(run: Run, wanted: Sequence[ExampleKey], signals: Mapping[str, NDArray]) -> dict[str, float]:
    """The largest difference of readiness and log-probability from what the run itself read under its lens."""
    frame, own = read_signals(run.folder, run.manifest)
    place = {key: i for i, key in enumerate(zip(*(frame[name] for name in KEYS[:3]), strict=True))}
    rows = [place[key] for key in wanted]
    return {
        name: round(float(np.abs(own[name][rows] - signals[name]).max()), DIGITS)
        for name in ("readiness", "log_probability")
    }
