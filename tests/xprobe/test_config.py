"""A configuration is checked when it is made, never changes, and survives the way through JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from xprobe.config import DEFAULT_PROBES, DTYPES, SETTINGS, Execution, StudyConfig, split_options
from xprobe.errors import UsageError, XprobeError

FULL = StudyConfig(
    model="somewhere/model",
    data="folder",
    settings=("x-x", "en-x"),
    languages=("en", "zh"),
    limit=7,
    template="plain",
    dtype="bfloat16",
    lens="jacobian:lens.pt",
    strict=True,
    seed=11,
    bootstrap=50,
    permutations=20,
    signals=("readiness",),
    probes=("language",),
)

HOW = Execution(device="cpu", batch_tokens=1, backend="torch", jobs=3, trust_remote_code=True, allow_pickle=True)


def test_the_default_configuration_is_valid() -> None:
    config = StudyConfig()
    assert config.settings == ("en-x",)
    assert config.languages is None
    assert config.limit is None
    assert not Execution().trust_remote_code
    assert not Execution().allow_pickle


def test_a_configuration_never_changes() -> None:
    config = StudyConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        del config.seed
    assert config == StudyConfig()
    assert hash(config) == hash(StudyConfig())


# -- validation -----------------------------------------------------------------------------------------------------

REFUSED = {
    "unknown setting": ({"settings": ("x-en",)}, r"unknown setting 'x-en'; available: en-x, x-x"),
    "one of two settings unknown": ({"settings": ("en-x", "all")}, r"unknown setting 'all'"),
    "no setting": ({"settings": ()}, r"no setting given; available: en-x, x-x"),
    "unknown signal": ({"signals": ("depth",)}, r"unknown signal 'depth'; available: readiness"),
    "no signal": ({"signals": ()}, r"no signal given"),
    "no language": ({"languages": ()}, r"languages is empty: name at least one, or leave it out"),
    "unknown dtype": ({"dtype": "int8"}, r"unknown dtype 'int8'; available: auto, float32, bfloat16"),
    "limit zero": ({"limit": 0}, r"limit must be a whole number of at least 1, got 0; leave it out"),
    "limit negative": ({"limit": -3}, r"limit must be .* got -3"),
    "limit a fraction": ({"limit": 2.5}, r"limit must be .* got 2\.5"),
    "limit a bool": ({"limit": True}, r"limit must be .* got True"),
    "limit a text": ({"limit": "5"}, r"limit must be .* got '5'"),
    "paragraphs zero": (
        {"paragraphs": 0},
        r"^paragraphs must be .* got 0; leave it out for all paragraphs",
    ),
    "paragraphs a bool": ({"paragraphs": True}, r"^paragraphs must be .* got True"),
    "paragraphs a text": ({"paragraphs": "5"}, r"^paragraphs must be .* got '5'"),
    "questions of a paragraph zero": (
        {"questions_per_paragraph": 0},
        r"^questions_per_paragraph must be a whole number of at least 1, got 0; leave it out for all questions",
    ),
    "questions of a paragraph a fraction": (
        {"questions_per_paragraph": 1.5},
        r"^questions_per_paragraph must be .* got 1\.5",
    ),
    "limit and paragraphs": ({"limit": 8, "paragraphs": 2}, r"leave out limit, or leave out paragraphs$"),
    "limit and questions of a paragraph": (
        {"limit": 8, "questions_per_paragraph": 4},
        r"leave out limit, or leave out questions_per_paragraph$",
    ),
    "limit and both": (
        {"limit": 8, "paragraphs": 2, "questions_per_paragraph": 4},
        r"^limit 8 contradicts paragraphs 2 and questions_per_paragraph 4: "
        r"leave out limit, or leave out paragraphs and questions_per_paragraph$",
    ),
    "no draws": ({"bootstrap": 0}, r"bootstrap must be a whole number of at least 1, got 0"),
    "draws a float": ({"bootstrap": 100.0}, r"bootstrap must be .* got 100\.0"),
    "too few permutations": ({"permutations": 19}, r"permutations must be a whole number of at least 20, got 19"),
    "seed negative": ({"seed": -1}, r"seed must be a whole number of at least 0, got -1"),
    "seed a bool": ({"seed": False}, r"seed must be .* got False"),
    "seed missing": ({"seed": None}, r"seed must be .* got None"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_value_is_refused_by_name_and_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        StudyConfig(**options)
    assert isinstance(caught.value, XprobeError)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 0}, "batch_tokens must be a whole number of at least 1, got 0"),
        ({"batch_tokens": True}, "batch_tokens must be .* got True"),
        ({"jobs": 0}, r"jobs must be -1 \(one per core\) or a whole number of at least 1, got 0"),
        ({"jobs": -2}, "jobs must be .* got -2"),
    ],
)
def test_a_wrong_value_of_an_execution_is_refused_by_name_and_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Execution(**options)


def test_options_are_split_and_unknown_ones_are_named() -> None:
    assert split_options({"seed": 3, "device": "cpu", "limit": 2}) == ({"seed": 3, "limit": 2}, {"device": "cpu"})
    with pytest.raises(UsageError, match=r"unknown option 'sed'; known: .*seed"):
        split_options({"sed": 3})
    what, how = ({f.name for f in dataclasses.fields(kind)} for kind in (StudyConfig, Execution))
    assert not what & how


@pytest.mark.parametrize(
    "options",
    [
        {"limit": 1},
        {"paragraphs": 1},
        {"paragraphs": 1, "questions_per_paragraph": 1},
        {"bootstrap": 1},
        {"permutations": 20},
        {"seed": 0},
        {"settings": tuple(SETTINGS)},
    ]
    + [{"dtype": dtype} for dtype in DTYPES],
    ids=str,
)
def test_the_smallest_values_are_accepted(options: dict[str, Any]) -> None:
    config = StudyConfig(**options)
    assert {name: getattr(config, name) for name in options} == options


def test_one_name_stands_for_a_tuple_of_one() -> None:
    config = StudyConfig(settings="x-x", languages="de", signals="readiness")  # type: ignore[arg-type]
    assert (config.settings, config.languages, config.signals) == (("x-x",), ("de",), ("readiness",))


def test_lists_become_tuples_and_repeats_are_dropped_in_order() -> None:
    config = StudyConfig(settings=["x-x", "en-x", "x-x"], languages=["zh", "en", "zh"])  # type: ignore[arg-type]
    assert (config.settings, config.languages) == (("x-x", "en-x"), ("zh", "en"))


# -- to and from plain values ---------------------------------------------------------------------------------------


SPREAD = Execution(device_map={"model.embed_tokens": 0, "model.layers": "cpu", "lm_head": "disk"})


@pytest.mark.parametrize(
    "config", [StudyConfig(), FULL, Execution(), HOW, SPREAD], ids=["default", "full", "execution", "how", "spread"]
)
def test_a_configuration_comes_back_from_json(config: StudyConfig | Execution) -> None:
    values = config.to_dict()
    assert list(values) == [field.name for field in dataclasses.fields(config)]
    assert json.loads(json.dumps(values)) == values
    again = type(config).from_dict(json.loads(json.dumps(values)))
    assert again == config
    assert hash(again) == hash(config)
    assert again.to_dict() == values


def test_every_field_of_the_full_example_differs_from_its_default() -> None:
    same = [f.name for f in dataclasses.fields(StudyConfig) if getattr(FULL, f.name) == getattr(StudyConfig(), f.name)]
    # probes need rows; the last two exclude a limit
    assert set(same) == {"store_rows", "paragraphs", "questions_per_paragraph"}
    same = [f.name for f in dataclasses.fields(Execution) if getattr(HOW, f.name) == getattr(Execution(), f.name)]
    assert set(same) == {"device_map", "tensor_parallel", "stream"}  # they exclude a device


def test_everything_is_computed_by_default() -> None:
    assert StudyConfig().signals == ("readiness", "encoding")
    assert StudyConfig().probes == DEFAULT_PROBES
    without = StudyConfig(store_rows=False)
    assert (without.signals, without.probes) == (("readiness",), ())
    assert StudyConfig(probes=()).probes == ()


def test_probes_that_are_not_known_here_can_be_read() -> None:
    values = {"probes": ["mine", "language"]}
    assert StudyConfig.from_dict(values).probes == ("mine", "language")


def test_missing_entries_take_their_defaults() -> None:
    assert StudyConfig.from_dict({"seed": 4}) == StudyConfig(seed=4)
    assert StudyConfig.from_dict({}) == StudyConfig()


def test_unknown_entries_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"unknown entries \['colour', 'speed'\]; known: .*'seed'"):
        StudyConfig.from_dict({"seed": 1, "speed": 2, "colour": 3})


def test_entries_are_checked_as_arguments_are() -> None:
    with pytest.raises(UsageError, match="limit must be"):
        StudyConfig.from_dict({**StudyConfig().to_dict(), "limit": 0})


def test_changing_the_plain_values_does_not_change_the_configuration() -> None:
    config = StudyConfig(languages=("en", "de"))
    config.to_dict()["languages"].append("zh")
    assert config.languages == ("en", "de")


@pytest.mark.parametrize("name", ["store_rows", "stream", "strict", "trust_remote_code", "allow_pickle"])
@pytest.mark.parametrize("value", ["all", None, 1, []])
def test_switches_are_true_or_false(name, value):
    with pytest.raises(UsageError, match=f"{name} must be True or False"):
        configuration(**{name: value})


@pytest.mark.parametrize("name", ["model", "data", "template", "dtype", "device", "backend"])
@pytest.mark.parametrize("value", [None, 3, b"x", ["a"]])
def test_names_are_text(name, value):
    with pytest.raises(UsageError, match=f"{name} must be text"):
        configuration(**{name: value})


def configuration(**options: Any) -> None:
    study, execution = split_options(options)
    StudyConfig(**study)
    Execution(**execution)
