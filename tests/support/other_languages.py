"""A small parallel set in languages that XQuAD does not have: Finnish, Japanese, Swahili, Yoruba, and English."""

from __future__ import annotations

import json
from pathlib import Path

LANGUAGES = ("en", "fi", "ja", "sw", "yo")

# language -> (context, (question, answer), (question, answer)) for each paragraph
TEXTS: dict[str, list[tuple[str, tuple[str, str], tuple[str, str]]]] = {
    "en": [
        ("Anna built a red house in 1998.", ("Who built the house?", "Anna"), ("When was the house built?", "1998")),
        ("The river Nile flows through Egypt.", ("Which river flows through Egypt?", "Nile"),
         ("Through which country does the Nile flow?", "Egypt")),
        ("Peter bought three boats in Helsinki.", ("How many boats did Peter buy?", "three"),
         ("Where did Peter buy the boats?", "Helsinki")),
    ],
    "fi": [
        ("Anna rakensi punaisen talon vuonna 1998.", ("Kuka rakensi talon?", "Anna"),
         ("Milloin talo rakennettiin?", "1998")),
        ("Niili virtaa Egyptin läpi.", ("Mikä joki virtaa Egyptin läpi?", "Niili"),
         ("Minkä maan läpi Niili virtaa?", "Egyptin")),
        ("Peter osti kolme venettä Helsingissä.", ("Kuinka monta venettä Peter osti?", "kolme"),
         ("Missä Peter osti veneet?", "Helsingissä")),
    ],
    "ja": [
        ("アンナは1998年に赤い家を建てた。", ("誰が家を建てましたか。", "アンナ"),
         ("家はいつ建てられましたか。", "1998年")),
        ("ナイル川はエジプトを流れている。", ("どの川がエジプトを流れていますか。", "ナイル川"),
         ("ナイル川はどの国を流れていますか。", "エジプト")),
        ("ピーターはヘルシンキで三隻の船を買った。", ("ピーターは船を何隻買いましたか。", "三隻"),
         ("ピーターはどこで船を買いましたか。", "ヘルシンキ")),
    ],
    "sw": [
        ("Anna alijenga nyumba nyekundu mwaka 1998.", ("Nani alijenga nyumba?", "Anna"),
         ("Nyumba ilijengwa lini?", "1998")),
        ("Mto Nile unapita nchini Misri.", ("Mto gani unapita nchini Misri?", "Nile"),
         ("Mto Nile unapita katika nchi gani?", "Misri")),
        ("Peter alinunua mashua tatu huko Helsinki.", ("Peter alinunua mashua ngapi?", "tatu"),
         ("Peter alinunua mashua wapi?", "Helsinki")),
    ],
    "yo": [
        ("Anna kọ́ ilé pupa ní ọdún 1998.", ("Ta ni ó kọ́ ilé náà?", "Anna"), ("Nígbà wo ni wọ́n kọ́ ilé náà?", "1998")),
        ("Odò Náílì ń ṣàn gba ilẹ̀ Íjíbítì.", ("Odò wo ni ó ń ṣàn gba ilẹ̀ Íjíbítì?", "Náílì"),
         ("Orílẹ̀-èdè wo ni odò Náílì ń ṣàn gbà?", "Íjíbítì")),
        ("Peter ra ọkọ̀ ojú omi mẹ́ta ní Helsinki.", ("Ọkọ̀ ojú omi mélòó ni Peter rà?", "mẹ́ta"),
         ("Níbo ni Peter ti ra àwọn ọkọ̀ náà?", "Helsinki")),
    ],
}  # fmt: skip


def write_other_languages(folder: Path) -> Path:
    """Writes ``own.<lang>.json`` for every language, and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for language, paragraphs in TEXTS.items():
        rows = [
            {"id": f"p{number}q{index}", "context": context, "question": question,
             "answers": {"text": [answer], "answer_start": [context.index(answer)]}}
            for number, (context, *asked) in enumerate(paragraphs)
            for index, (question, answer) in enumerate(asked)
        ]  # fmt: skip
        (folder / f"own.{language}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return folder
