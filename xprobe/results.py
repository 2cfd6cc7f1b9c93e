"""A finished study: the same object fresh from ``run`` and read back from its folder."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xprobe.arguments import folder_path
from xprobe.config import STAGE_COMMANDS
from xprobe.errors import RunFolderError, UnknownNameError, UsageError
from xprobe.runs.folder import EXAMPLES, LAYERS, MANIFEST, PROBE_TABLE, RunFolder
from xprobe.runs.manifest import Manifest

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class SettingResult:
    """Results of one setting of a run; ``study["x-x"]`` gives it.

    Attributes
    ----------
    study : Study
    setting : str
    """

    study: Study
    setting: str

    @property
    def summary(self) -> dict[str, Any]:
        """All figures of this setting: alpha, boundary, spread, ..., and the same by language."""
        return self.study.manifest.stages["phases"].results["settings"][self.setting]

    @property
    def alpha(self) -> dict[str, float | None]:
        """Phasing stability (Krippendorff's alpha of the onsets over languages): {value, lo, hi}."""
        return self.summary["alpha"]

    @property
    def boundary(self) -> dict[str, float | None]:
        """Median retrieval onset, in layers: {value, lo, hi}."""
        return self.summary["boundary"]

    @property
    def stability(self) -> pd.DataFrame:
        """One row per layer: phase, stability, stability_lo, stability_hi, readiness, rank, ..."""
        from xprobe.phases.tables import stability_table

        return stability_table(self.study.layers, self.setting)

    @property
    def signals(self) -> pd.DataFrame:
        """value, lo, hi and n of every signal, by (signal, language, layer); ``all`` for the pooled rows."""
        layers = self.study.layers
        part = layers[layers["setting"] == self.setting]
        return part.set_index(["signal", "language", "layer"])[["value", "lo", "hi", "n"]].sort_index()

    @property
    def boundaries(self) -> pd.DataFrame:
        """One row per language: boundary, relative_boundary, spread, phased_fraction, encoding_depth, encoding_peak,
        each with _lo and _hi; phase_order with _share; n, without_onset."""
        import pandas as pd

        rows: dict[str, dict[str, Any]] = {}
        for language, entry in self.summary["languages"].items():
            row = rows.setdefault(language, {})
            for name, value in entry.items():
                parts = value if isinstance(value, dict) else {"value": value}
                row |= {name if part == "value" else f"{name}_{part}": number for part, number in parts.items()}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("language")

    @property
    def examples(self) -> pd.DataFrame:
        """One row per example of this setting: language, question_id, paragraph, onset, sharpness, phased, ..."""
        examples = self.study.examples
        return examples[examples["setting"] == self.setting]

    @property
    def probes(self) -> pd.DataFrame:
        """One row per probe, state and layer: metric, score with interval, baseline, control, selectivity."""
        probes = self.study.probes
        part = probes[probes["setting"] == self.setting]
        return part.drop(columns="setting").set_index(["probe", "state", "layer"]).sort_index()

    @property
    def plot(self) -> Any:
        """Figures of this setting for papers (``xprobe.report.figures.Plots``): ``plot.stability()``, ..."""
        return _report("figures").Plots(self.study, self.setting)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the summary, and ``layers`` with one entry per layer. None where nothing could be computed."""
        records = self.stability.reset_index().to_dict("records")
        layers = [{name: None if value != value else value for name, value in row.items()} for row in records]
        return {**self.summary, "layers": layers}

    def __repr__(self) -> str:
        value = self.alpha["value"]
        alpha = "undefined" if value is None else f"{value:.3f}"
        boundary = self.boundary["value"]
        return f"SettingResult({self.setting}: examples {self.summary['n']}, boundary {boundary}, alpha {alpha})"

    def _repr_html_(self) -> str:
        return _report("notebook").setting_html(self)


@dataclass(frozen=True, eq=False)
class Study(Mapping[str, SettingResult]):
    """Results of one run: a read-only mapping from each setting to its ``SettingResult``.

    Attributes
    ----------
    path : Path
        The run folder.
    manifest : Manifest
        Everything in ``manifest.json``: configuration, model, data, and what each stage recorded.
    layers : DataFrame
        setting, layer, language, signal, value, lo, hi, n.
    examples : DataFrame
        One row per example: setting, language, question_id, paragraph, onset, sharpness, phased, ...
    probes : DataFrame
        One row per setting, probe, state and layer; empty if none was trained.
    """

    path: Path
    manifest: Manifest
    layers: pd.DataFrame
    examples: pd.DataFrame
    probes: pd.DataFrame

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings of this run, in order."""
        return tuple(self.manifest.stages["phases"].results["settings"])

    @property
    def lens(self) -> str:
        """What read the states, as ``StudyConfig.lens`` names it."""
        return self.manifest.study.lens

    __eq__, __hash__ = object.__eq__, object.__hash__  # a mapping would compare data frames

    def __len__(self) -> int:
        return len(self.settings)

    def __iter__(self) -> Iterator[str]:
        return iter(self.settings)

    def __getitem__(self, setting: str) -> SettingResult:
        if setting not in self.settings:
            raise UnknownNameError(f"this run holds no setting {setting!r}; it holds {', '.join(self.settings)}")
        return SettingResult(self, setting)

    @property
    def _only(self) -> SettingResult:
        if len(self.settings) > 1:
            names = " or ".join(f'study["{setting}"]' for setting in self.settings)
            raise UsageError(f"this run holds {len(self.settings)} settings: choose {names}")
        return self[self.settings[0]]

    @property
    def alpha(self) -> dict[str, float | None]:
        """``alpha`` of the run's only setting. With several, a UsageError says how to choose one."""
        return self._only.alpha

    @property
    def boundary(self) -> dict[str, float | None]:
        """``boundary`` of the run's only setting."""
        return self._only.boundary

    @property
    def stability(self) -> pd.DataFrame:
        """``stability`` of the run's only setting."""
        return self._only.stability

    def _added(self, stage: str, lacking: str, effect: str) -> pd.DataFrame:
        """The table of a stage that was added to the run."""
        if stage not in self.manifest.stages:
            function = "read_lenses" if stage == "lenses" else STAGE_COMMANDS[stage]
            call = f"xprobe.{function}({str(self.path)!r}) or `xprobe {STAGE_COMMANDS[stage]}`"
            raise UsageError(f"the run in {self.path} {lacking}: {call} {effect}")
        return self.table(f"{stage}.parquet")

    @property
    def answers(self) -> pd.DataFrame:
        """One row per generated answer; see docs/performance.md. ``xprobe.evaluate`` writes them.

        Raises
        ------
        UsageError
            The run was not evaluated.
        """
        return self._added("answers", "has no answers", "generates them")

    @property
    def oracle(self) -> pd.DataFrame:
        """One row per search for the evidence of an answer; see docs/performance.md. ``xprobe.oracle`` writes them.

        Raises
        ------
        UsageError
            The run has none.
        """
        return self._added("oracle", "has no oracle", "computes it")

    @property
    def relevance(self) -> pd.DataFrame:
        """One row per example and group of tokens; see docs/attribution.md. ``xprobe.attribute`` writes them.

        Raises
        ------
        UsageError
            The run has none.
        """
        return self._added("relevance", "has no relevance", "computes it")

    @property
    def patching(self) -> pd.DataFrame:
        """One row per pair of questions, kind of patch and layer; see docs/causes.md. ``xprobe.patch`` writes them.

        Raises
        ------
        UsageError
            The run has none.
        """
        return self._added("patching", "has no patches", "computes them")

    @property
    def lenses(self) -> pd.DataFrame:
        """One row per lens, setting and language; see docs/lenses.md. ``xprobe.read_lenses`` writes them.

        Raises
        ------
        UsageError
            The run has none.
        """
        return self._added("lenses", "was read by its own lens alone", "reads it by several")

    def evaluate(self, settings: Any = None, **options: Any) -> Study:
        """This run with the stage "answers"; as ``xprobe.evaluate``."""
        return _public("evaluate")(self, settings, **options)

    def attribute(self, settings: Any = None, **options: Any) -> Study:
        """This run with the stage "relevance"; as ``xprobe.attribute``."""
        return _public("attribute")(self, settings, **options)

    def patch(self, settings: Any = None, **options: Any) -> Study:
        """This run with the stage "patching"; as ``xprobe.patch``."""
        return _public("patch")(self, settings, **options)

    def read_lenses(self, settings: Any = None, **options: Any) -> Study:
        """This run with the stage "lenses"; as ``xprobe.read_lenses``."""
        return _public("read_lenses")(self, settings, **options)

    def to_html(self, path: str | Path | None = None) -> Path:
        """Writes the report page: one HTML file that needs nothing from elsewhere.

        Parameters
        ----------
        path : path, optional
            ``report.html`` in the run folder by default. A file that is there is replaced.

        Returns
        -------
        Path

        Raises
        ------
        UsageError
            The file cannot be written there.
        RunFolderError
            A table of the run is missing or was changed.

        Examples
        --------
        >>> import xprobe
        >>> xprobe.load_study("runs/demo").to_html().name  # doctest: +SKIP
        'report.html'
        """
        return _report("page").write_page(self, self.path / "report.html" if path is None else path)

    @property
    def plot(self) -> Any:
        """Figures for papers (``xprobe.report.figures.Plots``): ``study.plot.stability()``; see docs/figures.md.

        With several settings, ``study["x-x"].plot`` draws one of them; ``save`` writes all.
        """
        return _report("figures").Plots(self)

    def table(self, name: str) -> pd.DataFrame:
        """A table that a stage wrote, by file name: also that of a stage of your own.

        Raises
        ------
        UsageError
            No stage of this run wrote such a table.
        RunFolderError
            The file is not there, or is not the one that the stage wrote.
        """
        written = {table: stage for stage, entry in self.manifest.stages.items() for table in entry.tables}
        if name not in written:
            raise UsageError(f"no stage of this run wrote {name!r}; there are: {', '.join(written)}")
        folder, stage = RunFolder(self.path), written[name]
        again = f"xprobe {STAGE_COMMANDS.get(stage, 'run --resume --out')} {shlex.quote(str(self.path))}"
        folder.check_table(name, self.manifest.stages[stage].tables[name], stage, f"compute it again ({again})")
        return folder.read_table(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``xprobe run --json`` prints them. None where a figure could not be computed."""
        manifest = self.manifest
        return {
            "run_dir": str(self.path),
            "model": manifest.model.name,
            "lens": self.lens,
            "settings": {setting: result.to_dict() for setting, result in self.items()},
            "phase_definition": manifest.stages["phases"].results["phase_definition"],
            "parity_error": manifest.stages["states"].results["parity_error"],
            "counts": asdict(manifest.counts),
            "seconds": {**manifest.seconds, "total": manifest.total_seconds},
            "warnings": manifest.warnings,
        }

    def __repr__(self) -> str:
        results = "; ".join(repr(one).removeprefix("SettingResult(").removesuffix(")") for one in self.values())
        return f"Study({str(self.path)!r}: {self.manifest.model.name}; {results})"

    def _repr_html_(self) -> str:
        return _report("notebook").study_html(self)


def _public(name: str) -> Any:
    """A function of ``xprobe`` by name: its stages read results, so results cannot import them."""
    return getattr(import_module("xprobe"), name)


def _report(module: str) -> Any:
    """A module of the room ``report``: it reads results, so results cannot import it."""
    return import_module(f"xprobe.report.{module}")


def load_study(path: str | Path) -> Study:
    """Reads a finished run from its folder.

    Raises
    ------
    UsageError
        ``path`` is not a run folder.
    RunFolderError
        The run is not finished, an entry of its manifest is missing or wrong, or a table is not the one that this run
        wrote.
    """
    import pandas as pd

    from xprobe.config import PROBE_COLUMNS

    folder = RunFolder.open(folder_path("path", path))
    manifest = folder.read_finished()
    names = table_names(manifest)
    layers, examples, *probes = read_tables(folder, manifest, names)
    without = sorted(set(manifest.stages["phases"].results["settings"]) - set(layers["setting"]))
    if without:
        raise RunFolderError(
            f"{folder.path / MANIFEST}: entry stages.phases.results names {without[0]}, which {LAYERS} does not hold; "
            f"{folder.resume_command} writes it again"
        )
    return Study(
        folder.path, manifest, layers, examples, probes[0] if probes else pd.DataFrame(columns=list(PROBE_COLUMNS))
    )


def why_stale(folder: RunFolder) -> str | None:
    """What is wrong with the tables of a finished run; None if nothing is."""
    try:
        load_study(folder.path)
    except RunFolderError as error:
        return str(error)
    return None


def read_tables(folder: RunFolder, manifest: Manifest, names: Sequence[str]) -> list[pd.DataFrame]:
    """Tables of a run, by their file names.

    Raises
    ------
    RunFolderError
        A table is missing, cannot be read, or is not the one that this run wrote.
    """
    from xprobe.config import EXAMPLE_COLUMNS, LAYER_COLUMNS, PROBE_COLUMNS

    columns = {LAYERS: LAYER_COLUMNS, EXAMPLES: EXAMPLE_COLUMNS, PROBE_TABLE: PROBE_COLUMNS}
    digests = {name: digest for stage in manifest.stages.values() for name, digest in stage.tables.items()}
    unknown = [name for name in names if name not in digests]
    if unknown:
        raise RunFolderError(
            f"{folder.path / MANIFEST} holds no checksum of {', '.join(unknown)}: {folder.resume_command} writes the "
            "tables and their checksums again from the shards"
        )
    tables = []
    for name in names:
        table = folder.read_table(name, digests[name])
        lacking = [column for column in columns[name] if column not in table]
        if lacking:
            raise RunFolderError(
                f"{folder.path / name} has no column {lacking[0]!r}: it is not a table of this version of xprobe; "
                f"{folder.resume_command} writes it again from the shards"
            )
        tables.append(table)
    return tables


def table_names(manifest: Manifest) -> list[str]:
    """File names of the tables that a run with this manifest has."""
    return [LAYERS, EXAMPLES, *([PROBE_TABLE] if "probes" in manifest.stages else [])]
