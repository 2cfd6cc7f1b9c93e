"""A finished study: the same object fresh from ``run`` and read back from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xprobe.errors import RunFolderError, UsageError
from xprobe.store import EXAMPLES, LAYERS, RunFolder

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
    """

    path: Path
    manifest: dict[str, Any]
    layers: pd.DataFrame
    examples: pd.DataFrame

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
        return Study(self.path, {**self.manifest, "results": reordered}, self.layers, self.examples)

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
        from xprobe.report.tables import stability_table

        return stability_table(self.layers, self.setting)

    @property
    def languages(self) -> pd.DataFrame:
        """One row per language: boundary with interval, relative boundary, spread, phased fraction, n."""
        import pandas as pd

        rows = {}
        for language, entry in self.manifest["results"][self.setting]["languages"].items():
            flat = {k: v for k, v in entry.items() if k != "boundary"}
            bounds = entry["boundary"]
            rows[language] = {"boundary": bounds["value"], "lo": bounds["lo"], "hi": bounds["hi"], **flat}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("language")

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
        The run is not finished, or its files cannot be read.
    """
    folder = RunFolder.open(Path(path))
    manifest = folder.read_run()
    if manifest.get("status") != "done":
        raise RunFolderError(f"the run in {path} is not finished ({manifest.get('status')}): continue it with --resume")
    return Study(folder.path, manifest, folder.read_table(LAYERS), folder.read_table(EXAMPLES))
