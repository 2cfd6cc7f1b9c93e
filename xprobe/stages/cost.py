"""About how long the later stages of a study take, before its run: counted on its prompts. Reads no weights.

Every stage is counted in tokens that go through all blocks. What a token of a small or a backward pass costs, compared
with one of the large passes of the stage "states", was measured (``benchmarks/stage_rates.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from xprobe.capture.plan import Strategy
from xprobe.config import STAGE_COMMANDS
from xprobe.errors import XprobeError
from xprobe.lenses.settings import LensesSettings
from xprobe.phases.patch_settings import PatchSettings
from xprobe.qa.prompts import Prompt
from xprobe.qa.selection import order_questions
from xprobe.scoring.settings import AnswerSettings, OracleSettings
from xprobe.stages.evidence import Searches
from xprobe.stages.generation import most_tokens
from xprobe.stages.opening import key_of
from xprobe.stages.oracle_forecast import count_removals
from xprobe.stages.pairs import choose_pairs
from xprobe.stages.patching import kinds_of
from xprobe.stages.removal import Removal

# what a token takes, in tokens of a large forward pass as the forecast counts them; measured on a CPU
GENERATED = 2.4  # one step of a few dozen answers
REMOVED = 1.75  # after a removed span: short texts behind long shared beginnings
BACKWARD = 1.5  # forwards and backwards, of a prompt alone
PATCHED = 1.2  # after an edited position


@dataclass(frozen=True)
class Speed:
    """What the parts of a run take on this device, in seconds.

    Attributes
    ----------
    token : float
        A token of a large pass, in all blocks.
    row : float
        A row at the unembedding.
    forward, reading : float
        The forward passes of all prompts; the lens on their answers, at all layers.
    n_blocks : int
    strategy : str
    batch_tokens : int
    max_shared_tokens : int, optional
    """

    token: float
    row: float
    forward: float
    reading: float
    n_blocks: int
    strategy: Strategy
    batch_tokens: int
    max_shared_tokens: int | None = None


def stage_seconds(
    stages: Mapping[str, Any], prompts: Sequence[Prompt], lens: str, seed: int, speed: Speed
) -> dict[str, float]:
    """Seconds of each later stage, without loading and tables.

    Parameters
    ----------
    stages : mapping of str to settings
        Stage -> its settings object.
    prompts : sequence of Prompt
        All prompts of the run.
    lens : str
        The lens of the study.
    seed : int
        Of the study.
    speed : Speed

    Returns
    -------
    dict of str to float
        Answers count as long as they may be, so ``answers`` is what they take at most. A stage that cannot be counted,
        since a package is missing, is left out.
    """
    found: dict[str, float] = {}
    for name, settings in stages.items():
        wanted = _first(prompts, getattr(settings, "limit", None))
        with suppress(XprobeError):  # the stage itself says what is wrong
            found[name] = _SECONDS[name](wanted, settings, speed, (lens, seed))
    return found


def _first(prompts: Sequence[Prompt], limit: int | None) -> Sequence[Prompt]:
    """The prompts of the first ``limit`` questions, in the order in which ``limit`` of a study takes them."""
    if limit is None:
        return prompts
    paragraphs: dict[str, dict[str, None]] = {}
    for prompt in prompts:
        paragraphs.setdefault(prompt.example.paragraph, {})[prompt.example.question_id] = None
    taken = set(order_questions([list(questions) for questions in paragraphs.values()])[:limit])
    return [prompt for prompt in prompts if prompt.example.question_id in taken]


def _answers(prompts: Sequence[Prompt], settings: AnswerSettings, speed: Speed, _: tuple[str, int]) -> float:
    limits = most_tokens(prompts, settings.max_new_tokens)
    generated = sum(limits[prompt.example.context_language] for prompt in prompts)
    return speed.forward + generated * (GENERATED * speed.token + speed.row)


def _oracle(prompts: Sequence[Prompt], settings: OracleSettings, speed: Speed, _: tuple[str, int]) -> float:
    gold = {key_of(one): _as_if_generated(one) for one in prompts}  # the answers are not known yet
    searches = Searches(prompts, gold, list(gold), settings, speed.batch_tokens)
    removal = Removal(filler=0 if settings.removal == "replace" else None)
    counted = count_removals(searches, removal, speed.batch_tokens, speed.strategy, speed.max_shared_tokens)
    return REMOVED * speed.token * counted[1]


def _as_if_generated(prompt: Prompt) -> dict[str, Any]:
    """What the oracle reads of an answer, for one that differs from the gold answer in its last token."""
    example = prompt.example
    ids = [*prompt.targets[:-1], -1]
    return {"ids": ids, "gold": [example.answer], "context_language": example.context_language}


def _relevance(prompts: Sequence[Prompt], settings: Any, speed: Speed, _: tuple[str, int]) -> float:
    return BACKWARD * speed.token * sum(prompt.length for prompt in prompts)


def _patching(prompts: Sequence[Prompt], settings: PatchSettings, speed: Speed, study: tuple[str, int]) -> float:
    tokens = 0
    for pair in choose_pairs(prompts, settings, study[1]):
        for kind in kinds_of(pair):
            after = pair.own.length - pair.own.spans["question"][1] if kind == "question" else 1
            tokens += after + len(pair.given)
    return speed.forward + PATCHED * speed.token * tokens * (speed.n_blocks + 1) / 2  # only what lies above the edit


def _lenses(prompts: Sequence[Prompt], settings: LensesSettings, speed: Speed, study: tuple[str, int]) -> float:
    return speed.forward + len(settings.with_own(study[0])) * speed.reading


_SECONDS: dict[str, Callable[..., float]] = dict(
    zip(STAGE_COMMANDS, (_answers, _oracle, _relevance, _patching, _lenses), strict=True)
)
