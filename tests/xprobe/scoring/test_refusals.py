"""Refusals: phrases by which models say that they cannot answer, in twelve languages, and texts that only look so."""

from __future__ import annotations

import unicodedata

import pytest

from xprobe.scoring.error_types import classify, is_refusal

CONTEXT = 'The Panthers defense gave up just 308 points. Nobody said "I don\'t know" in 1908.'
REFUSALS = {
    "en": [
        "I'm sorry, but I can't assist with that.",
        "The text does not provide information about who won.",
        "There is no mention of a king in the passage.",
        "The answer is not given in the text.",
        "I don't know.",
        "The information is not available in the given context.",
        "Cannot be determined from the context.",
        "It is not mentioned.",
        "The question cannot be answered based on the context.",
        "As a language model, I cannot know this.",
    ],
    "de": [
        "Ich weiß es nicht.",
        "Die Frage kann nicht beantwortet werden.",
        "Das wird im Text nicht erwähnt.",
        "Der Text enthält keine Informationen darüber.",
        "Es tut mir leid, aber ich kann diese Frage nicht beantworten.",
        "Als KI-Sprachmodell habe ich keine Meinung.",
        "Dazu gibt es keine Angaben im Text.",
        "Entschuldigung, das kann ich nicht sagen.",
    ],
    "es": [
        "No lo sé.",
        "El texto no proporciona información sobre esto.",
        "Lo siento, pero no puedo responder a esa pregunta.",
        "No se menciona en el texto.",
        "No hay información suficiente.",
        "La pregunta no se puede responder.",
        "Como modelo de lenguaje, no tengo opiniones.",
        "El contexto no lo menciona.",
    ],
    "ro": [
        "Nu știu.",
        "Textul nu oferă informații despre acest lucru.",
        "Îmi pare rău, dar nu pot răspunde.",
        "Nu este menționat în text.",
        "Nu există informații suficiente.",
        "Nu se poate răspunde la întrebare.",
        "Informația nu este disponibilă.",
    ],
    "ru": [
        "Я не знаю.",
        "В тексте не упоминается об этом.",
        "Извините, я не могу ответить на этот вопрос.",
        "В тексте нет информации об этом.",
        "Как языковая модель, я не могу знать.",
        "На этот вопрос невозможно ответить.",
        "Не указано.",
    ],
    "el": [
        "Δεν γνωρίζω.",
        "Δεν ξέρω.",
        "Το κείμενο δεν αναφέρει κάτι τέτοιο.",
        "Λυπάμαι, δεν μπορώ να απαντήσω.",
        "Δεν υπάρχουν πληροφορίες στο κείμενο.",
        "Ως γλωσσικό μοντέλο δεν έχω γνώμη.",
        "Δεν μπορεί να απαντηθεί.",
    ],
    "tr": [
        "Bilmiyorum.",
        "Üzgünüm, bu soruya cevap veremem.",
        "Metinde bu konuda bilgi yok.",
        "Bu soru cevaplanamaz.",
        "Metinde belirtilmemiştir.",
        "Bir yapay zeka olarak fikrim yok.",
        "Bağlamda bundan bahsedilmemektedir.",
    ],
    "vi": [
        "Tôi không biết.",
        "Xin lỗi, tôi không thể trả lời câu hỏi này.",
        "Không được đề cập trong đoạn văn.",
        "Văn bản không cung cấp thông tin về điều này.",
        "Không có thông tin.",
        "Là một mô hình ngôn ngữ, tôi không thể biết.",
        "Đoạn văn không đề cập đến điều này.",
    ],
    "ar": [
        "لا أعرف.",
        "عذراً، لا أستطيع الإجابة على هذا السؤال.",
        "لم يُذكر في النص.",
        "النص لا يذكر ذلك.",
        "لا توجد معلومات كافية.",
        "لا يمكن الإجابة على السؤال.",
        "كنموذج لغوي، لا يمكنني معرفة ذلك.",
        "أنا آسف، لكن لا يمكنني المساعدة.",
    ],
    "hi": [
        "मुझे नहीं पता।",
        "माफ़ कीजिए, मैं इस प्रश्न का उत्तर नहीं दे सकता।",
        "पाठ में इसका उल्लेख नहीं है।",
        "इस बारे में कोई जानकारी नहीं है।",
        "मुझे खेद है, मैं जवाब नहीं दे सकता।",
        "एक एआई के रूप में मेरी कोई राय नहीं है।",
        "संदर्भ में इसका उल्लेख नहीं किया गया है।",
    ],
    "th": [
        "ฉันไม่ทราบ",
        "ขออภัย ฉันไม่สามารถตอบคำถามนี้ได้",
        "ไม่ได้กล่าวถึงในบทความ",
        "ไม่มีข้อมูลเพียงพอ",
        "ไม่มีการกล่าวถึงในข้อความ",
        "ในฐานะโมเดลภาษา ฉันไม่มีความคิดเห็น",
        "ข้อความไม่ได้ระบุ",
    ],
    "zh": [
        "我不知道。",
        "对不起，我无法回答这个问题。",
        "文中没有提到。",
        "上下文中未提供相关信息。",
        "作为一个人工智能语言模型，我没有观点。",
        "文本没有说明。",
        "无法确定。",
        "很抱歉，我不能回答。",
        "作为AI助手，我不能这样做",
    ],
}


@pytest.mark.parametrize("language", REFUSALS)
def test_refusals_are_found_in_every_language_and_form_of_letters(language: str) -> None:
    missed = [text for text in REFUSALS[language] if classify(text, 0.0, language, CONTEXT) != "refusal"]
    assert missed == []
    assert all(is_refusal(unicodedata.normalize("NFD", text), CONTEXT) for text in REFUSALS[language])


@pytest.mark.parametrize(
    "text",
    [
        "I don't know",  # a quotation
        "308 points",
        "They do not mention him by name",
        "Nicht der Text, sondern das Bild",
        "No, el texto de 1908",
        "он не знал",
        "ne biliyorum",
        "không",
        "لا",
        "नहीं",
        "ไม่",
        "不知火市",
    ],
)
def test_other_answers_are_no_refusals(text: str) -> None:
    assert not is_refusal(text, CONTEXT)
