"""Templates: the built-in wording in every language, and files of the user's."""

from __future__ import annotations

import pytest

from xprobe.errors import UsageError
from xprobe.qa.parallel import XQUAD_LANGUAGES
from xprobe.qa.templates import DEFAULT_TEMPLATE, load_template


def test_the_built_in_template_speaks_every_language():
    template = load_template("auto")
    assert set(template.prompt) == set(template.cue) == set(XQUAD_LANGUAGES)
    assert len(set(template.prompt.values())) == len(XQUAD_LANGUAGES)


def test_pieces_come_in_order_and_make_up_the_prompt():
    pieces = load_template("auto").pieces("de", "KONTEXT", "FRAGE?")
    assert [name for name, _ in pieces] == ["template", "context", "template", "question", "template"]
    text = "".join(part for _, part in pieces)
    assert text.startswith("Lies den Text")
    assert text.endswith("Frage: FRAGE?")


def test_braces_in_a_context_are_left_alone():
    pieces = load_template("plain").pieces("en", "{question} {context} {x}", "{context}")
    assert pieces[1] == ("context", "{question} {context} {x}")
    assert pieces[3] == ("question", "{context}")


def test_a_file_replaces_the_wording(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('format = "plain"\nprompt = "C: {context}\\nQ: {question}"\ncue = "A:"\nseparator = ""\n')
    template = load_template(str(path))
    assert template.format == "plain"
    assert template.pieces("th", "c", "q")[0] == ("template", "C: ")
    assert template.cue_for("th") == "A:"
    assert template.separator_for("th") == ""


def test_a_copy_of_the_built_in_file_is_the_built_in_template(tmp_path):
    path = tmp_path / "copy.toml"
    path.write_bytes(DEFAULT_TEMPLATE.read_bytes())
    assert load_template(str(path)) == load_template("auto")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt = 3", "prompt must be a text"),
        ("", "prompt must be a text"),
        ('prompt = "{question} {context}"', "{context} and then {question}"),
        ('prompt = "{context} {context} {question}"', "{context} and then {question}"),
        ('prompt = "{context} {question}"\nformat = "loud"', "format must be one of"),
        ('prompt = "{context} {question}"\npromt = "x"', "unknown entry 'promt'"),
        ('prompt = "{context} {question}"\nseparator = 1', "separator must be"),
        ("prompt = ", "not valid TOML"),
    ],
)
def test_a_file_that_is_no_template_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(UsageError) as error:
        load_template(str(path))
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(UsageError, match=r"nowhere\.toml"):
        load_template("nowhere.toml")


def test_a_placeholder_that_nothing_replaces_is_named(tmp_path):
    path = tmp_path / "t.toml"
    path.write_text('prompt = "{context} {question} {answer}"\n')
    with pytest.raises(UsageError, match=r"prompt \(en\) holds \{answer\}, which nothing replaces"):
        load_template(str(path))
