"""Classifying probes: which language a question is in, and whether its answer will be right."""

from __future__ import annotations

import sklearn
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from xprobe.probes.components import LanguageCenterer, PrincipalComponents


def front(n_components: int = 128, random_state: int | None = None) -> Pipeline:
    """What the classifying probes begin with: StandardScaler, then at most ``n_components`` principal components."""
    return make_pipeline(StandardScaler(), PrincipalComponents(n_components, random_state))


def classifier(C: float = 1.0) -> LogisticRegression:
    """Multinomial logistic regression, the last step of both."""
    return LogisticRegression(C=C, max_iter=1000)


def language_probe(n_components: int = 128, C: float = 1.0, random_state: int | None = None) -> Pipeline:
    """Which language is the question in? Fitted on states [n, d] and language names [n]."""
    return Pipeline([*front(n_components, random_state).steps, ("classifier", classifier(C))])


def correctness_probe(n_components: int = 128, C: float = 1.0, random_state: int | None = None) -> Pipeline:
    """Will the first answer token be on top at the last layer? Fitted on states [n, d] and booleans [n].

    Each language's mean is taken out, so that knowing the language is not enough: call ``fit`` and ``predict_proba``
    with ``languages=`` [n], inside ``sklearn.config_context(enable_metadata_routing=True)``.
    """
    centre = LanguageCenterer()
    with sklearn.config_context(enable_metadata_routing=True):
        centre.set_fit_request(languages=True).set_transform_request(languages=True)
    steps = front(n_components, random_state).steps
    return Pipeline([*steps, ("languages", centre), ("classifier", classifier(C))])
