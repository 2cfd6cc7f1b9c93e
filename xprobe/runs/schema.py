"""Rules for the entries of a manifest. They are checked before anything reads it."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from xprobe.config import MAX_SEED, Execution, StudyConfig
from xprobe.errors import XprobeError
from xprobe.runs.identity import checksum_of
from xprobe.runs.manifest import Manifest

RESULTS_SHA256 = "results_sha256"  # entry of a stage: checksum of its results
STAGE_SHA256 = "stage_sha256"  # entry of a stage: checksum of all its other entries

_LARGEST = 2**53  # whole numbers up to here are exact in every JSON reader, and fit an int64
_SHOWN = 60  # characters of a wrong value in a message


@dataclass(frozen=True)
class Value:
    """A value without names inside: ``words`` completes "must be"."""

    words: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class Entries:
    """An object with known names. Names that are in neither table are allowed: a later version may have added them.

    ``others``: the rule that such names follow, if they must follow one.
    """

    needed: Mapping[str, Rule]
    optional: Mapping[str, Rule] = field(default_factory=dict)
    others: Rule | None = None


@dataclass(frozen=True)
class Every:
    """An object with any names, whose values all follow one rule."""

    rule: Rule
    filled: bool = False


@dataclass(frozen=True)
class Depending:
    """A rule that depends on the names that an object holds."""

    choose: Callable[[set[str]], Rule]


@dataclass(frozen=True)
class Items:
    """A list whose items all follow one rule."""

    rule: Rule


Rule = Value | Entries | Every | Depending | Items


def complaint(value: Any, rule: Rule, name: str = "") -> str | None:
    """The first thing that is wrong with ``value``; None if nothing is.

    Examples
    --------
    >>> complaint({"n_blocks": "six"}, Entries({"n_blocks": whole(1, 100)}), "model")
    'entry model.n_blocks must be a whole number from 1 to 100, is "six"'
    >>> complaint({}, Entries({"n_blocks": whole(1, 100)}), "model")
    'entry model.n_blocks must be a whole number from 1 to 100, is missing'
    >>> complaint({"n_blocks": 6, "new": None}, Entries({"n_blocks": whole(1, 100)}), "model")
    """
    if isinstance(rule, Depending):
        return complaint(value, rule.choose(set(value) if isinstance(value, dict) else set()), name)
    if isinstance(rule, Value):
        return None if rule.fits(value) else _wrong(name, rule, _shown(value))
    if isinstance(rule, Items):
        if not isinstance(value, list):
            return _wrong(name, rule, _shown(value))
        checked = (complaint(item, rule.rule, f"{name}[{index}]") for index, item in enumerate(value))
        return next((wrong for wrong in checked if wrong is not None), None)
    inside = f"{name}." if name else ""
    if not isinstance(value, dict) or (isinstance(rule, Every) and rule.filled and not value):
        return _wrong(name, rule, _shown(value))
    if isinstance(rule, Every):
        pairs = [(key, rule.rule) for key in value]
    else:
        missing = [key for key in rule.needed if key not in value]
        if missing:
            return _wrong(inside + missing[0], rule.needed[missing[0]], "missing")
        known = {**rule.needed, **rule.optional}
        pairs = [(key, some) for key, some in known.items() if key in value]
        if rule.others is not None:
            pairs += [(key, rule.others) for key in value if key not in known]
    checked = (complaint(value[key], some, f"{inside}{key}") for key, some in pairs)
    return next((wrong for wrong in checked if wrong is not None), None)


def _wrong(name: str, rule: Rule, what: str) -> str:
    if isinstance(rule, Value):
        words = rule.words
    elif isinstance(rule, Items):
        words = "a list"
    else:
        words = "an object that is not empty" if isinstance(rule, Every) and rule.filled else "an object"
    return f"entry {name} must be {words}, is {what}"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


_HEX = frozenset("0123456789abcdef")

# -- values -------------------------------------------------------------------------------------------------------


def whole(least: int, most: int = _LARGEST) -> Value:
    """A whole number; true and false are none."""
    return Value(f"a whole number from {least} to {most}", lambda v: type(v) is int and least <= v <= most)


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300  # False for NaN


TEXT = Value("text", lambda v: isinstance(v, str) and "\0" not in v)
MAYBE_TEXT = Value("text or null", lambda v: v is None or TEXT.fits(v))
COUNT = whole(0)
NUMBER = Value("a number", _finite)
POSITIVE = Value("a number above 0", lambda v: _finite(v) and v > 0)
SECONDS = Value("a number of at least 0", lambda v: _finite(v) and v >= 0)
MAYBE = Value("a number or null", lambda v: v is None or _finite(v))
SHARE = Value("a number from 0 to 1", lambda v: _finite(v) and 0 <= v <= 1)
MAYBE_SHARE = Value("a number from 0 to 1, or null", lambda v: v is None or SHARE.fits(v))
ORDER = Value("0, 1 or null", lambda v: v is None or (_finite(v) and v in (0, 1)))
DIGEST = Value("a SHA-256 in hexadecimal", lambda v: isinstance(v, str) and len(v) == 64 and set(v) <= _HEX)
TEXTS = Value("a list of texts", lambda v: isinstance(v, list) and all(map(TEXT.fits, v)))
NAMES = Value(
    "a list of different texts that is not empty", lambda v: TEXTS.fits(v) and len(v) > 0 and len(set(v)) == len(v)
)
STATUS = Value('"running" or "done"', lambda v: v in ("running", "done"))


def _field_rules(kind: type) -> dict[str, Rule]:
    hints = get_type_hints(kind)
    return {f.name: Value(_in_words(hints[f.name]), _fitting(hints[f.name])) for f in fields(kind)}


def _fitting(hint: Any) -> Callable[[Any], bool]:
    return lambda value: _is_of(value, hint)


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value from JSON fits a type hint of a configuration; tuples are lists there."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_is_of(value, some) for some in inner)
    if origin is tuple:
        return isinstance(value, list) and all(_is_of(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_of(item, inner[1]) for item in value.values())
    return TEXT.fits(value) and _may_be_a_path(value) if hint is str else type(value) is hint


def _may_be_a_path(text: str) -> bool:
    """Half a surrogate pair is a text in JSON, and no part of a file's name; a byte that is not UTF-8 is one."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _in_words(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(some) for some in inner)
    plain = {str: "text", int: "a whole number", bool: "true or false", tuple: "a list of texts", dict: "an object"}
    return plain.get(origin or hint, "null")


# -- the manifest -------------------------------------------------------------------------------------------------

_ESTIMATE = Entries({"value": MAYBE, "lo": MAYBE, "hi": MAYBE})
_PHASES: dict[str, Rule] = {
    "boundary": _ESTIMATE,
    "relative_boundary": _ESTIMATE,
    "spread": _ESTIMATE,
    "phased_fraction": Entries({"value": SHARE, "lo": MAYBE, "hi": MAYBE}),
    "without_onset": COUNT,
    "n": COUNT,
}
_ENCODING: dict[str, Rule] = {
    "encoding_depth": _ESTIMATE,
    "encoding_peak": _ESTIMATE,
    "phase_order": Entries({"value": ORDER, "share": MAYBE_SHARE}),
}
_SETTING: dict[str, Rule] = {"alpha": _ESTIMATE, "paragraphs": COUNT, **_PHASES}
_PLAIN_SETTING = Entries({**_SETTING, "languages": Every(Entries(_PHASES))})
_ENCODED_SETTING = Entries({**_SETTING, **_ENCODING, "languages": Every(Entries({**_PHASES, **_ENCODING}))})
_RESULTS = Every(Depending(lambda names: _ENCODED_SETTING if names & set(_ENCODING) else _PLAIN_SETTING), filled=True)
_PROBE = Entries({
    "folds": whole(2), "n_components": whole(1), "alpha": POSITIVE, "C": POSITIVE, "seed": whole(0, MAX_SEED),
    "device": TEXT,
})  # fmt: skip
_STUDY = _field_rules(StudyConfig)
_EXECUTION = Entries({
    "options": Entries({}, _field_rules(Execution)), "device": TEXT, "environment": Entries({}), "shards": COUNT,
}, {"key": TEXT, "strategy": TEXT, "warnings": TEXTS})  # fmt: skip
_STAGE: dict[str, Rule] = {
    "executions": Items(_EXECUTION), "seconds": Every(SECONDS), "warnings": TEXTS, "tables": Every(DIGEST),
    "results": Entries({}),
}  # fmt: skip
_TRAINED = Entries({**_STAGE, "results": Entries({"trained": Every(_PROBE)})})
_COUNTS = Entries({
    "examples": COUNT, "answer_tokens": COUNT, "languages": COUNT, "paragraphs": COUNT, "skipped": Every(COUNT),
    "bad_records": Every(COUNT),
})  # fmt: skip
_MODEL: dict[str, Rule] = {
    "kind": TEXT, "location": TEXT, "identity": MAYBE_TEXT, "type": TEXT, "dtype": TEXT, "window": MAYBE,
    "modules": Every(TEXT), "head_sha256": TEXT, "scale": NUMBER, "softcap": MAYBE,
}  # fmt: skip
_IDENTITY: dict[str, Rule] = {
    "status": STATUS,
    "study": Entries({}, _STUDY),
    "model": Entries({"name": TEXT, "files_sha256": TEXT}, {"dtype": TEXT}),
    "data": Entries({"name": TEXT, "files": TEXTS, "files_sha256": TEXT}, {"records_sha256": TEXT, "revision": TEXT}),
    "template_sha256": TEXT,
}
_EXTRAS: dict[str, Rule] = {
    "created": TEXT, "directory": TEXT, "places": Every(TEXT), "lens_sha256": TEXT,
    "selection": Entries({}), "prompt": Entries({}), "total_seconds": SECONDS,
}  # fmt: skip
_REWRITTEN = ("states", "phases")  # stages whose entries are written again when a run goes on
_NEEDED = ("seed", "bootstrap", "permutations", "settings", "store_rows")

# what resuming relies on; the rest is written again
IDENTITY = Entries(_IDENTITY, {"stages": Entries({}, {"probes": _TRAINED})})
FINISHED = Entries(
    {
        **_IDENTITY,
        "study": Entries({name: _STUDY[name] for name in _NEEDED}, _STUDY),
        "model": Entries({
            **_MODEL, "name": TEXT, "n_blocks": whole(1, 10**6), "width": whole(1, 10**9), "vocab_size": whole(2),
        }),
        "groups": NAMES,
        "counts": _COUNTS,
        "left_out": Every(TEXTS),
        "stages": Entries(
            {
                "states": Entries({**_STAGE, "results": Entries({"plan": Entries({}), "parity_error": SECONDS})}),
                "phases": Entries({
                    **_STAGE, "results": Entries({"phase_definition": COUNT, "settings": _RESULTS}),
                }),
            },
            {"probes": _TRAINED},
            Entries(_STAGE),
        ),
    },
)  # fmt: skip


def identity_complaint(manifest: dict[str, Any]) -> str | None:
    """What keeps a run from being continued; None if nothing does."""
    wrong = _complaint_at_any_depth(manifest, IDENTITY)
    if wrong is not None:
        return wrong
    try:
        Manifest.from_dict(without_broken_stages(manifest))
    except (XprobeError, TypeError) as error:
        return f"entry study or stages cannot be used: {error}"
    return None


def finished_complaint(manifest: dict[str, Any]) -> str | None:
    """What keeps a finished run from being read; None if nothing does."""
    wrong = _complaint_at_any_depth(manifest, FINISHED)
    try:
        if wrong is None and not _all_finite(manifest["stages"]["phases"]["results"]):
            wrong = "entry stages.phases.results must hold finite numbers, holds another"
        if wrong is None:
            wrong = _changed_results(manifest["stages"])
        if wrong is None:
            Manifest.from_dict(manifest)
    except (XprobeError, TypeError) as error:
        return f"entry stages cannot be used: {error}"
    except RecursionError:
        wrong = "entry stages.phases.results is nested too deeply"
    return wrong


def _changed_results(stages: dict[str, Any]) -> str | None:
    """The first stage whose results are not what its checksum says."""
    for name, stage in stages.items():
        if RESULTS_SHA256 in stage and stage[RESULTS_SHA256] != checksum_of(stage["results"]):
            return f"entry stages.{name}.results was changed after the run wrote it"
    return None


def stage_is_untouched(stage: Any) -> bool:
    """Whether the entry of a stage still has the checksum that it was written with."""
    if not isinstance(stage, dict):
        return False
    others = {name: value for name, value in stage.items() if name != STAGE_SHA256}
    return stage.get(STAGE_SHA256) == checksum_of(others)


def without_broken_extras(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest without wrong entries that nobody needs: stages of other versions, and what ``_EXTRAS`` names."""
    kept = {
        name: value
        for name, value in manifest.items()
        if name not in _EXTRAS or _complaint_at_any_depth(value, _EXTRAS[name]) is None
    }
    if isinstance(kept.get("stages"), dict):
        own = (*_REWRITTEN, "probes")
        kept["stages"] = {name: stage for name, stage in kept["stages"].items() if name in own or _is_stage(stage)}
    return kept


def without_broken_stages(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest without wrong entries of stages that are computed again anyway when the run goes on."""
    stages = manifest.get("stages", {})
    if not isinstance(stages, dict):
        return manifest
    return {
        **manifest,
        "stages": {name: stage for name, stage in stages.items() if name not in _REWRITTEN or _is_stage(stage)},
    }


def _is_stage(value: Any) -> bool:
    """Whether a stage can be read from an entry."""
    if _complaint_at_any_depth(value, Entries(_STAGE)) is not None:
        return False
    try:
        Manifest.from_dict({"stages": {"any": value}})
    except (XprobeError, TypeError):
        return False
    return True


def _complaint_at_any_depth(manifest: Any, rule: Rule) -> str | None:
    try:
        return complaint(manifest, rule)
    except RecursionError:  # of writing the wrong value into the message
        return "an entry is nested too deeply"


def _all_finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_all_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or _finite(value)
