"""Scripts of tokens: every token of every kind of tokenizer has exactly one of a closed list."""

from __future__ import annotations

import pytest
from support.families import tiny_tokenizer

from xprobe.scoring.scripts import SCRIPTS, text_script, token_script


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Berlin", "latin"),
        (" Việt", "latin"),
        ("ｗｉｄｅ", "latin"),
        ("Αθήνα", "greek"),
        ("Москва", "cyrillic"),
        ("ירושלים", "hebrew"),
        ("القاهرة", "arabic"),
        ("दिल्ली", "devanagari"),
        ("\N{DEVANAGARI SIGN VIRAMA}", "devanagari"),
        ("কলকাতা", "bengali"),
        ("சென்னை", "tamil"),
        ("తెలుగు", "telugu"),
        ("กรุงเทพ", "thai"),
        ("\N{THAI CHARACTER MAI EK}", "thai"),
        ("北京", "han"),
        ("々", "han"),
        ("さくら", "kana"),
        ("サクラ", "kana"),
        ("ｻｸﾗ", "kana"),
        ("서울", "hangul"),
        ("თბილისი", "other"),
        ("አዲስ", "other"),
        ("Ада Lo", "cyrillic"),
        (" 1998", "none"),
        ("...", "none"),
        ("", "none"),
        ("\N{COMBINING ACUTE ACCENT}", "none"),
        ("\ufffd", "undecodable"),
        ("\ufffd\ufffd", "undecodable"),
        ("é\ufffd", "latin"),
    ],
)
def test_a_text_has_the_script_of_its_letters(text: str, script: str) -> None:
    assert text_script(text) == script


@pytest.mark.parametrize("kind", ["byte_bpe", "byte_bpe_large", "metaspace_bpe", "unigram", "words"])
def test_every_token_has_a_script(kind: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    found = {token: token_script(tokenizer, token) for token in range(len(tokenizer) + 3)}  # heads may be padded
    assert set(found.values()) <= set(SCRIPTS)
    assert {found[token] for token in tokenizer.all_special_ids} == {"special"}
    assert [found[len(tokenizer) + extra] for extra in range(3)] == ["none"] * 3
    vocabulary = tokenizer.get_vocab()
    for piece, script in (("th", "latin"), ("และ", "thai"), ("в", "cyrillic"), ("的", "han")):
        for spelling in (piece, f"▁{piece}"):
            if spelling in vocabulary and found[vocabulary[spelling]] != "special":
                assert found[vocabulary[spelling]] == script
    assert "latin" in found.values()
    assert ("undecodable" in found.values()) == (kind in ("byte_bpe", "byte_bpe_large", "metaspace_bpe"))
