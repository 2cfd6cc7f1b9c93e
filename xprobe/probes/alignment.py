"""Alignment: a linear map from a question's state in one language to what the other languages agree on."""

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

    The states are centred per paragraph and language, the consensus is the mean of the other languages' centred states
    (``xprobe.phases.encoding.Paragraph``). Split by paragraph, or it is told the answers.

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
    n_components_ : int
        Components that were kept.
    """

    def __init__(self, n_components: int = 128, alpha: float = 0.1, random_state: int | None = None) -> None:
        self.n_components = n_components
        self.alpha = alpha
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Learns the map from states X [n, d] to consensus y [n, d'] (or [n])."""
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, ensure_min_samples=2)
        front = PrincipalComponents(self.n_components, self.random_state)
        penalty = Ridge(self.alpha * X.shape[0], solver="svd")
        self.pipeline_: Pipeline = make_pipeline(StandardScaler(), front, penalty).fit(X, y)
        self.n_components_ = front.n_components_
        return self

    def predict(self, X: Any) -> Any:
        """Predicted consensus [n, d']."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False)
        return self.pipeline_.predict(X)
