"""What the oracle of a run would take, before it starts: removals, tokens, time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from xprobe.capture.plan import Strategy, make_plan, rotary_limit
from xprobe.capture.requests import group_requests
from xprobe.errors import UsageError
from xprobe.models import loading
from xprobe.qa.prompts import Prompt
from xprobe.scoring.settings import OracleSettings
from xprobe.stages.evidence import Searches, batch_tokens, generated_answers, removal_for
from xprobe.stages.opening import AskedModel, first_questions, usable_prompts
from xprobe.stages.removal import Removal, Text, count_tokens, run_searches
from xprobe.stages.requests import study_request
from xprobe.stages.run import Run

SAMPLE = 3  # waves of which the tokens are counted


@dataclass(frozen=True)
class OracleForecast:
    """What the oracle would take.

    Attributes
    ----------
    examples : int
    removals : int
        Texts to run, each with a span removed. An estimate: which words are removed depends on the results.
    tokens : int
        Tokens of the forward passes, likewise.
    states_tokens : int
        Tokens that the passes of the stage "states" ran, for comparison.
    seconds : float, optional
        At the speed of the stage "states"; None where it is not known.
    """

    examples: int
    removals: int
    tokens: int
    states_tokens: int
    seconds: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def __str__(self) -> str:
        times = f", {self.tokens / self.states_tokens:.1f} times those of the states" if self.states_tokens else ""
        speed = "" if self.seconds is None else f"; {_duration(self.seconds)} at their speed"
        return (
            f"{_counted(self.examples, 'answer')}, about {_counted(self.removals, 'removal')}, "
            f"{_tokens(self.tokens)}{times}{speed}"
        )


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _tokens(count: int) -> str:
    return f"{count / 1e6:.1f} million tokens" if count >= 1e6 else f"{count:,} tokens"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes / 60:.1f} hours" if minutes >= 90 else _counted(max(1, round(minutes)), "minute")


def forecast(
    run: Run,
    settings: OracleSettings,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    strategy: Strategy = "tree",
    max_shared_tokens: int | None = None,
) -> OracleForecast:
    """What the oracle would take, counted on a few waves of examples. No weights are read.

    Which words are removed depends on the results. The forecast takes the sentence and the words of the gold answer.
    """
    budget = batch_tokens(run)
    wanted = first_questions(run, settings.limit)
    searches = Searches(prompts, generated_answers(run), wanted, settings, budget)
    removals, tokens = count_removals(searches, removal_for(settings, tokenizer), budget, strategy, max_shared_tokens)
    groups = group_requests([study_request(prompt) for prompt in prompts])
    whole = make_plan(groups, budget, strategy, max_shared_tokens).tokens_run
    forward = run.manifest.stages["states"].seconds.get("forward")
    return OracleForecast(len(wanted), removals, tokens, whole, forward * tokens / whole if forward else None)


def count_removals(
    searches: Searches, removal: Removal, budget: int, strategy: Strategy, max_shared_tokens: int | None
) -> tuple[int, int]:
    """About how many texts all searches run, and how many tokens: a few waves, as if gold answers were evidence."""
    sample = searches.waves[:: max(1, len(searches.waves) // SAMPLE)][:SAMPLE]
    removals = tokens = 0

    def measure(texts: list[Text]) -> list[float]:
        nonlocal removals, tokens
        removals += len(texts)
        tokens += count_tokens(texts, budget, strategy, max_shared_tokens)
        return [0.0] * len(texts)

    for wave in sample:
        cases = searches.cases(wave, guess=True).values()
        run_searches([case for own in cases for case in own], removal, measure)
    scale = len(searches.wanted) / max(1, sum(map(len, sample)))
    return round(removals * scale), round(tokens * scale)


def forecast_run(run: Run, settings: OracleSettings, asked: AskedModel) -> OracleForecast:
    """The forecast of a run that has answers. Reads the tokenizer and the model's configuration, no weights.

    Raises
    ------
    UsageError
        The run has no answers, or those of an older version.
    """
    if len(generated_answers(run)) < run.manifest.counts.examples:
        raise UsageError(f"the run in {run.folder.path} has no answers yet: xprobe.evaluate, or `xprobe evaluate`")
    trust = run.execution.trust_remote_code
    config = loading.load_config(asked.source, trust)
    tokenizer = loading.load_tokenizer(asked.source, trust)
    prompts = usable_prompts(asked.questions, tokenizer, loading.window(config))
    strategy = run.manifest.stages["states"].results["plan"]["strategy"]
    return forecast(run, settings, prompts, tokenizer, strategy, rotary_limit(config))
