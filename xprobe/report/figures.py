"""``study.plot``: the figures of a run for papers. Each method takes the tables of a run and draws one figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xprobe.arguments import check_least, folder_path, text_names
from xprobe.errors import UnknownNameError, UsageError
from xprobe.report import figure_panels as draw
from xprobe.report.figure_style import (
    COLUMN,
    SAVED,
    STYLE,
    TICKS,
    TWO_COLUMNS,
    check_matplotlib,
    fix_layout,
    label_points,
    panels,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from xprobe.results import SettingResult, Study

    AxesArray = NDArray[np.object_]

# figure -> the stage that it needs
FIGURES = {
    "stability": "phases",
    "signals": "phases",
    "onsets": "phases",
    "agreement": "phases",
    "boundaries": "phases",
    "causes": "patching",
    "relevance": "relevance",
    "performance": "answers",
    "probes": "probes",
}
DEFAULT_SIGNALS = ("readiness", "encoding_selectivity")


@dataclass(frozen=True, repr=False)
class Plots:
    """The figures of one setting of a run: ``study.plot``, or ``study["x-x"].plot`` if there are several settings.

    A method whose figure has one panel returns matplotlib's Axes, and draws into ``ax`` if it is given. A method whose
    figure has several panels returns an array of Axes, from left to right or from top to bottom, and draws into the
    sequence ``axes`` if it is given. New figures fit a paper: 3.3 in wide (one column) or 7 in (two columns). Figures
    need matplotlib: ``pip install 'xprobe[plot]'``. Its settings are the same before and after.

    Examples
    --------
    >>> import xprobe
    >>> study = xprobe.load_study("runs/demo")                    # doctest: +SKIP
    >>> axes = study.plot.stability()                             # doctest: +SKIP
    >>> axes.figure.savefig("stability.pdf")                      # doctest: +SKIP
    >>> study.plot.save("figures")                                # doctest: +SKIP
    """

    study: Study
    setting: str | None = None
    pyplot: bool = True  # new figures belong to pyplot

    def __repr__(self) -> str:
        return f"Plots({', '.join(self.available)})"

    @property
    def available(self) -> tuple[str, ...]:
        """Names of the figures for which the run has what they need.

        Examples
        --------
        >>> study.plot.available                                  # doctest: +SKIP
        ('stability', 'signals', 'onsets', 'agreement', 'boundaries', 'probes')
        """
        stages, layers = self.study.manifest.stages, self.study.layers
        without = set() if (layers["signal"] == "agreement_en").any() else {"agreement"}
        return tuple(name for name, stage in FIGURES.items() if stage in stages and name not in without)

    @property
    def _result(self) -> SettingResult:
        return self.study[self.setting] if self.setting is not None else self.study._only

    @property
    def _layers(self) -> Any:
        layers = self.study.layers
        return layers[layers["setting"] == self._result.setting]

    @property
    def _n_blocks(self) -> int:
        return self.study.manifest.model.n_blocks

    def _by_language_height(self, least: float = 1.1) -> float:
        """Height of a figure with a row for each language, in inches."""
        return least + 0.19 * len(self._result.summary["languages"])

    def stability(self, ax: Axes | None = None) -> Axes:
        """Phase stability S(l) with its interval, the boundary with its interval, and each language's agreement with
        English.

        Examples
        --------
        >>> study.plot.stability()                                # doctest: +SKIP
        """
        with panels(1, (COLUMN, 2.3), ax, pyplot=self.pyplot) as (axes,):
            draw.draw_stability(axes, self._layers, self._result.summary, self._n_blocks)
        return axes

    def signals(self, *names: str, axes: Sequence[Axes] | None = None) -> AxesArray:
        """A panel for each signal: all languages with interval, each language in the background.

        Parameters
        ----------
        *names : str
            Signals of ``layers.parquet``. By default readiness and encoding beyond its control, as far as the run has
            them.
        axes : sequence of Axes, optional
            One for each signal.

        Raises
        ------
        UsageError
            The run has no such signal.

        Examples
        --------
        >>> study.plot.signals()                                  # doctest: +SKIP
        >>> study.plot.signals("rank", "entropy")                 # doctest: +SKIP
        """
        layers, summary = self._layers, self._result.summary
        known = [name for name in dict.fromkeys(layers["signal"]) if name not in ("stability", "agreement_en")]
        names = names or tuple(name for name in DEFAULT_SIGNALS if name in known)
        for name in names:
            if name not in known:
                raise UnknownNameError(f"this run has no signal {name!r}; it has {', '.join(known)}")
        size = (COLUMN if len(names) == 1 else max(TWO_COLUMNS, 2.4 * len(names)), 2.3)
        with panels(len(names), size, axes, pyplot=self.pyplot) as drawn:
            for one, name in zip(drawn, names, strict=True):
                draw.draw_signal(one, layers, name, summary, self._n_blocks)
        return _array(drawn)

    def onsets(self, ax: Axes | None = None) -> Axes:
        """The distribution of the retrieval onsets in each language, with the median. Examples without onset are left
        out.

        Examples
        --------
        >>> study.plot.onsets()                                   # doctest: +SKIP
        """
        with panels(1, (COLUMN, self._by_language_height()), ax, pyplot=self.pyplot) as (axes,):
            draw.draw_onsets(axes, self._result.examples, self._result.summary, self._n_blocks)
        return axes

    def agreement(self, ax: Axes | None = None) -> Axes:
        """A map of languages by layers: the share of questions that are in the same phase as in English.

        Raises
        ------
        UsageError
            The run does not have questions in English and in another language.

        Examples
        --------
        >>> study.plot.agreement()                                # doctest: +SKIP
        """
        if not (self._layers["signal"] == "agreement_en").any():
            raise UsageError(
                f"the run in {self.study.path} has no agreement with English: it needs questions in English and in "
                "another language"
            )
        with panels(1, (COLUMN, self._by_language_height()), ax, pyplot=self.pyplot) as (axes,):
            draw.draw_agreement(axes, self._layers, self._result.summary, self._n_blocks)
        return axes

    def boundaries(self, ax: Axes | None = None) -> Axes:
        """Layers by language, with intervals: encoding depth and retrieval onset; the causal boundaries if the run was
        patched.

        Examples
        --------
        >>> study.plot.boundaries()                               # doctest: +SKIP
        """
        patched = None
        if "patching" in self.study.manifest.stages:
            patched = self.study.manifest.stages["patching"].results["settings"].get(self._result.setting, {})
            patched = patched.get("same")
        rows = len(self._result.summary["languages"]) + 1
        height = 1.0 + 0.19 * rows if patched is None else 1.2 + 0.26 * rows
        with panels(1, (COLUMN, height), ax, pyplot=self.pyplot) as (axes,):
            draw.draw_boundaries(axes, self._result.summary, patched, self._n_blocks)
        return axes

    def causes(self, axes: Sequence[Axes] | None = None) -> AxesArray:
        """Effects of patches by layer (T and Q), and below them readiness and encoding, as they can be read.

        Raises
        ------
        UsageError
            The run was not patched.

        Examples
        --------
        >>> effects, read = study.plot.causes()                   # doctest: +SKIP
        """
        _ = self.study.patching  # says how to compute it
        curves = self.study.table("patching_by_layer.parquet")
        with panels(2, (COLUMN, 4.3), axes, stacked=True, pyplot=self.pyplot) as drawn:
            draw.draw_effects(drawn[0], curves[curves["setting"] == self._result.setting], self._n_blocks)
            draw.draw_read(drawn[1], self._layers, self._result.summary, self._n_blocks)
        if axes is None:
            drawn[0].set_xlabel("")  # the panels share the layers
        return _array(drawn)

    def relevance(self, axes: Sequence[Axes] | None = None) -> AxesArray:
        """The share of the relevance of each group of tokens by layer, and the groups' major relevance depths.

        Raises
        ------
        UsageError
            The run has no relevance.

        Examples
        --------
        >>> shares, depths = study.plot.relevance()               # doctest: +SKIP
        """
        _ = self.study.relevance
        shares = self.study.table("relevance_by_layer.parquet")
        summary = self.study.manifest.stages["relevance"].results["settings"][self._result.setting]
        with panels(2, (TWO_COLUMNS, 2.6), axes, pyplot=self.pyplot) as drawn:
            draw.draw_shares(drawn[0], shares[shares["setting"] == self._result.setting], self._n_blocks)
            draw.draw_depths(drawn[1], summary, self._n_blocks)
        return _array(drawn)

    def performance(self, axes: Sequence[Axes] | None = None) -> AxesArray:
        """F1 of each language over its retrieval onset, and over its agreement with English at the boundary; and the
        error types by language.

        Raises
        ------
        UsageError
            The run was not evaluated.

        Examples
        --------
        >>> over_onset, over_agreement, errors = study.plot.performance()    # doctest: +SKIP
        """
        _ = self.study.answers
        answers = self.study.manifest.stages["answers"].results["settings"][self._result.setting]["languages"]
        f1 = {language: entry["f1"] for language, entry in answers.items()}
        summary, layers = self._result.summary, self._layers
        onsets = {language: entry["boundary"] for language, entry in summary["languages"].items()}
        boundary = summary["boundary"]["value"]
        layer = self._n_blocks if boundary is None else math.ceil(boundary)
        part = layers[(layers["signal"] == "agreement_en") & (layers["layer"] == layer)].set_index("language")
        agreement = {str(name): row.to_dict() for name, row in part[["value", "lo", "hi"]].iterrows()}
        with panels(3, (TWO_COLUMNS, 2.5), axes, pyplot=self.pyplot) as drawn:
            points = (
                draw.draw_performance(drawn[0], onsets, f1, "median retrieval onset (layer)", whole=True),
                draw.draw_performance(drawn[1], agreement, f1, f"agreement with English\nat layer {layer} (share)"),
            )
            drawn[1].set_ylim(drawn[0].get_ylim())
            draw.draw_error_types(drawn[2], {language: entry["error_types"] for language, entry in answers.items()})
            fix_layout(drawn[0].figure)
            for one, labelled in zip(drawn[:2], points, strict=True):
                label_points(one, labelled)
        return _array(drawn)

    def probes(self, axes: Sequence[Axes] | None = None) -> AxesArray:
        """A panel for each probe: its score by layer on both states, with intervals, beside its control task.

        Raises
        ------
        UsageError
            The run has no probes.

        Examples
        --------
        >>> study.plot.probes()                                   # doctest: +SKIP
        """
        if "probes" not in self.study.manifest.stages:
            raise UsageError(
                f"the run in {self.study.path} has no probes: `xprobe probe {self.study.path}` trains them"
            )
        table = self._result.probes.reset_index()
        names = list(dict.fromkeys(table["probe"]))
        size = (TWO_COLUMNS if len(names) > 1 else COLUMN, 2.5)
        with panels(len(names), size, axes, pyplot=self.pyplot) as drawn:
            for one, name in zip(drawn, names, strict=True):
                draw.draw_probe(one, table[table["probe"] == name], self._n_blocks)
                one.set_title(name)
            handles, labels = drawn[0].get_legend_handles_labels()
            if axes is None:
                drawn[0].figure.legend(handles, labels, loc="outside upper center", ncols=2 * min(2, len(names)))
            else:
                drawn[0].legend(handles, labels, fontsize="small")
        return _array(drawn)

    def save(
        self, folder: str | Path, formats: str | Sequence[str] = ("pdf",), *, names: Sequence[str] | None = None,
        dpi: int = 300,
    ) -> list[Path]:  # fmt: skip
        """Writes figures into a folder: all settings of the run, all figures that it has the stages for.

        Parameters
        ----------
        folder : path
            Made if it is not there. Files of the same names are replaced.
        formats : str or sequence of str
            "pdf", "svg", "png" or what else matplotlib writes.
        names : sequence of str, optional
            Methods of this class, such as "stability". By default those in ``available``.
        dpi : int
            Of formats made of pixels.

        Returns
        -------
        list of Path
            ``stability.pdf``, ...; with several settings ``stability_en-x.pdf``, ...

        Raises
        ------
        UsageError
            A format or a name is unknown, or the run lacks the stage of a figure that was asked for.

        Examples
        --------
        >>> study.plot.save("figures", formats=("pdf", "png"))    # doctest: +SKIP
        """
        check_matplotlib()
        from matplotlib import rc_context
        from matplotlib.backend_bases import FigureCanvasBase

        place, kinds = folder_path("folder", folder), text_names("formats", formats)
        wanted = self.available if names is None else text_names("names", names)
        check_least("dpi", dpi, 1)
        for given, known, what in ((kinds, FigureCanvasBase.filetypes, "format"), (wanted, FIGURES, "figure")):
            for name in given:
                if name not in known:
                    raise UnknownNameError(f"there is no {what} {name!r}; there are {', '.join(known)}")
        settings = self.study.settings if self.setting is None else (self.setting,)
        place.mkdir(parents=True, exist_ok=True)
        written = []
        for name in wanted:
            for setting in settings:
                drawn = getattr(replace(self, setting=setting, pyplot=False), name)()
                stem = name if len(self.study.settings) == 1 else f"{name}_{setting}"
                for kind in kinds:
                    path = place / f"{stem}.{kind}"
                    with rc_context(SAVED):
                        _figure(drawn).savefig(path, dpi=dpi)
                    written.append(path)
        return written


def _array(drawn: Sequence[Axes]) -> AxesArray:
    import numpy as np

    array = np.empty(len(drawn), dtype=object)
    array[:] = drawn
    return array


def _figure(drawn: Any) -> Any:
    return (drawn if not hasattr(drawn, "ravel") else drawn.ravel()[0]).figure


def save_causes(study: Study, path: Path) -> None:
    """The picture of `xprobe patch --figure`: a row for each setting, with effects, what is read, and boundaries.

    Raises
    ------
    UsageError
        The run was not patched, or matplotlib is not installed.

    Examples
    --------
    >>> save_causes(study, Path("causes.png"))                    # doctest: +SKIP
    """
    check_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE | SAVED):
        height = 1.6 + 0.25 * max(len(result.summary["languages"]) for result in study.values())
        figure = Figure(figsize=(3 * COLUMN, height * len(study)), layout="constrained")
        grid = figure.subplots(len(study), 3, squeeze=False)
        for (setting, plots), row in zip(((name, Plots(study, name)) for name in study), grid, strict=True):
            for axes in row:
                axes.tick_params(**TICKS)
            plots.causes(axes=row[:2])
            plots.boundaries(ax=row[2])
            row[0].annotate(setting, (0, 1), (-34, 8), "axes fraction", "offset points", ha="left", weight="bold")
        figure.savefig(path, dpi=200)
