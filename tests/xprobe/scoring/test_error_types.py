"""Error types: each rule applies where it should, in its order, and not elsewhere."""

from __future__ import annotations

import pytest

from xprobe.scoring.error_types import ERROR_TYPES, classify, is_gibberish, is_wrong_language
from xprobe.scoring.languages import identify
from xprobe.scoring.letters import main_script

CONTEXT = (
    "The Panthers defense gave up just 308 points, ranking sixth in the league, while also leading the NFL in "
    "interceptions with 24 and boasting four Pro Bowl selections. Kawann Short led the team in sacks with 11."
)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("", "blank"),
        (" ... \n", "blank"),
        ("\ufffd\ufffd", "blank"),
        ("I cannot answer this question.", "refusal"),
        ("I’m sorry, but as an AI language model I have no opinion.", "refusal"),
        ("The provided text does not mention how many points.", "refusal"),
        ("Der Text enthält dazu leider keine Angaben.", "refusal"),
        ("Lo siento, no puedo responder.", "refusal"),
        ("Textul nu menționează acest lucru.", "refusal"),
        ("В тексте не указано, сколько очков.", "refusal"),
        ("Δεν αναφέρεται στο κείμενο.", "refusal"),
        ("Metinde bu bilgi belirtilmemiş.", "refusal"),
        ("Xin lỗi, không có thông tin về điều này.", "refusal"),
        ("لا يمكنني الإجابة على هذا السؤال", "refusal"),
        ("इस प्रश्न का उत्तर नहीं दे सकता", "refusal"),
        ("ขออภัย ไม่มีข้อมูล", "refusal"),
        ("抱歉，文中没有提到。", "refusal"),
        ("Die Verteidigung der Panther ließ nur wenige Punkte zu", "wrong language"),
        ("黑豹队的防守", "wrong language"),
        ("Защита Пантер", "wrong language"),
        ("in der Stadt, die unter der alten Ordnung stand", "wrong language"),
        ("¿Cuántos puntos cedió la defensa de los Panthers?", "wrong language"),
        ("the the the the the the the the the the", "gibberish"),
        ("(C) (D) (L) (R) (S) (T) (B) (C) (D) (R", "gibberish"),
        ("aaaaaaaaaaaaaaaa", "gibberish"),
        ("team in sacks team in sacks team in sacks team in sacks", "gibberish"),
        ("308      points", "content"),
        ("24", "content"),
        ("Kawann Short", "content"),
        ("The Panthers offense scored the most points in the league.", "content"),
        ("Saint-Jean-Cap-Ferrat", "content"),
    ],
)
def test_the_first_rule_that_applies_counts(answer: str, kind: str) -> None:
    assert classify(answer, 0.0, "en", CONTEXT) == kind
    assert classify(answer, 0.5, "en", CONTEXT) == "correct"
    assert classify(answer, 0.5, "en", CONTEXT, threshold=0.6) == kind


@pytest.mark.parametrize(
    ("answer", "language", "context"),
    [
        ("Denver Broncos", "th", "เดนเวอร์ บรองโกส์"),  # a name in Latin letters
        ("308", "zh", "黑豹队"),
        ("Pro Bowl", "ru", "игроки Pro Bowl"),
        ("la République française a été proclamée", "en", "They shouted: la République française a été proclamée!"),
        ("防守", "zh", "黑豹队的防守"),
        ("Universidad Nacional Autónoma de México", "en", "It was founded in 1910."),
        ("some text in a language that nobody has heard of", "xx", "?"),
        ("กรุงเทพมหานคร", "th", "เมืองหลวง"),
    ],
)
def test_names_numbers_and_quotations_are_of_no_wrong_language(answer: str, language: str, context: str) -> None:
    assert not is_wrong_language(answer, language, context)


@pytest.mark.parametrize("answer", ["1975-1979", "A B C", "Ha Noi", "x86_64", "2-3 (2000)", "กกก", "คณะกรรมการ"])
def test_short_answers_are_no_gibberish(answer: str) -> None:
    assert not is_gibberish(answer)


@pytest.mark.parametrize(
    ("answer", "language", "context"),
    [
        ("The Panthers defense gave up few points", "zh-TW", "黑豹队的防守只丢了308分"),
        ("黑豹队的防守只丢了308分", "de", "Die Panther-Verteidigung gab 308 Punkte ab"),
        ("la defensa cedió muchos puntos", "ro", "Apărarea a cedat 308 puncte"),
        ("ทีมแพนเทอร์เสียแต้ม Super Bowl 50", "en", "Super Bowl 50 was played in 2016"),
        ("टीम के रक्षकों ने अंक दिए", "ar", "تخلى الدفاع عن 308 نقطة"),
    ],
)
def test_sentences_of_another_language_are_found(answer: str, language: str, context: str) -> None:
    assert is_wrong_language(answer, language, context)


def test_hindi_and_thai_sentences_are_no_gibberish() -> None:
    assert not is_gibberish("प्रतिनिधित्व करने वाले कलाकार विलियम ब्लेक, जेम्स बैरी, हेनरी फुसेली और सर एडविन हैं")
    assert not is_gibberish("ทีมแพนเทอร์เสียแต้มไปเพียง 308 แต้มในฤดูกาลนี้ และอยู่ในอันดับที่หกของลีก")
    assert is_gibberish("การแข่งวิ่ง" * 5)
    assert is_gibberish("हिन्दी " * 10)


def test_a_language_is_sought_among_those_asked_about() -> None:
    assert identify("la ciudad", among=("en", "es")).language == "es"
    assert identify("la ciudad", among=("es", "en")) == identify("la ciudad", among=("en", "es"))
    assert identify("la ciudad", among=("es",)).confidence == 1
    assert identify("la ciudad", among=("xx",)).language == ""
    assert identify("308").confidence == 0


def test_languages_of_whole_sentences_are_named() -> None:
    sentences = {
        "ar": "كم عدد النقاط التي تخلى عنها دفاع الفريق؟", "de": "Wie viele Punkte gab die Verteidigung ab?",
        "el": "Πόσους πόντους παραχώρησε η άμυνα;", "en": "How many points did the defense surrender?",
        "es": "¿Cuántos puntos cedió la defensa del equipo?", "hi": "टीम के रक्षकों ने कितने अंक दिए थे?",
        "ro": "Câte puncte a cedat apărarea echipei?", "ru": "Сколько очков уступила защита команды?",
        "th": "ทีมแพนเทอร์เสียแต้มไปเท่าไรในฤดูกาลนี้", "tr": "Takımın savunması kaç sayı bırakmıştır?",
        "vi": "Hàng phòng ngự đã để mất bao nhiêu điểm?", "zh": "黑豹队的防守丢了多少分？",
    }  # fmt: skip
    assert {identify(sentence).language for sentence in sentences.values()} == set(sentences)
    assert all(identify(sentence).language == language for language, sentence in sentences.items())
    assert main_script("") == ""
    assert not identify("ok").certain


def test_every_type_has_a_description() -> None:
    assert list(ERROR_TYPES) == ["correct", "blank", "refusal", "wrong language", "gibberish", "content"]
    assert all(ERROR_TYPES.values())
