"""How single prompts are shown: a table that fits a terminal, whatever its scripts, a page in one file, notebooks."""

from __future__ import annotations

import unicodedata
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xprobe.single_prompt.lens import PromptLens
    from xprobe.single_prompt.patch import PatchedPrompt

CELL = 11  # columns of a cell in a table of many positions
_RIGHT_TO_LEFT = {"R", "AL", "AN"}
_ISOLATE, _END = "\u2068", "\u2069"  # so that text from right to left does not move its neighbours


def display_width(text: str) -> int:
    """Columns that a text takes in a terminal: 2 for wide letters, 0 for marks on the letter before.

    Examples
    --------
    >>> display_width("Rom"), display_width("東京"), display_width("กำ")
    (3, 4, 2)
    """
    return sum(_width(character) for character in text)


def _width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def shown(text: str) -> str:
    """A token with its blanks, line breaks and control characters made visible.

    Examples
    --------
    >>> shown(" a\\n"), shown("\\x07")
    ('·a⏎', '␣')
    """
    text = text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Cf" else "␣" for c in text)


def fitted(text: str, width: int) -> str:
    """A token in exactly ``width`` columns, cut with … where it is longer.

    Examples
    --------
    >>> fitted("東京都", 5), fitted("Rom", 5)
    ('東京…', 'Rom  ')
    """
    if display_width(text) > width:
        cut, used = "", 0
        for character in text:
            if used + _width(character) > width - 1:
                break
            cut += character
            used += _width(character)
        text = cut + "…"
    padding = " " * (width - display_width(text))
    if any(unicodedata.bidirectional(c) in _RIGHT_TO_LEFT for c in text):
        text = _ISOLATE + text + _END
    return text + padding


def terminal_table(found: PromptLens, width: int) -> str:
    """One position: a row per layer with its best tokens. Several: a column per position with its best token."""
    title = f"{found.model} · lens {found.lens}" + (f" · answer {shown(found.answer)}" if found.answer else "")
    return "\n".join([title, "", *(_one(found, width) if len(found.positions) == 1 else _grid(found, width))])


def _one(found: PromptLens, width: int) -> list[str]:
    answer = found.answer_rank is not None
    fixed = 5 + 2 + 7 + 2 + (2 + 7 + 2 + 6 if answer else 0)
    cell = 18  # a token of 10 columns, and its probability
    count = max(1, min(len(found.top[0][0]), (width - fixed) // cell))
    head = f"after {shown(found.tokens[found.positions[0]])}: the most probable tokens"
    heads = [f"{'layer':>5}", fitted(head, count * cell - 2), "entropy"]
    header = "  ".join([*heads, *(["   rank", "   p(a)"] if answer else [])])
    lines = [header, "─" * display_width(header)]
    for layer, by_position in enumerate(found.top):
        best = "  ".join(f"{fitted(shown(text), 10)} {chance:5.3f}" for text, chance in by_position[0][:count])
        cells = [f"{layer:>5}", best, f"{found.entropy[layer, 0]:>7.2f}"]
        if found.answer_rank is not None and found.answer_probability is not None:
            cells += [f"{found.answer_rank[layer, 0]:>7}", f"{found.answer_probability[layer, 0]:>7.3f}"]
        lines.append("  ".join(cells))
    return lines


def _grid(found: PromptLens, width: int) -> list[str]:
    count = min(len(found.positions), max(1, (width - 5) // (CELL + 1)))
    first = len(found.positions) - count
    tokens = [found.tokens[position] for position in found.positions[first:]]
    header = " ".join(["layer", *(fitted(shown(token), CELL) for token in tokens)])
    lines = [header.rstrip(), "─" * (5 + count * (CELL + 1))]
    if first:
        lines.insert(0, f"the last {count} of {len(found.positions)} positions (--json and --save have all)")
    for layer, by_position in enumerate(found.top):
        cells = (fitted(shown(best[0][0]), CELL) for best in by_position[first:])
        lines.append(" ".join([f"{layer:>5}", *cells]).rstrip())
    if found.answer_rank is not None:
        lines += ["", "rank of the answer", header.rstrip(), "─" * (5 + count * (CELL + 1))]
        for layer, ranks in enumerate(found.answer_rank):
            lines.append(" ".join([f"{layer:>5}", *(f"{rank:<{CELL}}" for rank in ranks[first:])]).rstrip())
    return lines


# the colours of text and paper are those of the notebook or page around it, light or dark
_STYLE = """
.xprobe-lens { font: 13px/1.4 system-ui, sans-serif; }
.xprobe-lens p { margin: 0 0 6px; }
.xprobe-lens table { border-collapse: separate; border-spacing: 1px; font-size: 12px; margin: 0; border: 0; }
.xprobe-lens tr { background: none; }
.xprobe-lens th, .xprobe-lens td { text-align: left; white-space: pre; border: 0; padding: 2px 6px; max-width: none; }
.xprobe-lens th { font-weight: 600; }
.xprobe-lens td.layer { text-align: right; opacity: .7; }
.xprobe-lens .scroll { overflow-x: auto; }
"""


def page(found: PromptLens, *, whole: bool = True) -> str:
    """A table of layers and positions; a cell's colour is the probability, its tooltip has the other tokens."""
    heads = "".join(f"<th><bdi>{escape(shown(found.tokens[position]))}</bdi></th>" for position in found.positions)
    rows = []
    for layer in reversed(range(len(found.top))):
        cells = "".join(_cell(found, layer, place) for place in range(len(found.positions)))
        rows.append(f'<tr><td class="layer">{layer}</td>{cells}</tr>')
    about = f"{escape(found.model)}, lens {escape(found.lens)}"
    if found.answer is not None:
        about += f", answer <bdi>{escape(shown(found.answer))}</bdi> (its rank stands after its token)"
    body = (
        f'<div class="xprobe-lens"><style>{_STYLE}</style><p><b><bdi>{escape("".join(found.tokens))}</bdi></b></p>'
        f"<p>What each layer would say next: {about}. Stronger colour: more probable. Point at a cell for the next "
        'tokens.</p><div class="scroll"><table>'
        f"<tr><th>layer</th>{heads}</tr>{''.join(rows)}</table></div></div>"
    )
    if not whole:
        return body
    title = escape(f"{found.model}: {''.join(found.tokens)[:60]}")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{title}</title>'
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _cell(found: PromptLens, layer: int, place: int) -> str:
    best = found.top[layer][place]
    tip = "\n".join(f"{shown(text)} {chance:.3f}" for text, chance in best)
    text, chance = best[0]
    label = f"<bdi>{escape(shown(text))}</bdi>"
    if found.answer_rank is not None and found.answer_probability is not None:
        rank = int(found.answer_rank[layer, place])
        tip += f"\nanswer: rank {rank}, {found.answer_probability[layer, place]:.3f}"
        label += f" <small>{rank}</small>"
    ink = "#fff" if chance > 0.75 else "inherit"
    return f'<td style="background:rgba(47,93,138,{chance:.2f});color:{ink}" title="{escape(tip)}">{label}</td>'


def patched_html(patched: PatchedPrompt) -> str:
    """A table for notebooks: what the model says before and after the edits."""
    from xprobe.report.notebook import Part, render
    from xprobe.report.parts import Cell, Table, cell, missing

    frame = patched.table
    names = [name for name in frame.columns if name not in ("layer", "position", "token", "top")]
    heads = ["run", "layer", "position", "token", *(shown(name) for name in names), "next tokens"]
    rows = []
    for run, row in frame.iterrows():
        best = ", ".join(f"{shown(text)} {value:.3f}" for text, value in row["top"])
        token = "–" if missing(row["token"]) else shown(row["token"])
        places = [cell(row["layer"]), cell(row["position"]), Cell(token)]
        rows.append([Cell(str(run)), *places, *(cell(row[name]) for name in names), Cell(best)])
    table = Table("Runs", heads, rows, [False, True, True, False, *[True] * len(names), False])
    text = "Columns of answers: log-probability of the first token (nats)" if names else ""
    return render("".join(patched.tokens), text, [Part("", (), [table])])
