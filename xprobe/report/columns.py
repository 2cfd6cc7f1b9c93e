"""What the tables of a run and their columns hold, in a line each: for data set cards."""

from __future__ import annotations

# table -> one row is ...
TABLES: dict[str, str] = {
    "layers": "one row per setting, layer, language and signal",
    "examples": "one row per example: a question in one language and setting",
    "probes": "one row per setting, probe, state and layer",
    "answers": "one row per generated answer",
    "answers_by_layer": "signals of the gold answer by layer, for examples answered right and wrong",
    "oracle": "one row per search for the words of the context that an answer depends on",
    "relevance": "one row per example and group of tokens",
    "relevance_by_layer": "mean share of the relevance by layer",
    "patching": "one row per pair of questions, kind of patch and layer",
    "patching_by_layer": "effects of the patches by layer",
    "lenses": "one row per lens, setting and language",
    "lenses_by_layer": "one row per lens, setting, layer, language and signal",
    "lenses_by_example": "one row per lens and example",
}

_EVERYWHERE: dict[str, str] = {
    "setting": "en-x: context and answer in English; x-x: context, question and answer in the same language",
    "layer": "0 is the embedding, the last one is the model's output",
    "language": "of the question; all: all languages together",
    "question_id": "id of the question in the data",
    "paragraph": "key of the paragraph; intervals come from a bootstrap over paragraphs",
    "context_language": "language of the context and of the gold answer",
    "value": "of the signal or figure in this row",
    "lo": "lower end of the 95 % interval",
    "hi": "upper end of the 95 % interval",
    "n": "examples (of stability: questions) behind the row",
    "signal": "stability is S(l), readiness is the normalised rank of the gold token; docs/method.md defines all",
    "onset": "retrieval onset: first layer of phase 2; missing if there is none",
    "sharpness": "quality of the fit of two phases",
    "rise": "rise of the readiness from phase 1 to phase 2",
    "phased": "whether a permutation test finds two phases",
    "lens": "what read the hidden states",
    "normaliser": "how texts were written before F1 and exact match were computed",
    "f1": "F1 of words with the best gold answer",
    "exact_match": "whether the normalised texts are equal",
    "readiness": "1 - log2(rank) / log2(size of the vocabulary), of the gold token under the lens",
    "log_probability": "log-probability in nats",
    "rank": "rank of the gold token under the lens, 1 is the top",
    "entropy": "entropy of the lens's distribution, in nats",
    "kl": "divergence of the lens's distribution from the model's output, in nats",
    "encoding": "1 - log2(rank) / log2(questions) of the right question on its paragraph, by the last prompt state",
    "encoding_question": "the same by the mean state of the question's tokens",
    "boundary": "median retrieval onset, in layers",
    "relative_boundary": "boundary as a share of the layers",
    "spread": "spread of the onsets, as a share of the layers",
    "phased_fraction": "share of examples with two phases",
    "alpha": "phasing stability: Krippendorff's alpha of the onsets over languages",
    "stability": "mean of S(l) over the layers",
    "tokens": "number of tokens",
}
_TABLE: dict[str, dict[str, str]] = {
    "examples": {
        "prompt_tokens": "length of the prompt", "answer_tokens": "length of the gold answer",
        "first_token_correct": "whether the first answer token is on top at the last layer",
    },
    "probes": {
        "probe": "name of the probe", "state": "which hidden state it reads", "metric": "how it is scored",
        "score": "on held-out paragraphs", "baseline": "score of the most frequent label; 0.5 for ROC AUC",
        "control": "score of the control task", "selectivity": "score less control", "folds": "folds with a score",
        "not_converged": "logistic regressions that stopped before they converged",
    },
    "answers": {
        "answer": "text that the model generated", "gold": "first gold answer of the data",
        "error_type": "correct, blank, refusal, wrong language, gibberish or content",
        "answer_language": "most probable language of the answer", "tokens": "generated tokens",
        "stopped": "whether a stop token ended the answer",
        "log_probability": "of the generated answer, in nats", "gold_log_probability": "of the gold answer, in nats",
    },
    "answers_by_layer": {"outcome": "correct or wrong", "signal": "of the gold answer"},
    "oracle": {
        "target": "own: the model's answer; gold: the gold answer", "question": "whether the prompt held the question",
        "evidence": "words of the context that the answer depends on", "start": "first character of the evidence",
        "stop": "character after the evidence", "words": "words of the evidence",
        "drop": "fall of the answer's log-probability without the evidence, in nats",
        "log_probability": "of the answer with the whole context, in nats",
        "sentence": "sentence with the largest drop", "sentence_drop": "its drop, in nats",
        "sentence_hit": "whether it holds the gold answer", "sentence_chance": "share of sentences that hold it",
        "f1": "of the evidence with the gold answer", "exact_match": "whether the evidence is the gold answer",
        "chance_f1": "mean F1 of spans of the same length",
    },
    "relevance": {
        "rule": "how relevance passes the model", "group": "question, answer, context, template or given tokens",
        "share": "share of the absolute relevance from layer 1 on", "mrd": "major relevance depth, in layers",
        "mrd_q1": "its first quartile over tokens", "mrd_q2": "its median over tokens",
        "mrd_q3": "its third quartile over tokens", "mrd_positive": "the same of the positive part",
        "mrd_with_embeddings": "the same from layer 0 on", "attributed": "what the relevance is of",
        "y": "value of what is attributed",
    },
    "relevance_by_layer": {"group": "question, answer, context, template or given tokens"},
    "patching": {
        "pairs": "same: in one language; cross: across languages", "kind": "which states are put in, or which control",
        "language": "of the question that is run", "question_id": "of the question that is run",
        "other_language": "of the other question of the pair", "other_question_id": "of the other question of the pair",
        "source_language": "of the question whose states are put in",
        "source_question_id": "of the question whose states are put in",
        "given": "tokens that both answers begin with", "own": "log-probability of the own answer with the patch",
        "other": "log-probability of the other answer with the patch",
        "own_before": "own without a patch", "other_before": "other without a patch",
        "own_outright": "own where the other question itself is run",
        "other_outright": "other where the other question itself is run",
    },
    "patching_by_layer": {
        "pairs": "same: in one language; cross: across languages", "kind": "which states are put in, or which control",
        "other_language": "of the other question of the pair; all: all languages together",
        "measure": "effect, gain or loss", "n": "pairs told apart",
    },
    "lenses": {"onset_mean": "mean retrieval onset", "onset_shift": "mean onset less that under the run's own lens"},
}  # fmt: skip
_PARTS: dict[str, str] = {
    "_lo": "lower end of the 95 % interval of {}",
    "_hi": "upper end of the 95 % interval of {}",
    "_last": "{} at the last layer",
    "_control": "chance level of {}: each question counts as the right one in turn",
    "_selectivity": "{} less its control",
    "_top1": "{}: 1 if the right question is first",
    "_margin": "{}: cosine with the right question less the mean cosine with the others",
    "_probed": "{} by the alignment probe",
}
_DEPTHS = {"_25": "a quarter", "_50": "half", "_75": "three quarters"}
_AT_DEPTH: dict[str, str] = {
    "readiness": "mean readiness",
    "script": "most frequent script of the top token",
    "script_share": "share of examples with this script",
    "latent_share": "mean share of the own language",
}


def describe_table(table: str) -> str:
    """What one row of a table is; ``""`` for a table of a stage of your own.

    Examples
    --------
    >>> describe_table("examples")
    'one row per example: a question in one language and setting'
    """
    return TABLES.get(table, "")


def describe_column(table: str, column: str) -> str:
    """What a column of a table holds; ``""`` if it is a column of your own.

    Examples
    --------
    >>> describe_column("lenses", "alpha_lo")
    'lower end of the 95 % interval of alpha'
    >>> describe_column("lenses", "readiness_25")
    'mean readiness at a quarter of the layers'
    """
    known = {**_EVERYWHERE, **_TABLE.get(table, {})}
    if column in known:
        return known[column]
    for end, depth in _DEPTHS.items():
        if column.endswith(end) and (what := _AT_DEPTH.get(column.removesuffix(end))):
            return f"{what} at {depth} of the layers"
    for end, words in _PARTS.items():
        name = column.removesuffix(end)
        if name != column and describe_column(table, name):
            return words.format(name)
    return ""
