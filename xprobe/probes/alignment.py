"""Alignment: a linear map from the state of a question in one language to the consensus of the other languages."""

from __future__ import annotations

from typing import Any, Self

from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.linear_model import Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted, validate_data

from xprobe.probes.components import PrincipalComponents


class AlignmentProbe(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Ridge map from states to the cross-language consensus: StandardScaler, principal components, Ridge.

    The states are centred per paragraph and language; the consensus is the mean of the other languages' centred states
    (``xprobe.phases.encoding.Paragraph``). Keep whole paragraphs out of the training data: the centred states of one
    paragraph are not independent.

    Parameters
    ----------
    n_components : int
        Most principal components to keep.
    alpha : float
        Ridge penalty per training sample: ``Ridge(alpha * n)``.
    random_state : int, optional
        Of the randomised principal components.

    Attributes
    ----------
    pipeline_ : Pipeline
        StandardScaler, PrincipalComponents, Ridge.
    n_components_ : int
        Number of components that were kept.

    Examples
    --------
    >>> import numpy as np
    >>> states = np.random.default_rng(0).normal(size=(100, 3))
    >>> consensus = states @ np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    >>> probe = AlignmentProbe(alpha=1e-6).fit(states[:80], consensus[:80])
    >>> probe.n_components_, bool(np.allclose(probe.predict(states[80:]), consensus[80:], atol=1e-3))
    (3, True)
    """

    def __init__(self, n_components: int = 128, alpha: float = 0.1, random_state: int | None = None) -> None:
        self.n_components = n_components
        self.alpha = alpha
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Learns the map from states X [n, d] to the consensus y, [n, d'] or [n]."""
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, ensure_min_samples=2)
        components = PrincipalComponents(self.n_components, self.random_state)
        ridge = Ridge(self.alpha * X.shape[0], solver="svd")
        self.pipeline_: Pipeline = make_pipeline(StandardScaler(), components, ridge).fit(X, y)
        self.n_components_ = components.n_components_
        return self

    def predict(self, X: Any) -> Any:
        """The predicted consensus, of the shape of y in ``fit``."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False)
        return self.pipeline_.predict(X)
