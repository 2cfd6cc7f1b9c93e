"""What the page of a run shows, in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import starmap
from typing import TYPE_CHECKING, Any

from xprobe.report.later_stages import causes, evidence, lenses, performance, relevance
from xprobe.report.parts import Cell, Group, Section, Table, counted, number
from xprobe.report.places import shown_name, without_folders
from xprobe.report.reading import cards, languages, phases, probes, signals

if TYPE_CHECKING:
    from xprobe.results import SettingResult, Study


def groups(study: Study) -> list[Group]:
    """All parts of the page, in order."""
    return [*(_setting(study, result) for result in study.values()), _about(study)]


def about(study: Study) -> str:
    """Data, numbers of examples, languages and paragraphs, and the lens, in one line."""
    manifest = study.manifest
    counts = manifest.counts
    return (
        f"{shown_name(manifest.data.name)} · {counted(counts.examples, 'example')} in "
        f"{counted(counts.languages, 'language')} on {counted(counts.paragraphs, 'paragraph')} · "
        f"lens {shown_name(study.lens)}"
    )


def _setting(study: Study, result: SettingResult) -> Group:
    name = result.setting
    group = Group(name, f"Setting {name}", cards(study, result))
    makers = (phases, signals, languages, causes, relevance, performance, evidence, probes, lenses)
    group.sections = [section for make in makers if (section := make(study, result)) is not None]
    return group


def _about(study: Study) -> Group:
    manifest = study.manifest
    model, counts, states = manifest.model, manifest.counts, manifest.stages["states"]
    execution = states.executions[-1]
    environment = execution.environment
    sizes = [(counts.examples, "example"), (counts.languages, "language"), (counts.paragraphs, "paragraph")]
    facts = [
        ("model", f"{shown_name(model.name)} ({model.type})"),
        ("size", f"{model.n_blocks} layers, width {model.width}, vocabulary {model.vocab_size}, {model.dtype}"),
        ("lens", shown_name(study.lens)),
        ("data", shown_name(manifest.data.name)),
        ("questions", ", ".join(starmap(counted, sizes))),
        ("parity", f"the lens at the last layer and the model differ by {number(states.results['parity_error'])} nats"),
        ("device", f"{execution.device}, {execution.strategy}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in _versions(environment))),
        ("seed", str(manifest.study.seed)),
        ("begun", str(manifest.created)),
        ("seconds", ", ".join(f"{name} {sum(one.seconds.values()):.0f}" for name, one in manifest.stages.items())),
        ("checksums", f"model {model.files_sha256[:16]}, data {manifest.data.files_sha256[:16]}"),
        ("run folder", study.path.resolve().name),
    ]  # fmt: skip
    rows = [[Cell(name), Cell(value)] for name, value in facts if value]
    group = Group("run", "About this run")
    group.sections = [Section("run-facts", "Model, data, versions", "", [], [Table("Facts", ["fact", "value"], rows)])]
    if skipped := {**counts.skipped, **counts.bad_records}:
        cells = [[Cell(reason, reason), Cell(str(n), n)] for reason, n in skipped.items()]
        group.sections.append(
            Section("run-skips", "Left out", "", [], [Table("Left out", ["reason", "examples"], cells, [False, True])])
        )
    if manifest.warnings:
        cells = [[Cell(without_folders(one))] for one in manifest.warnings]
        group.sections.append(Section("run-warnings", "Warnings", "", [], [Table("Warnings", ["warning"], cells)]))
    return group


def _versions(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("xprobe", "python"):
        yield name, str(environment.get(name))
    yield from environment.get("packages", {}).items()
