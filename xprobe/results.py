"""A finished study: the same object fresh from ``run`` and read back from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xprobe.errors import RunFolderError, UsageError
from xprobe.runs.folder import EXAMPLES, LAYERS, MANIFEST, PROBE_TABLE, RunFolder

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Study:
    """Results of one run.

    Attributes
    ----------
    path : Path
        The run folder.
    manifest : dict
        Everything in ``manifest.json``: configuration, model, data, versions, timings, parity, counts, summaries.
    layers : DataFrame
        setting, layer, language, signal, value, lo, hi, n.
    examples : DataFrame
        One row per example: setting, language, question_id, paragraph, onset, sharpness, phased, ...
    all_probes : DataFrame
        One row per setting, probe, state and layer; empty if none was trained.
    """

    path: Path
    manifest: dict[str, Any]
    layers: pd.DataFrame
    examples: pd.DataFrame
    all_probes: pd.DataFrame

    @property
    def settings(self) -> tuple[str, ...]:
        return tuple(self.manifest["results"])

    @property
    def setting(self) -> str:
        """The setting that the properties below speak of: the first one of the run. ``of`` gives another one."""
        return self.settings[0]

    def of(self, setting: str) -> Study:
        """The same study with another setting in front."""
        results = self.manifest["results"]
        if setting not in results:
            raise UsageError(f"this run holds no setting {setting!r}; it holds {', '.join(results)}")
        reordered = {setting: results[setting], **results}
        return Study(self.path, {**self.manifest, "results": reordered}, self.layers, self.examples, self.all_probes)

    @property
    def alpha(self) -> dict[str, float | None]:
        """Phasing stability (Krippendorff's alpha of the onsets over languages): {value, lo, hi}."""
        return self.manifest["results"][self.setting]["alpha"]

    @property
    def boundary(self) -> dict[str, float | None]:
        """Median retrieval onset, in layers: {value, lo, hi}."""
        return self.manifest["results"][self.setting]["boundary"]

    @property
    def stability(self) -> pd.DataFrame:
        """One row per layer: phase, stability, stability_lo, stability_hi, readiness, rank, ..."""
        from xprobe.phases.tables import stability_table

        return stability_table(self.layers, self.setting)

    @property
    def signals(self) -> pd.DataFrame:
        """value, lo, hi and n of every signal, by (signal, language, layer); ``all`` for the pooled rows."""
        part = self.layers[self.layers["setting"] == self.setting]
        return part.set_index(["signal", "language", "layer"])[["value", "lo", "hi", "n"]].sort_index()

    @property
    def boundaries(self) -> pd.DataFrame:
        """One row per language: boundary, relative_boundary, spread, phased_fraction, encoding_depth, encoding_peak,
        each with _lo and _hi; phase_order with _share; n, without_onset."""
        import pandas as pd

        rows: dict[str, dict[str, Any]] = {}
        for language, entry in self.manifest["results"][self.setting]["languages"].items():
            row = rows.setdefault(language, {})
            for name, value in entry.items():
                parts = value if isinstance(value, dict) else {"value": value}
                row |= {name if part == "value" else f"{name}_{part}": number for part, number in parts.items()}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("language")

    @property
    def probes(self) -> pd.DataFrame:
        """One row per probe, state and layer: metric, score with interval, baseline, control, selectivity."""
        part = self.all_probes[self.all_probes["setting"] == self.setting]
        return part.drop(columns="setting").set_index(["probe", "state", "layer"]).sort_index()

    def to_dict(self) -> dict[str, Any]:
        """What ``xprobe run --json`` prints: plain values; None where a figure could not be computed."""
        manifest = self.manifest
        summaries = {setting: self.of(setting)._summary() for setting in self.settings}
        first = summaries.pop(self.setting)
        return {
            "run_dir": str(self.path),
            "model": manifest["model"]["name"],
            "settings": list(self.settings),
            "phase_definition": manifest["phase_definition"],
            "parity_error": manifest["parity_error"],
            "counts": manifest["counts"],
            "timings": manifest["timings"],
            "setting": self.setting,
            **first,
            "other_settings": summaries,
        }

    def _summary(self) -> dict[str, Any]:
        entry = self.manifest["results"][self.setting]
        table = self.stability.reset_index()
        layers = [
            {name: (None if value != value else value) for name, value in row.items()}
            for row in table.to_dict("records")
        ]
        return {**{k: v for k, v in entry.items() if k != "n"}, "layers": layers}

    def __repr__(self) -> str:
        value = self.alpha["value"]
        alpha = "undefined" if value is None else f"{value:.3f}"
        return (
            f"Study({str(self.path)!r}: {self.manifest['model']['name']}, {self.setting}, "
            f"{self.manifest['counts']['examples']} examples, boundary {self.boundary['value']}, alpha {alpha})"
        )

    def _repr_html_(self) -> str:
        from html import escape

        return f"<p><code>{escape(repr(self))}</code></p>{self.stability.to_html(float_format='{:.3f}'.format)}"


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
    folder = RunFolder.open(Path(path))
    manifest = folder.read_finished()
    tables = read_tables(folder, manifest)
    without = sorted(set(manifest["results"]) - set(tables[0]["setting"]))
    if without:
        raise RunFolderError(
            f"{folder.path / MANIFEST}: entry results names a setting that {LAYERS} does not hold ({without[0]}); "
            f"{folder.resume_command} writes it again"
        )
    return Study(folder.path, manifest, *tables)


def read_tables(folder: RunFolder, manifest: dict[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The tables of a finished run: layers, examples, probes (empty if none was trained).

    Raises
    ------
    RunFolderError
        A table is missing, cannot be read, or is not the one that this run wrote.
    """
    import pandas as pd

    from xprobe.config import EXAMPLE_COLUMNS, LAYER_COLUMNS, PROBE_COLUMNS

    digests = manifest.get("tables", {})
    names = table_names(manifest)
    unknown = [name for name in names if name not in digests]
    if unknown:
        raise RunFolderError(
            f"{folder.path / MANIFEST} holds no checksum of {', '.join(unknown)}: another version of xprobe wrote it; "
            f"{folder.resume_command} writes the tables and their checksums again from the shards"
        )
    layers, examples, *probes = (folder.read_table(name, digests[name]) for name in names)
    columns = {LAYERS: LAYER_COLUMNS, EXAMPLES: EXAMPLE_COLUMNS, PROBE_TABLE: PROBE_COLUMNS}
    for name, table in zip(names, (layers, examples, *probes), strict=True):
        lacking = [column for column in columns[name] if column not in table]
        if lacking:
            raise RunFolderError(
                f"{folder.path / name} has no column {lacking[0]!r}: it is not a table of this version of xprobe; "
                f"{folder.resume_command} writes it again from the shards"
            )
    return layers, examples, probes[0] if probes else pd.DataFrame(columns=list(PROBE_COLUMNS))


def table_names(manifest: dict[str, Any]) -> list[str]:
    """File names of the tables that a run with this manifest has."""
    return [LAYERS, EXAMPLES, *([PROBE_TABLE] if manifest["probes"] else [])]
