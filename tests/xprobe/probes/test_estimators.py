"""The parts of the probes pass the checks of scikit-learn for estimators, and compute what their names promise."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from xprobe.phases.segmentation import PhaseSegmenter, segment
from xprobe.probes.alignment import AlignmentProbe
from xprobe.probes.classification import correctness_probe, language_probe
from xprobe.probes.components import LanguageCenterer, PrincipalComponents

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(60, 9)) * np.arange(1, 10)
LANGUAGES = np.array(["en", "de", "th"] * 20)


# pipelines are left out: scikit-learn's own fits its steps in place, which one of the checks forbids
@parametrize_with_checks([PrincipalComponents(), LanguageCenterer(), AlignmentProbe(), PhaseSegmenter()])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_components_are_those_of_pca_and_as_many_as_the_data_allow():
    ours = PrincipalComponents(4).fit(X)
    assert np.allclose(ours.transform(X), PCA(4).fit_transform(X))
    assert PrincipalComponents(128).fit(X).n_components_ == 9
    assert PrincipalComponents(128).fit(X[:5]).n_components_ == 4
    with pytest.raises(ValueError, match="n_components must be a whole number of at least 1, got 0"):
        PrincipalComponents(0).fit(X)


def test_states_that_are_all_equal_have_components_without_warnings(recwarn):
    same = np.ones((8, 5))
    assert np.allclose(PrincipalComponents().fit_transform(same), 0)
    assert not recwarn.list


def test_languages_are_centred_by_the_training_samples_alone():
    centre = LanguageCenterer().fit(X[:30], languages=LANGUAGES[:30])
    wanted = X[30:].copy()
    for language in ("en", "de", "th"):
        wanted[LANGUAGES[30:] == language] -= X[:30][LANGUAGES[:30] == language].mean(0)
    assert np.allclose(centre.transform(X[30:], languages=LANGUAGES[30:]), wanted)
    unseen = np.full(5, "fi")
    assert np.allclose(centre.transform(X[:5], languages=unseen), X[:5] - X[:30].mean(0))
    with pytest.raises(ValueError, match="one language for each of 5 samples"):
        centre.transform(X[:5], languages=LANGUAGES)


def test_the_alignment_probe_is_scaler_components_and_ridge_written_by_hand():
    y = X @ GENERATOR.normal(size=(9, 6)) + GENERATOR.normal(size=(60, 6))
    probe = AlignmentProbe(n_components=5, alpha=0.2).fit(X[:40], y[:40])
    scaler, pca, ridge = StandardScaler(), PCA(5), Ridge(0.2 * 40)
    ridge.fit(pca.fit_transform(scaler.fit_transform(X[:40])), y[:40])
    assert np.allclose(probe.predict(X[40:]), ridge.predict(pca.transform(scaler.transform(X[40:]))))


def test_the_correctness_probe_gains_nothing_from_the_language():
    """Languages lie far apart and differ in their rate of right answers: without centring that is all there is."""
    generator = np.random.default_rng(3)
    languages = np.array(["en", "th"] * 200)
    states = generator.normal(size=(400, 6))
    states[languages == "en", 0] += 50
    right = generator.random(400) < np.where(languages == "en", 0.9, 0.1)
    with sklearn.config_context(enable_metadata_routing=True):
        probe = correctness_probe().fit(states[:200], right[:200], languages=languages[:200])
        score = probe.decision_function(states[200:], languages=languages[200:])
    seen = np.corrcoef(score, languages[200:] == "en")[0, 1]
    assert abs(seen) < 0.2
    plain = language_probe().fit(states[:200], right[:200])
    assert plain.score(states[200:], right[200:]) > 0.8


def test_the_segmenter_gives_the_results_of_the_function():
    curves = np.where(np.arange(12) < 5, 0.2, 0.9) + GENERATOR.normal(scale=0.01, size=(7, 12))
    curves[3, 2] = np.nan
    segmenter = PhaseSegmenter(permutations=50, random_state=4)
    table = segmenter.fit_transform(curves)
    wanted = segment(curves, 50, 4)
    for column, name in enumerate(segmenter.get_feature_names_out()):
        assert np.array_equal(table[:, column], getattr(wanted, name).astype(float), equal_nan=True)
        assert np.array_equal(getattr(segmenter, f"{name}_"), getattr(wanted, name), equal_nan=True)
    assert np.isnan(table[3, 0])
    assert table[0, 0] == 5
    for name, value in (("permutations", 3), ("level", 1.5)):
        with pytest.raises(ValueError, match=name):
            PhaseSegmenter(**{name: value}).fit(curves)
