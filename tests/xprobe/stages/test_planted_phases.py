"""Planted phases: the whole pipeline, from a saved model to the tables, recovers boundaries that are known exactly."""

from __future__ import annotations

import krippendorff
import numpy as np
import pytest
from support.planted import DECOYS, N_BLOCKS, planted_model, planted_set, planted_template
from support.runs import parity

import xprobe

ONSET = {"en": 4, "de": 4, "zh": 7}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    return xprobe.run(
        str(planted_model(folder / "model", ONSET)),
        data=str(planted_set(folder / "data", list(ONSET))),
        setting="x-x",
        template=str(planted_template(folder, list(ONSET))),
        out=folder / "run",
    )


def test_every_onset_is_recovered_exactly(study):
    found = study.examples.groupby("language")["onset"].unique()
    assert {language: values.tolist() for language, values in found.items()} == {k: [v] for k, v in ONSET.items()}
    assert study.examples["sharpness"].min() == pytest.approx(1.0, abs=1e-9)
    assert study.examples["phased"].all()


def test_readiness_and_rank_have_their_closed_form(study):
    layers = study.layers.set_index(["signal", "language", "layer"])["value"]
    vocabulary = study.manifest.model.vocab_size
    before = 1 - np.log2(1 + len(DECOYS)) / np.log2(vocabulary)
    for language, onset in ONSET.items():
        for layer in range(N_BLOCKS + 1):
            wanted = before if layer < onset else 1.0
            assert layers["readiness", language, layer] == pytest.approx(wanted)
            assert layers["rank", language, layer] == (1 if layer >= onset else 1 + len(DECOYS))


def test_layer_stability_counts_the_languages_that_agree(study):
    # between layers 4 and 7 two of three languages are in phase 2: A = 1 - 2 * 3 * (2/3) * (1/3) / 2 = 1/3
    wanted = [1 / 3 if 4 <= layer < 7 else 1.0 for layer in range(N_BLOCKS + 1)]
    assert study.stability["stability"].tolist() == pytest.approx(wanted)
    assert study.stability["phase"].tolist() == [1] * 4 + [2] * 7


def test_boundary_and_alpha_agree_with_their_definitions(study):
    assert study.boundary == {"value": 4.0, "lo": 4.0, "hi": 4.0}
    ratings = study.examples.pivot(index="language", columns="question_id", values="onset").to_numpy()
    wanted = krippendorff.alpha(reliability_data=ratings, level_of_measurement="interval")
    assert study.alpha["value"] == pytest.approx(wanted, abs=1e-9)


def test_agreement_with_english_is_per_language(study):
    layers = study.layers[study.layers["signal"] == "agreement_en"].set_index(["language", "layer"])["value"]
    assert (layers["de"] == 1).all()
    assert [layers["zh", layer] for layer in range(N_BLOCKS + 1)] == [0.0 if 4 <= at < 7 else 1.0 for at in range(11)]


def test_parity_holds(study):
    assert parity(study) < 1e-5


@pytest.mark.parametrize("onset", [2, 5, N_BLOCKS - 1])
def test_any_onset_is_recovered(tmp_path, onset):
    study = xprobe.run(
        str(planted_model(tmp_path / "model", {"en": onset, "de": onset})),
        data=str(planted_set(tmp_path / "data", ["en", "de"], paragraphs=2, questions=1)),
        setting="x-x",
        template=str(planted_template(tmp_path, ["en", "de"])),
        out=tmp_path / "run",
    )
    assert study.examples["onset"].tolist() == [onset] * 4
    assert study.boundary["value"] == onset
    assert study.alpha["value"] is None  # onsets that do not differ leave nothing to correct for chance
    assert study.stability["stability"].tolist() == [1.0] * (N_BLOCKS + 1)


@pytest.mark.parametrize("encoded", [3, 6])
def test_the_layer_where_the_question_is_known_is_recovered_exactly(tmp_path, encoded):
    """Below it the last prompt token is the same for all questions on a paragraph, from it on none is mistaken."""
    study = xprobe.run(
        str(planted_model(tmp_path / "model", ONSET, encoded)),
        data=str(planted_set(tmp_path / "data", list(ONSET))),
        setting="x-x",
        template=str(planted_template(tmp_path, list(ONSET))),
        out=tmp_path / "run",
    )
    table = study.stability
    tied = 1 - np.log2(2) / np.log2(3)  # the middle one of three
    layers = np.arange(N_BLOCKS + 1)
    assert np.allclose(table["encoding"], np.where(layers < encoded, tied, 1.0))
    assert np.allclose(table["encoding_selectivity"][:encoded], 0)
    assert (table["encoding_selectivity"][encoded:] > 0.5).all()  # wrong ones tie in part, so chance is about 0.45
    assert np.allclose(table["encoding_probed"][encoded:], 1.0)
    assert np.allclose(table["encoding_question"], 1.0)  # its own words tell it apart
    results = study["x-x"].summary
    assert results["encoding_depth"] == {"value": encoded, "lo": encoded, "hi": encoded}
    assert results["encoding_peak"]["value"] == encoded
    holds = {language: float(encoded < onset) for language, onset in ONSET.items()}
    found = study["x-x"].boundaries["phase_order"].to_dict()
    assert found == holds
