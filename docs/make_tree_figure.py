"""Draws docs/images/tree.png: four prompts as one packed sequence, and which token may attend to which.

python docs/make_tree_figure.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

from xprobe.capture.tree import Tree, make_tree

BEGINNING = ["Answer", "from", "the", "text.", "Einstein", "was", "born", "in", "Ulm."]
QUESTIONS = [
    ["Where", "was", "he", "born?"],
    ["Where", "was", "his", "home?"],
    ["Wo", "kam", "er", "zur", "Welt?"],
    ["Il", "est", "né", "où", "?"],
]
PALETTE = ["#f4f4f2", "#c9d7e6", "#2f5d8a", "#d8893b"]  # not seen, other prompts' cost without sharing, own, above
INK, QUIET = "#222222", "#8a8a86"


def main() -> None:
    words = [BEGINNING + question for question in QUESTIONS]
    ids = {word: number for number, word in enumerate(dict.fromkeys(w for prompt in words for w in prompt))}
    tree = make_tree([[ids[word] for word in prompt] for prompt in words], node_cost=0)
    names = {number: word for word, number in ids.items()}
    plt.rcParams.update({"font.size": 9, "text.color": INK, "axes.edgecolor": QUIET})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.4), width_ratios=[1, 1.15], constrained_layout=True)
    draw_prompts(left, words, tree)
    draw_attention(right, tree, names)
    figure.savefig(Path(__file__).parent / "images" / "tree.png", dpi=130)


def draw_prompts(axes: Axes, words: list[list[str]], tree: Tree) -> None:
    """The prompts one under another; tokens that are run are filled, those that are shared with one above are not."""
    seen: set[int] = set()
    for row, prompt in enumerate(words):
        for at, word in enumerate(prompt):
            place = tree.index(row, at)
            run = place not in seen
            seen.add(place)
            color = ("#2f5d8a" if at >= len(BEGINNING) else "#d8893b") if run else "#ffffff"
            axes.add_patch(Rectangle((at, -row - 0.35), 0.94, 0.7, facecolor=color, edgecolor=QUIET, linewidth=0.6))
            axes.text(at + 0.47, -row, word, ha="center", va="center", fontsize=5.6, color="white" if run else QUIET)
    total = sum(map(len, words))
    axes.set(xlim=(-0.2, 14.4), ylim=(-6.2, 0.9))
    axes.set_title(f"{total} tokens in {len(words)} prompts, {len(tree.ids)} are run", loc="left", fontsize=10)
    axes.text(0, -4.3, "filled: run once.  white: already there.", fontsize=9, color=QUIET)
    axes.axis("off")


def draw_attention(axes: Axes, tree: Tree, names: dict[int, str]) -> None:
    """Queries down, keys across: a segment on itself, and on the segments above it."""
    size = len(tree.ids)
    kind = np.zeros((size, size), dtype=int)
    for segment in tree.segments:
        own = np.arange(segment.start, segment.stop)
        kind[np.ix_(own, own)] = np.where(own[:, None] >= own, 2, 0)
        kind[segment.stop : segment.end, segment.start : segment.stop] = 3
    axes.imshow(kind, cmap=ListedColormap(PALETTE), vmin=0, vmax=3)
    axes.set_xticks(range(size), [names[i] for i in tree.ids], rotation=90, fontsize=6.5)
    axes.set_yticks(range(size), [names[i] for i in tree.ids], fontsize=6.5)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title("the packed sequence: what each token attends to", loc="left", fontsize=10)
    for color, label in ((PALETTE[2], "its own segment, causally"), (PALETTE[3], "a segment above, no mask")):
        axes.plot([], [], "s", color=color, label=label)
    axes.legend(loc="upper right", frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
