"""Classifying probes: which language a question is in, and whether its answer will be right."""

from __future__ import annotations

import sklearn
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from xprobe.probes.components import LanguageCenterer, PrincipalComponents


def preprocessing(n_components: int = 128, random_state: int | None = None) -> Pipeline:
    """The beginning of the classifying probes: StandardScaler, then at most ``n_components`` principal components.

    Examples
    --------
    >>> list(preprocessing().named_steps)
    ['standardscaler', 'principalcomponents']
    """
    return make_pipeline(StandardScaler(), PrincipalComponents(n_components, random_state))


def classifier(C: float = 1.0) -> LogisticRegression:
    """The last step of the classifying probes: multinomial logistic regression with the inverse penalty C.

    Examples
    --------
    >>> classifier(C=0.5).C
    0.5
    """
    return LogisticRegression(C=C, max_iter=1000)


def language_probe(n_components: int = 128, C: float = 1.0, random_state: int | None = None) -> Pipeline:
    """Which language is the question in? Fitted on states [n, d] and language names [n].

    Examples
    --------
    >>> import numpy as np
    >>> states, languages = np.array([[0.0, 0.1], [0.1, 0.0], [5.0, 0.1], [5.1, 0.0]]), ["en", "en", "th", "th"]
    >>> language_probe().fit(states, languages).predict([[4.9, 0.0]]).tolist()
    ['th']
    """
    return Pipeline([*preprocessing(n_components, random_state).steps, ("classifier", classifier(C))])


def correctness_probe(n_components: int = 128, C: float = 1.0, random_state: int | None = None) -> Pipeline:
    """Will the first answer token be on top at the last layer? Fitted on states [n, d] and booleans [n].

    The mean of each language is subtracted, so that it is not enough to know the language. Call ``fit`` and
    ``predict_proba`` with ``languages=`` [n], inside ``sklearn.config_context(enable_metadata_routing=True)``.

    Examples
    --------
    English states lie far from Thai ones. In both, the answer is right where the second number is large:

    >>> import numpy as np
    >>> states = np.array([[90.0, 1.0], [90.0, 0.0], [0.0, 1.0], [0.0, 0.0]] * 3)
    >>> right, languages = np.array([True, False] * 6), np.array(["en", "en", "th", "th"] * 3)
    >>> with sklearn.config_context(enable_metadata_routing=True):
    ...     probe = correctness_probe().fit(states, right, languages=languages)
    ...     probe.predict(states[:4], languages=languages[:4]).tolist()
    [True, False, True, False]
    """
    centerer = LanguageCenterer()
    with sklearn.config_context(enable_metadata_routing=True):
        centerer.set_fit_request(languages=True).set_transform_request(languages=True)
    steps = preprocessing(n_components, random_state).steps
    return Pipeline([*steps, ("languages", centerer), ("classifier", classifier(C))])
