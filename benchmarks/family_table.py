"""Turns the results of a sweep over families into docs/families.md, and reads the document's rows back."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

Record = dict[str, Any]

# by dtype: allowed difference in fp32 roundings of the largest logit. It is not smaller for fp64 models, because many
# of them compute their final norm in fp32
ALLOWED_ROUNDINGS = {"float64": 4, "float32": 16}
ROUNDING = 2**-23
ALLOWED_NATS = 1e-3  # between two strategies, in fp32
COLUMNS = ("model type", "class", "lens", "sharing", "differs by", "in bf16", "stream", "dry run", "message")
OUTCOMES = (
    "lens",
    "sharing",
    "differs by",
    "in bf16",
    "stream",
    "dry run",
)  # columns that a test compares with those of a new sweep

INTRODUCTION = """# Model families

Results of xprobe on every model type that transformers {transformers} can load as a causal language model. A script
makes the tables. Each family is a tiny random model (4 layers, width 32, 300 tokens), built from the default
configuration of its type. The script saves it, then loads, reads, runs and streams it as `xprobe run` does.

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
| lens | `right`: at every layer the lens gives the log-probabilities that the model's own final modules give for that layer's states, in fp64, over the whole vocabulary; ranks are equal. The number is the largest difference in nats. It is near 1e-15 where the final norm follows the model's dtype, and near 1e-7 where the norm always computes in fp32. A family whose own code has no fp64 is compared in fp32. `wrong`: they differ by more than {allowed_roundings} fp32 roundings of the largest logit. `refused`: xprobe refuses this model, with the message in the last column. `fault`: an unexpected error ends the run. `not run`: the family's own code does not run here; the last column says why. |
| sharing | How prompts with common beginnings are run together: `tree` (packed as a tree, each shared token once), `prefix` (a cache for the common beginning), `plain` (padded batches of whole prompts, nothing is shared). xprobe chooses by comparing rows; see [capture.md](capture.md). It chooses twice here: for a run on the built-in questions, and for short prompts of random tokens. The random prompts show more clearly if a strategy does not fit the model. |
| differs by | Largest difference, over all layers, of the lens log-probabilities between the chosen strategy and prompts that run one by one, on the random prompts, in fp32, in nats. `wrong`: more than {allowed_nats:g}, for one of the two choices. |
| in bf16 | The strategy that is chosen with `--dtype bfloat16`. `wrong`: the strategy does not fit the model, but bf16 rounding hid this; the number is its lens error in fp32, in nats. |
| stream | `yes`: `--stream` gives the numbers of the run in memory. `refused`: xprobe cannot run the blocks one at a time. |
| dry run | `yes`: `--dry-run` works. It estimates the sharing from the configuration. The cell names the estimate if the run chooses another strategy. |
| message | Each refusal or error, after the runs that gave it: `bfloat16` is a run with `--dtype bfloat16`, and so on. |

"""  # noqa: E501
SECOND = """
## Vision-language models

Model types that transformers loads with `AutoModelForImageTextToText` and not with `AutoModelForCausalLM`. Types that
it loads with both are in the first table. xprobe loads models with `AutoModelForCausalLM`, so this
table shows its answer to their configuration.

"""


def summary_line(name: str, record: Record) -> str:
    """One case as a line for the terminal."""
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
    row["message"] = "<br>".join(_messages(record))
    opened = _state(record, "open float32")
    if "fault" in record.get("build", {}) and opened == "missing":
        return row | {"lens": "not run"}
    if opened != "done":
        row["lens"] = opened
    elif _state(record, "read") != "done":
        row["lens"] = _state(record, "read")
    else:
        read = record["read"]
        allowed = ALLOWED_ROUNDINGS[read["dtype"]] * ROUNDING * max(1.0, read["largest_logit"])
        right = read["nats"] <= allowed and read["wrong_ranks"] == 0
        where = "" if read["dtype"] == "float64" else " in fp32"
        row["lens"] = f"{'right' if right else 'wrong'}, {read['nats']:.0e}{where}"
    errors = record.get("strategies in float32", {})
    shared = record.get("sharing float32", {})
    if "strategy" in shared:
        errors = {**errors, shared["strategy"]: shared["nats"]}
        chosen = max(shared["strategy"], record["run"]["strategy"], key=lambda name: errors[name] > ALLOWED_NATS)
        wrong = "" if errors[chosen] <= ALLOWED_NATS else "wrong, "
        row["sharing"], row["differs by"] = chosen, f"{wrong}{errors[chosen]:.0e}"
    in_bf16 = [
        record[step]["strategy"] for step in ("run bfloat16", "sharing bfloat16") if "strategy" in record.get(step, {})
    ]
    if in_bf16 and errors:
        chosen = max(in_bf16, key=lambda name: errors[name] > ALLOWED_NATS)
        row["in bf16"] = chosen if errors[chosen] <= ALLOWED_NATS else f"wrong, {chosen} {errors[chosen]:.0e}"
    elif opened == "done":
        steps = ("open bfloat16", "run bfloat16", "sharing bfloat16")
        row["in bf16"] = next((state for state in (_state(record, step) for step in steps) if state != "done"), "")
    row["stream"] = _state(record, "stream")
    if row["stream"] == "done":
        compared = record.get("stream against run", {}).get("nats")
        row["stream"] = "yes" if compared is not None and compared <= ALLOWED_NATS else f"wrong, {compared}"
    row["dry run"] = _state(record, "dry run")
    if row["dry run"] == "done":
        estimate, taken = record["dry run"]["strategy"], record.get("run", {}).get("strategy")
        row["dry run"] = "yes" if taken in (None, estimate) else f"yes, estimates {estimate}"
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
        **results["made"],
        summary=_summary(rows),
        allowed_nats=ALLOWED_NATS,
        allowed_roundings=ALLOWED_ROUNDINGS["float64"],
    )
    first = _table(COLUMNS, rows)
    columns = ("model type", "memory", "dry run", "message")
    wrappers = {name: record for name, record in results["cases"].items() if record["wrapper"]}
    second = _table(columns, [_wrapper_cells(name, record) for name, record in wrappers.items()])
    return head + first + SECOND + second


def outcomes(text: str) -> dict[str, dict[str, str]]:
    """The word of each outcome column, without its number, for every row of the first table of a document."""
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
        "message": "<br>".join(_messages(record, build=False)),
    }


def _state(record: Record, step: str) -> str:
    entry = record.get(step)
    if entry is None:
        return "missing"
    return next((word for word in ("refused", "fault", "unfinished") if word in entry), "done")


def _messages(record: Record, build: bool = True) -> list[str]:
    """Every different message, with the steps that gave it."""
    by_line: dict[str, list[str]] = {}
    for step, entry in record.items():
        if not isinstance(entry, dict) or (step == "build" and not build):
            continue
        for word in ("fault", "refused", "unfinished"):
            if word in entry:
                line = "did not finish" if word == "unfinished" else str(entry[word])
                by_line.setdefault(line, []).append(step.removeprefix("open "))
    if note := record.get("build", {}).get("note"):
        by_line[note] = ["note"]
    messages = []
    for line, steps in by_line.items():
        if {"float32", "run"} <= set(steps):  # the model does not open at all, so every step gives the same message
            steps = ["all" if {"stream", "bfloat16"} <= set(steps) else "memory"]
        messages.append(f"{', '.join(dict.fromkeys(steps))}: {_shortened(line)}")
    return messages


def _shortened(line: str) -> str:
    line = re.sub(r"Model type should be one of .*", "Model type should be one of ...", line)
    line = line.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")
    return line if len(line) <= 300 else line[:297] + "..."


def _table(columns: tuple[str, ...], rows: list[dict[str, str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    lines += [f"| {' | '.join(row[column] for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _summary(rows: list[dict[str, str]]) -> str:
    def counted(column: str, among: list[dict[str, str]]) -> str:
        counts = Counter(row[column].split(",")[0] or "-" for row in among)
        return ", ".join(f"{word} {count}" for word, count in counts.most_common())

    right = [row for row in rows if row["lens"].startswith("right")]
    lines = [
        f"- Rows: {len(rows)}. Lens: {counted('lens', rows)}.",
        f"- Of the {len(right)} that are read: sharing {counted('sharing', right)}; "
        f"in bf16 {counted('in bf16', right)}; stream {counted('stream', right)}; dry run {counted('dry run', right)}.",
    ]
    return "\n".join(lines)
