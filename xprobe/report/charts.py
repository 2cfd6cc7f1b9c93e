"""The charts of the page, as Vega-Lite specifications: plain dictionaries with their data inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xprobe.report.palette import BLACK, BLUE, GREY, MAP, ORANGE, SERIES

Spec = dict[str, Any]
Row = Mapping[str, Any]
Rows = Sequence[Row]

INK = "currentColor"  # the page is light or dark
DASHES = ((1, 0), (6, 3), (2, 2), (8, 3, 2, 3), (10, 4), (4, 2), (3, 5))
HEIGHT = 240
ROW_HEIGHT = 22  # of a language in a chart with one row for each


def spec(height: int | Mapping[str, int], **parts: Any) -> Spec:
    """What all charts share: they take the width of the page, and leave colours of text and axes to its style."""
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",  # a name; nothing is fetched
        "width": "container", "height": height, "background": None,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "config": {
            "font": "system-ui, sans-serif", "aria": False, "view": {"stroke": None},
            "axis": {"titleFontWeight": 500, "labelFontSize": 11, "titleFontSize": 12, "grid": False},
            "axisY": {"grid": True, "domain": False, "ticks": False},
            "legend": {"orient": "top", "title": None, "labelFontSize": 12, "labelLimit": 320, "columns": 2,
                       "symbolOpacity": 1},
        },
        **parts,
    }  # fmt: skip


def layer_axis() -> Spec:
    return {"field": "layer", "type": "quantitative", "title": "layer", "axis": {"tickMinStep": 1},
            "scale": {"nice": False}}  # fmt: skip


def depth_axis() -> Spec:
    return {"field": "depth", "type": "quantitative", "title": "depth (layer / layers)", "scale": {"domain": [0, 1]}}


def _scale(names: Sequence[str], colours: Mapping[str, str] | None = None) -> Spec:
    """A colour for each name: that in ``colours``, or else the next of ``SERIES``."""
    own = colours or {}
    found = [own.get(name, SERIES[place % len(SERIES)]) for place, name in enumerate(names)]
    return {"domain": list(names), "range": [INK if colour == BLACK else colour for colour in found]}


def lines(
    rows: Rows, series: Sequence[str], y_title: str, *, colours: Mapping[str, str] | None = None,
    domain: Sequence[float] | None = None,
    mark: Mapping[str, float | None] | None = None, mark_name: str = "",
    depth: bool = False,
) -> Spec:  # fmt: skip
    """Lines over layers with their intervals.

    Parameters
    ----------
    rows : sequence of mapping
        layer, series, value; lo and hi where there is an interval.
    series : sequence of str
        In the order of colours and dashes.
    y_title : str
        What is measured, with its unit.
    colours : mapping, optional
        Of the series; those that it lacks take the next colour of the palette.
    domain : (float, float), optional
        What lies outside is cut off.
    mark : {value, lo, hi}, optional
        A layer to mark, with its interval.
    mark_name : str
        What the mark says when it is pointed at.
    depth : bool
        The rows have ``depth``, a share of all layers, in place of ``layer``.
    """
    colour = {
        "field": "series", "type": "nominal", "sort": list(series),
        "scale": _scale(series, colours),
        "legend": {"symbolType": "stroke"},
    }  # fmt: skip
    dash = colour | {
        "scale": {"domain": list(series), "range": [list(DASHES[i % len(DASHES)]) for i in range(len(series))]}
    }
    y_scale = {} if domain is None else {"domain": list(domain)}
    y = {"field": "value", "type": "quantitative", "title": y_title, "scale": y_scale}
    band = {"y": y | {"field": "lo"}, "y2": {"field": "hi"}}
    tip = [
        {"field": "series", "title": "series"}, {"field": "depth" if depth else "layer"},
        *({"field": name, "title": name, "format": ".3f"} for name in ("value", "lo", "hi")),
    ]  # fmt: skip
    layers = _mark(mark, mark_name)
    layers += [
        {
            "transform": [{"filter": "isValid(datum.lo)"}],
            "mark": {"type": "area", "opacity": 0.16, "clip": True}, "encoding": band | {"color": colour},
        },
        {
            "mark": {"type": "line", "strokeWidth": 2, "clip": True},
            "encoding": {"y": y, "color": colour, "strokeDash": dash},
        },
        {
            "params": [_nearest("point")],
            "mark": {"type": "point", "filled": True, "size": 55, "clip": True},
            "encoding": {
                "y": y, "color": colour, "tooltip": tip,
                "opacity": {"condition": {"param": "point", "empty": False, "value": 1}, "value": 0},
            },
        },
    ]  # fmt: skip
    return spec(
        HEIGHT, data={"values": list(rows)}, encoding={"x": depth_axis() if depth else layer_axis()}, layer=layers
    )


def by_language(
    rows: Rows, y_title: str, *, colour: str = BLUE, domain: Sequence[float] | None = None, pooled: str = "all"
) -> Spec:
    """A line for each language over layers, thin and grey but for the one that is pointed at; the pooled one is thick.
    English is dashed.

    ``rows`` have layer, language and value; the pooled ones also lo and hi.
    """
    y = {
        "field": "value",
        "type": "quantitative",
        "title": y_title,
        "scale": {} if domain is None else {"domain": list(domain)},
    }
    over, english = {"param": "over", "empty": False}, {"test": "datum.language === 'en'"}
    tip = [{"field": "language"}, {"field": "layer"}, {"field": "value", "format": ".3f"}]
    single, together = f"datum.language !== '{pooled}'", f"datum.language === '{pooled}'"
    return spec(
        HEIGHT, data={"values": list(rows)}, encoding={"x": layer_axis(), "y": y},
        layer=[
            {
                "transform": [{"filter": together}], "mark": {"type": "area", "opacity": 0.18, "color": colour},
                "encoding": {"y": {"field": "lo", "type": "quantitative", "title": y_title}, "y2": {"field": "hi"}},
            },
            {
                "transform": [{"filter": single}], "mark": {"type": "line"},
                "encoding": {
                    "detail": {"field": "language"},
                    "color": {"condition": [over | {"value": ORANGE}, english | {"value": INK}], "value": GREY},
                    "strokeDash": {"condition": english | {"value": [4, 3]}, "value": [1, 0]},
                    "size": {"condition": over | {"value": 2.5}, "value": 1},
                    "opacity": {"condition": over | {"value": 1}, "value": 0.6},
                },
            },
            {
                "transform": [{"filter": single}],
                "params": [{
                    "name": "over",
                    "select": {"type": "point", "on": "pointerover", "nearest": True, "fields": ["language"],
                               "clear": "pointerout"},
                }],
                "mark": {"type": "point", "opacity": 0}, "encoding": {"tooltip": tip},
            },
            {
                "transform": [{"filter": together}],
                "mark": {"type": "line", "color": colour, "strokeWidth": 3}, "encoding": {},
            },
        ],
    )  # fmt: skip


def grid(rows: Rows, languages: Sequence[str], title: str, *, domain: Sequence[float] = (0, 1)) -> Spec:
    """A map of layers and languages; ``rows`` have layer, language, value and n."""
    return spec(
        ROW_HEIGHT * len(languages), data={"values": list(rows)}, mark={"type": "rect"},
        encoding={
            "x": {"field": "layer", "type": "ordinal", "title": "layer",
                  "axis": {"labelAngle": 0, "labelOverlap": "greedy", "labelSeparation": 6}},
            "y": _language_axis(languages),
            "color": {
                "field": "value", "type": "quantitative", "title": title,
                "scale": {"scheme": MAP, "domain": list(domain)},
                "legend": {"title": title, "gradientLength": 160, "orient": "top"},
            },
            "tooltip": [
                {"field": "language"}, {"field": "layer"}, {"field": "value", "title": title, "format": ".3f"},
                {"field": "n"},
            ],
        },
    )  # fmt: skip


def cells(rows: Rows, languages: Sequence[str], models: Sequence[str], title: str) -> Spec:
    """A map of languages and models; ``rows`` have model, language, value and n."""
    return spec(
        ROW_HEIGHT * len(models), data={"values": list(rows)}, mark={"type": "rect"},
        encoding={
            "x": {"field": "language", "type": "nominal", "title": None, "sort": list(languages),
                  "axis": {"labelAngle": 0}},
            "y": {"field": "model", "type": "nominal", "title": None, "sort": list(models), "axis": {"grid": False}},
            "color": {
                "field": "value", "type": "quantitative", "title": title, "scale": {"scheme": MAP, "zero": False},
                "legend": {"title": title, "gradientLength": 160, "orient": "top"},
            },
            "tooltip": [
                {"field": "model"}, {"field": "language"}, {"field": "value", "title": title, "format": ".3f"},
                {"field": "n"},
            ],
        },
    )  # fmt: skip


def intervals(
    rows: Rows, languages: Sequence[str], series: Sequence[str], last: int, colours: Mapping[str, str]
) -> Spec:
    """Points with intervals on the axis of layers, a row for each language; ``rows`` have language, series, value."""
    shapes = ("circle", "square", "diamond", "triangle-up", "cross")
    colour = {"field": "series", "type": "nominal", "sort": list(series),
              "scale": _scale(series, colours)}  # fmt: skip
    shape = colour | {"scale": {"domain": list(series), "range": list(shapes[: len(series)])}}
    step = max(ROW_HEIGHT, 9 * len(series))
    shared = {"y": _language_axis(languages), "yOffset": {"field": "series", "sort": list(series)}, "color": colour}
    tip = [{"field": "language"}, {"field": "series", "title": "quantity"}] + [
        {"field": name, "title": name, "format": ".2f"} for name in ("value", "lo", "hi")
    ]
    x = {"type": "quantitative", "title": "layer", "scale": {"domain": [0, last], "nice": False}}
    return spec(
        step * len(languages), data={"values": list(rows)},
        layer=[
            {"transform": [{"filter": "isValid(datum.lo)"}], "mark": {"type": "rule", "strokeWidth": 1.5},
             "encoding": shared | {"x": x | {"field": "lo"}, "x2": {"field": "hi"}}},
            {"mark": {"type": "point", "filled": True, "size": 60},
             "encoding": shared | {"x": x | {"field": "value"}, "shape": shape, "tooltip": tip}},
        ],
    )  # fmt: skip


def scatter(rows: Rows, x: str, x_title: str, y: str, y_title: str, label: str = "language") -> Spec:
    """A labelled point for each row; ``rows`` have the fields ``label``, ``x`` and ``y``."""
    axes = {
        "x": {"field": x, "type": "quantitative", "title": x_title, "scale": {"zero": False, "padding": 50}},
        "y": {"field": y, "type": "quantitative", "title": y_title, "scale": {"zero": False, "padding": 25}},
    }
    tip = [{"field": label}, {"field": x, "title": x_title, "format": ".3f"},
           {"field": y, "title": y_title, "format": ".3f"}]  # fmt: skip
    return spec(
        HEIGHT, data={"values": list(rows)}, encoding=axes,
        layer=[
            {"mark": {"type": "point", "filled": True, "size": 70, "color": BLUE}, "encoding": {"tooltip": tip}},
            {"mark": {"type": "text", "dy": -11, "fontSize": 11},
             "encoding": {"text": {"field": label}}},
        ],
    )  # fmt: skip


def shares(rows: Rows, languages: Sequence[str], parts: Sequence[str], title: str, colours: Mapping[str, str]) -> Spec:
    """Stacked bars that add up to 1; ``rows`` have language, part and value."""
    return spec(
        ROW_HEIGHT * len(languages), data={"values": list(rows)},
        mark={"type": "bar", "stroke": "#ffffff", "strokeWidth": 0.5},
        encoding={
            "x": {"field": "value", "type": "quantitative", "title": title, "stack": "zero",
                  "scale": {"domain": [0, 1]}},
            "y": _language_axis(languages),
            "color": {"field": "part", "type": "nominal", "sort": list(parts),
                      "scale": _scale(parts, colours)},
            "order": {"field": "order"},
            "tooltip": [{"field": "language"}, {"field": "part", "title": "type"}, {"field": "value", "format": ".1%"}],
        },
    )  # fmt: skip


def _language_axis(languages: Sequence[str]) -> Spec:
    return {"field": "language", "type": "nominal", "title": None, "sort": list(languages),
            "axis": {"grid": False}}  # fmt: skip


def _nearest(name: str) -> Spec:
    return {
        "name": name,
        "select": {"type": "point", "on": "pointerover", "nearest": True, "clear": "pointerout"},
    }


def _mark(found: Mapping[str, float | None] | None, name: str) -> list[Spec]:
    if found is None or found["value"] is None:
        return []
    lo, hi = (found[end] if found[end] is not None else found["value"] for end in ("lo", "hi"))
    said = f"{name} {found['value']:g} [{lo:.3g}, {hi:.3g}]"
    data = {"values": [{"value": found["value"], "lo": lo, "hi": hi, "name": said}]}
    x = {"type": "quantitative", "title": "layer"}
    tip = {"field": "name", "title": " "}
    return [
        {"data": data, "mark": {"type": "rect", "opacity": 0.12, "color": GREY},
         "encoding": {"x": x | {"field": "lo"}, "x2": {"field": "hi"}, "tooltip": tip}},
        {"data": data, "mark": {"type": "rule", "strokeDash": [4, 3], "strokeWidth": 1.5, "color": GREY},
         "encoding": {"x": x | {"field": "value"}, "tooltip": tip}},
    ]  # fmt: skip
