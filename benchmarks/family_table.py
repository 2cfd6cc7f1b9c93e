"""Turns the results of a sweep over families into docs/families.md, and reads the document's rows back."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

Record = dict[str, Any]

# roundings of the largest logit, in fp32: many models compute their final norm in fp32 whatever their dtype
READ_RIGHT = {"float64": 4, "float32": 16}
ROUNDING = 2**-23
SHARED_RIGHT = 1e-3  # nats in fp32
COLUMNS = ("model type", "class", "lens", "sharing", "differs by", "in bf16", "stream", "dry run", "remark")
OUTCOMES = (
    "lens",
    "sharing",
    "differs by",
    "in bf16",
    "stream",
    "dry run",
)  # columns that a test compares with a new sweep

INTRODUCTION = """# Model families

What xprobe does with every model type that transformers {transformers} can load as a causal language model. The tables
are made, not written: each family is a tiny random model (4 layers, width 32, 300 tokens), built from the default
configuration of its type, saved, and then loaded, read, run and streamed as `xprobe run` does it.

    python benchmarks/families.py --out docs/families.md        # about {minutes:.0f} minutes on 2 CPU cores

Made on {date} with xprobe {xprobe}, transformers {transformers}, torch {torch}, Python {python}, on a CPU.

## Summary

{summary}

## Causal language models

A tiny random model shows whether xprobe reads a family's code correctly. It says nothing about how well a published
model answers questions, and nothing about published checkpoints whose configuration differs much from the default.

| column | meaning |
| --- | --- |
| model type | `model_type` in the model's `config.json`. `is_decoder=True` is a second row for types that are encoders unless their configuration says otherwise. |
| class | The class that `AutoModelForCausalLM` makes of it. |
| lens | `right`: at every layer the lens gives the log-probabilities that the model's own final modules give for that layer's states, in fp64, over the whole vocabulary; ranks are equal. The number is the largest difference in nats. It is near 1e-15 where the final norm follows the model's dtype, and near 1e-7 where the norm always computes in fp32. A family whose own code has no fp64 is compared in fp32. `wrong`: they differ by more than {read_right} fp32 roundings of the largest logit. `refused`: xprobe says that it does not read this model; the remark has its line. `fault`: xprobe ends in an error that is not its own. `not run`: the family's own code does not run here; the remark says why. |
| sharing | How prompts with common beginnings are run together: `tree` (packed as a tree, each shared token once), `prefix` (a cache for the common beginning), `plain` (padded batches of whole prompts, nothing is shared). xprobe chooses by comparing rows; see [capture.md](capture.md). It chooses twice here: for a run on the built-in questions, and for short prompts of random tokens, in which more goes wrong where a strategy does not fit. |
| differs by | Largest difference, over all layers, of the lens log-probabilities between the chosen strategy and prompts that run one by one, on the random prompts, in fp32, in nats. `wrong`: more than {shared_right:g}, for one of the two choices. |
| in bf16 | The strategy that is chosen with `--dtype bfloat16`. `wrong`: rounding hid that it does not fit; the number is what it does to the lens of the same model in fp32, in nats. |
| stream | `yes`: `--stream` gives the numbers of the run in memory. `refused`: xprobe says that the blocks cannot be run one at a time. |
| dry run | `yes`: `--dry-run` works. It estimates the sharing from the configuration; where its estimate is not what the run chooses, the cell says so. |
| remark | The line of each refusal or error, and by which option it came: `bfloat16` is a run with `--dtype bfloat16`, and so on. |

"""  # noqa: E501
SECOND = """
## Vision-language models

Model types that transformers loads with `AutoModelForImageTextToText` and not with `AutoModelForCausalLM`. Types that
it loads with both are in the first table. xprobe loads models with `AutoModelForCausalLM`, so this is what it says to
their configuration.

"""


def in_short(name: str, record: Record) -> str:
    """One case for the terminal."""
    row = cells(name, record)
    return " | ".join(row[column] for column in COLUMNS if row[column])


def cells(name: str, record: Record) -> dict[str, str]:
    """A row of the first table, by column."""
    row = dict.fromkeys(COLUMNS, "")
    row["model type"] = f"`{name}`"
    classes = [e["class"] for e in record.values() if isinstance(e, dict) and "class" in e]
    row["class"] = (
        record["open float32"]["class"] if "class" in record.get("open float32", {}) else "".join(classes[:1])
    )
    row["remark"] = "<br>".join(_remarks(record))
    opened = _state(record, "open float32")
    if "fault" in record.get("build", {}) and opened == "missing":
        return row | {"lens": "not run"}
    if opened != "done":
        row["lens"] = opened
    elif _state(record, "read") != "done":
        row["lens"] = _state(record, "read")
    else:
        read = record["read"]
        allowed = READ_RIGHT[read["dtype"]] * ROUNDING * max(1.0, read["largest_logit"])
        right = read["nats"] <= allowed and read["wrong_ranks"] == 0
        where = "" if read["dtype"] == "float64" else " in fp32"
        row["lens"] = f"{'right' if right else 'wrong'}, {read['nats']:.0e}{where}"
    errors = record.get("strategies in float32", {})
    shared = record.get("sharing float32", {})
    if "strategy" in shared:
        errors = {**errors, shared["strategy"]: shared["nats"]}
        way = max(shared["strategy"], record["run"]["strategy"], key=lambda name: errors[name] > SHARED_RIGHT)
        wrong = "" if errors[way] <= SHARED_RIGHT else "wrong, "
        row["sharing"], row["differs by"] = way, f"{wrong}{errors[way]:.0e}"
    in_bf16 = [
        record[step]["strategy"] for step in ("run bfloat16", "sharing bfloat16") if "strategy" in record.get(step, {})
    ]
    if in_bf16 and errors:
        way = max(in_bf16, key=lambda name: errors[name] > SHARED_RIGHT)
        row["in bf16"] = way if errors[way] <= SHARED_RIGHT else f"wrong, {way} {errors[way]:.0e}"
    elif opened == "done":
        steps = ("open bfloat16", "run bfloat16", "sharing bfloat16")
        row["in bf16"] = next((state for state in (_state(record, step) for step in steps) if state != "done"), "")
    row["stream"] = _state(record, "stream")
    if row["stream"] == "done":
        compared = record.get("stream against run", {}).get("nats")
        row["stream"] = "yes" if compared is not None and compared <= SHARED_RIGHT else f"wrong, {compared}"
    row["dry run"] = _state(record, "dry run")
    if row["dry run"] == "done":
        estimate, taken = record["dry run"]["strategy"], record.get("run", {}).get("strategy")
        row["dry run"] = "yes" if taken in (None, estimate) else f"yes, says {estimate}"
    return row


def causal_rows(cases: dict[str, Record]) -> list[dict[str, str]]:
    """The rows of the first table; a variant of a type is left out if it is read, or refused, as its type is."""
    rows: list[dict[str, str]] = []
    for name, record in cases.items():
        if record["wrapper"]:
            continue
        row, before = cells(name, record), next((r for r in rows if r["model type"] == f"`{name.split()[0]}`"), None)
        if before is None or row["lens"].startswith("right") != before["lens"].startswith("right"):
            rows.append(row)
    return rows


def document(results: Record) -> str:
    """All of docs/families.md."""
    rows = causal_rows(results["cases"])
    head = INTRODUCTION.format(
        **results["made"], summary=_summary(rows), shared_right=SHARED_RIGHT, read_right=READ_RIGHT["float64"]
    )
    first = _table(COLUMNS, rows)
    columns = ("model type", "memory", "dry run", "remark")
    wrappers = {name: record for name, record in results["cases"].items() if record["wrapper"]}
    second = _table(columns, [_wrapper_cells(name, record) for name, record in wrappers.items()])
    return head + first + SECOND + second


def outcomes(text: str) -> dict[str, dict[str, str]]:
    """Of every row of the first table of a document: the word of each outcome column, without its number."""
    rows = {}
    for line in text.split(SECOND.splitlines()[1])[0].splitlines():
        parts = [part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(parts) == len(COLUMNS) and parts[0].startswith("`"):
            row = dict(zip(COLUMNS, parts, strict=True))
            rows[row["model type"].strip("`")] = outcome(row)
    return rows


def outcome(row: dict[str, str]) -> dict[str, str]:
    """The words of a row's outcome columns."""
    words = {column: row[column].split(",")[0] for column in OUTCOMES}
    return {column: word for column, word in words.items() if not word[:1].isdigit()}


def _wrapper_cells(name: str, record: Record) -> dict[str, str]:
    words = {"done": "loads", "missing": "not run"}
    memory, dry = _state(record, "open float32"), _state(record, "dry run")
    return {
        "model type": f"`{name}`",
        "memory": words.get(memory, memory),
        "dry run": {"done": "yes"}.get(dry, dry),
        "remark": "<br>".join(_remarks(record, build=False)),
    }


def _state(record: Record, step: str) -> str:
    entry = record.get(step)
    if entry is None:
        return "missing"
    return next((word for word in ("refused", "fault", "unfinished") if word in entry), "done")


def _remarks(record: Record, build: bool = True) -> list[str]:
    """Every different line that was said, with the steps that said it."""
    by_line: dict[str, list[str]] = {}
    for step, entry in record.items():
        if not isinstance(entry, dict) or (step == "build" and not build):
            continue
        for word in ("fault", "refused", "unfinished"):
            if word in entry:
                line = "was still at it" if word == "unfinished" else str(entry[word])
                by_line.setdefault(line, []).append(step.removeprefix("open "))
    if note := record.get("build", {}).get("note"):
        by_line[note] = ["what it is"]
    found = []
    for line, steps in by_line.items():
        if {"float32", "run"} <= set(steps):  # whatever follows from a model that does not open at all
            steps = ["all" if {"stream", "bfloat16"} <= set(steps) else "memory"]
        found.append(f"{', '.join(dict.fromkeys(steps))}: {_shortened(line)}")
    return found


def _shortened(line: str) -> str:
    line = re.sub(r"Model type should be one of .*", "Model type should be one of ...", line)
    line = line.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")
    return line if len(line) <= 300 else line[:297] + "..."


def _table(columns: tuple[str, ...], rows: list[dict[str, str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    lines += [f"| {' | '.join(row[column] for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _summary(rows: list[dict[str, str]]) -> str:
    def counted(column: str, of: list[dict[str, str]]) -> str:
        counts = Counter(row[column].split(",")[0] or "-" for row in of)
        return ", ".join(f"{word} {count}" for word, count in counts.most_common())

    right = [row for row in rows if row["lens"].startswith("right")]
    lines = [
        f"- Rows: {len(rows)}. Lens: {counted('lens', rows)}.",
        f"- Of the {len(right)} that are read: sharing {counted('sharing', right)}; "
        f"in bf16 {counted('in bf16', right)}; stream {counted('stream', right)}; dry run {counted('dry run', right)}.",
    ]
    return "\n".join(lines)
