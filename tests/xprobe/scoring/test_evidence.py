"""Words of a context, and the search for those that an answer hangs on."""

from __future__ import annotations

import os
import random
from itertools import pairwise
from pathlib import Path

import pytest

from xprobe.scoring.evidence import MOST_WORDS, Search, Words
from xprobe.scoring.words import sentence_spans, split_words, word_spans

TEXTS = {
    "en": ("The U.S. sold 1,000 boats (in 1874). It didn't rain!", ["U.S", "1,000", "didn't", "1874"]),
    "de": ("Der Ärmelkanal ist 33 km breit. Wirklich?", ["Ärmelkanal", "33"]),
    "zh": ("丹佛野马队赢得了超级碗。他们庆祝了三天。", ["三天"]),
    "th": ("ประภาคารบนเกาะสร้างในปี 1874 โดยวิศวกร", ["1874", "วิศวกร"]),
    "hi": ("पुल 1902 में गिरा। किसने बनाया?", ["1902", "किसने"]),
    "ar": ("بنى المهندس المنارة. متى؟", ["المهندس"]),
}


@pytest.mark.parametrize("language", TEXTS)
def test_pieces_joined_are_the_text_and_words_are_whole(language: str) -> None:
    text, wanted = TEXTS[language]
    assert "".join(split_words(text, language)) == text
    found = [text[start:stop] for start, stop in word_spans(text, language)]
    assert set(wanted) <= set(found), found
    assert not any(piece in "(.,!?)。؟।" for piece in found)
    assert "".join(text[start:stop] for start, stop in sentence_spans(text)) == text


@pytest.mark.parametrize(("language", "count"), [("en", 2), ("de", 2), ("zh", 2), ("hi", 2), ("ar", 2)])
def test_sentences_end_where_the_script_ends_them(language: str, count: int) -> None:
    assert len(sentence_spans(TEXTS[language][0])) == count


def test_words_that_share_a_token_are_one_word() -> None:
    text = "ab cd ef."
    words = Words.find(text, "en", [(0, 4), (4, 5), (5, 8), (8, 9)])  # "ab c", "d", " ef", "."
    assert [text[start:stop] for start, stop in words.characters] == ["ab cd", "ef"]
    assert words.tokens == ((0, 2), (2, 3))


def test_several_tokens_of_one_letter_stay_together() -> None:
    words = Words.find("é a", "en", [(0, 1), (0, 1), (1, 3)])
    assert words.tokens == ((0, 2), (2, 3))


def test_a_long_sentence_is_searched_in_equal_parts() -> None:
    text = " ".join(f"w{i}" for i in range(2 * MOST_WORDS + 1))
    places = word_spans(text, "en")
    words = Words.find(text, "en", places)
    sizes = [stop - start for start, stop in words.sentences]
    assert len(sizes) == 3
    assert max(sizes) - min(sizes) <= 1
    assert words.sentences[0][0] == 0
    assert words.sentences[-1][1] == len(places)
    assert all(one[1] == other[0] for one, other in pairwise(words.sentences))


def numbered(sentences: list[int]) -> Words:
    """Words without a text: one token each."""
    count = sum(sentences)
    cuts = [sum(sentences[:i]) for i in range(len(sentences) + 1)]
    spans = tuple((3 * i, 3 * i + 2) for i in range(count))
    return Words(spans, tuple((i, i + 1) for i in range(count)), tuple(pairwise(cuts)))


def ended(search: Search, drop) -> Search:
    while spans := search.wanted():
        search.take([drop(*span) for span in spans])
    return search


@pytest.mark.parametrize("seed", range(30))
def test_the_search_finds_any_planted_span(seed: int) -> None:
    """Each word of the span counts alike: as many of them as are removed, so much falls the log-probability."""
    draw = random.Random(seed)
    words = numbered([draw.randint(1, 9) for _ in range(5)])
    start, stop = draw.choice(words.sentences)
    first = draw.randint(start, stop - 1)
    last = draw.randint(first + 1, min(stop, first + 4))
    search = ended(Search(words, most=4), lambda a, b: float(len(set(range(a, b)) & set(range(first, last)))))
    assert search.evidence.span == (first, last)
    assert search.evidence.drop == last - first
    assert search.sentence.span == (start, stop)


def test_every_span_is_removed_once_and_none_is_longer_than_allowed() -> None:
    search = ended(Search(numbered([3, 12]), most=5), lambda a, b: float(a <= 8 < b))
    removed = [span for step in search.steps for span in step]
    assert len(removed) == len(set(removed))
    assert all(stop - start <= 5 for start, stop in removed if (start, stop) not in ((0, 3), (3, 15)))
    assert {(4, 9), (8, 13)} <= set(removed)


def test_nothing_that_counts_gives_the_first_shortest_span() -> None:
    search = ended(Search(numbered([4, 4]), most=3), lambda a, b: 0.0)
    assert search.evidence.span == (0, 1)


def test_without_spans_the_evidence_is_a_sentence() -> None:
    search = ended(Search(numbered([4, 4]), most=3, spans=False), lambda a, b: float(a <= 5 < b))
    assert search.evidence.span == search.sentence.span == (4, 8)
    assert len(search.steps) == 1


def test_a_context_of_one_word() -> None:
    search = ended(Search(numbered([1]), most=3), lambda a, b: 2.0)
    assert search.evidence == search.sentence == ((0, 1), 2.0)


@pytest.mark.skipif(not os.environ.get("XPROBE_XQUAD_DIR"), reason="XPROBE_XQUAD_DIR is not set: no XQuAD here")
def test_gold_answers_of_xquad_lie_in_one_sentence_and_begin_and_end_at_words() -> None:
    from xprobe.qa.parallel import load_data

    records = load_data(str(Path(os.environ["XPROBE_XQUAD_DIR"]))).records
    signs = ".,'\"()«»„“”‘’$%€£° "
    for language, floor in {"en": 0.97, "de": 0.97, "zh": 0.93, "th": 0.97, "hi": 0.97, "ar": 0.9, "tr": 0.85}.items():
        whole = same = 0
        chosen = list(records[language].values())[::6]
        for record in chosen:
            places = [(i, i + 1) for i in range(len(record.context))]
            words = Words.find(record.context, language, places)
            gold = (record.answer_start, record.answer_start + len(record.answer))
            span = words.overlapping(gold)
            whole += any(start <= span[0] and span[1] <= stop for start, stop in words.sentences)
            a, b = words.characters_of(span)
            same += record.context[a:b].strip(signs) == record.answer.strip(signs)
        assert whole >= 0.93 * len(chosen), (language, whole, len(chosen))
        assert same >= floor * len(chosen), (language, same, len(chosen))
